"""Batches of conversations, preferences and rankings: batch k is a pure function of (config, rows, k).

Groups are packed once, whole, by best fit. Every epoch has a new random order of rows.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from ml_collections import ConfigDict

from llmjax.data.packing import best_fit, learnt_places, most_places, packed, packed_trees, size_of, text_of, tree_size
from llmjax.data.source import Batch
from llmjax.post.rows import Store

SHUFFLE_ROUNDS = 4  # of grain's block cipher; the fewest it allows
COMPARING = (
    "preference",
    "unpaired",
    "reward",
    "classify",
)  # objectives whose rows hold answers with numbers of their own
AT_PLACES = ("causal", "preference", "unpaired")  # objectives whose losses read the logits of learnt places alone


@dataclass(frozen=True)
class Rows:
    """The rows of a split: the groups in each row, and the largest number of answers in a row."""

    store: Store
    groups: list[list[int]]
    length: int
    answers: int
    reference: np.ndarray | None = None  # summed log-probabilities of each example by the reference model
    filled: int = 0  # positions with a token, of all rows
    learnt: int = 0  # places of a row for which logits are computed; 0: for all

    @property
    def pairs(self) -> int:
        return len(self.store.ranks) // 2

    def examples(self, number: int) -> list[int]:
        """The examples of a row; none for a row of padding."""
        groups = self.groups[number] if number < len(self.groups) else []
        return [e for g in groups for e in range(self.store.first[g], self.store.first[g + 1])]

    @cached_property
    def chosen_tokens(self) -> int:
        """The number of learnt tokens in all chosen answers."""
        learnt = np.add.reduceat(self.store.weights > 0, self.store.start[:-1])
        return int(learnt[::2].sum())

    @property
    def padding(self) -> float:
        """The share of positions without a token."""
        return 1 - self.filled / (len(self.groups) * self.length)


def rows_of(store: Store, c: ConfigDict, *, reference: np.ndarray | None = None) -> Rows:
    """The groups packed into rows of `train.sequence_length`; without `data.pack`, one group a row."""
    length = c.train.sequence_length
    sizes = np.add.reduceat(store.sizes - 1, store.first[:-1]) if len(store) else np.zeros(0, np.int64)
    if c.data.share_prompts:
        sizes = np.array([tree_size([*map(text_of, store.examples(g))]) for g in range(len(store))], np.int64)
    groups = best_fit(sizes.tolist(), length=length) if c.data.pack else [[g] for g in range(len(store))]
    counts = np.diff(store.first)
    answers = max((int(counts[row].sum()) for row in groups), default=0)
    learnt = 0
    if len(store) and c.objective.name in AT_PLACES:
        tokens = np.add.reduceat(np.add.reduceat(store.weights > 0, store.start[:-1], dtype=np.int64), store.first[:-1])
        learnt = most_places(max(int(tokens[row].sum()) for row in groups), length)
    return Rows(store, groups, length, answers, reference, filled=int(sizes.sum()), learnt=learnt)


def row(rows: Rows, number: int, c: ConfigDict) -> Batch:
    """One row as the objective of `c` reads it, without the batch dimension. `number` beyond the last: a row of padding."""
    numbers = rows.examples(number)
    if c.data.share_prompts:
        trees = [[*map(text_of, rows.store.examples(g))] for g in (rows.groups[number] if numbers else [])]
        made, _ = packed_trees(trees, length=rows.length)
    else:
        made = packed([rows.store.example(e) for e in numbers], length=rows.length)
    if rows.learnt:
        made["places"] = learnt_places(made["weights"], rows.learnt)
    if c.objective.name not in COMPARING:
        return made
    a, room = len(numbers), rows.answers

    def spread(values: Sequence[float] | np.ndarray) -> np.ndarray:
        return np.pad(np.asarray(values, np.float32), (0, room - a))

    made["exists"] = spread(np.ones(a))
    if rows.reference is not None:
        made["reference"] = spread(rows.reference[numbers])
    ends = np.cumsum([size_of(rows.store.example(e)) for e in numbers], dtype=np.int32)
    if c.objective.name == "classify":
        first = c.model.direction == "bidirectional"  # where such a text is read
        made["place"] = np.pad(np.r_[np.int32(0), ends[:-1]] if first and a else ends - 1, (0, room - a))
        made["labels"] = spread(rows.store.labels[rows.groups[number] if numbers else []])
        texts = made.pop("weights")
        if c.model.types > 1:
            made["types"] = texts.astype(np.int32)
        del made["targets"]
    elif c.objective.name == "reward":
        groups = rows.groups[number] if numbers else []
        sizes = [int(rows.store.first[g + 1] - rows.store.first[g]) for g in groups]
        made["last"] = np.pad(ends - 1, (0, room - a))
        made["groups"] = np.pad(np.repeat(np.arange(len(groups), dtype=np.int32), sizes), (0, room - a))
        made["ranks"], made["margins"] = spread(rows.store.ranks[numbers]), spread(_margins(rows.store, groups))
    else:
        made["pair_weights"] = made.pop("exists")[::2]
        if c.objective.name == "unpaired":
            groups = rows.groups[number] if numbers else []
            made["good"] = np.pad(rows.store.labels[groups], (0, room // 2 - len(groups)))
            return made
        made["token_share"] = np.array(rows.pairs / max(rows.chosen_tokens, 1), np.float32)
        if c.objective.preference.length_weight < 1:
            weigh_length(made, a, c.objective.preference.length_weight)
    return made


def _margins(store: Store, groups: Sequence[int]) -> list[float]:
    """The margin of the group for its best answer, and 0 for the others."""
    found: list[float] = []
    for g in groups:
        ranks = store.ranks[store.first[g] : store.first[g + 1]]
        found += [float(store.margins[g]) if rank == ranks.min() else 0.0 for rank in ranks]
    return found


def weigh_length(row: Batch, answers: int, weight: float) -> None:
    """Add `length_weights`, smaller for tokens of a pair's longer answer beyond the shorter one's length (LD-DPO, Liu et
    al. 2024)."""
    row["length_weights"] = np.ones(row["weights"].shape, np.float32)
    for first in range(1, answers + 1, 2):
        numbers = row.get("answers", row["segments"])
        sides = [np.flatnonzero((numbers == s) & (row["weights"] > 0)) for s in (first, first + 1)]
        shared = min(map(len, sides))
        for places in sides:
            row["length_weights"][places[shared:]] = weight


def batches_of(rows: Rows, c: ConfigDict, *, host: int = 0, hosts: int = 1) -> Callable[[int], Batch]:
    """Batch number -> this host's rows of it. Epochs follow one another, each in its own order."""
    from grain.experimental import index_shuffle  # it imports jax, which reading rows does without

    count, size = len(rows.groups), c.train.batch_size

    def place(index: int) -> int:
        epoch, at = divmod(index, count)
        seed = int.from_bytes(hashlib.blake2b(f"{c.seed} rows {epoch}".encode(), digest_size=4).digest())
        return index_shuffle(index=at, max_index=count - 1, seed=seed, rounds=SHUFFLE_ROUNDS)

    def batch(k: int) -> Batch:
        mine = np.arange(k * size, (k + 1) * size).reshape(hosts, -1)[host]
        return stacked([row(rows, place(int(i)), c) for i in mine])

    return batch


def heldout_batches_of(rows: Rows, c: ConfigDict, *, count: int, host: int = 0, hosts: int = 1) -> list[Batch]:
    """The rows of at most `count` batches as micro-batches, in stored order. The last one is padded with empty rows."""
    size = c.train.batch_size // c.train.micro_batches
    wanted = min(len(rows.groups), count * c.train.batch_size)
    found = []
    for first in range(0, wanted, size):
        mine = np.arange(first, first + size).reshape(hosts, -1)[host]
        found.append(stacked([row(rows, int(i) if i < wanted else len(rows.groups), c) for i in mine]))
    return found


def stacked(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
