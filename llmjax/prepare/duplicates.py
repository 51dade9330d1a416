"""Near-duplicate documents (MinHash, verified) and repeated lines and paragraphs: the pure functions of both.

Near duplicates are found in the steps below; between them stands one grouping by key, which DuckDB or Spark does on
numbers alone. `ordinal` is an int64 name of a document whose order is its priority: of two duplicates the smaller stays.

1. `near_keys`: every text to its band keys. Two texts of Jaccard similarity J share a key with 1 - (1 - J^rows)^bands
   (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3).
2. Rows (key, ordinal), grouped by key, sorted by (key, ordinal), to `band_edges`: pairs worth comparing, at most two a
   row, so that a template of which there are thousands costs no more than as many other documents.
3. `shingles` of the documents of those pairs, joined to the pairs, to `jaccard_of_stars` or `jaccard_of_pairs`: the
   exact similarity of each pair.
4. `components`: true connected components over the pairs that are similar enough, and what to keep: a document is
   removed only if it is that similar to a document that stays. So of a chain A-B-C with A unlike C, A and C stay.
5. `open_pairs`: pairs that may be similar but were never compared, because a document between them was removed. Compare
   them (3), add them to the pairs, and decide again (4). One such round finds nearly all, and each is bounded by the
   number of pairs. For survivors of heavy groups `band_edges` may be run again on the rows of kept documents.

As every removal is verified, its precision is that of arithmetic; its recall is that of the bands.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from llmjax.errors import UserError
from llmjax.prepare.kernels import minhash, windows
from llmjax.prepare.kernels.words import room, tables, utf8

VECTOR = (
    16  # hash functions are rounded up to full vector registers; those beyond bands x rows are computed for nothing
)
MINIMUM_UNIT_WORDS = 4  # a shorter line or paragraph ("Contents", "Read more") repeats without being copied


def near_keys(
    texts: pa.LargeStringArray, *, bands: int = 14, rows: int = 8, words: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """The MinHash band keys of texts: what near-duplicates have in common.

    Words are case-folded and every digit counts as the same one; a text of fewer than `words` words has one shingle of
    all of them.

    Args:
        bands, rows: bands of hash functions and functions in each; 14 x 8 finds half of the pairs at J = 0.72.
        words: words of a shingle.

    Returns:
        keys, uint64 (texts, bands), and the number of words, int32 (texts,). A text without a word has keys of 0, which
        mean nothing: leave its rows out.

    Raises:
        UserError: for numbers below 1 or texts that are not strings.
    """
    _check(bands=bands, rows=rows, words=words)
    data, offsets = utf8(texts)
    functions = -(-bands * rows // VECTOR) * VECTOR
    multipliers, additions = minhash.hash_functions(functions)
    keys_NB = np.empty((len(texts), bands), np.uint64)
    words_N = np.empty(len(texts), np.int32)
    hashes = np.empty(room(offsets), np.uint64)
    minhash.band_keys(data, offsets, *tables(), multipliers, additions, rows, words, hashes, keys_NB, words_N)
    return keys_NB, words_N


def shingles(texts: pa.LargeStringArray, *, words: int = 5) -> pa.LargeListArray:
    """The sorted hashes, each once, of the word shingles of every text: the sets whose similarity is meant above."""
    _check(words=words)
    data, offsets = utf8(texts)
    bytes_total = int(offsets[-1] - offsets[0])
    flat = np.empty(bytes_total // 2 + len(texts) + 1, np.uint64)  # a word and what divides it from the next: two bytes
    ends = np.zeros(len(texts) + 1, np.int64)
    minhash.text_shingles(data, offsets, *tables(), words, np.empty(room(offsets), np.uint64), flat, ends)
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        flat[begin:end].sort()
    total = minhash.unique_sorted(flat, ends)
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat[:total].copy()))


def band_edges(keys: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs to compare: each document of a group with the group's first, and with the one before it.

    Args:
        keys: uint64 (rows,), sorted; a group of equal keys must be complete, several groups may be given at once.
        documents: int64 (rows,), ordinals, sorted within each group.

    Returns:
        centers and members, int64 (pairs,), center < member, sorted and each pair once within this call.

    Raises:
        UserError: if the rows are not sorted.
    """
    keys, documents = np.asarray(keys, np.uint64), np.asarray(documents, np.int64)
    same = keys[1:] == keys[:-1]
    if np.any(keys[1:] < keys[:-1]) or np.any(same & (documents[1:] < documents[:-1])):
        raise UserError("band_edges needs rows sorted by key, then by document")
    rows = np.flatnonzero(same) + 1
    group_start = np.zeros(len(keys), np.int64)
    group_start[1:] = np.where(same, 0, np.arange(1, len(keys)))
    first = documents[np.maximum.accumulate(group_start)[rows]]
    pairs = np.concatenate([np.stack([first, documents[rows]], 1), np.stack([documents[rows - 1], documents[rows]], 1)])
    return _unique_pairs(pairs[pairs[:, 0] != pairs[:, 1]])


def jaccard_of_stars(centers: np.ndarray, members: np.ndarray, shingles: pa.LargeListArray) -> np.ndarray:
    """The similarity of each row's document to the center of its group, float64 (rows,); 1 for the center's own row.

    Args:
        centers: int64 (rows,), rows of the same center together.
        members: int64 (rows,); the center is a member of its own group, in any of its rows.
        shingles: of each row's member, as `shingles` gives them.

    Raises:
        UserError: if a group lacks the row of its center.
    """
    centers, members = np.asarray(centers, np.int64), np.asarray(members, np.int64)
    values, offsets = _lists(shingles)
    begins = np.flatnonzero(np.diff(centers, prepend=centers[:1] - 1)) if len(centers) else np.empty(0, np.int64)
    group = np.zeros(len(centers), np.int64)
    group[begins[1:]] = 1
    group = np.cumsum(group)
    center_rows = np.full(len(begins), -1, np.int64)
    own = np.flatnonzero(centers == members)
    center_rows[group[own]] = own
    if np.any(center_rows < 0):
        missing = centers[begins[np.flatnonzero(center_rows < 0)[0]]]
        raise UserError(f"the group of document {missing} has no row with the shingles of {missing} itself")
    result = np.empty(len(centers), np.float64)
    minhash.jaccard_rows(values, offsets, center_rows[group], np.arange(len(centers)), result)
    result[own] = 1.0
    return result


def jaccard_of_pairs(a: np.ndarray, b: np.ndarray, ordinals: np.ndarray, shingles: pa.LargeListArray) -> np.ndarray:
    """The similarity of the documents a and b, float64 (pairs,); `ordinals`, sorted, name the rows of `shingles`.

    Raises:
        UserError: if a document of a pair is not among the ordinals.
    """
    ordinals = np.asarray(ordinals, np.int64)
    values, offsets = _lists(shingles)
    rows = []
    for side in (np.asarray(a, np.int64), np.asarray(b, np.int64)):
        row = np.minimum(np.searchsorted(ordinals, side), max(0, len(ordinals) - 1))
        if len(side) and (not len(ordinals) or np.any(ordinals[row] != side)):
            raise UserError("a pair names a document whose shingles are not given")
        rows.append(row)
    result = np.empty(len(rows[0]), np.float64)
    minhash.jaccard_rows(values, offsets, rows[0], rows[1], result)
    return result


def components(
    edges_a: np.ndarray,
    edges_b: np.ndarray,
    jaccard: np.ndarray,
    ordinals: Sequence[int] | np.ndarray | None = None,
    *,
    threshold: float = 0.7,
) -> pa.Table:
    """Connected components of the pairs that are similar enough, and which documents stay.

    In the order of the ordinals a document stays unless a pair makes it at least `threshold` similar to one that
    stays. Pairs may be given in any order, either way round, and several times.

    Args:
        edges_a, edges_b: int64 (pairs,).
        jaccard: float64 (pairs,), their exact similarity.
        ordinals: documents to list, whether or not a pair names them; by default those of pairs similar enough.

    Returns:
        A table sorted by ordinal (int64): root (int64, the smallest ordinal of its component), kept (bool), of (int64,
        the document that stays in its place, itself if kept), jaccard (float64, to that document).
    """
    from scipy import sparse  # takes long to import

    a, b, jaccard = np.asarray(edges_a, np.int64), np.asarray(edges_b, np.int64), np.asarray(jaccard, np.float64)
    similar = (jaccard >= threshold) & (a != b)
    a, b, jaccard = np.minimum(a, b)[similar], np.maximum(a, b)[similar], jaccard[similar]
    listed = np.empty(0, np.int64) if ordinals is None else np.asarray(ordinals, np.int64)
    nodes = np.unique(np.concatenate([a, b, listed]))
    small, large = np.searchsorted(nodes, a), np.searchsorted(nodes, b)
    order = np.lexsort((small, large))
    small, large, jaccard = small[order], large[order], jaccard[order]
    starts = np.searchsorted(large, np.arange(len(nodes) + 1))

    graph = sparse.csr_array((np.ones(len(small), np.int8), (small, large)), shape=(len(nodes), len(nodes)))
    number, labels = sparse.csgraph.connected_components(graph, directed=False)
    roots = np.full(number, len(nodes), np.int64)
    np.minimum.at(roots, labels, np.arange(len(nodes)))

    kept, of, best = np.empty(len(nodes), bool), np.empty(len(nodes), np.int64), np.empty(len(nodes), np.float64)
    minhash.keep_greedily(starts, small, jaccard, kept, of, best)
    return pa.table(
        {
            "ordinal": nodes,
            "root": nodes[roots[labels]],
            "kept": kept,
            "of": nodes[np.where(kept, np.arange(len(nodes)), of)],
            "jaccard": np.where(kept, 1.0, best),
        }
    )


def open_pairs(
    edges_a: np.ndarray, edges_b: np.ndarray, jaccard: np.ndarray, decided: pa.Table, *, threshold: float = 0.7
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of kept documents that were never compared although a removed document is similar to both.

    The first of a pair is the document for which the removed one went; the second is kept and similar to the removed
    one. Takes what `components` took and what it decided.

    Returns:
        a < b, int64 (pairs,), sorted, at most as many as there are edges.
    """
    a, b = np.asarray(edges_a, np.int64), np.asarray(edges_b, np.int64)
    near = np.asarray(jaccard) >= threshold
    ordinals, kept = decided["ordinal"].to_numpy(), decided["kept"].to_numpy()
    of = decided["of"].to_numpy()
    if not len(ordinals) or not near.any():
        return np.empty(0, np.int64), np.empty(0, np.int64)
    candidates = []
    for removed, other in ((a[near], b[near]), (b[near], a[near])):
        at, other_at = np.searchsorted(ordinals, removed), np.searchsorted(ordinals, other)
        open_ = ~kept[at] & kept[other_at] & (of[at] != other)
        candidates.append(np.stack([of[at][open_], other[open_]], 1))
    pairs = np.sort(np.concatenate(candidates), axis=1)
    pairs = np.stack(_unique_pairs(pairs), 1)
    known = np.stack(_unique_pairs(np.sort(np.stack([a, b], 1), axis=1)), 1)
    return _unique_pairs(pairs[~_among(pairs, known)])


def unit_keys(
    texts: pa.LargeStringArray, unit: Literal["line", "paragraph"], *, minimum_words: int = MINIMUM_UNIT_WORDS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lines, or paragraphs (parted by a line without a character), and a hash of each, white space around it aside.

    Units of fewer than `minimum_words` words are left out.

    Returns:
        row (int64), start and stop (int64, bytes within the row's text, white space around it not included) and hash
        (uint64 (units, 2), 128 bits of the exact bytes); in the order of the texts.
    """
    if unit not in ("line", "paragraph"):
        raise UserError(f"unit must be 'line' or 'paragraph', not {unit!r}")
    data, offsets = utf8(texts)
    most = int(windows.count_byte(data, offsets[0], offsets[-1], 10)) + len(texts)
    rows, spans = np.empty(most, np.int64), np.empty((most, 2), np.int64)
    hashes = np.empty((most, 2), np.uint64)
    count = windows.units(data, offsets, tables()[0], unit == "paragraph", minimum_words, rows, spans, hashes)
    return rows[:count], spans[:count, 0], spans[:count, 1], hashes[:count]


def remove_spans(
    texts: pa.LargeStringArray, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> pa.LargeStringArray:
    """The texts without some byte spans, which may overlap and come in any order.

    Where something was cut out, white space around it shrinks to the wider of what stood on its two sides: as many
    line ends (at most two) and the indentation of what follows, or one space.

    Args:
        rows, starts, stops: int64 (spans,); bytes within the text of the row, at the borders of characters.
    """
    rows, starts, stops = (np.asarray(x, np.int64) for x in (rows, starts, stops))
    if not len(rows):
        return texts
    order = np.lexsort((stops, starts, rows))
    changed: dict[int, list[tuple[int, int]]] = {}
    for row, start, stop in zip(rows[order].tolist(), starts[order].tolist(), stops[order].tolist(), strict=True):
        spans = changed.setdefault(row, [])
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    pieces, at = [], 0
    for row, spans in sorted(changed.items()):
        text = texts[row].as_py()
        pieces.append(texts.slice(at, row - at))
        pieces.append(pa.array([None if text is None else _cut(text.encode(), spans).decode()], pa.large_string()))
        at = row + 1
    pieces.append(texts.slice(at))
    return pa.concat_arrays(pieces)


def _cut(text: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    """The text without spans that are sorted and apart."""
    result: list[bytes] = []
    blanks: list[bytes] = []  # white space since the last characters that stay, a piece for each side of each cut
    at = 0
    for start, stop in [*spans, (len(text), len(text))]:
        piece = text[at:start]
        at = stop
        left = piece.lstrip()
        core = left.rstrip()
        blanks.append(piece[: len(piece) - len(left)])
        if not core:
            continue
        if result:
            lines = min(2, max(blank.count(b"\n") for blank in blanks))
            spaced = any(blanks) or (result[-1][-1:].isalnum() and core[:1].isalnum())
            result.append(b"\n" * lines + _indentation(blanks) if lines else b" " * spaced)
        elif len(blanks) == 1:
            result.append(blanks[0])  # nothing was cut before it
        else:
            result.append(_indentation(blanks))
        result.append(core)
        blanks = [left[len(core) :]]
    return b"".join(result) + (b"\n" if result and text.endswith(b"\n") else b"")


def _indentation(blanks: Sequence[bytes]) -> bytes:
    """What stands before the first character of a line, in the last piece of white space in which a line ends."""
    for blank in reversed(blanks):
        if b"\n" in blank:
            return blank[blank.rfind(b"\n") + 1 :]
    return b""


def _unique_pairs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of an int64 (pairs, 2), sorted, as two arrays."""
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    new = np.ones(len(pairs), bool)
    new[1:] = np.any(pairs[1:] != pairs[:-1], axis=1)
    return pairs[new, 0], pairs[new, 1]


def _among(pairs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of the pairs are among known pairs, both int64 (pairs, 2) of distinct rows."""
    _, index, counts = np.unique(np.concatenate([known, pairs]), axis=0, return_inverse=True, return_counts=True)
    return counts[index.reshape(-1)[len(known) :]] > 1


def _lists(lists: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    """The values (uint64) and offsets (int64) of a list array."""
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.combine_chunks()
    if pa.types.is_list(lists.type):
        lists = lists.cast(pa.large_list(lists.type.value_type))
    return lists.values.to_numpy(), lists.offsets.to_numpy()


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} must be at least 1, not {number}")
