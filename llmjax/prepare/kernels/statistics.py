"""The counts of a text that the Gopher and FineWeb rules need, in one pass over its bytes.

All lengths are in characters (code points), as the published rules count them. Of a text longer than LONGEST_TEXT bytes only
the beginning counts, so that the memory has a bound.
"""

from typing import Literal

import numpy as np
import pyarrow as pa

from llmjax.errors import UserError
from llmjax.prepare import rules
from llmjax.prepare.kernels import english, jit
from llmjax.prepare.kernels.english import (
    ALPHABETIC,
    BLANK,
    LINE_END,
    SYMBOL,
    TERMINAL,
    characters_hash,
    english_tokens,
    special_pieces,
    word_list,
    word_table,
)  # fmt: skip
from llmjax.prepare.kernels.words import (
    TABLE_SIZE,
    Array,
    HashTable,
    Pair,
    decode,
    entry,
    find_words,
    new_table,
    number_of,
    rolling,
    room,
    table_mask,
    tables,
    utf8,
)  # fmt: skip

NAMES = (
    "characters",
    "words",
    "plain_words",  # not of symbols alone
    "plain_characters",  # in those
    "alphabetic_words",
    "stop_words",  # different ones
    "hashes",
    "ellipses",
    "lines",  # by any line end of Unicode
    "bullet_lines",
    "ellipsis_lines",
    "paragraphs",
    "repeated_paragraphs",
    "repeated_paragraph_characters",
    "pieces",  # lines as Gopher's repetition counts them: what runs of line feeds part
    "repeated_pieces",
    "repeated_piece_characters",
    "full_lines",  # by line feed, not blank
    "terminal_lines",
    "short_lines",
    "repeated_full_characters",
    "line_feeds",
    *(f"top_{n}" for n in range(2, 5)),
    *(f"repeated_{n}" for n in range(5, 11)),
)
LONGEST_TEXT = 4_000_000  # bytes of a text that count
COLUMN = {name: i for i, name in enumerate(NAMES)}
WordKind = Literal["unicode", "spacy_compat"]


def statistics(
    texts: pa.LargeStringArray, *, words: WordKind = "unicode", short_line: int = 30
) -> dict[str, np.ndarray]:
    """Counts for every text, float64 (texts,) by name.

    Args:
        words: runs of letters and digits of any script ("unicode"), or tokens much as spaCy's English ones, among them
            punctuation ("spacy_compat"), with which the published thresholds were found.
        short_line: most characters of a short line.

    Raises:
        UserError: for another kind of words.
    """
    if words not in ("unicode", "spacy_compat"):
        raise UserError(f"words must be 'unicode' or 'spacy_compat', not {words!r}")
    given = utf8(texts)
    out = np.zeros((len(texts), len(NAMES)), np.float64)
    most = min(room(given[1]), LONGEST_TEXT + 1)
    is_english, stop_words = words == "spacy_compat", word_list(rules.STOP_WORDS)
    words_as_they_are = tables("nothing")
    _statistics(
        given, english.properties(), words_as_they_are, is_english, special_pieces(), stop_words, short_line, most, out
    )
    return {name: out[:, i] for name, i in COLUMN.items()}


_last: tuple[pa.Array, object, np.ndarray, dict[str, np.ndarray]] | None = None


def shared_statistics(
    texts: pa.LargeStringArray, rows: np.ndarray, *, words: WordKind, short_line: int
) -> dict[str, np.ndarray]:
    """`statistics` of some rows, remembered for the last array: each rule set asks about rows that the one before kept.

    The array is held, so that no other texts can get its memory.
    """
    global _last
    addresses = tuple(buffer.address if buffer else 0 for buffer in texts.buffers())
    key = (addresses, texts.offset, len(texts), words, short_line)
    last = _last
    if last is None or last[1] != key or not last[2][rows].all():
        found = statistics(texts.take(pa.array(rows)), words=words, short_line=short_line)
        is_known, places = np.zeros(len(texts), bool), np.zeros(len(texts), np.int64)
        is_known[rows], places[rows] = True, np.arange(len(rows))
        last = (texts, key, is_known, {name: values[places] for name, values in found.items()})
        _last = last
    return {name: values[rows] for name, values in last[3].items()}


@jit
def _statistics(
    texts: Pair,
    properties: Array,
    tables: Pair,
    is_english: bool,
    lists: tuple[Pair, Array, Pair],
    stop_words: Pair,
    short_line: int,
    most: int,
    out: Array,
) -> None:
    """Write the counts of every text; the only kernel of this module and of english.py that Python calls."""
    (data, offsets), (special_words, parts, unit_words) = texts, lists
    codes, bits = np.empty(most, np.int32), np.empty(most, np.uint32)
    spans, stack = np.empty((most + 2, 2), np.int64), np.empty((most if is_english else 0, 2), np.int64)
    hashes, grams = np.empty(most, np.uint64), np.empty(most, np.uint64)
    before = np.zeros(most + 1, np.int64)  # characters of all words before each
    counts, lengths = np.empty(most, np.int64), np.empty(most, np.int64)
    specials, units, stops = word_table(special_words), word_table(unit_words), word_table(stop_words)
    table, stamp = new_table(1024), 0
    for text in range(offsets.shape[0] - 1):
        row = out[text]
        start, stop = offsets[text], offsets[text + 1]
        if stop - start >= most:
            stop = start + most - 1
            while data[stop] & 0xC0 == 0x80:  # within a character
                stop -= 1
        count = _decoded(data, start, stop, properties, codes, bits)
        row[0] = count
        if is_english:
            words = english_tokens(codes, bits, count, specials, parts, units, spans, stack)
        else:
            words = find_words(data, start, stop, tables, False, hashes, spans)
            _in_characters(data, start, stop, words, spans)
        if table_mask(max(words, count // 2)) >= table[0].shape[0]:
            table, stamp = new_table(max(words, count // 2)), 0
        _words(codes, bits, words, spans, stops, hashes, before, row)
        _characters_and_lines(codes, bits, count, row)
        stamp += 2
        _pieces(codes, bits, count, short_line, table, table_mask(count // 2), stamp, row)
        _repetition(words, hashes, before, grams, counts, lengths, table, stamp, row)
        stamp += 9


@jit
def _decoded(data: Array, at: int, stop: int, properties: Array, codes: Array, bits: Array) -> int:
    """Write the code points of data[at:stop] and their properties; returns their number."""
    count = 0
    while at < stop:
        code, size = decode(data, at, stop)
        codes[count] = code
        bits[count] = properties[code] if code < TABLE_SIZE else 0
        count += 1
        at += size
    return count


@jit
def _in_characters(data: Array, start: int, stop: int, words: int, spans: Array) -> None:
    """Turn spans of bytes into spans of characters of data[start:stop], in place."""
    word, is_inside, characters = 0, False, 0
    for at in range(start, stop + 1):
        if at < stop and data[at] & 0xC0 == 0x80:
            continue
        if is_inside and at == spans[word, 1]:
            spans[word, 1] = characters
            is_inside, word = False, word + 1
        if not is_inside and word < words and at == spans[word, 0]:
            spans[word, 0] = characters
            is_inside = True
        characters += 1


@jit
def _words(
    codes: Array, bits: Array, words: int, spans: Array, stops: HashTable, hashes: Array, before: Array, row: Array
) -> None:
    """Count words by kind; write their hashes, and the characters of all words before each."""
    found_stop_words = 0
    for i in range(words):
        start, end = spans[i, 0], spans[i, 1]
        is_plain, is_alphabetic = False, False
        for j in range(start, end):
            is_plain = is_plain or not bits[j] & SYMBOL
            is_alphabetic = is_alphabetic or bits[j] & ALPHABETIC != 0
        hashes[i] = characters_hash(codes, start, end)
        before[i + 1] = before[i] + end - start
        row[2] += is_plain
        row[3] += (end - start) if is_plain else 0
        row[4] += is_alphabetic
        if end - start <= 4:
            stop_word = number_of(stops, hashes[i])
            if stop_word >= 0:
                found_stop_words |= 1 << stop_word
    row[1] = words
    while found_stop_words:
        row[5] += found_stop_words & 1
        found_stop_words >>= 1


@jit
def _repetition(
    words: int,
    hashes: Array,
    before: Array,
    grams: Array,
    counts: Array,
    lengths: Array,
    table: HashTable,
    stamp: int,
    row: Array,
) -> None:
    """Characters in the most frequent run of 2 to 4 words, and in runs of 5 to 10 words that stood before."""
    mask, (keys, numbers, stamps) = table_mask(words), table
    for n in range(2, min(5, words + 1)):
        stamp += 1
        entries = 0
        for i in range(rolling(hashes, words, n, grams)):
            number = entry(keys, numbers, stamps, mask, stamp, grams[i], entries)
            if number == entries:
                counts[number], lengths[number] = 1, before[i + n] - before[i] + n - 1
                entries += 1
            else:
                counts[number] += 1
        best = 0
        for number in range(entries):  # of equally frequent runs the first counts
            if counts[number] > counts[best]:
                best = number
        row[20 + n] = counts[best] * lengths[best]
    for n in range(5, min(11, words + 1)):
        stamp += 1
        number = rolling(hashes, words, n, grams)
        i, repeated = 0, 0
        while i < number:
            if entry(keys, numbers, stamps, mask, stamp, grams[i], i) == i:
                i += 1
            else:
                repeated += before[i + n] - before[i]
                i += n
        row[20 + n] = repeated


@jit
def _characters_and_lines(codes: Array, bits: Array, count: int, row: Array) -> None:
    """Hashes, ellipses, and lines as Python's str.splitlines cuts them."""
    dots, line_has_begun, is_bullet, last = 0, False, False, -1
    for i in range(count + 1):
        code = codes[i] if i < count else 10
        dots = dots + 1 if code == 46 else 0
        row[6] += code == 35
        row[7] += code == 0x2026 or (code == 46 and dots % 3 == 0)
        row[21] += code == 10 and i < count
        if i == count or bits[i] & LINE_END:
            is_second_half = i < count and code == 10 and i > 0 and codes[i - 1] == 13
            if not is_second_half and (i < count or (count and not bits[count - 1] & LINE_END)):
                row[8] += 1
                row[9] += is_bullet
                if last >= 0:
                    three = last >= 2 and codes[last] == 46 and codes[last - 1] == 46 and codes[last - 2] == 46
                    row[10] += codes[last] == 0x2026 or three
            line_has_begun, is_bullet, last = False, False, -1
        elif not bits[i] & BLANK:
            if not line_has_begun:
                is_bullet = code == 0x2022 or code == 45
                line_has_begun = True
            last = i


@jit
def _pieces(
    codes: Array, bits: Array, count: int, short_line: int, table: HashTable, mask: int, stamp: int, row: Array
) -> None:
    """Lines by line feeds and paragraphs by two or more, and what is repeated of them."""
    number, at = 0, 0
    keys, numbers, stamps = table
    if count:
        # Line feeds at the two ends make empty lines, as in re.split.
        at_both_ends = codes[0] == 10 and codes[count - 1] == 10
        row[14] = (codes[0] == 10) + (codes[count - 1] == 10)
        row[15] = at_both_ends
    while at < count:
        if codes[at] == 10:
            at += 1
            continue
        start, is_blank = at, True
        while at < count and codes[at] != 10:
            is_blank = is_blank and bits[at] & BLANK != 0
            at += 1
        is_repeated = entry(keys, numbers, stamps, mask, stamp - 1, characters_hash(codes, start, at), number) != number
        number += 1
        row[14] += 1
        if is_repeated:
            row[15] += 1
            row[16] += at - start
        if not is_blank:
            row[17] += 1
            row[18] += bits[at - 1] & TERMINAL != 0
            row[19] += at - start <= short_line
            row[20] += (at - start) if is_repeated else 0
    first, last = 0, count
    while first < last and bits[first] & BLANK:
        first += 1
    while last > first and bits[last - 1] & BLANK:
        last -= 1
    at, number = first, 0
    while at < last:
        start = at
        while at < last and not (codes[at] == 10 and codes[at + 1] == 10):
            at += 1
        if entry(keys, numbers, stamps, mask, stamp, characters_hash(codes, start, at), number) != number:
            row[12] += 1
            row[13] += at - start
        number += 1
        while at < last and codes[at] == 10:
            at += 1
    row[11] = max(number, 1)
