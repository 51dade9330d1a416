"""Files of rows, each row a document: JSON Lines, JSON, CSV, Parquet, and the Arrow files of Hugging Face's datasets.

A row that cannot be used is rejected with its reason, and the next one is read. Where a file is so broken that no next
row can be found, one more rejected row says so.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from llmjax.prepare import sources
from llmjax.prepare.documents import beginning, text_id
from llmjax.prepare.parts import Item

BOM = "\ufeff"
BLOCK_BYTES = 1 << 20
BATCH_BYTES = 8_000_000  # of the rows of a Parquet file that are decoded at once
BATCH_ROWS = 1024
SEPARATORS = re.compile(r"[\s,]*")
ORIGINS = {
    "url": ("url", "source_url", "uri"),
    "licence": ("licence", "license"),
    "language": ("language", "lang"),
}
ORIGIN_COLUMNS = (*(name for names in ORIGINS.values() for name in names), "meta", "metadata")
MISSING = object()
Row = dict[str, Any]


@dataclass
class Fields:
    """Which rows of a source had the text field, for the message of a source where none has."""

    rows: int = 0
    with_field: int = 0
    names: set[str] = field(default_factory=set)

    def add(self, names: Iterable[str], *, has_field: bool) -> None:
        """Count a row."""
        self.rows += 1
        self.with_field += has_field
        if not self.with_field and len(self.names) < 100:
            self.names.update(names)


@dataclass(frozen=True)
class Reading:
    """How rows are read: the field that holds the text, the largest document, and what is counted."""

    text_field: str
    max_bytes: int
    fields: Fields

    @property
    def too_large(self) -> str:
        """The reason of a document that is too large."""
        return f"too large: more than prepare.max_document_bytes={self.max_bytes:,}"


def rejected(path: str, reason: str, data: bytes = b"", **columns: Any) -> Row:
    """A row for what cannot be used: the first characters of it, and why."""
    return {"path": path, "group": path, "text": beginning(data), "size": len(data), "reason": reason, **columns}


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or MISSING; "content.text" is the field text of content, unless a field has the whole name."""
    if name in row:
        return row[name]
    value: Any = row
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return MISSING
        value = value[key]
    return value


def names_in(row: Mapping[str, Any]) -> Iterator[str]:
    """The names by which `value_of` finds the fields of a row, one level down."""
    for name, value in row.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, Mapping) and value else (name,)


def document(
    row: Any, item: Item, number: int, reading: Reading, *, unit: str = "row", data: bytes = b"",
    names: Collection[str] = (),
) -> Row:  # fmt: skip
    """The document of a row, or why it has none.

    Args:
        unit: what the number is of. data: the row as it stands in the file.
        names: of all fields, where `row` does not have all.
    """
    where = f"{item.path}:{number}"
    if not isinstance(row, dict):
        reason = f"broken JSON: {unit} {number} is no object but {type(row).__name__}"
        return rejected(where, reason, data, offset=number)
    text = value_of(row, reading.text_field)
    reading.fields.add((names or names_in(row)) if text is MISSING else (), has_field=text is not MISSING)
    if text is MISSING:
        reason = f"no text field: {unit} {number} lacks {reading.text_field!r}"
        return rejected(where, reason, data, offset=number)
    if not isinstance(text, str):
        reason = f"text is no string: {unit} {number} holds {type(text).__name__}"
        return rejected(where, reason, data or repr(text).encode(), offset=number)
    if len(text) > reading.max_bytes:
        return rejected(where, reading.too_large, text.encode("utf-8", "replace"), offset=number)
    return _text_row(text, where, number, origin(row))


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
    for name, spellings in ORIGINS.items():
        values: Iterator[Any] = (given.get(key) for given in (row, inner) for key in spellings)
        found[name] = next((value for value in values if isinstance(value, str)), "")
    return found


def json_lines(lines: Iterator[bytes | str], item: Item, reading: Reading) -> Iterator[Row]:
    """A document a line. A line that is a str is the reason why there is none."""
    for number, line in enumerate(lines, start=item.first + 1):
        where = f"{item.path}:{number}"
        if isinstance(line, str):
            yield rejected(where, line, offset=number)
            continue
        line = line.removeprefix(BOM.encode())  # of the file, or of one that was put behind another
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield rejected(where, f"invalid UTF-8: at byte {error.start} of line {number}", line, offset=number)
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            yield rejected(where, f"broken JSON: line {number}: {error}", line, offset=number)
        else:
            yield document(row, item, number, reading, unit="line", data=line)


def is_json_lines(beginning: bytes) -> bool:
    """Whether a .json file is JSON Lines, as those of C4 and Dolma are, rather than one value on several lines."""
    first, newline, _ = beginning.removeprefix(BOM.encode()).lstrip().partition(b"\n")
    try:
        return first.startswith(b"{") and (not newline or isinstance(json.loads(first), dict))
    except (ValueError, RecursionError):
        return False


def json_values(opened: Any, item: Item, reading: Reading) -> Iterator[Row]:
    """A document for each element of one JSON array, or for each of several JSON values that follow one another.

    After a value that is broken or too large no other can be found, so the file ends there.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    parser, text, at, number = json.JSONDecoder(), "", 0, 1
    is_array, is_begun, is_whole = False, False, False
    while True:
        separators = SEPARATORS.match(text, at)
        at = separators.end() if separators else at
        if not is_begun and at < len(text):
            is_begun, is_array = True, text[at] == "["
            at += is_array
            continue
        if is_whole and (at == len(text) or (is_array and text[at] == "]")):
            if is_array and at == len(text):
                yield rejected(f"{item.path}:{number}", "broken JSON: the array does not end")
            return
        try:
            value, end = parser.raw_decode(text, at)
            reason = ""
        except (ValueError, RecursionError) as error:
            reason = f"broken JSON: row {number}: {error}"
        if not reason and (end < len(text) or is_whole):  # else a number may go on
            yield document(value, item, number, reading)
            number, at = number + 1, end
        elif is_whole or len(text) - at > reading.max_bytes:
            data = text[at:].encode("utf-8", "surrogateescape")
            yield rejected(f"{item.path}:{number}", reason if is_whole else reading.too_large, data, offset=number)
            return
        else:  # as much again, so that no value is parsed more than a few times
            block = opened.read(max(BLOCK_BYTES, len(text) - at))
            text, at, is_whole = text[at:] + decode(block, not block), 0, not block


def csv_rows(opened: Any, item: Item, reading: Reading, *, delimiter: str) -> Iterator[Row]:
    """A document for each row below the line of names."""
    csv.field_size_limit(min(reading.max_bytes, 2**31 - 1))
    lines = io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(lines, delimiter=delimiter, restkey="")
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            if "" in row:
                reason = f"broken csv: row {number} has more values than the first line has names"
                yield rejected(f"{item.path}:{number}", reason, repr(row).encode("utf-8", "replace"), offset=number)
            else:
                yield document(row, item, number, reading)
    except csv.Error as error:  # where the next row begins, nobody knows
        reason = f"broken csv: row {number + 1}: {error}; the rest of the file is left out"
        yield rejected(f"{item.path}:{number + 1}", reason, offset=number + 1)


def parquet_rows(item: Item, reading: Reading) -> Iterator[Row]:
    """A document for each row of the row groups of an item."""
    import pyarrow.parquet

    try:
        with (
            sources.open_file(item.file) as opened,
            pyarrow.parquet.ParquetFile(opened, buffer_size=BLOCK_BYTES) as table,
        ):
            groups = range(item.start, item.stop if item.stop >= 0 else table.metadata.num_row_groups)
            number, names, wanted = item.first, _names(table.schema_arrow), _wanted(table.schema_arrow, reading)
            for group in groups:
                size = _rows_at_once(
                    table.metadata.row_group(group).num_rows, table.metadata.row_group(group).total_byte_size
                )
                for batch in table.iter_batches(size, row_groups=[group], columns=wanted):
                    for row in batch.to_pylist() if wanted else [{}] * batch.num_rows:
                        number += 1
                        yield document(row, item, number, reading, names=names)
    except (pa.ArrowException, OSError) as error:
        yield _broken_arrow(error, item, "parquet")


def arrow_rows(item: Item, reading: Reading) -> Iterator[Row]:
    """A document for each row of an Arrow file or stream, such as those that `datasets` saves to disk."""
    try:
        with sources.open_file(item.file) as opened:
            is_file = opened.read(6) == b"ARROW1"
            opened.seek(0)
            read = pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)
            batches = (read.get_batch(n) for n in range(read.num_record_batches)) if is_file else read
            number, names, wanted = item.first, _names(read.schema), _wanted(read.schema, reading)
            for batch in batches:
                size = _rows_at_once(batch.num_rows, batch.nbytes)
                for start in range(0, batch.num_rows, size):
                    some = batch.slice(start, size)
                    for row in some.select(wanted).to_pylist() if wanted else [{}] * some.num_rows:
                        number += 1
                        yield document(row, item, number, reading, names=names)
    except (pa.ArrowException, OSError) as error:
        yield _broken_arrow(error, item, "arrow")


def _wanted(schema: pa.Schema, reading: Reading) -> list[str]:
    """The columns of the text and of where it comes from."""
    names = {reading.text_field, reading.text_field.partition(".")[0], *ORIGIN_COLUMNS}
    return [name for name in schema.names if name in names]


def _names(schema: pa.Schema) -> list[str]:
    """What `names_in` gives of the rows of a schema."""
    names: list[str] = []
    for column in schema:
        inner = column.type if pa.types.is_struct(column.type) else ()
        names += [f"{column.name}.{part.name}" for part in inner] or [column.name]
    return names


def _rows_at_once(rows: int, size: int) -> int:
    """So many of `rows` rows of `size` bytes are some BATCH_BYTES."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


def _broken_arrow(error: Exception, item: Item, kind: str) -> Row:
    if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
        raise error
    return rejected(item.path, f"broken {kind}: {str(error).splitlines()[0]}")
