"""The steps that look at all documents at once: duplicates of documents, near-duplicates, repeated lines and passages.

Each is the same three moves: every part gives keys (numbers, never text), the engine brings equal keys together, and
what follows is decided by pure functions (`duplicates.py`, `substring.py`). The decisions are small tables by part:
documents to remove, with the one they duplicate, or bytes to take out of texts.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmjax import human
from llmjax.prepare import split, store
from llmjax.prepare.engine import Engine, Job
from llmjax.prepare.parts import Part

OVERALL = ("exact", "paragraphs", "lines", "near", "substring", "caps")
REMOVED = pa.schema([("ordinal", pa.int64()), ("kind", pa.string()), ("of", pa.int64()), ("detail", pa.string())])
SPANS = pa.schema([("ordinal", pa.int64()), ("start", pa.int64()), ("stop", pa.int64())])
KEY_ROWS = 1 << 18  # rows of keys that are written at once
PAIRS = 20_000  # pairs of documents that one task compares


@dataclass
class State:
    """The corpus between two steps: where its documents are, and what was decided about them since they were written."""

    engine: Engine
    parts: list[Part]
    work: Path
    settings: dict[str, Any]
    documents: Path = Path()
    removed: str = ""  # folder of REMOVED tables by part, "" none
    spans: str = ""  # folder of SPANS tables by part, "" none
    earlier: int = 0  # so many sources at the start are earlier runs
    linked: list[str] = field(default_factory=list)  # files (group, root): groups with near-duplicates of each other
    number: int = 0

    def map(self, function: Callable[..., Any], folder: str, *, label: str, **arguments: Any) -> list[Any]:
        """Call `function` for every part with its number and the folder that it writes to."""
        jobs = [
            Job(part.number, self.work / folder / f"{part.number:06d}.json",
                {"number": part.number, "out": str(self.work / folder), **arguments}, part.size)
            for part in self.parts
        ]  # fmt: skip
        return self.engine.map(function, jobs, label=label)

    def keys(self, name: str, kind: str, **arguments: Any) -> list[str]:
        """The files of one kind of keys of all live documents."""
        folder = f"{self.number:02d}-{name}"
        self.map(
            write_keys, folder, label=f"{name}: keys", documents=str(self.documents), removed=self.removed, kind=kind,
            settings=self.settings, **arguments,
        )  # fmt: skip
        return store.files(self.work / folder)

    def remove(self, name: str, decided: pa.Table) -> None:
        """Add documents to those that are removed."""
        folder = self.work / f"{self.number:02d}-{name}-removed"
        known = [pq.read_table(path) for path in store.files(Path(self.removed))] if self.removed else []
        store.split_by_part(pa.concat_tables([*known, decided]), folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.removed = str(folder)

    def cut(self, name: str, spans: pa.Table) -> None:
        """Have bytes taken out of texts before the next step."""
        folder = self.work / f"{self.number:02d}-{name}-spans"
        folder.mkdir(parents=True, exist_ok=True)
        store.split_by_part(spans, folder)
        self.spans = str(folder)

    def group(self, name: str, paths: list[str], reduce: Callable[[pa.Table], pa.Table], **how: Any) -> pa.Table:
        """Group keys; the result is kept, so that a resumed run need not group again."""
        out = self.work / f"{self.number:02d}-{name}.parquet"
        return self.engine.group(paths, reduce=reduce, out=out, **how)


def run(state: State, name: str) -> dict[str, float]:
    """Run one of OVERALL and note its decisions in `state`; the numbers to report."""
    state.number += 1
    functions: dict[str, Callable[[State], dict[str, float]]] = {
        "exact": exact,
        "near": near,
        "paragraphs": functools.partial(units, unit="paragraph"),
        "lines": functools.partial(units, unit="line"),
        "substring": substring,
        "caps": caps,
    }
    return functions[name](state)


# Exact duplicates.


def exact(state: State) -> dict[str, float]:
    """Of documents with the same text the first stays."""
    found = state.group("exact", state.keys("exact-keys", "id"), first_of_equal, key=["id"], order=["ordinal"])
    columns = [found["ordinal"], pa.array(["duplicate"] * found.num_rows), found["of"], pa.array([""] * found.num_rows)]
    state.remove("exact", pa.table(columns, schema=REMOVED))
    return {"removed": found.num_rows}


def first_of_equal(table: pa.Table) -> pa.Table:
    """(ordinal, of): every row but the first of its id, and that first."""
    from llmjax.prepare.engine import key_starts

    starts = key_starts(table, ["id"])
    ordinals = table["ordinal"].to_numpy()
    first = ordinals[np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))] if len(starts) else ordinals
    return pa.table({"ordinal": ordinals[~starts], "of": first[~starts]})


# Near-duplicates.


def near(state: State) -> dict[str, float]:
    """Of documents whose word shingles are similar enough, verified, the first (or the longest) stays."""
    from llmjax.prepare import duplicates

    threshold = state.settings["near_jaccard"]
    ranks = _ranks(state) if state.settings["near_keep"] == "longest" else None
    rank_file = state.work / f"{state.number:02d}-near-ranks.npz"
    if ranks is not None:
        np.savez(rank_file, ordinals=ranks[0], ranks=ranks[1])
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
        if not len(more[0]) or rounds >= 4:
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
        "clusters": len(sizes), "largest cluster": int(sizes.max(initial=0)), "rounds": rounds,
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
        np.savez(folder / f"pairs-{number}.npz", a=a[start:stop], b=b[start:stop])
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
    Path(out).mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("ordinal", pa.int64()), ("shingles", pa.large_list(pa.uint64()))])
    with pa.ipc.new_file(str(store.part_path(Path(out), number)), schema) as writer:
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
    np.save(pairs.replace(".npz", ".npy"), duplicates.jaccard_of_pairs(a, b, table["ordinal"].to_numpy(), lists))
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


# Lines, paragraphs and passages.


def units(state: State, *, unit: str) -> dict[str, float]:
    """Of equal lines (or paragraphs) the first stays, wherever it is; the others are cut out of their documents."""
    name = f"{unit}s"
    key = ["high", "low"]
    found = state.group(name, state.keys(f"{name}-keys", unit), all_but_first_unit, key=key, order=["ordinal", "start"])
    state.cut(name, found.cast(SPANS))
    return {"cut": found.num_rows, "bytes cut": _span_bytes(found)}


def all_but_first_unit(table: pa.Table) -> pa.Table:
    """(ordinal, start, stop) of every unit but the first of its hash."""
    from llmjax.prepare.engine import key_starts

    return table.filter(pa.array(~key_starts(table, ["high", "low"]))).select(["ordinal", "start", "stop"])


def substring(state: State) -> dict[str, float]:
    """Of passages of so many tokens that occur more than once the first stays (Lee et al. 2021)."""
    paths = state.keys("anchors", "anchors")
    repeated = state.group("anchors-repeated", paths, distinct_keys, key=["key"], order=[])
    anchors = state.work / f"{state.number:02d}-anchors.npy"
    np.save(anchors, np.unique(repeated["key"].to_numpy()))
    paths = state.keys("windows", "windows", anchors=str(anchors))
    windows = state.group("windows-repeated", paths, all_but_first_window, key=["key"], order=["ordinal", "start"])
    folder = state.work / f"{state.number:02d}-windows-found"
    store.split_by_part(windows, folder)
    state.map(
        write_spans, f"{state.number:02d}-substring-spans", label="substring: spans", documents=str(state.documents),
        found=str(folder), tokens=state.settings["substring_tokens"],
    )  # fmt: skip
    state.spans = str(state.work / f"{state.number:02d}-substring-spans")
    tables = [pq.read_table(path) for path in store.files(Path(state.spans))]
    spans = pa.concat_tables(tables) if tables else SPANS.empty_table()
    return {"windows": windows.num_rows, "cut": spans.num_rows, "bytes cut": _span_bytes(spans)}


def _span_bytes(spans: pa.Table) -> int:
    return int((spans["stop"].to_numpy() - spans["start"].to_numpy()).sum())


def distinct_keys(table: pa.Table) -> pa.Table:
    """The keys, each once."""
    return pa.table({"key": np.unique(table["key"].to_numpy())})


def all_but_first_window(table: pa.Table) -> pa.Table:
    """(ordinal, start) of every window but the first of its hash."""
    from llmjax.prepare.engine import key_starts

    return table.filter(pa.array(~key_starts(table, ["key"]))).select(["ordinal", "start"])


def write_spans(*, number: int, documents: str, found: str, tokens: int, out: str) -> dict[str, int]:
    """Task: the bytes of a part's repeated windows, SPANS in OUT/NUMBER.parquet; nothing where there are none."""
    from llmjax.prepare import substring as passages

    table = store.row_table(Path(found) / f"{number:06d}.parquet")
    if table is None:
        return {"spans": 0}
    table = table.sort_by([("ordinal", "ascending"), ("start", "ascending")])
    ordinals, windows = table["ordinal"].to_numpy(), table["start"].to_numpy()
    unique = np.unique(ordinals)
    texts = store.take(store.part_path(Path(documents), number), unique & 0xFFFFFFFF, columns=("text",))["text"]
    rows = np.searchsorted(unique, ordinals)
    rows, starts, stops = passages.spans_of(texts.combine_chunks(), rows, windows, tokens=tokens)
    spans = pa.table([pa.array(unique[rows]), pa.array(starts), pa.array(stops)], schema=SPANS)
    store.write_table(spans, Path(out) / f"{number:06d}.parquet")
    return {"spans": spans.num_rows}


# Caps.


def caps(state: State) -> dict[str, float]:
    """Of a language or a source with more bytes than its cap stays what comes first in the order of the ids."""
    limits = parse_caps(state.settings["caps"], sources=[part.name for part in state.parts])
    live = [
        _live_index(state.documents, part.number, state.removed) for part in state.parts if part.source >= state.earlier
    ]
    table = pa.concat_tables(live) if live else store.INDEX.empty_table()
    names = {part.source: part.name for part in state.parts}
    table = table.sort_by([("id", "ascending"), ("ordinal", "ascending")])
    sizes, ordinals = table["size"].to_numpy(), table["ordinal"].to_numpy()
    columns = {
        "language": np.array(table["language"].to_pylist(), object),
        "source": np.array([names[number] for number in table["source"].to_pylist()], object),
    }
    gone: dict[int, str] = {}
    for (kind, name), limit in limits.items():
        rows = np.flatnonzero(columns[kind] == name)
        rows = rows[np.fromiter((int(ordinals[row]) not in gone for row in rows), bool, len(rows))]
        over = rows[np.cumsum(sizes[rows]) > limit]
        gone |= {int(ordinals[row]): f"{kind} {name} has its {limit:,} bytes" for row in over}
    found = sorted(gone.items())
    columns_of = [[o for o, _ in found], ["cap"] * len(found), [-1] * len(found), [detail for _, detail in found]]
    state.remove(
        "caps", pa.table([pa.array(c, f.type) for c, f in zip(columns_of, REMOVED, strict=True)], schema=REMOVED)
    )
    return {"removed": len(found)}


def parse_caps(given: Sequence[str], *, sources: Sequence[str]) -> dict[tuple[str, str], int]:
    """(kind, name) -> bytes of "language:de=2GB" or "source:web=10GB".

    Raises ValueError for anything else, a source that is not there, or no cap at all.
    """
    limits: dict[tuple[str, str], int] = {}
    if not given:
        raise ValueError('the step caps needs prepare.caps, such as \'["language:de=2GB", "source:web=10GB"]\'')
    for text in given:
        what, _, size = text.partition("=")
        kind, _, name = what.partition(":")
        if kind not in ("language", "source") or not name or not size:
            raise ValueError(f"prepare.caps: {text!r} is not understood: write language:de=2GB or source:web=10GB")
        if kind == "source" and name not in sources:
            raise ValueError(
                f"prepare.caps: there is no source {name!r}; there are {', '.join(dict.fromkeys(sources))}"
            )
        limits[kind, name] = human.parse_size(size)
    return limits


# Keys.


def write_keys(
    *, number: int, documents: str, removed: str, kind: str, settings: dict[str, Any], out: str,
    ranks: str = "", anchors: str = "",
) -> dict[str, int]:  # fmt: skip
    """Task: one kind of keys of a part's live documents, as OUT/NUMBER.parquet; 64-bit keys are signed, for Spark."""
    path = Path(out) / f"{number:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "id":
        table = _live_index(Path(documents), number, removed).select(["id", "ordinal"])
        store.write_table(table, path)
        return {"rows": table.num_rows}
    extra = {"ranks": ranks, "anchors": anchors}
    tables, rows = [KEY_SCHEMAS[kind].empty_table()], 0
    for ordinals, texts in split.live_texts(Path(documents), number, removed):
        for table in _text_keys(kind, ordinals, texts, settings, extra):
            tables.append(table)
            rows += table.num_rows
    store.write_table(pa.concat_tables(tables), path)
    return {"rows": rows}


KEY_SCHEMAS = {
    "bands": pa.schema([("key", pa.int64()), ("rank", pa.int64())]),
    "line": pa.schema([("high", pa.int64()), ("low", pa.int64()), ("ordinal", pa.int64()), ("start", pa.int64()), ("stop", pa.int64())]),
    "anchors": pa.schema([("key", pa.int64())]),
    "windows": pa.schema([("key", pa.int64()), ("ordinal", pa.int64()), ("start", pa.int64())]),
}  # fmt: skip
KEY_SCHEMAS["paragraph"] = KEY_SCHEMAS["line"]


def _live_index(documents: Path, number: int, removed: str) -> pa.Table:
    index = pq.read_table(store.part_path(documents, number).with_suffix(".parquet"))
    gone = store.row_table(Path(removed) / f"{number:06d}.parquet") if removed else None
    live = index["kept"].to_numpy()
    if gone is not None:
        live = live & ~np.isin(index["ordinal"].to_numpy(), gone["ordinal"].to_numpy())
    return index.filter(pa.array(live))


def _text_keys(
    kind: str, ordinals: np.ndarray, texts: pa.LargeStringArray, settings: dict[str, Any], extra: dict[str, str]
) -> Iterator[pa.Table]:
    from llmjax.prepare import duplicates
    from llmjax.prepare import substring as passages

    schema = KEY_SCHEMAS[kind]
    if kind == "bands":
        bands, rows = settings["near_bands"], settings["near_rows"]
        keys, words = duplicates.near_keys(texts, bands=bands, rows=rows, words=settings["near_words"])
        ranks = _ranks_of(ordinals, extra["ranks"])
        chosen = words > 0
        flat = keys[chosen].ravel().view(np.int64)
        yield pa.table([pa.array(flat), pa.array(np.repeat(ranks[chosen], bands))], schema=schema)
    elif kind in ("line", "paragraph"):
        rows, starts, stops, hashes = duplicates.unit_keys(texts, kind)  # type: ignore[arg-type]
        high, low = np.ascontiguousarray(hashes.T).view(np.int64)
        yield pa.table([pa.array(c) for c in (high, low, ordinals[rows], starts, stops)], schema=schema)
    elif kind == "anchors":
        _, _, hashes = passages.anchors(texts, tokens=settings["substring_tokens"])
        yield pa.table([pa.array(hashes.view(np.int64))], schema=schema)
    else:
        repeated = _anchors(extra["anchors"])
        rows, starts, hashes = passages.window_keys(texts, tokens=settings["substring_tokens"], repeated=repeated)
        yield pa.table([pa.array(c) for c in (hashes.view(np.int64), ordinals[rows], starts)], schema=schema)


@functools.lru_cache(maxsize=1)
def _anchors(path: str) -> np.ndarray:
    return np.sort(np.load(path).view(np.uint64))


def _ranks_of(ordinals: np.ndarray, path: str) -> np.ndarray:
    if not path:
        return ordinals
    with np.load(path) as known:
        ranks: np.ndarray = known["ranks"][np.searchsorted(known["ordinals"], ordinals)]
    return ranks
