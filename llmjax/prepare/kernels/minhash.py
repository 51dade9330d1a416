"""MinHash signatures, shingles and the Jaccard similarity of sorted sets."""

import numpy as np

from llmjax.prepare.kernels import jit
from llmjax.prepare.kernels.words import CHARACTER, SEED, Array, Pair, find_words, mix, rolling

_32 = np.uint64(32)
_SMALL = np.uint64(0xFFFFFFFF)


def hash_functions(count: int) -> Pair:
    """Odd multipliers and additions, uint32 (count,), of as many hash functions.

    They are the high bits of SplitMix64 from a constant seed (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom
    Number Generators"): keys that are stored must be the same in every version of NumPy.
    """
    state = np.arange(1, 2 * count + 1, dtype=np.uint64) * SEED
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    numbers = ((state ^ (state >> np.uint64(31))) >> _32).astype(np.uint32)
    return numbers[:count] | np.uint32(1), numbers[count:]


@jit
def band_keys(
    texts: Pair, tables: Pair, functions: Pair, rows: int, words: int, hashes: Array, keys: Array, counts: Array
) -> None:
    """Write the band keys (texts, bands) and the number of words of every text. A text without words has keys of 0.

    Each of bands x rows hash functions is a * x + b modulo 2**32 of the well-mixed shingle x. With 32 bits the loop over
    the functions runs in vector registers and costs less than the search for words.
    """
    (data, offsets), (multipliers, additions) = texts, functions
    no_spans = np.zeros((0, 2), np.int64)
    shingles = np.empty_like(hashes)
    minima = np.empty(multipliers.shape[0], np.uint32)
    for text in range(offsets.shape[0] - 1):
        count = find_words(data, offsets[text], offsets[text + 1], tables, False, hashes, no_spans)
        counts[text] = count
        if count == 0:
            keys[text, :] = 0
            continue
        number = rolling(hashes, count, words, shingles)
        minima[:] = 0xFFFFFFFF
        for i in range(number):
            x = np.uint32(shingles[i] & _SMALL)
            for j in range(multipliers.shape[0]):
                value = np.uint32(np.uint32(x * multipliers[j]) + additions[j])
                minima[j] = min(minima[j], value)
        for band in range(keys.shape[1]):
            key = SEED + np.uint64(band)
            for j in range(band * rows, (band + 1) * rows):
                key = (mix(key) ^ np.uint64(minima[j])) * CHARACTER
            keys[text, band] = mix(key)


@jit
def text_shingles(texts: Pair, tables: Pair, words: int, hashes: Array, out: Array, out_offsets: Array) -> None:
    """Write the shingle hashes of every text, unsorted, one text after the other, and where each text begins."""
    data, offsets = texts
    no_spans = np.zeros((0, 2), np.int64)
    at = 0
    for text in range(offsets.shape[0] - 1):
        count = find_words(data, offsets[text], offsets[text + 1], tables, False, hashes, no_spans)
        at += rolling(hashes, count, words, out[at:])
        out_offsets[text + 1] = at


@jit
def unique_sorted(values: Array, offsets: Array) -> int:
    """Drop repeats within every sorted segment of `values`, in place, and adapt the offsets. Returns the number left."""
    at = 0
    begin = offsets[0]
    for segment in range(offsets.shape[0] - 1):
        end = offsets[segment + 1]
        for i in range(begin, end):
            if i == begin or values[i] != values[i - 1]:
                # `at` is never ahead of i, so values[i - 1] is read before it is written over.
                values[at] = values[i]
                at += 1
        begin = end
        offsets[segment + 1] = at
    return at


@jit
def common(values: Array, a: int, a_end: int, b: int, b_end: int) -> int:
    """How many numbers two sorted segments without repeats have in common."""
    count = 0
    while a < a_end and b < b_end:
        x, y = values[a], values[b]
        count += x == y
        a += x <= y
        b += y <= x
    return count


@jit
def jaccard_rows(values: Array, offsets: Array, a_rows: Array, b_rows: Array, out: Array) -> None:
    """Write the Jaccard similarity of the sets of rows a and b, pair by pair; 0 for two empty sets."""
    for pair in range(a_rows.shape[0]):
        a, a_end = offsets[a_rows[pair]], offsets[a_rows[pair] + 1]
        b, b_end = offsets[b_rows[pair]], offsets[b_rows[pair] + 1]
        both = common(values, a, a_end, b, b_end)
        union = (a_end - a) + (b_end - b) - both
        out[pair] = both / union if union else 0.0


@jit
def keep_greedily(starts: Array, neighbours: Array, jaccard: Array, kept: Array, of: Array, best: Array) -> None:
    """Keep nodes in order, unless a kept node before is a neighbour. Note the most similar kept neighbour.

    Args:
        starts, neighbours, jaccard: edges to smaller nodes, as rows of a sparse matrix.
        kept, of, best: written to: whether node i is kept, the kept node that it duplicates or -1, and how similar.
    """
    for node in range(starts.shape[0] - 1):
        kept[node], of[node], best[node] = True, -1, 0.0
        for i in range(starts[node], starts[node + 1]):
            other = neighbours[i]
            if kept[other] and (jaccard[i] > best[node] or (jaccard[i] == best[node] and other < of[node])):
                kept[node], of[node], best[node] = False, other, jaccard[i]
