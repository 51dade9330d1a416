"""Words and their 64-bit hashes, straight from the UTF-8 bytes of an Arrow string array; a hash table of such hashes.

A word is a maximal run of letters, digits, combining marks and underscores. In scripts without spaces (Chinese
characters, kana, Thai, Lao, Khmer, Burmese and others) every character, with the marks that follow it, is a word.
Punctuation and symbols of all scripts divide words, as white space does. Soft hyphens and zero-width joiners are ignored.
The classes of code points come from `unicodedata`, thus from the Unicode version of Python: machines that share keys must
run the same Python.
"""

import functools
import unicodedata
from typing import Literal

import numpy as np
import pyarrow as pa

from llmjax.errors import UserError
from llmjax.prepare.kernels import jit

SPACE, OTHER, LETTER, DIGIT, MARK, SINGLE, IGNORED = range(7)  # classes of code points
TABLE_SIZE = 0x33480  # no letter is assigned beyond the third plane; code points there are OTHER
UNSPACED = (  # scripts written without spaces between words: first and last code point of their blocks
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),
    (0x3021, 0x312F),  # Hangzhou numerals, kana, Bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0xA4CF),  # unified ideographs, Yi
    (0xA980, 0xA9FF),  # Javanese, Burmese extensions
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width katakana
    (0x1AFF0, 0x1B2FF),  # kana supplements, Nushu
    (0x20000, 0x3347F),
)
# Constants of the hash functions. Stored keys depend on them.
SEED = np.uint64(0x9E3779B97F4A7C15)
CHARACTER = np.uint64(0xFF51AFD7ED558CCD)
MIX = np.uint64(0xD6E8FEB86659FD93)
ROLL = np.uint64(0xC2B2AE3D27D4EB4F)
_32 = np.uint64(32)
Array = np.ndarray
Pair = tuple[Array, Array]
HashTable = tuple[Array, Array, Array]  # keys (uint64), numbers (int32), stamps (int64)


@functools.cache
def tables(fold: Literal["case", "case and digits", "nothing"] = "case") -> Pair:
    """For every code point below TABLE_SIZE its class (uint8), and the code point that it counts as (uint32)."""
    classes, folds = _unicode()
    if fold == "nothing":
        folds = np.arange(TABLE_SIZE, dtype=np.uint32)
    elif fold == "case and digits":
        folds = np.where(classes == DIGIT, np.uint32(ord("0")), folds)
    return classes, folds


@functools.cache
def _unicode() -> Pair:
    """For every code point below TABLE_SIZE its class, and its case-folded code point."""
    classes, folds = np.full(TABLE_SIZE, OTHER, np.uint8), np.arange(TABLE_SIZE, dtype=np.uint32)
    by_category = {"L": LETTER, "N": LETTER, "M": MARK, "Z": SPACE}
    for code in range(TABLE_SIZE):
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Nd":
            classes[code] = DIGIT
        elif category == "Cc" or code == 0x200B:  # of the format characters the zero-width space alone divides words
            classes[code] = SPACE
        elif category == "Cf":
            classes[code] = IGNORED
        else:
            classes[code] = by_category.get(category[0], OTHER)
        folded = character.casefold()
        folded = folded if len(folded) == 1 else character.lower()
        if len(folded) == 1:  # the few whose lower case is several characters stay as they are
            folds[code] = ord(folded)
    classes[ord("_")] = LETTER
    for first, last in UNSPACED:
        block = classes[first : last + 1]
        block[block == LETTER] = SINGLE
    return classes, folds


def utf8(texts: pa.Array | pa.ChunkedArray) -> Pair:
    """The bytes (uint8) of a string array and the int64 offsets of its n rows in them (n + 1), without copying them.

    A null is an empty text. Raises:
        UserError: if the array is not of strings.
    """
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if pa.types.is_string(texts.type):
        texts = texts.cast(pa.large_string())
    if not pa.types.is_large_string(texts.type):
        raise UserError(f"texts must be an Arrow array of large_string, not of {texts.type}")
    if texts.null_count:
        texts = texts.fill_null("")
    _, offsets_buffer, data_buffer = texts.buffers()
    if not len(texts):
        return np.zeros(1, np.uint8), np.zeros(1, np.int64)
    offsets = np.frombuffer(offsets_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    # An empty buffer is None; numba wants an array all the same.
    data = np.zeros(1, np.uint8) if not data_buffer else np.frombuffer(data_buffer, np.uint8)
    return data, offsets


def room(offsets: np.ndarray) -> int:
    """The most words or tokens that the longest of the texts can have."""
    return int(np.diff(offsets).max(initial=0)) + 1


@jit
def mix(x: np.uint64) -> np.uint64:
    """A bijection of 64-bit numbers. Every output bit depends on every input bit."""
    x = (x ^ (x >> _32)) * MIX
    x = (x ^ (x >> _32)) * MIX
    return x ^ (x >> _32)


@jit
def decode(data: Array, at: int, stop: int) -> tuple[np.int64, int]:
    """The code point that begins at a byte of valid UTF-8, and its number of bytes. Reads no byte beyond `stop`."""
    first = np.int64(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        if at + 1 >= stop:
            return np.int64(0), 1
        return (first & 0x1F) << 6 | np.int64(data[at + 1]) & 0x3F, 2
    if first < 0xF0:
        if at + 2 >= stop:
            return np.int64(0), 1
        return (first & 0x0F) << 12 | (np.int64(data[at + 1]) & 0x3F) << 6 | np.int64(data[at + 2]) & 0x3F, 3
    if at + 3 >= stop:
        return np.int64(0), 1
    high = (first & 0x07) << 18 | (np.int64(data[at + 1]) & 0x3F) << 12
    return high | (np.int64(data[at + 2]) & 0x3F) << 6 | np.int64(data[at + 3]) & 0x3F, 4


@jit
def find_words(data: Array, start: int, stop: int, tables: Pair, marks: bool, hashes: Array, spans: Array) -> int:
    """Write the hash of each word of data[start:stop], and where it lies, and return their number.

    Args:
        data: uint8, valid UTF-8.
        tables: as the function `tables` gives them.
        marks: whether every other character that is not white space is a word too.
        hashes: uint64, written to; at least as long as there can be words (`room`).
        spans: int64 (words, 2), written to: first byte and byte after the last; of no rows where it is not wanted.
    """
    classes, folds = tables
    count, state, begin, end = 0, SPACE, start, start
    code_hash = SEED
    wants_spans = spans.shape[0] > 0
    at = start
    while at < stop:
        code, size = decode(data, at, stop)
        kind = classes[code] if code < TABLE_SIZE else OTHER
        if kind == IGNORED:
            at += size
            continue
        if kind == MARK:  # a part of what it follows; at the beginning of a word it is a letter
            kind = LETTER if state == SPACE else state
            joins = state != SPACE
        else:
            if kind == DIGIT:
                kind = LETTER
            elif kind == OTHER and not marks:
                kind = SPACE
            joins = kind == LETTER and state == LETTER
        if not joins and state != SPACE:
            hashes[count] = mix(code_hash)
            if wants_spans:
                spans[count, 0], spans[count, 1] = begin, end
            count += 1
            code_hash = SEED
        if kind != SPACE:
            if not joins:
                begin = at
            code_hash = (code_hash ^ np.uint64(folds[code] if code < TABLE_SIZE else code)) * CHARACTER
            end = at + size
        state = kind
        at += size
    if state != SPACE:
        hashes[count] = mix(code_hash)
        if wants_spans:
            spans[count, 0], spans[count, 1] = begin, end
        count += 1
    return count


@jit
def new_table(items: int) -> HashTable:
    """A hash table for so many items, all of whose slots are free but for the stamp 0."""
    size = table_mask(items) + 1
    return np.empty(size, np.uint64), np.empty(size, np.int32), np.zeros(size, np.int64)


@jit
def table_mask(items: int) -> int:
    """One less than the power of two that holds so many items half full."""
    size = 16
    while size < 2 * items:
        size *= 2
    return size - 1


@jit
def entry(keys: Array, numbers: Array, stamps: Array, mask: int, stamp: int, key: np.uint64, new: int) -> int:
    """The number of a key in a hash table, of which mask + 1 slots are used. A key that is not there gets the number `new`.

    A slot of another stamp is free. Writing without asking whether to makes the loops over runs twice as fast.
    """
    slot = np.int64(key & np.uint64(mask))
    while stamps[slot] == stamp:
        if keys[slot] == key:
            return numbers[slot]
        slot = (slot + 1) & mask
    keys[slot], numbers[slot], stamps[slot] = key, new, stamp
    return new


@jit
def number_of(table: HashTable, key: np.uint64) -> int:
    """The number of a key in a whole hash table of the stamp 1, or -1."""
    keys, numbers, stamps = table
    mask = keys.shape[0] - 1
    slot = np.int64(key & np.uint64(mask))
    while stamps[slot] == 1:
        if keys[slot] == key:
            return numbers[slot]
        slot = (slot + 1) & mask
    return -1


@jit
def power(length: int) -> np.uint64:
    """ROLL to the power of length - 1: the weight of the oldest of `length` hashes in their rolling hash."""
    weight = np.uint64(1)
    for _ in range(length - 1):
        weight *= ROLL
    return weight


@jit
def rolling(hashes: Array, count: int, length: int, out: Array) -> int:
    """Write the hash of each run of `length` of the first `count` hashes, and return the number of runs.

    Fewer than `length` hashes, but some, make one run of all of them. The hash of a run is a polynomial of its hashes
    modulo 2**64, mixed, so the cost of a run does not depend on its length.
    """
    if count == 0:
        return 0
    length = min(length, count)
    weight, total = power(length), np.uint64(0)
    for i in range(length - 1):
        total = total * ROLL + hashes[i]
    for i in range(length - 1, count):
        total = total * ROLL + hashes[i]
        out[i - length + 1] = mix(total)
        total -= hashes[i - length + 1] * weight
    return count - length + 1
