"""The keys of documents, lines and passages, which queries bring together. They are numbers, never text.

64-bit keys are signed, because Spark has no unsigned numbers.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmjax.prepare import split
from llmjax.prepare.documents import part_path, side_table, table_files, write_table
from llmjax.prepare.state import State


def write_keys(
    *, number: int, documents: str, removed: str, kind: str, settings: dict[str, Any], out: str,
    ranks: str = "", anchors: str = "",
) -> dict[str, int]:  # fmt: skip
    """Task: one kind of keys of a part's live documents, as OUT/NUMBER.parquet."""
    path = Path(out) / f"{number:06d}.parquet"
    if kind == "id":
        table = live_index(Path(documents), number, removed).select(["id", "ordinal"])
        write_table(table, path)
        return {"rows": table.num_rows}
    extra = {"ranks": ranks, "anchors": anchors}
    tables, rows = [KEY_SCHEMAS[kind].empty_table()], 0
    for ordinals, texts in split.live_texts(Path(documents), number, removed):
        for table in _text_keys(kind, ordinals, texts, settings, extra):
            tables.append(table)
            rows += table.num_rows
    write_table(pa.concat_tables(tables), path)
    return {"rows": rows}


KEY_SCHEMAS = {
    "bands": pa.schema([("key", pa.int64()), ("rank", pa.int64())]),
    "line": pa.schema([("high", pa.int64()), ("low", pa.int64()), ("ordinal", pa.int64()), ("start", pa.int64()), ("stop", pa.int64())]),
    "anchors": pa.schema([("key", pa.int64())]),
    "windows": pa.schema([("key", pa.int64()), ("ordinal", pa.int64()), ("start", pa.int64())]),
}  # fmt: skip
KEY_SCHEMAS["paragraph"] = KEY_SCHEMAS["line"]


def keys_of(state: State, name: str, kind: str, **arguments: Any) -> list[str]:
    """The files of one kind of keys of all live documents."""
    folder = f"{state.number:02d}-{name}"
    state.map(
        write_keys, folder, label=f"{name}: keys", documents=str(state.documents), removed=state.removed, kind=kind,
        settings=state.settings, **arguments,
    )  # fmt: skip
    return table_files(state.work / folder)


def live_index(documents: Path, number: int, removed: str) -> pa.Table:
    """The index rows of a part's documents that no step has rejected or removed."""
    index = pq.read_table(part_path(documents, number).with_suffix(".parquet"))
    gone = side_table(Path(removed) / f"{number:06d}.parquet") if removed else None
    live = index["kept"].to_numpy()
    if gone is not None:
        live = live & ~np.isin(index["ordinal"].to_numpy(), gone["ordinal"].to_numpy())
    return index.filter(pa.array(live))


def _text_keys(
    kind: str, ordinals: np.ndarray, texts: pa.LargeStringArray, settings: dict[str, Any], extra: dict[str, str]
) -> Iterator[pa.Table]:
    from llmjax.prepare.dedup import text_hashes  # compiles

    schema = KEY_SCHEMAS[kind]
    if kind == "bands":
        bands, rows = settings["near_bands"], settings["near_rows"]
        keys, words = text_hashes.near_keys(texts, bands=bands, rows=rows, words=settings["near_words"])
        ranks = _ranks_of(ordinals, extra["ranks"])
        chosen = words > 0
        flat = keys[chosen].ravel().view(np.int64)
        yield pa.table([pa.array(flat), pa.array(np.repeat(ranks[chosen], bands))], schema=schema)
    elif kind in ("line", "paragraph"):
        rows, starts, stops, hashes = text_hashes.unit_keys(texts, kind)  # type: ignore[arg-type]
        high, low = np.ascontiguousarray(hashes.T).view(np.int64)
        yield pa.table([pa.array(c) for c in (high, low, ordinals[rows], starts, stops)], schema=schema)
    elif kind == "anchors":
        _, _, hashes = text_hashes.anchors(texts, tokens=settings["substring_tokens"])
        yield pa.table([pa.array(hashes.view(np.int64))], schema=schema)
    else:
        repeated = _anchors(extra["anchors"])
        rows, starts, hashes = text_hashes.window_keys(texts, tokens=settings["substring_tokens"], repeated=repeated)
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
