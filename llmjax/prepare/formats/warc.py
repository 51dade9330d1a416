"""Common Crawl's files: the responses of WARC files and the plain text of WET files, one document each.

fastwarc reads the records. It ends a file at the first record that it does not understand, so this module looks for the
next record behind the damage, and goes on from there.
"""

import re
import zlib
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

from llmjax.prepare.formats import RejectedError, is_panic
from llmjax.prepare.formats.http_encodings import GZIP, ZSTD, decoded

FORMATS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text", "application/pdf": "pdf"}
CLIPPED = 4000  # bytes of a rejected record that are kept
BLOCK_BYTES = 1 << 20
_CHARSET = re.compile(r"(?i)charset\s*=\s*[\"']?([\w.:-]{1,40})")
_BEGIN = re.compile(rb"\x1f\x8b\x08|\x28\xb5\x2f\xfd|WARC/\d\.\d{1,2}\r?\n[A-Za-z-]{1,40} ?:")
_BEGIN_BYTES = 64  # no match is longer
_HEAD = re.compile(rb"WARC/[^\n]*\n(?:[^\n]*[^\r\n][^\n]*\n)*\r?\n")
_LENGTH = re.compile(rb"(?im)^content-length[ \t]*:[ \t]*(\d{1,15})[ \t]*\r?$")
_TAIL = re.compile(rb"\r?\n\r?\n")

Row = dict[str, Any]


class _End(NamedTuple):
    """Where fastwarc ends.

    Attributes:
        last: where the last record begins that was read, -1: none. error: what is wrong, "" if nothing was noticed.
    """

    last: int
    error: str


def read(opened: Any, path: str, *, max_bytes: int) -> Iterator[Row]:
    """Raw rows of the records that hold a document: HTML, plain text and PDF that were answered with status 200.

    Other records (requests, metadata, redirects, images) are skipped. A record that is cut off, whose length is wrong or
    whose body cannot be decoded becomes a rejected row, as do bytes between two records.

    Args:
        opened: the file, open and seekable; records may be compressed one by one (gzip, Zstandard).
    """
    start = 0
    while True:
        found = yield from _records(opened, path, start, max_bytes)
        # The record at `last` is whole, and what follows is no record; or it is not (a wrong length may reach over all
        # records that follow), and has been rejected.
        end = _end_of_record(opened, found.last, max_bytes) if found.last >= 0 else -1
        next_ = _next_record(opened, end if end >= 0 else max(found.last, start) + 1)
        if found.error and (next_ < 0 or next_ != end) and (end >= 0 or found.last < 0):
            yield _broken(path, max(end, start), found.error)
        if next_ < 0:
            return
        start = next_


def _records(opened: Any, path: str, start: int, max_bytes: int) -> Generator[Row, None, _End]:
    """The rows of the records from a byte on. Returns where they end.

    A row is given once the record behind it has been found, which tells whether its length is right.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType  # an extra; check_extras has said so by now

    opened.seek(start)
    last, held = -1, None
    try:
        # With auto_decode, fastwarc ends the file at the first record that it cannot decode.
        for record in ArchiveIterator(opened, parse_http=True, auto_decode="none"):
            if held is not None:
                yield held
            last, kind = record.stream_pos, record.record_type
            is_response = kind == WarcRecordType.response
            is_other = not is_response and kind not in (WarcRecordType.conversion, WarcRecordType.resource)
            held = None if is_other else _row(record, path, is_response=is_response)
            if held is None:
                continue
            length = int(record.content_length)
            body = record.reader.read(max_bytes + 1)
            if len(body) < min(length, max_bytes + 1):
                held = _rejected(held, f"broken warc: the record at byte {last} is cut off", body)
            else:
                held = _with_body(held, body, record.http_headers, max_bytes)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
            raise
        if not (isinstance(error, (OSError, ValueError, EOFError)) or is_panic(error)):
            raise
        if held is not None:
            if "reason" not in held and _end_of_record(opened, last, max_bytes) < 0:
                held = _rejected(held, f"broken warc: the length of the record at byte {last} is wrong")
            yield held
        elif last >= 0 and _end_of_record(opened, last, max_bytes) < 0:
            yield _broken(path, last, str(error))
        return _End(last, str(error) or type(error).__name__)
    if held is not None:
        yield held
    if last < 0 and start == 0:
        opened.seek(0)
        if opened.read(1):
            yield {"path": path, "group": path, "text": "", "reason": "broken warc: no record in it"}
    return _End(last, "")


def _with_body(row: Row, body: bytes, headers: Any, max_bytes: int) -> Row:
    try:
        return {**row, "data": decoded(body, headers, max_bytes)}
    except RejectedError as rejected:
        return _rejected(row, str(rejected), body)


def _broken(path: str, at: int, error: str) -> Row:
    where = f"{path}@{at}" if at else path
    return {"path": where, "group": where, "offset": at, "text": "", "reason": f"broken warc: at byte {at}: {error}"}


def _rejected(row: Row, reason: str, body: bytes = b"") -> Row:
    row = {key: value for key, value in row.items() if key != "data"}
    return {**row, "format": "", "text": body[:CLIPPED].decode("utf-8", "replace"), "reason": reason}


def _row(record: Any, path: str, *, is_response: bool) -> Row | None:
    """The row of a record without its data, None if it holds no document."""
    content = record.headers.get("Content-Type") or "text/plain"
    if is_response and record.http_headers is not None:
        if record.http_headers.status_code not in (200, "200"):
            return None
        content = record.http_headers.get("Content-Type") or ""
    kind = FORMATS.get(content.partition(";")[0].strip().lower(), "")
    if not kind:
        return None
    if charset := _CHARSET.search(content):
        kind += f"; charset={charset[1]}"
    url = record.headers.get("WARC-Target-URI") or ""
    where = f"{path}@{record.stream_pos}"
    host = url.partition("://")[2].partition("/")[0].lower()  # pages of one site are held out together
    return {"path": where, "offset": record.stream_pos, "url": url, "group": host or where, "format": kind}


def _unpacker(beginning: bytes) -> Any:
    """A decompressor for one record that begins so, with `decompress`, `eof` and `unused_data`; None: as it is."""
    if beginning.startswith(GZIP):
        return zlib.decompressobj(31)
    if beginning.startswith(ZSTD):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()
    return None


def _unpacked(unpacker: Any, data: bytes) -> bytes:
    """Some bytes decompressed, b"" if they cannot be."""
    try:
        result: bytes = unpacker.decompress(data)
    except Exception as error:
        if isinstance(error, zlib.error) or type(error).__name__ == "ZstdError":
            return b""
        raise
    return result


def _end_of_record(opened: Any, at: int, max_bytes: int) -> int:
    """Where the record that begins at a byte ends; -1 if it is not whole, its length is wrong, or it is too large."""
    opened.seek(at)
    most = max_bytes + BLOCK_BYTES
    unpacker = _unpacker(opened.read(4))
    opened.seek(at)
    if unpacker is None:
        record = opened.read(most)
    else:
        record = bytearray()
        while not unpacker.eof and len(record) < most and (block := opened.read(BLOCK_BYTES)):
            piece = _unpacked(unpacker, block)
            if not piece:
                return -1
            record += piece
        if not unpacker.eof:
            return -1
    head = _HEAD.match(record)
    length = _LENGTH.search(head[0]) if head else None
    if head is None or length is None:
        return -1
    end = head.end() + int(length[1])
    if unpacker is not None:
        return opened.tell() - len(unpacker.unused_data) if len(record) >= end and not record[end:].strip() else -1
    tail = _TAIL.match(record, end)
    return at + tail.end() if tail else -1


def _next_record(opened: Any, at: int) -> int:
    """Where the next record begins, at a byte or behind it; -1: nowhere."""
    base = max(at - 1, 0)  # a record begins behind a line end
    opened.seek(base)
    block = b""
    while piece := opened.read(BLOCK_BYTES):
        block += piece
        for match in _BEGIN.finditer(block):
            position = base + match.start()
            if position < at:
                continue
            opened.seek(position)
            beginning = opened.read(4096)
            unpacker = _unpacker(beginning)
            is_line = position == at or block[match.start() - 1 : match.start()] in (b"\n", b"")
            if is_line if unpacker is None else _unpacked(unpacker, beginning).startswith(b"WARC/"):
                return position
        opened.seek(base + len(block))
        base, block = base + max(len(block) - _BEGIN_BYTES, 0), block[-_BEGIN_BYTES:]
    return -1
