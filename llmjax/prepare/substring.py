"""Exact repeated runs of tokens across all documents, as a suffix array would find them, by grouping numbers.

Lee et al. (2021), "Deduplicating Training Data Makes Language Models Better", find them with a suffix array of the whole
corpus in memory. Here two groupings do, which spill to disk and spread over machines; the answer is the same.

A token is a maximal run of letters, digits, marks and underscores (a character of an unspaced script by itself), or a
single other character that is not white space; case counts, white space does not. A window is `tokens` tokens in a row
of one document. **A window is a repeat if an equal window starts earlier** in the order of (ordinal of the document,
token position); what lies in any repeat is removed, so the first occurrence stays. Within a document windows may overlap
their equals: of a run with a period of p tokens the first p stay.

1. `anchors`: smallest 8-grams of windows (Schleimer, Wilkerson and Aiken 2003, "Winnowing"): a twentieth of the tokens.
   Equal windows have equal smallest grams, so a window whose gram occurs nowhere else has no equal. Group by hash: which
   occur twice?
2. `window_keys`: the windows whose smallest gram does. Group by hash: every window but the first of (ordinal, start).
3. `spans_of` those windows, and `duplicates.remove_spans`.
"""

import numpy as np
import pyarrow as pa

from llmjax.errors import UserError
from llmjax.prepare.kernels import windows
from llmjax.prepare.kernels.words import room, tables, utf8

GRAM = 8  # tokens of an anchor; windows must be at least as long


def anchors(texts: pa.LargeStringArray, *, tokens: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The smallest 8-grams of the windows of every text: row (int64), token position (int64) and hash (uint64).

    Sorted by row. Raises:
        UserError: if a window has fewer tokens than a gram.
    """
    gram = _gram(tokens)
    data, offsets = utf8(texts)
    hashes = np.empty(room(offsets), np.uint64)
    size = int(offsets[-1] - offsets[0]) // 64 + 1024
    while True:
        rows, positions, values = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.uint64)
        count = windows.anchors(data, offsets, tables()[0], tokens, gram, hashes, rows, positions, values)
        if count <= size:
            return rows[:count], positions[:count], values[:count]
        size = count  # text of few words and much punctuation: once more, with room for all


def window_keys(
    texts: pa.LargeStringArray, *, tokens: int = 50, repeated: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The windows that may have an equal: row (int64), first token (int64) and 64-bit hash (uint64), in the order of both.

    Args:
        repeated: uint64, sorted, the anchor hashes that occur at least twice in the corpus.
    """
    gram = _gram(tokens)
    repeated = np.asarray(repeated, np.uint64)
    if np.any(repeated[1:] < repeated[:-1]):
        raise UserError("the repeated anchors must be sorted")
    data, offsets = utf8(texts)
    hashes = np.empty(room(offsets), np.uint64)
    size = int(offsets[-1] - offsets[0]) // 16 + 1024
    while True:
        rows, starts, keys = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.uint64)
        arguments = (data, offsets, tables()[0], tokens, gram, repeated, hashes)
        count = windows.repeated_windows(*arguments, rows, starts, keys)
        if count <= size:
            return rows[:count], starts[:count], keys[:count]
        size = count  # more of the text is repeated than was guessed: once more, with room for all


def spans_of(
    texts: pa.LargeStringArray, rows: np.ndarray, starts: np.ndarray, *, tokens: int = 50
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes that windows cover, joined where they overlap or touch: row, start and stop (int64) within its text.

    Args:
        rows, starts: int64 (windows,), in any order.

    Raises:
        UserError: if a window does not lie within its text, which happens when the text was changed meanwhile.
    """
    rows, starts = np.asarray(rows, np.int64), np.asarray(starts, np.int64)
    order = np.lexsort((starts, rows))
    data, offsets = utf8(texts)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(texts)):
        raise UserError(f"a window is in row {rows.max()} of {len(texts)} texts")
    most = room(offsets)
    spans, out_rows, out = (
        np.empty((most, 2), np.int64),
        np.empty(len(rows), np.int64),
        np.empty((len(rows), 2), np.int64),
    )
    hashes = np.empty(most, np.uint64)
    arguments = (data, offsets, tables()[0], tokens, rows[order], starts[order], hashes, spans, out_rows, out)
    count = windows.window_spans(*arguments)
    if count < 0:
        raise UserError("a window does not lie within its text: were the texts changed since the windows were made?")
    return out_rows[:count], out[:count, 0], out[:count, 1]


def _gram(tokens: int) -> int:
    if tokens < GRAM:
        raise UserError(f"substring_tokens must be at least {GRAM}, not {tokens}: shorter runs repeat in all prose")
    return GRAM
