"""What a document classifier sees of a document: hashed words and pairs of words, and statistics of its writing."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Features:
    """Features of some documents.

    Attributes:
        rows: int64 [entries], rising: the document of each sparse entry. columns: int64 [entries], the feature.
        values: float64 [entries].
        dense: float64 [documents, statistics], or an embedding.
        width: the number of sparse features.
    """

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    dense: np.ndarray
    width: int


STATISTICS = (
    "letters a word",
    "upper-case letters a letter",
    "digits a byte",
    "spaces a byte",
    "logarithm of bytes a line",
    "sentence marks a word",
    "other punctuation a byte",
    "bytes beyond ASCII a byte",
    "lines that end a sentence a line",
)
# Not the length of a document: where the classes were collected differently it separates them and means nothing.
_LOWER, _UPPER, _DIGIT, _SPACE, _NEWLINE, _MARK, _OTHER, _BEYOND = range(8)
_LOG_COUNT = np.array([0.0] + [1 + math.log(k) for k in range(1, 1024)])


def _byte_classes() -> np.ndarray:
    classes = np.full(256, _OTHER, np.int64)
    for characters, kind in (
        ("abcdefghijklmnopqrstuvwxyz", _LOWER),
        ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", _UPPER),
        ("0123456789", _DIGIT),
        (" \t\r", _SPACE),
        ("\n", _NEWLINE),
        (".!?", _MARK),
    ):
        classes[list(characters.encode())] = kind
    classes[128:] = _BEYOND
    return classes


def _random_numbers(count: int) -> np.ndarray:
    """Fixed 64-bit numbers (SplitMix64, Steele et al. 2014): the hash must be the same in every version of numpy."""
    numbers, state, mask = [], 0, (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append((z ^ (z >> 31)) | 1)
    return np.array(numbers, np.uint64)


_CLASSES = _byte_classes()
_NUMBERS = _random_numbers(256 + 64)
_BYTE_NUMBERS, _PLACE_NUMBERS = _NUMBERS[:256].copy(), _NUMBERS[256:]
_BYTE_NUMBERS[list(b"0123456789")] = _BYTE_NUMBERS[ord("0")]  # every number is a pattern of digits
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def _words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All words of all documents: the document of each, a 64-bit hash, and its length in bytes."""
    raw = [text.lower().encode(errors="replace") for text in texts]
    data = np.frombuffer(b"\n".join([*raw, b"\n\n\n"]), np.uint8)
    classes = _CLASSES[data]
    inside = (classes <= _DIGIT) | (classes == _BEYOND)
    # Punctuation beyond ASCII parts words: U+00A0-00BF (C2 ..), U+2000-206F (E2 80, E2 81), U+3000-303F (E3 80).
    latin = np.flatnonzero(data[:-1] == 0xC2)
    inside[latin] = inside[latin + 1] = False
    for lead, second in ((0xE2, 0x80), (0xE2, 0x81), (0xE3, 0x80)):
        at = np.flatnonzero((data[:-2] == lead) & (data[1:-1] == second))
        inside[at] = inside[at + 1] = inside[at + 2] = False
    first = inside.copy()
    first[1:] &= ~inside[:-1]
    first |= (
        inside & (data >= 0xE3) & (data <= 0xE9)
    )  # kana and Chinese characters stand alone; pairs come from bigrams
    starts = np.flatnonzero(first)
    if not len(starts):
        return np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int64)
    places = np.arange(len(data)) - starts[np.maximum(np.cumsum(first) - 1, 0)]
    terms = np.where(inside, _BYTE_NUMBERS[data] * _PLACE_NUMBERS[places % len(_PLACE_NUMBERS)], np.uint64(0))
    hashes = np.add.reduceat(terms, starts)
    hashes = (hashes ^ (hashes >> np.uint64(31))) * _MIX
    lengths = np.add.reduceat(inside.astype(np.int64), starts)
    ends = np.cumsum([len(text) + 1 for text in raw])
    return np.searchsorted(ends, starts, side="right"), hashes, lengths


def _statistics(texts: Sequence[str], words: np.ndarray, letters: np.ndarray) -> np.ndarray:
    """The numbers that STATISTICS names, float64 [documents, statistics]."""
    raw = [text.encode(errors="replace") for text in texts]
    sizes = np.array([len(text) + 1 for text in raw])  # with a newline at the end of each
    data = np.frombuffer(b"\n".join([*raw, b""]), np.uint8)
    documents = np.repeat(np.arange(len(texts)), sizes)
    classes = _CLASSES[data]
    counts = np.bincount(documents * 8 + classes, minlength=8 * len(texts)).reshape(-1, 8)
    ending = np.zeros(len(data), bool)
    ending[1:] = (classes[1:] == _NEWLINE) & (classes[:-1] == _MARK)
    word_count = np.maximum(np.bincount(words, minlength=len(texts)), 1)
    columns = [
        np.bincount(words, weights=letters, minlength=len(texts)) / word_count,
        counts[:, _UPPER] / np.maximum(counts[:, _UPPER] + counts[:, _LOWER], 1),
        counts[:, _DIGIT] / sizes,
        counts[:, _SPACE] / sizes,
        [math.log(size / lines) for size, lines in zip(sizes.tolist(), counts[:, _NEWLINE].tolist(), strict=True)],
        counts[:, _MARK] / word_count,
        counts[:, _OTHER] / sizes,
        counts[:, _BEYOND] / sizes,
        np.bincount(documents[ending], minlength=len(texts)) / counts[:, _NEWLINE],
    ]
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def hashed_words(texts: Sequence[str], settings: Mapping[str, Any]) -> Features:
    """Signed hashed words and pairs of neighbouring words, with 1 + ln(count), each document of length 1; STATISTICS."""
    bits = settings["bits"]
    texts = [text[: settings["characters"]] for text in texts]
    documents, hashes, lengths = _words(texts)
    dense = _statistics(texts, documents, lengths)
    together = documents[1:] == documents[:-1]
    pairs = ((hashes[:-1] * np.uint64(3) + hashes[1:]) ^ np.uint64(0x5BD1E995)) * _MIX
    keys = np.concatenate([hashes, pairs[together]]) >> np.uint64(63 - bits)  # the last bit is the sign
    rows = np.concatenate([documents, documents[1:][together]])
    keys, counts = np.unique((rows.astype(np.uint64) << np.uint64(bits + 1)) | keys, return_counts=True)
    rows = (keys >> np.uint64(bits + 1)).astype(np.int64)
    hashed = (keys & np.uint64((1 << (bits + 1)) - 1)).astype(np.int64)
    values = _LOG_COUNT[np.minimum(counts, len(_LOG_COUNT) - 1)]
    norms = np.sqrt(np.bincount(rows, weights=values * values, minlength=len(texts)))
    values = np.where(hashed & 1, values, -values) / norms[rows]
    return Features(rows, hashed >> 1, values, dense, 1 << bits)


# Another extractor, such as one of model embeddings, is a function put in here under its name.
FEATURES: dict[str, Callable[[Sequence[str], Mapping[str, Any]], Features]] = {"hashed_words": hashed_words}
