"""Files of rows, each row a document: what all of them share, and JSON Lines, JSON and CSV. `arrow.py` has the others.

A row that cannot be used is rejected with its reason, and the next one is read. Where a file is so broken that no next
row can be found, one more rejected row says so.
"""

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmjax.prepare.documents import beginning, text_id
from llmjax.prepare.formats.text import nearly_utf8
from llmjax.prepare.parts import Item

BOM = "\ufeff"
BLOCK_BYTES = 1 << 20
LONGEST_WORD = 16  # characters of a JSON token beside numbers and strings that the end of a block may cut in two
SEPARATORS = re.compile(r"[\s,]*")
_BRACKETS = re.compile(r'\\.|["\[\]{},]', re.DOTALL)
ORIGINS = {
    "url": ("url", "source_url", "uri"),
    "licence": ("licence", "license"),
    "language": ("language", "lang"),
}
ORIGIN_COLUMNS = (*(name for names in ORIGINS.values() for name in names), "meta", "metadata")
MISSING = object()
EMPTY: Mapping[str, int] = {}
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


def value_of(row: Any, name: str) -> Any:
    """The value of a field, or MISSING; "content.text" is the field text of content, unless a field has the whole name."""
    if not isinstance(row, Mapping) or not name:
        return MISSING
    if name in row:
        return row[name]
    first, _, rest = name.partition(".")
    return value_of(row.get(first), rest)


def names_in(row: Mapping[str, Any]) -> Iterator[str]:
    """The names by which `value_of` finds the fields of a row, one level down."""
    for name, value in row.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, Mapping) and value else (name,)


def document(
    row: Any, item: Item, number: int, reading: Reading, *, unit: str = "row", data: bytes = b"",
    names: Collection[str] = (), facts: Mapping[str, int] = EMPTY,
) -> Row:  # fmt: skip
    """The document of a row, or why it has none. A text that is bytes is decoded later, by the step extract.

    Args:
        unit: what the number is of. data: the row as it stands in the file.
        names: of all fields, where `row` does not have all. facts: about the text.
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
    if isinstance(text, bytes):
        too_large = {"data": None, **rejected(where, reading.too_large, text, offset=number)}
        columns = {"offset": number, "format": "text", "data": text, **origin(row)}
        group = hashlib.blake2b(text, digest_size=16).hexdigest()
        return too_large if len(text) > reading.max_bytes else {"path": where, "group": group, **columns}
    if not isinstance(text, str):
        reason = f"text is no string: {unit} {number} holds {type(text).__name__}"
        return rejected(where, reason, data or repr(text).encode(), offset=number)
    if len(text) > reading.max_bytes:
        return rejected(where, reading.too_large, text.encode("utf-8", "replace"), offset=number)
    return _text_row(text, where, number, origin(row), facts)


def _text_row(text: str, where: str, number: int, columns: Mapping[str, str], facts: Mapping[str, int]) -> Row:
    """A row of a text as it stands in a file of rows: without a byte order mark, with "\\n" line ends."""
    text = text.removeprefix(BOM).replace("\r\n", "\n").replace("\r", "\n")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        nearly = nearly_utf8(_escaped(text))
        if nearly is None:
            reason = f"invalid Unicode: lone surrogate at character {error.start}"
            return rejected(where, reason, text.encode("utf-8", "replace"), offset=number)
        text, facts = nearly
        data = text.encode()
    if "\0" in text:
        return rejected(where, f"binary: NUL at byte {data.index(0)}", data, offset=number)
    row = {"path": where, "group": text_id(text).hex(), "offset": number, "text": text, **columns}
    return {**row, "facts": json.dumps(facts)} if facts else row


def _escaped(text: str) -> bytes:
    """The bytes of a text in which bad bytes are surrogates (`surrogateescape`); b"" if it has other surrogates."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b""


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
            content, facts = line.decode(), EMPTY
        except UnicodeDecodeError as error:
            if (nearly := nearly_utf8(line)) is None:
                yield rejected(where, f"invalid UTF-8: at byte {error.start} of line {number}", line, offset=number)
                continue
            content, facts = nearly
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            yield rejected(where, f"broken JSON: line {number}: {error}", line, offset=number)
        else:
            yield document(row, item, number, reading, unit="line", data=line, facts=facts)


def is_json_lines(beginning: bytes) -> bool:
    """Whether a .json file is JSON Lines, as those of C4 and Dolma are, rather than one value on several lines."""
    first, newline, _ = beginning.removeprefix(BOM.encode()).lstrip().partition(b"\n")
    try:
        return first.startswith(b"{") and (not newline or isinstance(json.loads(first), dict))
    except (ValueError, RecursionError):
        return False


def json_values(opened: Any, item: Item, reading: Reading) -> Iterator[Row]:
    """A document for each element of one JSON array, or for each of several JSON values that follow one another.

    A value that is broken or too large is a rejected row. The next one is looked for where its brackets end.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    parser, text, at, number = json.JSONDecoder(), "", 0, 1
    is_array, is_begun, is_whole = False, False, False

    def more(size: int) -> None:
        nonlocal text, at, is_whole
        block = opened.read(max(BLOCK_BYTES, size))
        text, at, is_whole = text[at:] + decode(block, not block), 0, not block

    while True:
        separators = SEPARATORS.match(text, at)
        at = separators.end() if separators else at
        if not is_begun and at < len(text):
            is_begun, is_array = True, text[at] == "["
            at += is_array
            continue
        if at < len(text) and is_array and text[at] == "]":
            return
        if is_whole and at == len(text):
            if is_array:
                yield rejected(f"{item.path}:{number}", "broken JSON: the array does not end")
            return
        is_large = len(text) - at > reading.max_bytes
        try:
            value, end = parser.raw_decode(text, at)
            reason, is_cut = "", end == len(text)  # a number may go on
        except (ValueError, RecursionError) as error:
            reason, is_cut = f"broken JSON: row {number}: {error}", _is_cut(error, len(text))
        if is_cut and not (is_large or is_whole):
            more(len(text) - at)  # as much again, so that no value is parsed more than a few times
        elif not reason and (is_whole or not is_cut):
            yield document(value, item, number, reading)
            number, at = number + 1, end
        else:
            end, left = _end_of_value(text, at)
            data = text[at : end if end >= 0 else len(text)].encode("utf-8", "replace")
            is_large = len(data) > reading.max_bytes
            yield rejected(f"{item.path}:{number}", reading.too_large if is_large else reason, data, offset=number)
            while end < 0 and not is_whole:
                at = len(text)
                more(0)
                end, left = _end_of_value(text, at, left)
            if end < 0:
                return
            number, at = number + 1, max(end, at + 1)


def _is_cut(error: Exception, size: int) -> bool:
    """Whether JSON cannot be parsed because the text of so many characters ends too early."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > size - LONGEST_WORD


def _end_of_value(text: str, at: int, opened: str = "") -> tuple[int, str]:
    """Where a JSON value ends, by its brackets and strings, however broken it is; -1: not in this text.

    Args:
        opened: the brackets, and the quotation mark at the end, that are open at `at`. Those at the end are returned too.
    """
    for match in _BRACKETS.finditer(text, at):
        mark = match[0]
        if opened.endswith('"'):
            opened = opened[:-1] if mark == '"' else opened
        elif mark in '"[{':
            opened += mark
        elif mark in "]}":
            if not opened:
                return match.start(), ""
            place = opened.rfind("[" if mark == "]" else "{")  # brackets within it that were not closed go too
            opened = opened[: max(place, 0)]
            if not opened:
                return match.end(), ""
        elif mark == "," and not opened:
            return match.start(), ""
    return -1, opened


def _within(opened: Any, limit: int) -> Iterator[str]:
    """The lines of an open file, with bad bytes as surrogates. csv.Error for a line of more than so many bytes."""
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    while line := opened.readline(limit + 1):
        if len(line) > limit:
            raise csv.Error(f"a line of more than {limit:,} bytes")
        yield decode(line)


def csv_rows(opened: Any, item: Item, reading: Reading, *, delimiter: str) -> Iterator[Row]:
    """A document for each row below the line of names."""
    csv.field_size_limit(min(reading.max_bytes, 2**31 - 1))
    rows = csv.DictReader(_within(opened, reading.max_bytes), delimiter=delimiter, restkey="")
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
