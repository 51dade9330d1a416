"""Common Crawl's files: the responses of WARC files and the plain text of WET files, one document each."""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from llmjax.prepare import sources
from llmjax.prepare.formats import RejectedError
from llmjax.prepare.formats.text import looks_binary

FORMATS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text", "application/pdf": "pdf"}
CLIPPED = 4000  # bytes of a rejected record that are kept
_CHARSET = re.compile(r"(?i)charset\s*=\s*[\"']?([\w.:-]{1,40})")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")


def read(file: str, path: str, *, max_bytes: int) -> Iterator[dict[str, Any]]:
    """Raw rows of the records that hold a document: HTML, plain text and PDF that were answered with status 200.

    Other records (requests, metadata, redirects, images) are skipped. A record whose body cannot be decoded becomes a
    rejected row. So does the last record of a file that is cut off or whose compression is damaged.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType  # an extra; check_extras has said so by now

    last = -1
    stop = sources.size_of(file)
    kinds = WarcRecordType.response | WarcRecordType.conversion | WarcRecordType.resource
    with sources.open_file(file) as raw:
        try:
            # With auto_decode, fastwarc ends the file at the first record that it cannot decode.
            for record in ArchiveIterator(raw, record_types=kinds, parse_http=True, auto_decode="none"):
                last = record.stream_pos
                row = _row(record, path, is_response=record.record_type == WarcRecordType.response)
                if row is None:
                    continue
                length = int(record.content_length)
                body = record.reader.read(max_bytes + 1)
                if len(body) < min(length, max_bytes + 1):
                    yield _rejected(row, f"broken warc: the record at byte {last} is cut off", body)
                    return
                try:
                    yield {**row, "data": _decoded(body, record.http_headers, max_bytes)}
                except RejectedError as rejected:
                    yield _rejected(row, str(rejected), body)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
                raise
            reason = f"broken warc: after byte {max(last, 0)} of {stop}: {error or type(error).__name__}"
            yield {"path": path, "group": path, "text": "", "reason": reason}
            return
    if last < 0 and stop:
        yield {"path": path, "group": path, "text": "", "reason": "broken warc: no record in it"}


def _rejected(row: dict[str, Any], reason: str, body: bytes) -> dict[str, Any]:
    return {**row, "format": "", "text": body[:CLIPPED].decode("utf-8", "replace"), "reason": reason}


def _row(record: Any, path: str, *, is_response: bool) -> dict[str, Any] | None:
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


def _decoded(body: bytes, headers: Any, max_bytes: int) -> bytes:
    """The body of a response without its transfer and content encodings.

    Raises:
        RejectedError: the body is damaged, or has more than max_bytes.
    """
    if headers is not None:
        named = f"{headers.get('Content-Encoding') or ''},{headers.get('Transfer-Encoding') or ''}".lower()
        for name in [name.strip() for name in reversed(named.split(","))]:  # the last encoding applied is undone first
            if undo := _ENCODINGS.get(name):
                try:
                    body = undo(body, max_bytes + 1)
                except (zlib.error, ValueError) as error:
                    raise RejectedError(f"broken record: {name}: {error}") from error
    if len(body) > max_bytes:
        raise RejectedError(f"too large: more than prepare.max_document_bytes={max_bytes:,}")
    return body


# Each function undoes an encoding and returns at most `most` bytes. A header may name an encoding that the crawler has
# already undone, so a body that does not begin like the encoding, or is plain text, stays as it is.


def _inflated(body: bytes, most: int, bits: int) -> bytes:
    inflater = zlib.decompressobj(bits)
    result = inflater.decompress(body, most)
    if not inflater.eof and len(result) < most:
        raise ValueError("cut off")
    return result


def _gzip(body: bytes, most: int) -> bytes:
    return _inflated(body, most, 31) if body.startswith(b"\x1f\x8b") else body


def _deflate(body: bytes, most: int) -> bytes:
    for bits in (15, -15):  # zlib's format, as the standard says, or raw deflate, as some servers send it
        try:
            return _inflated(body, most, bits)
        except (zlib.error, ValueError) as error:
            failed = error
    if looks_binary(body):
        raise failed
    return body


def _brotli(body: bytes, most: int) -> bytes:
    import brotli  # comes with fastwarc

    decoder = brotli.Decompressor()
    try:
        result: bytes = decoder.process(body, output_buffer_limit=most)
    except brotli.error as error:
        if looks_binary(body):
            raise ValueError(str(error)) from error
        return body
    if not decoder.is_finished() and len(result) < most:
        raise ValueError("cut off")
    return result


def _zstd(body: bytes, most: int) -> bytes:
    import zstandard

    if not body.startswith(b"\x28\xb5\x2f\xfd"):
        return body
    try:
        result: bytes = zstandard.ZstdDecompressor().stream_reader(body).read(most)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return result


def _chunked(body: bytes, most: int) -> bytes:
    parts, at, size = [], 0, 0
    while size < most:
        head = _CHUNK.match(body, at)
        if head is None:
            if at == 0:
                return body
            raise ValueError(f"no chunk at byte {at}")
        length, at = int(head[1], 16), head.end()
        if not length:
            break
        parts.append(body[at : at + length])
        if len(parts[-1]) < length:
            raise ValueError("cut off")
        size, at = size + length, at + length
        at += 2 if body.startswith(b"\r\n", at) else 1
    return b"".join(parts)


_ENCODINGS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
    "chunked": _chunked,
}
