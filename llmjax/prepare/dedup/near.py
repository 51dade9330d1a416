"""The step near: documents whose word shingles are alike (MinHash), of which one stays. Every pair is verified.

A document is known by its rank, an int64: of two duplicates the one of the smaller rank stays.

1. `near_keys`: every text to its band keys. Two texts of Jaccard similarity J share a key with 1 - (1 - J^rows)^bands
   (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3).
2. `PAIRS_OF_BANDS`: the pairs worth comparing. Each document of a key is paired with the key's first and with the one
   before it: at most two pairs a row, so that thousands of pages of one template cost no more than other documents.
3. `shingles` of the documents of those pairs, and `jaccard_of_pairs`: the exact similarity of each pair.
4. `components`: the connected components of the pairs that are similar enough, and what to keep. A document is removed
   only if it is that similar to a document that stays. So of a chain A-B-C with A unlike C, A and C stay.
5. `open_pairs`: pairs that may be similar but were never compared, because a document between them was removed. They are
   compared (3) and added to the pairs, and 4 decides again. One such round finds nearly all.

As every removal is verified, its precision is that of arithmetic. Its recall is that of the bands. All digits are one
digit to the bands, and differ in the verification: texts that differ only in many numbers are compared, and both stay.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmjax import storage
from llmjax.errors import UserError
from llmjax.prepare.dedup.keys import keys_of
from llmjax.prepare.dedup.text_hashes import check_positive
from llmjax.prepare.documents import (
    part_path,
    read_batches,
    read_tables,
    side_table,
    split_by_part,
    table_files,
    take_rows,
    write_array,
    write_arrays,
    write_table,
)
from llmjax.prepare.engine import Job
from llmjax.prepare.kernels import minhash
from llmjax.prepare.kernels.words import room, tables, utf8
from llmjax.prepare.state import REMOVED, State

PAIRS = 20_000  # pairs of documents that one task compares
ROUNDS = 4  # of comparing the open pairs of the round before; most corpora need one or two
PAIRS_OF_BANDS = """
WITH places AS (
    SELECT rank, first_value(rank) OVER same AS first_rank, lag(rank) OVER same AS previous_rank
    FROM keys WINDOW same AS (PARTITION BY key ORDER BY rank)
)
SELECT first_rank AS center, rank AS member FROM places WHERE first_rank < rank
UNION
SELECT previous_rank AS center, rank AS member FROM places WHERE previous_rank < rank
ORDER BY center, member
"""


def near(state: State) -> dict[str, float]:
    """Remove documents that are similar enough to one that stays: the first, or the longest."""
    threshold = state.settings["near_jaccard"]
    ranks = _ranks(state) if state.settings["near_keep"] == "longest" else None
    rank_file = state.work / f"{state.number:02d}-near-ranks.npz"
    if ranks is not None:
        write_arrays(rank_file, ordinals=ranks[0], ranks=ranks[1])
    paths = keys_of(state, "near-keys", "bands", ranks=str(rank_file) if ranks is not None else "")
    edges = state.query("near-pairs", PAIRS_OF_BANDS, keys=paths)
    pairs = edges["center"].to_numpy(), edges["member"].to_numpy()
    to_ordinal = _lookup(ranks)
    jaccard = _compare(state, "near-first", pairs, to_ordinal)
    decided = components(pairs[0], pairs[1], jaccard, threshold=threshold)
    rounds = 1
    while True:
        more = open_pairs(pairs[0], pairs[1], jaccard, decided, threshold=threshold)
        if not len(more[0]) or rounds >= ROUNDS:
            break
        jaccard = np.concatenate([jaccard, _compare(state, f"near-more{rounds}", more, to_ordinal)])
        pairs = np.concatenate([pairs[0], more[0]]), np.concatenate([pairs[1], more[1]])
        decided = components(pairs[0], pairs[1], jaccard, threshold=threshold)
        rounds += 1
    gone = decided.filter(pc.invert(decided["kept"]))
    details = [f"{value:.2f}" for value in gone["jaccard"].to_pylist()]
    columns = [
        pa.array(to_ordinal(gone["ordinal"].to_numpy())), pa.array(["near duplicate"] * gone.num_rows),
        pa.array(to_ordinal(gone["of"].to_numpy())), pa.array(details, pa.string()),
    ]  # fmt: skip
    state.remove("near", pa.table(columns, schema=REMOVED))
    _link(state, to_ordinal(pairs[0]), to_ordinal(pairs[1]), jaccard)
    sizes = np.unique(decided["root"].to_numpy(), return_counts=True)[1]
    return {
        "removed": gone.num_rows, "pairs compared": len(jaccard), "pairs similar": int((jaccard >= threshold).sum()),
        "clusters": len(sizes), "largest cluster": max(sizes.tolist(), default=0), "rounds": rounds,
    }  # fmt: skip


def _ranks(state: State) -> tuple[np.ndarray, np.ndarray]:
    """(sorted ordinals, their ranks): documents of earlier runs come first, then the longest, then the first read."""
    table = read_tables(table_files(state.documents))
    ordinals, sizes = table["ordinal"].to_numpy(), table["size"].to_numpy()
    order = np.lexsort((ordinals, -sizes, table["source"].to_numpy() >= state.earlier))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ordinals, ranks


def _lookup(ranks: tuple[np.ndarray, np.ndarray] | None) -> Callable[[np.ndarray], np.ndarray]:
    if ranks is None:
        return lambda given: given
    back = np.empty(len(ranks[0]), np.int64)
    back[ranks[1]] = ranks[0]
    return lambda given: back[given]


def _compare(
    state: State, name: str, pairs: tuple[np.ndarray, np.ndarray], to_ordinal: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The exact similarity of pairs, float64: the shingles of their documents by part, then the pairs in tasks."""
    a, b = to_ordinal(pairs[0]), to_ordinal(pairs[1])
    if not len(a):
        return np.empty(0)
    folder = state.work / f"{state.number:02d}-{name}"
    wanted = np.unique(np.concatenate([a, b]))
    split_by_part(pa.table({"ordinal": wanted}), folder / "wanted")
    state.map(
        write_shingles, f"{folder.name}/shingles", label="near: shingles", documents=str(state.documents),
        wanted=str(folder / "wanted"), words=state.settings["near_words"],
    )  # fmt: skip
    jobs = []
    for number, start in enumerate(range(0, len(a), PAIRS)):
        stop = start + PAIRS
        write_arrays(folder / f"pairs-{number}.npz", a=a[start:stop], b=b[start:stop])
        arguments = {"pairs": str(folder / f"pairs-{number}.npz"), "shingles": str(folder / "shingles")}
        jobs.append(Job(number, folder / f"pairs-{number}.json", arguments, 1))
    state.engine.map(compare_pairs, jobs, label="near: comparing")
    return np.concatenate([np.load(job.arguments["pairs"].replace(".npz", ".npy")) for job in jobs])


def write_shingles(*, number: int, documents: str, wanted: str, words: int, out: str) -> dict[str, int]:
    """Task: the shingles of the documents of a part that are in a pair, as an Arrow file (ordinal, shingles)."""
    table = side_table(Path(wanted) / f"{number:06d}.parquet")
    if table is None:
        return {"documents": 0}
    ordinals = table["ordinal"].to_numpy()
    schema = pa.schema([("ordinal", pa.int64()), ("shingles", pa.large_list(pa.uint64()))])
    with (
        storage.replacing(part_path(Path(out), number), shared=True) as path,
        pa.ipc.new_file(str(path), schema) as writer,
    ):
        for start in range(0, len(ordinals), 4096):
            chosen = ordinals[start : start + 4096]
            texts = take_rows(part_path(Path(documents), number), chosen & 0xFFFFFFFF, columns=("text",))["text"]
            lists = shingles(texts.combine_chunks(), words=words)
            writer.write_batch(pa.record_batch([pa.array(chosen), lists], schema=schema))
    return {"documents": len(ordinals)}


def compare_pairs(*, pairs: str, shingles: str) -> dict[str, int]:
    """Task: the similarity of some pairs of documents, as a .npy file beside theirs."""
    with np.load(pairs) as given:
        a, b = given["a"], given["b"]
    wanted = np.unique(np.concatenate([a, b]))
    tables = []
    for part in np.unique(wanted >> 32):
        path = part_path(Path(shingles), int(part))
        have = np.concatenate([batch["ordinal"].to_numpy() for batch in read_batches(path)])
        rows = np.searchsorted(have, wanted[wanted >> 32 == part])
        tables.append(take_rows(path, rows, columns=("ordinal", "shingles")))
    table = pa.concat_tables(tables)
    lists = table["shingles"].combine_chunks()
    found = jaccard_of_pairs(a, b, table["ordinal"].to_numpy(), lists)
    write_array(Path(pairs).with_suffix(".npy"), found)
    return {"pairs": len(a)}


def _link(state: State, a: np.ndarray, b: np.ndarray, jaccard: np.ndarray) -> None:
    """Note groups that hold documents at least half alike: a held-out document must have no near copy in training."""
    from scipy import sparse

    half = jaccard >= min(0.5, state.settings["near_jaccard"])
    table = read_tables(table_files(state.documents))
    ordinals, groups = table["ordinal"].to_numpy(), table["group"].to_numpy()
    order = np.argsort(ordinals)
    sides = [groups[order[np.searchsorted(ordinals, side[half], sorter=order)]] for side in (a, b)]
    names, numbers = np.unique(np.concatenate(sides), return_inverse=True)
    first, second = np.split(numbers, 2)
    graph = sparse.coo_array((np.ones(len(first), np.int8), (first, second)), shape=(len(names), len(names)))
    _, labels = sparse.csgraph.connected_components(graph, directed=False)
    # The root is the group of the largest hash: linking takes documents out of the held-out part and puts none in.
    roots = np.full(labels.max(initial=-1) + 1, np.iinfo(np.int64).min)
    np.maximum.at(roots, labels, names)
    path = state.work / f"{state.number:02d}-near-linked.parquet"
    write_table(pa.table({"group": names, "root": roots[labels] if len(names) else names}), path)
    state.linked = [str(path)]


def shingles(texts: pa.LargeStringArray, *, words: int = 5) -> pa.LargeListArray:
    """The sorted hashes, each once, of the word shingles of every text. Case is folded, digits are not."""
    check_positive(words=words)
    given = utf8(texts)
    size = int(given[1][-1] - given[1][0])
    flat = np.empty(size // 2 + len(texts) + 1, np.uint64)  # a word and what divides it from the next: two bytes
    ends = np.zeros(len(texts) + 1, np.int64)
    minhash.text_shingles(given, tables(), words, np.empty(room(given[1]), np.uint64), flat, ends)
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        flat[begin:end].sort()
    total = minhash.unique_sorted(flat, ends)
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat[:total].copy()))


def jaccard_of_pairs(a: np.ndarray, b: np.ndarray, ordinals: np.ndarray, shingles: pa.LargeListArray) -> np.ndarray:
    """The similarity of the documents a and b, float64 (pairs,); `ordinals`, sorted, name the rows of `shingles`.

    Raises:
        UserError: if a document of a pair is not among the ordinals.
    """
    ordinals = np.asarray(ordinals, np.int64)
    values, offsets = shingles.values.to_numpy(), shingles.offsets.to_numpy()
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
    new, known = _pairs(*np.concatenate(candidates).T), _pairs(a, b)
    new = new.group_by(["a", "b"]).aggregate([]).join(known, ["a", "b"], join_type="left anti")
    new = new.sort_by([("a", "ascending"), ("b", "ascending")])
    return new["a"].to_numpy(), new["b"].to_numpy()


def _pairs(a: np.ndarray, b: np.ndarray) -> pa.Table:
    """A table (a, b) of pairs whose first is the smaller."""
    return pa.table({"a": np.minimum(a, b), "b": np.maximum(a, b)})
