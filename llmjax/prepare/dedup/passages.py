"""The steps lines, paragraphs and substring: repeated text within documents is cut out, its first occurrence stays.

The step substring finds exact repeated runs of tokens across all documents.

Lee et al. (2021), "Deduplicating Training Data Makes Language Models Better", find them with a suffix array of the whole
corpus in memory. Two queries of hashes, which spill to disk and spread over machines, give the same answer.

A token is a maximal run of letters, digits, marks and underscores (a character of an unspaced script by itself), or a
single other character that is not white space. Case counts, white space does not. A window is `tokens` tokens in a row
of one document. **A window is a repeat if an equal window starts earlier** in the order of (ordinal of the document,
token position). All repeats are removed, so the first occurrence stays. Windows may overlap their equals: of a run with a
period of p tokens the first p stay.

1. `text_hashes.anchors`: the smallest 8-gram of each window (Schleimer, Wilkerson and Aiken 2003, "Winnowing"), a twentieth of the
   tokens. Equal windows have equal smallest grams. `REPEATED_ANCHORS` selects the grams that occur twice.
2. `text_hashes.window_keys`: the windows with such a gram. `ALL_BUT_FIRST_WINDOW` selects the repeats.
3. `spans_of` the repeats, and `cutting.remove_spans`.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmjax.errors import UserError
from llmjax.prepare.dedup.keys import keys_of
from llmjax.prepare.documents import (
    part_path,
    side_table,
    split_by_part,
    table_files,
    take_rows,
    write_array,
    write_table,
)
from llmjax.prepare.kernels import windows
from llmjax.prepare.kernels.words import room, tables, utf8
from llmjax.prepare.state import SPANS, State

ALL_BUT_FIRST_UNIT = """
SELECT ordinal, start, stop FROM (
    SELECT ordinal, start, stop, row_number() OVER (PARTITION BY high, low ORDER BY ordinal, start) AS place FROM keys
) AS units WHERE place > 1
"""
REPEATED_ANCHORS = "SELECT key FROM keys GROUP BY key HAVING count(*) > 1 ORDER BY key"
ALL_BUT_FIRST_WINDOW = """
SELECT ordinal, start FROM (
    SELECT ordinal, start, row_number() OVER (PARTITION BY key ORDER BY ordinal, start) AS place FROM keys
) AS windows WHERE place > 1
"""


def units(state: State, *, unit: str) -> dict[str, float]:
    """Cut out lines (or paragraphs) that an earlier one equals, in any document."""
    found = state.query(f"{unit}s", ALL_BUT_FIRST_UNIT, keys=keys_of(state, f"{unit}s-keys", unit))
    state.cut(f"{unit}s", found.cast(SPANS))
    return {"cut": found.num_rows, "bytes cut": _span_bytes(found)}


def substring(state: State) -> dict[str, float]:
    """Cut out passages of so many tokens that occurred before (Lee et al. 2021)."""
    repeated = state.query("anchors-repeated", REPEATED_ANCHORS, keys=keys_of(state, "anchors", "anchors"))
    anchors = state.work / f"{state.number:02d}-anchors.npy"
    write_array(anchors, repeated["key"].to_numpy())
    paths = keys_of(state, "windows", "windows", anchors=str(anchors))
    repeats = state.query("windows-repeated", ALL_BUT_FIRST_WINDOW, keys=paths)
    folder = state.work / f"{state.number:02d}-windows-found"
    split_by_part(repeats, folder)
    state.map(
        write_spans, f"{state.number:02d}-substring-spans", label="substring: spans", documents=str(state.documents),
        found=str(folder), tokens=state.settings["substring_tokens"],
    )  # fmt: skip
    state.spans = str(state.work / f"{state.number:02d}-substring-spans")
    tables = [pq.read_table(path) for path in table_files(Path(state.spans))]
    spans = pa.concat_tables(tables) if tables else SPANS.empty_table()
    return {"windows": repeats.num_rows, "cut": spans.num_rows, "bytes cut": _span_bytes(spans)}


def _span_bytes(spans: pa.Table) -> int:
    return int((spans["stop"].to_numpy() - spans["start"].to_numpy()).sum())


def write_spans(*, number: int, documents: str, found: str, tokens: int, out: str) -> dict[str, int]:
    """Task: the bytes of a part's repeated windows, SPANS in OUT/NUMBER.parquet. Without windows there is no file."""
    table = side_table(Path(found) / f"{number:06d}.parquet")
    if table is None:
        return {"spans": 0}
    table = table.sort_by([("ordinal", "ascending"), ("start", "ascending")])
    ordinals, windows = table["ordinal"].to_numpy(), table["start"].to_numpy()
    unique = np.unique(ordinals)
    texts = take_rows(part_path(Path(documents), number), unique & 0xFFFFFFFF, columns=("text",))["text"]
    rows = np.searchsorted(unique, ordinals)
    rows, starts, stops = spans_of(texts.combine_chunks(), rows, windows, tokens=tokens)
    spans = pa.table([pa.array(unique[rows]), pa.array(starts), pa.array(stops)], schema=SPANS)
    write_table(spans, Path(out) / f"{number:06d}.parquet")
    return {"spans": spans.num_rows}


def spans_of(
    texts: pa.LargeStringArray, rows: np.ndarray, starts: np.ndarray, *, tokens: int = 50
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes that windows cover, joined where they overlap or touch: row, start and stop (int64) within its text.

    Args:
        rows, starts: int64 (windows,), in any order.

    Raises:
        UserError: if a window does not lie within its text, which happens when the text was changed meanwhile.
    """
    rows, starts = np.asarray(rows, np.int64), np.asarray(starts, np.int64)
    order = np.lexsort((starts, rows))
    given = utf8(texts)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(texts)):
        raise UserError(f"a window is in row {rows.max()} of {len(texts)} texts")
    most = room(given[1])
    spans, out_rows, out = (
        np.empty((most, 2), np.int64),
        np.empty(len(rows), np.int64),
        np.empty((len(rows), 2), np.int64),
    )
    hashes = np.empty(most, np.uint64)
    arguments = (given, tables("nothing"), tokens, rows[order], starts[order], hashes, spans, out_rows, out)
    count = windows.window_spans(*arguments)
    if count < 0:
        raise UserError("a window does not lie within its text: were the texts changed since the windows were made?")
    return out_rows[:count], out[:count, 0], out[:count, 1]
