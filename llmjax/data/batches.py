"""Batches: rows of the token streams with positions, segments and weights. Batch k is a pure function of (config, k).

Row i of a stream is the L + 1 tokens from i * L + shift, inputs and targets one apart. An epoch of a source visits its
rows in a permutation that is computed, not stored; permutation and shift are drawn anew for every epoch, so documents
are cut in other places each time. The mixture (`mixture.py`) chooses the source of each row.

Rows of parallel text are whole pairs, as many as fit; epochs differ in the order of the rows. An objective may change
each row (hide tokens, say): it gets a random generator that depends on the seed, k and the row's number in the batch.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from llmjax.data import parallel_text, replay
from llmjax.data.generators import generator
from llmjax.data.mixture import Mixture, capped, parse_mixture, tempered
from llmjax.data.ramp import batch_sizes, sizes
from llmjax.data.tokens import Index, Stream, load_index
from llmjax.errors import UserError

Batch = dict[str, np.ndarray]
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2  # of the tokenizers that are trained here
SHUFFLE_ROUNDS = 4  # of grain's block cipher; the fewest it allows


@dataclass(frozen=True)
class Corruption:
    """An objective's transform of each row of text."""

    tokens: int  # of text that it reads; what comes out is as long as it likes
    transform: Callable[[Batch, np.random.Generator], Batch]  # a row of `pack`, without the batch dimension -> a row


def pack(rows: Sequence[np.ndarray], *, length: int, start_id: int = BOS_ID, end_id: int = EOS_ID) -> Batch:
    """A batch from rows of at most `length` + 1 tokens, shorter ones padded.

    Args:
        start_id, end_id: what documents begin and end with. Where they are the same, a document's end is the
            beginning of the next, and is predicted as such.

    Returns:
        "tokens", "targets" (the tokens that follow), "positions" (from 0 at each <bos> and at the start of the row),
        "segments" (1, 2, ... by document, 0 for padding), all int32 BL; and "weights", float32 BL: 0 where the target
        is <bos> or padding, so that no document is predicted from the one before it, and 1 elsewhere.
    """
    windows_BL = np.full((len(rows), length + 1), PAD_ID, np.int32)
    for window_L, row in zip(windows_BL, rows, strict=True):
        window_L[: len(row)] = row
    filled_BL = np.arange(length + 1)[None] < np.array([len(row) for row in rows])[:, None]
    tokens_BL, targets_BL = windows_BL[:, :-1], windows_BL[:, 1:]
    real_BL = filled_BL[:, :-1]
    starts_BL = (tokens_BL == start_id) & real_BL
    starts_BL[:, 0] = True
    steps_L = np.arange(length, dtype=np.int32)
    begun_BL = np.maximum.accumulate(np.where(starts_BL, steps_L, 0), axis=1)
    predicted_BL = filled_BL[:, 1:] & ((targets_BL != start_id) | (start_id == end_id))
    return {
        "tokens": np.ascontiguousarray(tokens_BL),
        "targets": np.ascontiguousarray(targets_BL),
        "positions": np.where(real_BL, steps_L - begun_BL, 0).astype(np.int32),
        "segments": np.where(real_BL, np.cumsum(starts_BL, axis=1), 0).astype(np.int32),
        "weights": predicted_BL.astype(np.float32),
    }


class _Windows:
    """The rows of a stream: windows of L + 1 tokens, L apart (fewer tokens if the whole stream is shorter)."""

    def __init__(self, stream: Stream, *, length: int) -> None:
        self._stream, self._length = stream, length
        # The last row of every epoch must end inside the stream, whatever the shift.
        self.shifts = max(1, min(length, stream.tokens - length))
        self.count = max(1, (stream.tokens - self.shifts) // length)
        self.heldout_count = -(-(stream.tokens - 1) // length)

    def read(self, row: int, shift: int = 0) -> np.ndarray:
        """The tokens of one row."""
        start = row * self._length + shift
        return self._stream.read(start, min(start + self._length + 1, self._stream.tokens))


class _Pairs:
    """The rows of a stream of parallel text: whole pairs, at most L tokens together."""

    shifts = 1

    def __init__(self, stream: Stream, *, length: int, start_id: int) -> None:
        self._stream, self._length, self._start_id = stream, length, start_id
        self._starts = np.load(stream.folder / parallel_text.PAIRS_FILE)
        self._firsts = parallel_text.rows_of_pairs(self._starts, length=length)
        self.count = self.heldout_count = len(self._firsts) - 1

    def read(self, row: int, shift: int = 0) -> np.ndarray:
        """The tokens of one row; a pair that is too long for a row is cut."""
        first, last = self._firsts[row], self._firsts[row + 1]
        tokens = self._stream.read(int(self._starts[first]), int(self._starts[last]))
        if len(tokens) > self._length:
            tokens = parallel_text.shorten(tokens, length=self._length, start_id=self._start_id)
        return tokens


def _layout(index: Index, stream: Stream, *, length: int) -> _Windows | _Pairs:
    if len(stream.languages) == 2:
        return _Pairs(stream, length=length, start_id=index.start_id)
    return _Windows(stream, length=length)


class _Rows:
    """The rows of one training stream in the order of training: index -> tokens."""

    def __init__(self, layout: _Windows | _Pairs, *, source: str, seed: int) -> None:
        from grain.experimental import index_shuffle  # it imports jax, which most of this room does without

        self._layout, self._source, self._seed = layout, source, seed
        self._shuffle = index_shuffle
        self.count = layout.count
        self._draw = functools.lru_cache(maxsize=8)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> tuple[int, int]:
        key = f"{self._seed} {self._source} {epoch}".encode()
        digest = hashlib.blake2b(key, digest_size=12).digest()
        return int.from_bytes(digest[:4]), int.from_bytes(digest[4:]) % self._layout.shifts

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.count)
        seed, shift = self._draw(epoch)
        row = self._shuffle(index=place, max_index=self.count - 1, seed=seed, rounds=SHUFFLE_ROUNDS)
        return self._layout.read(row, shift)


class _Maker:
    """From rows of tokens to a batch: packed, with languages where the model has them, and changed by the objective."""

    def __init__(self, c: ConfigDict, index: Index, corruption: Corruption | None) -> None:
        self._corruption = corruption
        self.length = c.train.sequence_length if corruption is None else corruption.tokens
        self._ids = {"start_id": index.start_id, "end_id": index.end_id}
        self._numbers = index.language_numbers if c.model.languages else {}
        if len(self._numbers) > c.model.languages:
            raise UserError(
                f"there are {len(self._numbers)} languages ({', '.join(self._numbers)}) and model.languages="
                f"{c.model.languages}: raise it, or give sources the names of their languages"
            )

    def __call__(
        self,
        rows: Sequence[np.ndarray],
        languages: Sequence[tuple[str, ...]],
        rng_of: Callable[[int], np.random.Generator],
    ) -> Batch:
        """`rng_of`: place of a row among these -> the generator of its changes."""
        batch = pack(rows, length=self.length, **self._ids)
        if self._numbers:
            # Where there are two languages, documents are in the one and in the other by turns.
            pairs_B2 = np.array([[self._numbers[names[0]], self._numbers[names[-1]]] for names in languages], np.int32)
            second_BL = (batch["segments"] + 1) % 2
            languages_BL = np.where(second_BL == 1, pairs_B2[:, 1:], pairs_B2[:, :1])
            batch["languages"] = np.where(batch["segments"] > 0, languages_BL, 0).astype(np.int32)
        if self._corruption is None:
            return batch
        changed = [
            self._corruption.transform({name: values[i] for name, values in batch.items()}, rng_of(i))
            for i in range(len(rows))
        ]
        return {name: np.stack([row[name] for row in changed]) for name in changed[0]}


def _train_layouts(index: Index, *, length: int) -> dict[str, _Windows | _Pairs]:
    """The training streams that have text, by source, cut into rows of so many tokens."""
    streams = {source: Stream(index, "train", source) for source in index.splits["train"]}
    layouts = {name: _layout(index, stream, length=length) for name, stream in streams.items() if stream.tokens >= 2}
    if not layouts:
        raise UserError(
            f"there is no text to train on in {index.folder}: check data.sources and run `llmjax prepare` again"
        )
    return layouts


def tokens_per_epoch(c: ConfigDict, index: Index, *, corruption: Corruption | None = None) -> int:
    """The number of places for tokens in one pass over every training source.

    Raises:
        UserError: for token shards that are missing or damaged, and when there is no text.
    """
    length = c.train.sequence_length if corruption is None else corruption.tokens
    return _places(_train_layouts(index, length=length), c)


def _places(layouts: Mapping[str, _Windows | _Pairs], c: ConfigDict) -> int:
    return sum(layout.count for layout in layouts.values()) * c.train.sequence_length


class TrainBatches:
    """The training batches of one host.

    `batch(k)` depends on the config, c.seed and k alone, and the parts of all hosts, joined in order, are the batch of
    a single host. `languages` has those of each source.
    """

    def __init__(
        self,
        c: ConfigDict,
        tokens_folder: str | Path,
        *,
        total_steps: int,
        corruption: Corruption | None = None,
        host: int = 0,
        hosts: int = 1,
    ) -> None:
        """Open the train streams.

        Args:
            total_steps: what percentages in data.mixture refer to. 0: not known yet, and batches are only to be
                measured: their rows come from the sources by size.

        Raises:
            UserError: for token shards that are missing or damaged, a data.mixture that cannot be read, a source with
                fewer than 2 tokens, or a batch that the hosts do not divide.
        """
        for size in sizes(c.train):
            if size % hosts:
                name = (
                    "train.batch_size" if size == c.train.batch_size else "a batch of the ramp from train.batch_start"
                )
                raise UserError(f"{name}={size} is not a multiple of the {hosts} hosts: change {name.split()[-1]}")
        index = load_index(tokens_folder)
        self._make = _Maker(c, index, corruption)
        layouts = _train_layouts(index, length=self._make.length)
        self._rows = [_Rows(layout, source=name, seed=c.seed) for name, layout in layouts.items()]
        self._counts = {name: layout.count for name, layout in layouts.items()}
        self.languages = [tuple(index.splits["train"][name]["languages"]) for name in layouts]
        self._sizes = batch_sizes(c.train, tokens_per_epoch=_places(layouts, c))
        if c.data.mixture and total_steps:
            steps = functools.partial(self._sizes.steps, total_steps=total_steps)
            stages = parse_mixture(c.data.mixture, sources=list(layouts), steps=steps)
        elif c.data.replay and total_steps:
            stages = [(0, replay.weights(c, self._counts))]
        else:
            stages = [(0, tempered(self._counts, c.data.mixture_temperature))]
        examples = [(self._sizes.first_row(step), weights) for step, weights in stages]
        if c.data.max_epochs and total_steps:
            rows = self._sizes.first_row(total_steps)
            examples = capped(examples, examples=rows, sizes=self._counts, max_epochs=c.data.max_epochs)
        self._mixture = Mixture(examples, sources=list(layouts), seed=c.seed)
        self._seed, self._host, self._hosts = c.seed, host, hosts

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each source has been seen after so many steps."""
        seen = self._mixture.counts(self._sizes.first_row(steps))
        return {name: seen[name] / count for name, count in self._counts.items()}

    def batch(self, k: int) -> Batch:
        """This host's rows of global batch k, as `pack` describes them, or as the objective changed them."""
        host_rows = np.arange(self._sizes.at(k).rows).reshape(self._hosts, -1)[self._host]
        sources, indices = self._mixture.locate(self._sizes.first_row(k) + host_rows)
        rows = [self._rows[source][i] for source, i in zip(sources.tolist(), indices.tolist(), strict=True)]
        languages = [self.languages[source] for source in sources.tolist()]
        return self._make(rows, languages, lambda i: generator("changes", self._seed, k, int(host_rows[i])))


def _heldout_generator(numbers: Sequence[int], i: int) -> np.random.Generator:
    return generator("held-out changes", numbers[i])


def heldout_batches(
    c: ConfigDict,
    tokens_folder: str | Path,
    *,
    count: int,
    corruption: Corruption | None = None,
    host: int = 0,
    hosts: int = 1,
) -> dict[str, list[Batch]]:
    """Fixed rows of each held-out source, at most `count` batches of `train.batch_size`, for the loss during training.

    They come in batches of a micro-batch's rows, because more may not fit. They are spread evenly over the stream; a
    short stream gives fewer, and rows of padding (weight 0) fill the last batch. The rows, and what `corruption` makes of
    them, are the same for every seed and number of hosts. Without it a batch's text has as many UTF-8 bytes as the
    `piece_bytes` of its targets with weight 1.

    Raises UserError as `TrainBatches` does. Without held-out text the dict is empty.
    """
    size = c.train.batch_size // c.train.micro_batches
    if size % hosts:
        raise UserError(
            f"train.batch_size / train.micro_batches = {size} is not a multiple of the {hosts} hosts: change one of them"
        )
    index = load_index(tokens_folder)
    make = _Maker(c, index, corruption)
    batches: dict[str, list[Batch]] = {}
    for source in index.splits["heldout"]:
        stream = Stream(index, "heldout", source)
        if stream.tokens < 2:
            continue
        layout = _layout(index, stream, length=make.length)
        total = layout.heldout_count
        wanted = min(total, count * c.train.batch_size)
        batches[source] = []
        for first in range(0, wanted, size):
            numbers = range(first + host * size // hosts, first + (host + 1) * size // hosts)
            rows = [layout.read(n * total // wanted) if n < wanted else np.empty(0, np.int32) for n in numbers]
            rng_of = functools.partial(_heldout_generator, numbers)
            batches[source].append(make(rows, [stream.languages] * len(rows), rng_of))
    return batches
