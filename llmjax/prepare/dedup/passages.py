"""The steps lines, paragraphs and substring: repeated text within documents is cut out, its first occurrence stays.

The step substring finds exact repeated runs of tokens across all documents.

Lee et al. (2021), "Deduplicating Training Data Makes Language Models Better", find them with a suffix array of the whole
corpus in memory. Two queries of hashes, which spill to disk and spread over machines, give the same answer.

A token is a maximal run of letters, digits, marks and underscores (a character of an unspaced script by itself), or a
single other character that is not white space. Case counts, white space does not. A window is `tokens` tokens in a row
of one document. **A window is a repeat if an equal window starts earlier** in the order of (ordinal of the document,
token position). All repeats are removed, so the first occurrence stays. Windows may overlap their equals: of a run with a
period of p tokens the first p stay.

1. `anchors`: the smallest 8-gram of each window (Schleimer, Wilkerson and Aiken 2003, "Winnowing"), a twentieth of the
   tokens. Equal windows have equal smallest grams. `REPEATED_ANCHORS` selects the grams that occur twice.
2. `window_keys`: the windows with such a gram. `ALL_BUT_FIRST_WINDOW` selects the repeats.
3. `spans_of` the repeats, and `remove_spans`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

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

GRAM = 8  # tokens of an anchor; windows must be at least as long
MINIMUM_UNIT_WORDS = 4  # a shorter line or paragraph ("Contents", "Read more") repeats without being copied
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


def anchors(texts: pa.LargeStringArray, *, tokens: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The smallest 8-grams of the windows of every text: row (int64), token position (int64) and hash (uint64).

    Sorted by row. Raises:
        UserError: if a window has fewer tokens than a gram.
    """
    gram = _gram(tokens)
    given = utf8(texts)
    hashes = np.empty(room(given[1]), np.uint64)
    size = int(given[1][-1] - given[1][0]) // 64 + 1024
    while True:
        rows, positions, values = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.uint64)
        count = windows.anchors(given, tables("nothing"), tokens, gram, hashes, rows, positions, values)
        if count <= size:
            return rows[:count], positions[:count], values[:count]
        size = count  # few words and much punctuation: again, with room for all


def window_keys(
    texts: pa.LargeStringArray, *, tokens: int = 50, repeated: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The windows that may have an equal: row (int64), first token (int64) and 64-bit hash (uint64), in the order of both.

    Args:
        repeated: uint64, sorted, the anchor hashes that occur at least twice in the corpus.
    """
    gram = _gram(tokens)
    repeated = np.asarray(repeated, np.uint64)
    if np.any(repeated[1:] < repeated[:-1]):
        raise UserError("the repeated anchors must be sorted")
    given = utf8(texts)
    hashes = np.empty(room(given[1]), np.uint64)
    size = int(given[1][-1] - given[1][0]) // 16 + 1024
    while True:
        rows, starts, keys = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.uint64)
        arguments = (given, tables("nothing"), tokens, gram, repeated, hashes)
        count = windows.repeated_windows(*arguments, rows, starts, keys)
        if count <= size:
            return rows[:count], starts[:count], keys[:count]
        size = count  # more is repeated than was guessed: again, with room for all


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


def _gram(tokens: int) -> int:
    if tokens < GRAM:
        raise UserError(f"substring_tokens must be at least {GRAM}, not {tokens}: shorter runs repeat in all prose")
    return GRAM


def unit_keys(
    texts: pa.LargeStringArray, unit: Literal["line", "paragraph"], *, minimum_words: int = MINIMUM_UNIT_WORDS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lines, or paragraphs (divided by blank lines), and a hash of each without the white space around it.

    Units of fewer than `minimum_words` words are left out.

    Returns:
        row (int64), start and stop (int64, bytes within the row's text, white space around it not included) and hash
        (uint64 (units, 2), 128 bits of the exact bytes); in the order of the texts.
    """
    if unit not in ("line", "paragraph"):
        raise UserError(f"unit must be 'line' or 'paragraph', not {unit!r}")
    given = utf8(texts)
    most = int(windows.count_byte(given[0], given[1][0], given[1][-1], 10)) + len(texts)
    rows, spans = np.empty(most, np.int64), np.empty((most, 2), np.int64)
    hashes = np.empty((most, 2), np.uint64)
    count = windows.units(given, tables()[0], unit == "paragraph", minimum_words, rows, spans, hashes)
    return rows[:count], spans[:count, 0], spans[:count, 1], hashes[:count]


def remove_spans(
    texts: pa.LargeStringArray, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> pa.LargeStringArray:
    """The texts without some byte spans, which may overlap and come in any order.

    Around a cut the wider of the white space on its two sides stays: as many line ends (at most two) and the indentation
    of what follows, or one space.

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
    """The white space after the last line end in the last piece that has one."""
    for blank in reversed(blanks):
        if b"\n" in blank:
            return blank[blank.rfind(b"\n") + 1 :]
    return b""
