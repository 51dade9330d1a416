"""Lines and paragraphs, and windows of tokens, which are found through their smallest grams."""

import numpy as np

from llmjax.prepare.kernels import jit
from llmjax.prepare.kernels.words import (
    CHARACTER,
    DIGIT,
    IGNORED,
    LETTER,
    MARK,
    OTHER,
    ROLL,
    SEED,
    SINGLE,
    SPACE,
    TABLE_SIZE,
    Array,
    Pair,
    decode,
    find_words,
    mix,
    power,
    rolling,
)  # fmt: skip


@jit
def count_byte(data: Array, start: int, stop: int, byte: int) -> int:
    """How often a byte occurs in data[start:stop]."""
    count = 0
    for i in range(start, stop):
        count += data[i] == byte
    return count


@jit
def units(
    texts: Pair, classes: Array, paragraphs: bool, minimum_words: int, rows: Array, spans: Array, hashes: Array
) -> int:
    """Write row, trimmed span within the row's text and 128-bit hash of lines or paragraphs, and return their number."""
    data, offsets = texts
    count = 0
    for text in range(offsets.shape[0] - 1):
        start, stop = offsets[text], offsets[text + 1]
        begin, end, number, previous = -1, -1, 0, SPACE
        line_is_blank = True
        at = start
        while at <= stop:
            # The end of the text counts as two line ends, which end a paragraph too.
            code, size = decode(data, at, stop) if at < stop else (10, 1)
            at += size
            if code == 10:
                previous = SPACE
                if begin >= 0 and (not paragraphs or line_is_blank or at > stop):
                    if number >= minimum_words:
                        a, b = SEED, CHARACTER
                        for i in range(begin, end):
                            a = (a ^ np.uint64(data[i])) * CHARACTER
                            b = (b ^ np.uint64(data[i])) * ROLL
                        rows[count] = text
                        spans[count, 0], spans[count, 1] = begin - start, end - start
                        hashes[count, 0], hashes[count, 1] = mix(a), mix(b)
                        count += 1
                    begin, end, number = -1, -1, 0
                line_is_blank = True
                continue
            kind = classes[code] if code < TABLE_SIZE else OTHER
            if kind == SPACE:
                previous = SPACE
                continue
            if begin < 0:
                begin = at - size
            end = at
            line_is_blank = False
            if kind in (MARK, IGNORED):
                continue
            kind = LETTER if kind == DIGIT else kind
            number += kind == SINGLE or (kind == LETTER and previous != LETTER)
            previous = kind
    return count


@jit
def _grams(data: Array, start: int, stop: int, tables: Pair, gram: int, hashes: Array, out: Array) -> tuple[int, int]:
    """Write the tokens of a text to `hashes`, and the hashes of their runs of `gram` to `out`. Returns both numbers."""
    count = find_words(data, start, stop, tables, True, hashes, np.zeros((0, 2), np.int64))
    return count, (rolling(hashes, count, gram, out) if count >= gram else 0)


@jit
def anchors(
    texts: Pair, tables: Pair, tokens: int, gram: int, hashes: Array, rows: Array, positions: Array, values: Array
) -> int:
    """Write row, token position and hash of every gram that is a smallest one of some window, while there is room.

    Returns the number of such grams. A gram is smallest in some window if, and only if, the run around it in which no
    gram is smaller fills a window. Equal smallest grams of one window all count: otherwise a window that overlaps its own
    copy could be missed.
    """
    data, offsets = texts
    grams = np.empty_like(hashes)
    smaller_before = np.empty(hashes.shape[0], np.int64)
    stack = np.empty(hashes.shape[0], np.int64)
    width = tokens - gram + 1
    total = 0
    for text in range(offsets.shape[0] - 1):
        count, number = _grams(data, offsets[text], offsets[text + 1], tables, gram, hashes, grams)
        if count < tokens:
            continue
        top = 0
        for i in range(number + 1):
            while top and (i == number or grams[i] < grams[stack[top - 1]]):
                top -= 1
                at = stack[top]
                if i - smaller_before[at] - 1 >= width:
                    if total < rows.shape[0]:
                        rows[total], positions[total], values[total] = text, at, grams[at]
                    total += 1
            if i < number:
                if top and grams[stack[top - 1]] == grams[i]:
                    smaller_before[i] = smaller_before[stack[top - 1]]
                else:
                    smaller_before[i] = stack[top - 1] if top else -1
                stack[top] = i
                top += 1
    return total


@jit
def repeated_windows(
    texts: Pair,
    tables: Pair,
    tokens: int,
    gram: int,
    repeated: Array,
    hashes: Array,
    rows: Array,
    starts: Array,
    keys: Array,
) -> int:
    """Write row, first token and hash of the windows whose smallest gram is among `repeated` (sorted, uint64).

    Writes while there is room, and returns the number of such windows.
    """
    data, offsets = texts
    grams = np.empty_like(hashes)
    queue = np.empty(hashes.shape[0], np.int64)  # positions of grams from the window's smallest on, rising
    width = tokens - gram + 1
    weight = power(tokens)
    total = 0
    for text in range(offsets.shape[0] - 1):
        count, number = _grams(data, offsets[text], offsets[text + 1], tables, gram, hashes, grams)
        if count < tokens:
            continue
        head, tail = 0, 0
        known, is_repeated = np.uint64(0), False
        window_hash = np.uint64(0)
        for i in range(tokens - 1):
            window_hash = window_hash * ROLL + hashes[i]
        for i in range(number):
            while tail > head and grams[queue[tail - 1]] > grams[i]:
                tail -= 1
            queue[tail] = i
            tail += 1
            if queue[head] <= i - width:
                head += 1
            start = i - width + 1
            if start < 0:
                continue
            window_hash = window_hash * ROLL + hashes[start + tokens - 1]
            smallest = grams[queue[head]]
            if start == 0 or smallest != known:
                known = smallest
                place = np.searchsorted(repeated, smallest)
                is_repeated = place < repeated.shape[0] and repeated[place] == smallest
            if is_repeated:
                if total < rows.shape[0]:
                    rows[total], starts[total], keys[total] = text, start, mix(window_hash)
                total += 1
            window_hash -= hashes[start] * weight
    return total


@jit
def window_spans(
    texts: Pair,
    tables: Pair,
    tokens: int,
    rows: Array,
    starts: Array,
    hashes: Array,
    spans: Array,
    out_rows: Array,
    out: Array,
) -> int:
    """Write row and bytes within the row's text of the union of windows, given sorted by (row, start).

    Returns the number of spans, or -1 if a window does not lie within its text.
    """
    data, offsets = texts
    total, at = 0, 0
    while at < rows.shape[0]:
        text = rows[at]
        base = offsets[text]
        count = find_words(data, base, offsets[text + 1], tables, True, hashes, spans)
        first, last = starts[at], starts[at] + tokens
        while at < rows.shape[0] and rows[at] == text:
            if starts[at] < 0 or starts[at] + tokens > count:
                return -1
            if starts[at] > last:
                out_rows[total], out[total, 0], out[total, 1] = text, spans[first, 0] - base, spans[last - 1, 1] - base
                total += 1
                first = starts[at]
            last = starts[at] + tokens
            at += 1
        out_rows[total], out[total, 0], out[total, 1] = text, spans[first, 0] - base, spans[last - 1, 1] - base
        total += 1
    return total


FILTER_BITS = 20


def make_filter(hashes: np.ndarray) -> np.ndarray:
    """A bitmap, uint8 (128 KB), in which each hash sets the bit of its highest bits: most other hashes miss it."""
    bits = np.zeros(1 << FILTER_BITS, bool)
    bits[(hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)] = True
    return np.packbits(bits, bitorder="little")


@jit
def _find(sorted_hashes: Array, value: np.uint64) -> int:
    """The first place of a value, or -1."""
    low, high = 0, sorted_hashes.shape[0]
    while low < high:
        middle = (low + high) // 2
        if sorted_hashes[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low if low < sorted_hashes.shape[0] and sorted_hashes[low] == value else -1


@jit
def matches(
    texts: Pair,
    tables: Pair,
    grams: Array,
    width: int,
    present: Array,
    hashes: Array,
    rows: Array,
    starts: Array,
    places: Array,
) -> int:
    """Write row, first word and place in the sorted `grams` of the runs of words that are among them.

    Writes while there is room, and returns the number of such runs.
    """
    data, offsets = texts
    no_spans = np.zeros((0, 2), np.int64)
    runs = np.empty_like(hashes)
    shift = np.uint64(64 - FILTER_BITS)
    total = 0
    for text in range(offsets.shape[0] - 1):
        count = find_words(data, offsets[text], offsets[text + 1], tables, False, hashes, no_spans)
        if count < width:
            continue
        for i in range(rolling(hashes, count, width, runs)):
            bit = np.int64(runs[i] >> shift)
            if (present[bit >> 3] >> (bit & 7)) & 1:
                place = _find(grams, runs[i])
                if place >= 0:
                    if total < rows.shape[0]:
                        rows[total], starts[total], places[total] = text, i, place
                    total += 1
    return total
