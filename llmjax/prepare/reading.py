"""Reads a part into record batches of documents, and never stops at a bad one: it gets a reason and is counted.

What a file holds comes out raw where it must be extracted first (`data` and `format`), and as text where it is text
already (`formats/rows.py`, `arrow.py`). The largest document must fit in memory, so no document is larger than
`prepare.max_document_bytes`: text is cut at a line end, and other documents are rejected without being held.
"""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmjax.data import parallel_text, stdlib_corpus
from llmjax.prepare import sources
from llmjax.prepare.documents import make_batch, text_id
from llmjax.prepare.formats import arrow, mail, notebook, rows, warc
from llmjax.prepare.formats.rows import Fields, Reading, Row, rejected
from llmjax.prepare.parts import Item, Part

BATCH_BYTES = 8_000_000
BATCH_ROWS = 4096
SNIFFED_BYTES = 1 << 16
MARKS = {b"PAR1": "parquet", b"ARROW1": "arrow", b"%PDF-": "pdf", b"WARC/": "warc"}
BEGINNINGS = (
    (re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*\"[^\"\n]*\"\s*:"), "json"),
    (re.compile(rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html)\b"), "html"),
    (mail.BEGIN, "mailbox"),
)
BOMB_FACTOR = 16  # a compressed line that goes on for so many times the limit is not skipped but ends its file


def read_part(part: Part, *, text_field: str, max_bytes: int, fields: Fields) -> Iterator[pa.RecordBatch]:
    """The documents of a part in a fixed order, one batch in memory at a time; rejected rows carry their reason.

    Raises:
        UserError: if parallel text has lines without a partner.
        OSError: if a file cannot be read.
    """
    held: list[Row] = []
    size = 0
    for row in _rows(part, Reading(text_field, max_bytes, fields)):
        row["source"] = part.name
        size += len(row.get("data") or b"") + len(row.get("text") or "")
        held.append(row)
        if size >= BATCH_BYTES or len(held) >= BATCH_ROWS:
            yield make_batch(held)
            held, size = [], 0
    if held:
        yield make_batch(held)


def _rows(part: Part, reading: Reading) -> Iterator[Row]:
    for item in part.items:
        with sources.naming(item.file):
            if part.kind == "stdlib":
                yield from _stdlib(item.file)
            elif item.partner:
                yield from _pairs(item)
            else:
                yield from _file(item, reading)


def _stdlib(spec: str) -> Iterator[Row]:
    for entry in stdlib_corpus.test_entries() if spec == "stdlib-tests" else stdlib_corpus.entries():
        if entry.file:
            yield {"path": entry.path, "group": entry.group, "format": "text", "data": entry.file.read_bytes()}
        else:
            yield {"path": entry.path, "group": entry.group, "text": entry.text}


def _pairs(item: Item) -> Iterator[Row]:
    for number, data, reason in parallel_text.read_pairs(Path(item.file), Path(item.partner)):
        where = f"{item.path}:{number}"
        if reason:
            yield rejected(where, reason, data, offset=number)
        else:
            group = text_id(data.decode("utf-8", "replace")).hex()
            yield {"path": where, "group": group, "offset": number, "format": "text", "data": data}


def _file(item: Item, reading: Reading) -> Iterator[Row]:
    kind, compression = sources.format_of(item.file)
    if kind in ("", "json") or sources.suffix_of(item.file).startswith(".jl"):  # Julia, or lines of JSON
        kind = _kind_of(_beginning(item, compression)) or kind
    if kind == "parquet":
        yield from arrow.parquet_rows(item, reading)
    elif kind == "arrow":
        yield from arrow.arrow_rows(item, reading)
    else:
        try:
            with sources.open_file(item.file) as raw:
                opened = _decompressed(raw, compression)
                if kind == "warc":  # gzip and Zstandard are those of single records
                    archive = opened if compression in (".bz2", ".xz") else raw
                    yield from warc.read(archive, item.path, max_bytes=reading.max_bytes)
                elif kind == "rows":
                    raw.seek(item.start)
                    lines = _lines(opened, item, reading, compression)
                    yield from rows.json_lines(lines, item, reading)
                elif kind == "json":
                    yield from rows.json_values(opened, item, reading)
                elif kind == "csv":
                    tabs = sources.suffix_of(item.file).startswith(".tsv")
                    yield from rows.csv_rows(opened, item, reading, delimiter="\t" if tabs else ",")
                else:
                    yield from _documents(opened, item, kind, reading)
        except _damages(compression) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
                raise
            yield rejected(item.path, _broken(compression, error))


def _documents(opened: Any, item: Item, kind: str, reading: Reading) -> Iterator[Row]:
    """A file that is one document, or a mailbox. Text that is too large for one document is several."""
    if kind == "mailbox":
        yield from mail.messages(opened, item.path, max_bytes=reading.max_bytes)
        return
    data = opened.read(reading.max_bytes + 1)
    if len(data) > reading.max_bytes:
        if kind in ("", "text") and b"\0" not in data[:SNIFFED_BYTES]:
            yield from _pieces(opened, data, item, reading, is_packed=bool(sources.format_of(item.file)[1]))
        else:
            yield rejected(item.path, reading.too_large, data)
    elif kind == "notebook":
        yield notebook.document(data, item.path)
    else:
        yield {"path": item.path, "group": item.path, "format": kind or "text", "data": data}


def _pieces(opened: Any, data: bytes, item: Item, reading: Reading, *, is_packed: bool) -> Iterator[Row]:
    """Text as documents of at most `max_bytes`, which end with a line, else a word; they are held out together.

    A packed file without line ends and blanks may unpack to any size: it ends there.
    """
    at = 0
    while data:
        end = len(data) if len(data) <= reading.max_bytes else _cut(data[: reading.max_bytes], is_packed=is_packed)
        if not end:
            where = f"{item.path}@{at}" if at else item.path
            yield rejected(where, f"{reading.too_large} without a line end", data, offset=at)
            return
        piece, data = data[:end], data[end:]
        yield {"path": f"{item.path}@{at}", "group": item.path, "offset": at, "format": "text", "data": piece}
        at += end
        data += opened.read(reading.max_bytes + 1 - len(data))


def _cut(data: bytes, *, is_packed: bool) -> int:
    """Where text is cut: behind the last line end, else the last blank, else before a character; 0: nowhere."""
    end = data.rfind(b"\n") + 1 or max(data.rfind(b" "), data.rfind(b"\t")) + 1
    if end or is_packed:
        return end
    start = len(data) - 1  # of the last character, in UTF-8
    while start > max(len(data) - 4, 0) and data[start] & 0xC0 == 0x80:
        start -= 1
    return start if start and data[start] >= 0xC0 else len(data)


def _beginning(item: Item, compression: str) -> bytes:
    """The first bytes of a file, b"" if they cannot be unpacked."""
    with sources.open_file(item.file) as raw:
        try:
            found: bytes = _decompressed(raw, compression).read(SNIFFED_BYTES)
        except _damages(compression) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            return b""
    return found


def _kind_of(beginning: bytes) -> str:
    """The kind of a file, a value of FORMATS, by its first bytes; "" for text and all else."""
    for mark, kind in MARKS.items():
        if beginning.startswith(mark):
            return kind
    if rows.is_json_lines(beginning):
        return "rows"
    return next((kind for pattern, kind in BEGINNINGS if pattern.match(beginning)), "")


def _decompressed(raw: Any, compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".bz2":
        return bz2.BZ2File(raw)
    if compression == ".xz":
        return lzma.LZMAFile(raw)
    if compression == ".zst":
        import zstandard  # an extra; check_extras has said so by now

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


def _damages(compression: str) -> tuple[type[Exception], ...]:
    """What the decompressor raises of a file that is cut off or damaged."""
    if compression == ".zst":
        from zstandard import ZstdError

        return EOFError, ZstdError
    return {
        "": (),
        ".gz": (EOFError, zlib.error, gzip.BadGzipFile),
        ".bz2": (EOFError, OSError),
        ".xz": (EOFError, lzma.LZMAError),
    }[compression]


def _broken(compression: str, error: Exception) -> str:
    name = {".gz": "gzip", ".bz2": "bzip2"}.get(compression, compression.removeprefix("."))
    return f"broken {name}: {'the file is truncated' if isinstance(error, EOFError) else error}"


def _lines(opened: Any, item: Item, reading: Reading, compression: str) -> Iterator[bytes | str]:
    """Lines up to the item's end; a str, the reason, in the place of one that cannot be used, even if the file ends there."""
    left = item.stop - item.start if item.stop >= 0 else -1
    limit = reading.max_bytes
    while left:
        try:
            line = opened.readline(limit + 1)
            if len(line) > limit:
                skipped = _skip_line(opened, line, limit * BOMB_FACTOR if compression else 0)
                yield reading.too_large
                if skipped < 0:
                    return
                left -= skipped if left > 0 else 0
                continue
        except _damages(compression) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            yield _broken(compression, error)
            return
        if not line:
            return
        left -= len(line) if left > 0 else 0
        yield line


def _skip_line(opened: Any, line: bytes, limit: int) -> int:
    """Read on to the end of a line that is too long; its bytes, or -1 if it is longer than `limit` (0: none)."""
    total = len(line)
    while line and not line.endswith(b"\n"):
        line = opened.readline(1 << 20)
        total += len(line)
        if limit and total > limit:
            return -1
    return total
