"""Batches: rows of the token streams with positions, segments and weights. Batch k is a pure function of (config, k).

Row i of a stream is the L + 1 tokens from i * L + shift, inputs and targets one apart. An epoch of a source visits its
rows in a permutation that is computed, not stored; permutation and shift are drawn anew for every epoch, so documents
are cut in other places each time. Which source the next row comes from is the mixture's affair.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from llmjax.data.mixture import Mixture, parse_mixture
from llmjax.data.tokens import Stream, load_index

Batch = dict[str, np.ndarray]
PAD_ID, BOS_ID = 0, 1
READ_THREADS = 1  # one thread delivers more than training takes, and cores are for training
READ_AHEAD = 8  # batches
SHUFFLE_ROUNDS = 4  # of grain's block cipher; the fewest it allows


def pack(rows: Sequence[np.ndarray], *, length: int) -> Batch:
    """A batch from rows of at most `length` + 1 tokens, shorter ones padded.

    Returns:
        "tokens", "targets" (the tokens that follow), "positions" (from 0 at each <bos> and at the start of the row),
        "segments" (1, 2, ... by document, 0 for padding), all int32 BL; and "weights", float32 BL: 0 where the target
        is <bos> or <pad>, so that no document is predicted from the one before it, and 1 elsewhere.
    """
    windows_BL = np.full((len(rows), length + 1), PAD_ID, np.int32)
    for window_L, row in zip(windows_BL, rows, strict=True):
        window_L[: len(row)] = row
    tokens_BL, targets_BL = windows_BL[:, :-1], windows_BL[:, 1:]
    real_BL = tokens_BL != PAD_ID
    starts_BL = tokens_BL == BOS_ID
    starts_BL[:, 0] = True
    steps_L = np.arange(length, dtype=np.int32)
    begun_BL = np.maximum.accumulate(np.where(starts_BL, steps_L, 0), axis=1)
    return {
        "tokens": np.ascontiguousarray(tokens_BL),
        "targets": np.ascontiguousarray(targets_BL),
        "positions": np.where(real_BL, steps_L - begun_BL, 0).astype(np.int32),
        "segments": np.where(real_BL, np.cumsum(starts_BL, axis=1), 0).astype(np.int32),
        "weights": (real_BL & (targets_BL != BOS_ID) & (targets_BL != PAD_ID)).astype(np.float32),
    }


class _Rows:
    """The rows of one training stream: index -> L + 1 tokens (fewer if the whole stream is shorter)."""

    def __init__(self, stream: Stream, *, source: str, length: int, seed: int) -> None:
        from grain.experimental import index_shuffle  # it imports jax, which most of this room does without

        self._stream, self._source, self._length, self._seed = stream, source, length, seed
        self._shuffle = index_shuffle
        # The last row of every epoch must end inside the stream, whatever the shift.
        self._shifts = max(1, min(length, stream.tokens - length))
        self.count = max(1, (stream.tokens - self._shifts) // length)
        self._draw = functools.lru_cache(maxsize=8)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> tuple[int, int]:
        key = f"{self._seed} {self._source} {epoch}".encode()
        digest = hashlib.blake2b(key, digest_size=12).digest()
        return int.from_bytes(digest[:4]), int.from_bytes(digest[4:]) % self._shifts

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.count)
        seed, shift = self._draw(epoch)
        row = self._shuffle(index=place, max_index=self.count - 1, seed=seed, rounds=SHUFFLE_ROUNDS)
        start = row * self._length + shift
        return self._stream.read(start, min(start + self._length + 1, self._stream.tokens))


class TrainBatches:
    """The training batches of one host.

    `batch(k)` depends on the config, c.seed and k alone, and the parts of all hosts, joined in order, are the batch of
    a single host. `tokens_per_epoch` is the number of targets in one pass over every source.
    """

    def __init__(
        self, c: ConfigDict, tokens_folder: str | Path, *, total_steps: int, host: int = 0, hosts: int = 1
    ) -> None:
        """Open the train streams; `total_steps` is what percentages in data.mixture refer to.

        Raises:
            ValueError: for token shards that are missing or damaged, a data.mixture that cannot be read, a source with
                fewer than 2 tokens, or a train.batch_size that the hosts do not divide.
        """
        batch_size, length = c.train.batch_size, c.train.sequence_length
        if batch_size % hosts:
            raise ValueError(
                f"train.batch_size={batch_size} is not a multiple of the {hosts} hosts: change train.batch_size"
            )
        index = load_index(tokens_folder)
        streams = {source: Stream(index, "train", source) for source in index.splits["train"]}
        streams = {source: stream for source, stream in streams.items() if stream.tokens >= 2}
        if not streams:
            raise ValueError(
                f"there is no text to train on in {tokens_folder}: check data.sources and run `llmjax prepare` again"
            )
        self._rows = [_Rows(stream, source=name, length=length, seed=c.seed) for name, stream in streams.items()]
        self.tokens_per_epoch = sum(rows.count for rows in self._rows) * length
        if c.data.mixture:
            stages = parse_mixture(
                c.data.mixture, sources=list(streams), total_steps=total_steps, tokens_per_step=batch_size * length
            )
        else:
            stages = [(0, {name: float(rows.count) for name, rows in zip(streams, self._rows, strict=True)})]
        self._mixture = Mixture(stages, sources=list(streams), batch_size=batch_size, seed=c.seed)
        self._length, self._batch_size = length, batch_size
        self._host_rows = np.arange(batch_size).reshape(hosts, -1)[host]

    def batch(self, k: int) -> Batch:
        """This host's rows of global batch k, as `pack` describes them."""
        sources, indices = self._mixture.locate(k * self._batch_size + self._host_rows)
        rows = [self._rows[source][i] for source, i in zip(sources.tolist(), indices.tolist(), strict=True)]
        return pack(rows, length=self._length)

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """batch(start), batch(start + 1), ... without end, read ahead of the consumer."""
        import grain

        numbers = grain.MapDataset.range(start, 1 << 62)
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
        return iter(numbers.map(self.batch).to_iter_dataset(options))


def heldout_batches(
    c: ConfigDict, tokens_folder: str | Path, *, count: int, host: int = 0, hosts: int = 1
) -> dict[str, list[Batch]]:
    """At most `count` fixed batches of each held-out source, for the loss during training.

    Their rows are spread evenly over the stream; a short stream gives fewer batches, and rows of padding (weight 0)
    fill the last. The rows are the same for every seed and number of hosts. A batch's text has as many UTF-8 bytes as
    the `piece_bytes` of its targets with weight 1.

    Raises ValueError as `TrainBatches` does. Without held-out text the dict is empty.
    """
    batch_size, length = c.train.batch_size, c.train.sequence_length
    if batch_size % hosts:
        raise ValueError(
            f"train.batch_size={batch_size} is not a multiple of the {hosts} hosts: change train.batch_size"
        )
    index = load_index(tokens_folder)
    batches: dict[str, list[Batch]] = {}
    for source in index.splits["heldout"]:
        stream = Stream(index, "heldout", source)
        if stream.tokens < 2:
            continue
        total = -(-(stream.tokens - 1) // length)
        wanted = min(total, count * batch_size)
        starts = [i * total // wanted * length for i in range(wanted)]
        batches[source] = []
        for first in range(0, wanted, batch_size):
            rows = [stream.read(s, min(s + length + 1, stream.tokens)) for s in starts[first : first + batch_size]]
            rows += [np.empty(0, np.int32)] * (batch_size - len(rows))
            part = batch_size // hosts
            batches[source].append(pack(rows[host * part : (host + 1) * part], length=length))
    return batches
