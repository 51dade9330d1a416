"""The step near: documents whose word shingles are alike, every pair verified, of which one stays."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmjax import storage
from llmjax.prepare import store
from llmjax.prepare.engine import Job
from llmjax.prepare.state import REMOVED, State

PAIRS = 20_000  # pairs of documents that one task compares
ROUNDS = 4  # of comparing what the round before has left open; most corpora need one or two


def near(state: State) -> dict[str, float]:
    """Of documents whose word shingles are similar enough, verified, the first (or the longest) stays."""
    from llmjax.prepare import duplicates

    threshold = state.settings["near_jaccard"]
    ranks = _ranks(state) if state.settings["near_keep"] == "longest" else None
    rank_file = state.work / f"{state.number:02d}-near-ranks.npz"
    if ranks is not None:
        store.write_arrays(rank_file, ordinals=ranks[0], ranks=ranks[1])
    paths = state.keys("near-keys", "bands", ranks=str(rank_file) if ranks is not None else "")
    edges = state.group("near-pairs", paths, pairs_of_bands, key=["key"], order=["rank"])
    # Ranks are what priorities are decided by; documents are fetched by their ordinals.
    pairs = _unique_pairs(edges["center"].to_numpy(), edges["member"].to_numpy())
    to_ordinal = _lookup(ranks)
    jaccard = _compare(state, "near-first", pairs, to_ordinal)
    decided = duplicates.components(pairs[0], pairs[1], jaccard, threshold=threshold)
    rounds = 1
    while True:
        more = duplicates.open_pairs(pairs[0], pairs[1], jaccard, decided, threshold=threshold)
        if not len(more[0]) or rounds >= ROUNDS:
            break
        jaccard = np.concatenate([jaccard, _compare(state, f"near-more{rounds}", more, to_ordinal)])
        pairs = np.concatenate([pairs[0], more[0]]), np.concatenate([pairs[1], more[1]])
        decided = duplicates.components(pairs[0], pairs[1], jaccard, threshold=threshold)
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


def pairs_of_bands(table: pa.Table) -> pa.Table:
    """(center, member): pairs of documents worth comparing, by the ranks of those that share a band key."""
    from llmjax.prepare import duplicates

    # Keys are stored signed, for Spark; band_edges wants equal ones together, in any order it can check.
    keys = np.cumsum(np.diff(table["key"].to_numpy(), prepend=0) != 0).astype(np.uint64)
    centers, members = duplicates.band_edges(keys, table["rank"].to_numpy())
    return pa.table({"center": centers, "member": members})


def _unique_pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    new = np.ones(len(a), bool)
    new[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    return a[new], b[new]


def _ranks(state: State) -> tuple[np.ndarray, np.ndarray]:
    """(ordinals sorted, their ranks): those of earlier runs first, then the longest, then the first read."""
    table = store.concat(store.files(state.documents))
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
    store.split_by_part(pa.table({"ordinal": wanted}), folder / "wanted")
    state.map(
        write_shingles, f"{folder.name}/shingles", label="near: shingles", documents=str(state.documents),
        wanted=str(folder / "wanted"), words=state.settings["near_words"],
    )  # fmt: skip
    jobs = []
    for number, start in enumerate(range(0, len(a), PAIRS)):
        stop = start + PAIRS
        store.write_arrays(folder / f"pairs-{number}.npz", a=a[start:stop], b=b[start:stop])
        arguments = {"pairs": str(folder / f"pairs-{number}.npz"), "shingles": str(folder / "shingles")}
        jobs.append(Job(number, folder / f"pairs-{number}.json", arguments, 1))
    state.engine.map(compare_pairs, jobs, label="near: comparing")
    return np.concatenate([np.load(job.arguments["pairs"].replace(".npz", ".npy")) for job in jobs])


def write_shingles(*, number: int, documents: str, wanted: str, words: int, out: str) -> dict[str, int]:
    """Task: the shingles of those documents of a part that a pair names, as an Arrow file (ordinal, shingles)."""
    from llmjax.prepare import duplicates

    table = store.row_table(Path(wanted) / f"{number:06d}.parquet")
    if table is None:
        return {"documents": 0}
    ordinals = table["ordinal"].to_numpy()
    schema = pa.schema([("ordinal", pa.int64()), ("shingles", pa.large_list(pa.uint64()))])
    with (
        storage.replacing(store.part_path(Path(out), number), shared=True) as path,
        pa.ipc.new_file(str(path), schema) as writer,
    ):
        for start in range(0, len(ordinals), 4096):
            chosen = ordinals[start : start + 4096]
            texts = store.take(store.part_path(Path(documents), number), chosen & 0xFFFFFFFF, columns=("text",))["text"]
            lists = duplicates.shingles(texts.combine_chunks(), words=words)
            writer.write_batch(pa.record_batch([pa.array(chosen), lists], schema=schema))
    return {"documents": len(ordinals)}


def compare_pairs(*, pairs: str, shingles: str) -> dict[str, int]:
    """Task: the similarity of some pairs of documents, as a .npy file beside theirs."""
    from llmjax.prepare import duplicates

    with np.load(pairs) as given:
        a, b = given["a"], given["b"]
    wanted = np.unique(np.concatenate([a, b]))
    tables = []
    for part in np.unique(wanted >> 32):
        path = store.part_path(Path(shingles), int(part))
        have = np.concatenate([batch["ordinal"].to_numpy() for batch in store.read_batches(path)])
        rows = np.searchsorted(have, wanted[wanted >> 32 == part])
        tables.append(store.take(path, rows, columns=("ordinal", "shingles")))
    table = pa.concat_tables(tables)
    lists = table["shingles"].combine_chunks()
    found = duplicates.jaccard_of_pairs(a, b, table["ordinal"].to_numpy(), lists)
    store.write_array(Path(pairs).with_suffix(".npy"), found)
    return {"pairs": len(a)}


def _link(state: State, a: np.ndarray, b: np.ndarray, jaccard: np.ndarray) -> None:
    """Note which groups hold documents at least half alike: what is held out must have no near copy in training."""
    from scipy import sparse

    half = jaccard >= min(0.5, state.settings["near_jaccard"])
    table = store.concat(store.files(state.documents))
    ordinals, groups = table["ordinal"].to_numpy(), table["group"].to_numpy()
    order = np.argsort(ordinals)
    sides = [groups[order[np.searchsorted(ordinals, side[half], sorter=order)]] for side in (a, b)]
    names, numbers = np.unique(np.concatenate(sides), return_inverse=True)
    first, second = np.split(numbers, 2)
    graph = sparse.coo_array((np.ones(len(first), np.int8), (first, second)), shape=(len(names), len(names)))
    _, labels = sparse.csgraph.connected_components(graph, directed=False)
    # The root is the group of the largest hash, so that linking takes documents out of the held-out part, never in.
    roots = np.full(labels.max(initial=-1) + 1, np.iinfo(np.int64).min)
    np.maximum.at(roots, labels, names)
    path = state.work / f"{state.number:02d}-near-linked.parquet"
    store.write_table(pa.table({"group": names, "root": roots[labels] if len(names) else names}), path)
    state.linked = [str(path)]
