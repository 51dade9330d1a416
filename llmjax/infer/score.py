"""Perplexity and bits per byte of documents.

Every token of a document and its <eos> is scored once, given the tokens before it in the document. Longer documents than
the model's sequence length are scored in overlapping windows: each window after the first scores its last `stride` tokens
and has the rest as context. Bits per byte divide by the UTF-8 bytes of the text, so they compare models with different
tokenizers, and compressors.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from llmjax.errors import UserError
from llmjax.train.score import Score

BOS_ID, EOS_ID = 1, 2
Batch = dict[str, np.ndarray]


def split_documents(stream: np.ndarray, *, start_id: int = BOS_ID, end_id: int = EOS_ID) -> Iterator[np.ndarray]:
    """The documents of a token stream, each from its <bos> to its <eos>, which may be the <bos> of the next."""
    starts = np.flatnonzero(stream == start_id)
    for start, stop in zip(starts, [*starts[1:], len(stream)], strict=True):
        yield stream[start : stop + (start_id == end_id)].astype(np.int32)


def windows(count: int, *, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) of the windows that cover `count` targets, each target scored once."""
    done = 0
    while done < count:
        stop = min(done + (stride if done else length), count)
        start = max(stop - length, 0)
        yield start, stop, done
        done = stop


def pack_windows(
    documents: Iterable[np.ndarray], *, length: int, stride: int, batch_size: int, languages: Sequence[int] = ()
) -> Iterator[Batch]:
    """Batches (as in data/batches.py) of the windows of documents. Short windows share a row in different segments.

    With `languages` a batch has the language of each token. The documents take the languages in turn.
    """

    def empty() -> Batch:
        shape = (batch_size, length)
        names = ("tokens", "targets", "positions", "segments", *(("languages",) if languages else ()))
        return {**{name: np.zeros(shape, np.int32) for name in names}, "weights": np.zeros(shape, np.float32)}

    batch, row, column, segment = empty(), 0, 0, 0
    for number, document in enumerate(documents):
        for start, stop, first in windows(len(document) - 1, length=length, stride=stride):
            size = stop - start
            if column + size > length:
                row, column, segment = row + 1, 0, 0
            if row == batch_size:
                yield batch
                batch, row = empty(), 0
            segment += 1
            here = (row, slice(column, column + size))
            batch["tokens"][here] = document[start:stop]
            batch["targets"][here] = document[start + 1 : stop + 1]
            batch["positions"][here] = np.arange(size)
            batch["segments"][here] = segment
            if languages:
                batch["languages"][here] = languages[number % len(languages)]
            batch["weights"][row, column + first - start : column + size] = 1.0
            column += size
    if column:
        yield batch


def score(
    nats_of: Callable[[Batch], np.ndarray],
    documents: Iterable[np.ndarray],
    *,
    length: int,
    stride: int,
    batch_size: int,
    piece_sizes: np.ndarray,
    languages: Sequence[int] = (),
    on_tokens: Callable[[int], None] | None = None,
) -> Score:
    """Score documents of token ids.

    Args:
        nats_of: batch -> weighted nats of every target, (B, L).
        documents: int32 arrays that begin with <bos>.
        piece_sizes: UTF-8 bytes of every id, 0 for special ids.
        languages: the documents take these in turn; empty: the model has no languages.
        on_tokens: called after each batch with the number of tokens scored.

    Raises:
        UserError: for a stride that is not from 1 to the window, and for an empty batch.
    """
    if not 1 <= stride <= length or batch_size < 1:
        raise UserError(
            f"stride={stride} must be from 1 to the window's {length} tokens, and batch_size={batch_size} at least 1"
        )
    nats, tokens, size = 0.0, 0, 0
    made = pack_windows(documents, length=length, stride=stride, batch_size=batch_size, languages=languages)
    for batch in made:
        nats += float(np.sum(nats_of(batch), dtype=np.float64))
        scored = batch["weights"] > 0
        tokens += int(scored.sum())
        size += int(piece_sizes[batch["targets"][scored]].sum())
        if on_tokens is not None:
            on_tokens(tokens)
    return Score(nats=nats, tokens=tokens, bytes=size)
