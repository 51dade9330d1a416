"""The steps lines, paragraphs and substring: of what repeats within documents the first stays, the rest is cut out."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmjax.prepare import store
from llmjax.prepare.engine import key_starts
from llmjax.prepare.state import SPANS, State


def units(state: State, *, unit: str) -> dict[str, float]:
    """Of equal lines (or paragraphs) the first stays, wherever it is; the others are cut out of their documents."""
    name = f"{unit}s"
    key = ["high", "low"]
    found = state.group(name, state.keys(f"{name}-keys", unit), all_but_first_unit, key=key, order=["ordinal", "start"])
    state.cut(name, found.cast(SPANS))
    return {"cut": found.num_rows, "bytes cut": _span_bytes(found)}


def all_but_first_unit(table: pa.Table) -> pa.Table:
    """(ordinal, start, stop) of every unit but the first of its hash."""
    return table.filter(pa.array(~key_starts(table, ["high", "low"]))).select(["ordinal", "start", "stop"])


def substring(state: State) -> dict[str, float]:
    """Of passages of so many tokens that occur more than once the first stays (Lee et al. 2021)."""
    paths = state.keys("anchors", "anchors")
    repeated = state.group("anchors-repeated", paths, distinct_keys, key=["key"], order=[])
    anchors = state.work / f"{state.number:02d}-anchors.npy"
    store.write_array(anchors, np.unique(repeated["key"].to_numpy()))
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
