"""Rows that several sampled answers share, so that the trainer computes less.

A round has a row for each answer. This module packs the answers of an update, with the same numbers at their tokens, so the
loss of the update stays the same.

With `rollout.pack` each answer is a segment behind its own prompt, and there is less padding. The number of full rows
depends on the lengths, but a compiled step has one shape. So the batch keeps as many rows as answers, gathers the empty
rows in micro-batches, and the step skips these (`train/step.py`).

With `data.share_prompts` the answers to a prompt are the branches of a tree, and the prompt is computed once. An update
has a row for each prompt.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llmjax.data.packing import packed_trees

Rows = Mapping[str, np.ndarray]


class Shared(NamedTuple):
    """Answers in shared rows.

    `rows` has R rows, R a multiple of a micro-batch; `places` says of each of B answers in which row its own tokens are, where
    they begin there and in the answer's own row of `length`, and how many there are.
    """

    rows: dict[str, np.ndarray]
    places: list[tuple[int, int, int, int]]
    length: int

    def apart(self, values_RL: np.ndarray) -> np.ndarray:
        """Values of the tokens of shared rows as a row an answer, (B, length), 0 at all but its own tokens."""
        values_BL = np.zeros((len(self.places), self.length), values_RL.dtype)
        for own_L, (row, at, first, size) in zip(values_BL, self.places, strict=True):
            own_L[first : first + size] = values_RL[row, at : at + size]
        return values_BL


def share(rows: Rows, *, most: int, micro_batch: int) -> Shared:
    """Pack the rows of B answers, the longest first, each into the row with the least room that holds it.

    Args:
        rows: arrays (B, L), a row an answer, whose tokens are those with a segment; "exists" is (B, 1).
        most: answers in a row.
        micro_batch: rows of one.
    """
    sizes, length = (rows["segments"] > 0).sum(axis=1).tolist(), rows["tokens"].shape[1]
    inside = fitted(sizes, length=length, most=most)
    count = -(-len(inside) // micro_batch) * micro_batch
    shared = {
        name: np.zeros((count, most if name == "exists" else length), values.dtype) for name, values in rows.items()
    }
    places = [(0, 0, 0, 0)] * len(sizes)
    for row, answers in enumerate(inside):
        at = 0
        for number, i in enumerate(answers, start=1):
            size = sizes[i]
            for name, values in rows.items():
                if name != "exists":
                    shared[name][row, at : at + size] = number if name == "segments" else values[i, :size]
            shared["exists"][row, number - 1] = rows["exists"][i, 0]
            places[i] = row, at, 0, size
            at += size
    return Shared(shared, places, length)


def alone(rows: Rows) -> Shared:
    """A row for each answer, as they are."""
    count, length = rows["tokens"].shape
    return Shared(dict(rows), [(i, 0, 0, length) for i in range(count)], length)


def share_prompts(rows: Rows, *, samples: int, length: int, whole: bool) -> Shared:
    """Pack each `samples` rows, which are answers to one prompt, into one row of that length.

    Args:
        rows: as of `share`.
        whole: with the place of each answer's last token, where nothing is learnt but a critic gives its value.
    """
    sizes = (rows["segments"] > 0).sum(axis=1) - (not whole)
    texts = [
        {name: values[i, :size] for name, values in rows.items() if name not in ("exists", "segments", "positions")}
        for i, size in enumerate(sizes)
    ]
    made = [packed_trees([texts[i : i + samples]], length=length) for i in range(0, len(texts), samples)]
    shared = {name: np.stack([row[name] for row, _ in made]) for name in made[0][0]}
    shared["exists"] = rows["exists"].reshape(-1, samples)
    places = [(number, *place) for number, (_, found) in enumerate(made) for place in found]
    return Shared(shared, places, rows["tokens"].shape[1])


def fitted(sizes: Sequence[int], *, length: int, most: int) -> list[list[int]]:
    """The indices of sizes that share each row of a length, at most `most` in a row, in their order."""
    found: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        open_rows = [r for r, room in enumerate(left) if room >= sizes[i] and len(found[r]) < most]
        if not open_rows:
            found.append([])
            left.append(length)
            open_rows = [len(found) - 1]
        row = min(open_rows, key=lambda r: left[r])
        found[row].append(i)
        left[row] -= sizes[i]
    return [sorted(row) for row in found]


def batch_of(shared: Shared, *, micro_batches: int) -> dict[str, np.ndarray]:
    """A batch with as many rows as there are answers, for a step that cuts it into `micro_batches`.

    Micro-batch t has the rows t, t + T, ... of a batch (`train/step.py`); full rows are in the first ones.
    """
    count = len(shared.places)
    each = count // micro_batches
    to = [part + place * micro_batches for part in range(micro_batches) for place in range(each)]
    batch = {name: np.zeros((count, *values.shape[1:]), values.dtype) for name, values in shared.rows.items()}
    for name, values in shared.rows.items():
        batch[name][to[: len(values)]] = values
    return batch
