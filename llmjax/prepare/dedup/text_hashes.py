"""The hashes by which equal and similar texts are found: of shingles, lines, paragraphs and windows. Pure functions."""

from typing import Literal

import numpy as np
import pyarrow as pa

from llmjax.errors import UserError
from llmjax.prepare.kernels import minhash, windows
from llmjax.prepare.kernels.words import room, tables, utf8

VECTOR = 16  # the number of hash functions is rounded up to full vector registers
GRAM = 8  # tokens of an anchor; windows must be at least as long
MINIMUM_UNIT_WORDS = 4  # a shorter line or paragraph ("Contents", "Read more") repeats without being copied


def near_keys(
    texts: pa.LargeStringArray, *, bands: int = 14, rows: int = 8, words: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """The MinHash band keys of texts: what near-duplicates have in common.

    Words are case-folded, and all digits are one digit. A text of fewer than `words` words has one shingle of all of
    them.

    Args:
        bands, rows: bands of hash functions and functions in each; 14 x 8 finds half of the pairs at J = 0.72.
        words: words of a shingle.

    Returns:
        keys, uint64 (texts, bands), and the number of words, int32 (texts,). A text without a word has keys of 0, which
        mean nothing: leave its rows out.

    Raises:
        UserError: for numbers below 1 or texts that are not strings.
    """
    check_positive(bands=bands, rows=rows, words=words)
    given = utf8(texts)
    functions = minhash.hash_functions(-(-bands * rows // VECTOR) * VECTOR)
    keys_NB = np.empty((len(texts), bands), np.uint64)
    words_N = np.empty(len(texts), np.int32)
    hashes = np.empty(room(given[1]), np.uint64)
    minhash.band_keys(given, tables("case and digits"), functions, rows, words, hashes, keys_NB, words_N)
    return keys_NB, words_N


def unit_keys(
    texts: pa.LargeStringArray, unit: Literal["line", "paragraph"], *, minimum_words: int = MINIMUM_UNIT_WORDS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lines, or paragraphs (divided by blank lines), and a hash of each without the white space around it.

    Units of fewer than `minimum_words` words are left out.

    Returns:
        row (int64), start and stop (int64, bytes within the row's text, white space around it not included) and hash
        (uint64 (units, 2), 128 bits of the exact bytes); in the order of the texts.
    """
    if unit not in ("line", "paragraph"):
        raise UserError(f"unit must be 'line' or 'paragraph', not {unit!r}")
    given = utf8(texts)
    most = int(windows.count_byte(given[0], given[1][0], given[1][-1], 10)) + len(texts)
    rows, spans = np.empty(most, np.int64), np.empty((most, 2), np.int64)
    hashes = np.empty((most, 2), np.uint64)
    count = windows.units(given, tables()[0], unit == "paragraph", minimum_words, rows, spans, hashes)
    return rows[:count], spans[:count, 0], spans[:count, 1], hashes[:count]


def anchors(texts: pa.LargeStringArray, *, tokens: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The smallest 8-grams of the windows of every text: row (int64), token position (int64) and hash (uint64).

    Sorted by row. Raises:
        UserError: if a window has fewer tokens than a gram.
    """
    gram = _gram(tokens)
    given = utf8(texts)
    hashes = np.empty(room(given[1]), np.uint64)
    size = int(given[1][-1] - given[1][0]) // 64 + 1024
    while True:
        rows, positions, values = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.uint64)
        count = windows.anchors(given, tables("nothing"), tokens, gram, hashes, rows, positions, values)
        if count <= size:
            return rows[:count], positions[:count], values[:count]
        size = count  # few words and much punctuation: again, with room for all


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
    given = utf8(texts)
    hashes = np.empty(room(given[1]), np.uint64)
    size = int(given[1][-1] - given[1][0]) // 16 + 1024
    while True:
        rows, starts, keys = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.uint64)
        arguments = (given, tables("nothing"), tokens, gram, repeated, hashes)
        count = windows.repeated_windows(*arguments, rows, starts, keys)
        if count <= size:
            return rows[:count], starts[:count], keys[:count]
        size = count  # more is repeated than was guessed: again, with room for all


def _gram(tokens: int) -> int:
    if tokens < GRAM:
        raise UserError(f"substring_tokens must be at least {GRAM}, not {tokens}: shorter runs repeat in all prose")
    return GRAM


def check_positive(**numbers: int) -> None:
    """Raise UserError for a number below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} must be at least 1, not {number}")
