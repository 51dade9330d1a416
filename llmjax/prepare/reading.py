"""Reads a part into record batches of documents, and never stops at a bad one: it gets a reason and is counted.

What a file holds comes out raw where it must be extracted first (`data` and `format`), and as text where it is text
already (rows of JSONL and Parquet). The largest document must fit in memory, so larger ones than
`prepare.max_document_bytes` are rejected without being held.
"""

import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmjax.data import parallel_text, stdlib_corpus
from llmjax.errors import UserError
from llmjax.prepare import sources
from llmjax.prepare.documents import make_batch, text_id
from llmjax.prepare.formats import mail, warc
from llmjax.prepare.parts import Item, Part

BATCH_BYTES = 8_000_000
BATCH_ROWS = 4096
CLIPPED = 4000  # bytes of a rejected document that are kept: enough to recognise it by
BOM = "\ufeff"
BOMB_FACTOR = 16  # a compressed line that goes on for so many times the limit is not skipped but ends its file
Row = dict[str, Any]


@dataclass
class Fields:
    """Which rows of a source had the text field, for the message of a source where none has."""

    rows: int = 0
    with_field: int = 0
    names: set[str] = field(default_factory=set)

    def add(self, names: Collection[str], text_field: str) -> bool:
        """Count a row and say whether it has the text field."""
        self.rows += 1
        has_field = text_field in names
        self.with_field += has_field
        if not self.with_field and len(self.names) < 100:
            self.names.update(names)
        return has_field


def read_part(part: Part, *, text_field: str, max_bytes: int, fields: Fields) -> Iterator[pa.RecordBatch]:
    """The documents of a part in a fixed order, one batch in memory at a time; rejected rows carry their reason.

    Raises:
        UserError: if parallel text has lines without a partner.
        OSError: if a file cannot be read.
    """
    rows: list[Row] = []
    size = 0
    for row in _rows(part, text_field, max_bytes, fields):
        row["source"] = part.name
        size += len(row.get("data") or b"") + len(row.get("text") or "")
        rows.append(row)
        if size >= BATCH_BYTES or len(rows) >= BATCH_ROWS:
            yield make_batch(rows)
            rows, size = [], 0
    if rows:
        yield make_batch(rows)


def _rows(part: Part, text_field: str, max_bytes: int, fields: Fields) -> Iterator[Row]:
    for item in part.items:
        with sources.naming(item.file):
            if part.kind == "stdlib":
                yield from _stdlib(item.file)
            elif item.partner:
                yield from _pairs(item)
            else:
                yield from _file(item, text_field, max_bytes, fields)


def rejected(path: str, reason: str, data: bytes = b"", **columns: Any) -> Row:
    """A row for what cannot be used: the first bytes of it, and why."""
    return {"path": path, "group": path, "text": data[:CLIPPED].decode("utf-8", "replace"), "reason": reason, **columns}


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
            row = {"path": where, "group": text_id_hex(data), "offset": number, "format": "text", "data": data}
            yield row


def text_id_hex(data: bytes | str) -> str:
    """The id of a text as 32 hexadecimal digits: the group of a row that is a group of its own."""
    return text_id(data if isinstance(data, str) else data.decode("utf-8", "replace")).hex()


def _file(item: Item, text_field: str, max_bytes: int, fields: Fields) -> Iterator[Row]:
    kind, compression = sources.format_of(item.file)
    if kind == "parquet":
        yield from _parquet(item, text_field, max_bytes, fields)
        return
    if kind == "warc":
        yield from warc.read(item.file, item.path, max_bytes=max_bytes)
        return
    with sources.open_file(item.file) as raw:
        opened = _decompressed(raw, compression)
        if kind == "rows":
            raw.seek(item.start)
            yield from _json_rows(item, _lines(opened, item, max_bytes, bool(compression)), text_field, fields)
            return
        try:
            if kind == "mailbox":
                yield from mail.messages(opened, item.path, max_bytes=max_bytes)
                return
            data = opened.read(max_bytes + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error, _zstd_error()) as error:
            yield rejected(item.path, _broken(compression, error))
            return
    if len(data) > max_bytes:
        yield rejected(item.path, _too_large(max_bytes), data)
    else:
        yield {"path": item.path, "group": item.path, "format": kind or "text", "data": data}


def _too_large(max_bytes: int) -> str:
    return f"too large: more than prepare.max_document_bytes={max_bytes:,}"


def _decompressed(raw: Any, compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".zst":
        import io

        import zstandard  # an extra; check_extras has said so by now

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


def _zstd_error() -> type[Exception]:
    try:
        from zstandard import ZstdError
    except ImportError:
        return EOFError
    return ZstdError


def _broken(compression: str, error: Exception) -> str:
    name = compression.removeprefix(".").replace("gz", "gzip")
    return f"broken {name}: {'the file is truncated' if isinstance(error, EOFError) else error}"


def _lines(opened: Any, item: Item, max_bytes: int, is_compressed: bool) -> Iterator[bytes | UserError]:
    """Lines up to the item's end; a UserError in the place of one that cannot be used, the last one if the file ends there."""
    left = item.stop - item.start if item.stop >= 0 else -1
    while left:
        try:
            line = opened.readline(max_bytes + 1)
            if len(line) > max_bytes:
                skipped = _skip_line(opened, line, max_bytes * BOMB_FACTOR if is_compressed else 0)
                yield UserError(_too_large(max_bytes))
                if skipped < 0:
                    return
                left -= skipped if left > 0 else 0
                continue
        except (EOFError, gzip.BadGzipFile, zlib.error, _zstd_error()) as error:
            yield UserError(_broken(sources.format_of(item.file)[1], error))
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


def _json_rows(item: Item, lines: Iterator[bytes | UserError], text_field: str, fields: Fields) -> Iterator[Row]:
    for number, line in enumerate(lines, start=item.first + 1):
        where = f"{item.path}:{number}"
        if isinstance(line, UserError):
            yield rejected(where, str(line), offset=number)
            continue
        line = line.removeprefix(BOM.encode())  # of the file, or of one that was put behind another
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield rejected(where, f"invalid UTF-8: at byte {error.start} of line {number}", line, offset=number)
            continue
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            yield rejected(where, f"broken JSON: line {number}: {error}", line, offset=number)
            continue
        if not isinstance(row, dict):
            reason = f"broken JSON: line {number} is no object but {type(row).__name__}"
            yield rejected(where, reason, line, offset=number)
        elif not fields.add(row, text_field):
            yield rejected(where, f"no text field: line {number} lacks {text_field!r}", line, offset=number)
        elif not isinstance(row[text_field], str):
            reason = f"text is no string: line {number} holds {type(row[text_field]).__name__}"
            yield rejected(where, reason, line, offset=number)
        else:
            yield _text_row(row[text_field], where, number, origin(row))


def _text_row(text: str, where: str, number: int, columns: Mapping[str, str]) -> Row:
    """A row of a text as it stands in a file of rows: without a byte order mark, with "\\n" line ends."""
    text = text.removeprefix(BOM).replace("\r\n", "\n").replace("\r", "\n")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        reason = f"invalid Unicode: lone surrogate at character {error.start}"
        return rejected(where, reason, text.encode("utf-8", "replace"), offset=number)
    if "\0" in text:
        return rejected(where, f"binary: NUL at byte {data.index(0)}", data, offset=number)
    return {"path": where, "group": text_id(text).hex(), "offset": number, "text": text, **columns}


def origin(row: Mapping[str, Any]) -> dict[str, str]:
    """url, licence and language of a row, from its fields or those of its "meta" or "metadata", in the usual spellings."""
    found: dict[str, str] = {}
    inner: Mapping[str, Any] = next((row[key] for key in ("meta", "metadata") if isinstance(row.get(key), Mapping)), {})
    for name, spellings in {
        "url": ("url", "source_url", "uri"),
        "licence": ("licence", "license"),
        "language": ("language", "lang"),
    }.items():
        values: Iterator[Any] = (given.get(key) for given in (row, inner) for key in spellings)
        found[name] = next((value for value in values if isinstance(value, str)), "")
    return found


def _parquet(item: Item, text_field: str, max_bytes: int, fields: Fields) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        with sources.open_file(item.file) as opened, pyarrow.parquet.ParquetFile(opened) as table:
            names = table.schema_arrow.names
            wanted = [name for name in names if name in (text_field, *ORIGIN_COLUMNS)]
            groups = range(item.start, item.stop if item.stop >= 0 else table.metadata.num_row_groups)
            number = item.first
            batches: Iterator[pa.RecordBatch] = table.iter_batches(
                batch_size=1024, row_groups=list(groups), columns=wanted
            )
            for batch in batches:
                for row in batch.to_pylist() if wanted else [{}] * batch.num_rows:
                    number += 1
                    yield _parquet_row(row, f"{item.path}:{number}", number, names, text_field, max_bytes, fields)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
            raise
        yield rejected(item.path, f"broken parquet: {str(error).splitlines()[0]}")


ORIGIN_COLUMNS = ("url", "source_url", "uri", "licence", "license", "language", "lang", "meta", "metadata")


def _parquet_row(
    row: Row, where: str, number: int, names: Collection[str], text_field: str, max_bytes: int, fields: Fields
) -> Row:
    if not fields.add(names, text_field):
        return rejected(where, f"no text field: row {number} lacks {text_field!r}", offset=number)
    text = row[text_field]
    if not isinstance(text, str):
        reason = f"text is no string: row {number} holds {type(text).__name__}"
        return rejected(where, reason, repr(text).encode(), offset=number)
    if len(text) > max_bytes:
        return rejected(where, _too_large(max_bytes), text[:CLIPPED].encode(), offset=number)
    return _text_row(text, where, number, origin(row))
