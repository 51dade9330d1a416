"""Common Crawl's files: the responses of WARC files and the plain text of WET files, one document each."""

from collections.abc import Iterator
from typing import Any

from llmjax.prepare import sources

FORMATS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text", "application/pdf": "pdf"}


def read(file: str, path: str, *, max_bytes: int) -> Iterator[dict[str, Any]]:
    """Raw rows of the records that hold a document: HTML, plain text and PDF that were answered with status 200.

    Other records (requests, metadata, redirects, images) are no documents and are passed over. A file that ends within
    a record, or whose compression is damaged, ends with a rejected row.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType  # an extra; check_extras has said so by now

    last = -1
    stop = sources.size_of(file)
    kinds = WarcRecordType.response | WarcRecordType.conversion | WarcRecordType.resource
    with sources.open_file(file) as raw:
        try:
            for record in ArchiveIterator(raw, record_types=kinds, parse_http=True, auto_decode="all"):
                last = record.stream_pos
                url = record.headers.get("WARC-Target-URI") or ""
                where = f"{path}@{last}"
                row = {"path": where, "offset": last, "url": url, "group": _host(url) or where}
                if record.record_type == WarcRecordType.response and record.http_headers is not None:
                    if record.http_headers.status_code not in (200, "200"):
                        continue
                    content = record.http_content_type or ""
                else:
                    content = record.headers.get("Content-Type") or "text/plain"
                kind = FORMATS.get(content.partition(";")[0].strip().lower(), "")
                if not kind:
                    continue
                data = record.reader.read(max_bytes + 1)
                if len(data) > max_bytes:
                    reason = f"too large: more than prepare.max_document_bytes={max_bytes:,}"
                    yield {**row, "text": data[:4000].decode("utf-8", "replace"), "reason": reason}
                elif len(data) < _length(record):
                    reason = f"broken warc: the record at byte {last} is cut off"
                    yield {**row, "text": data[:4000].decode("utf-8", "replace"), "reason": reason}
                    return
                else:
                    yield {**row, "format": kind, "data": data}
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
                raise
            reason = f"broken warc: after byte {max(last, 0)} of {stop}: {error or type(error).__name__}"
            yield {"path": path, "group": path, "text": "", "reason": reason}
            return
    if last < 0 and stop:
        yield {"path": path, "group": path, "text": "", "reason": "broken warc: no record in it"}


def _host(url: str) -> str:
    """Pages of one site are held out together."""
    return url.partition("://")[2].partition("/")[0].lower()


def _length(record: Any) -> int:
    """Bytes that the record says its body has; 0 where a transfer or content encoding makes that unknown."""
    headers = record.http_headers
    if headers is not None and (headers.get("Content-Encoding") or headers.get("Transfer-Encoding")):
        return 0
    try:
        return int(record.content_length)
    except (TypeError, ValueError):
        return 0
