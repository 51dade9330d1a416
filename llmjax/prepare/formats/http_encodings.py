"""The transfer and content encodings of HTTP bodies: chunked, gzip, deflate, Brotli, Zstandard.

A header may name an encoding that the crawler has already undone, so a body that does not begin like the encoding, or is
plain text, stays as it is.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any

from llmjax.prepare.formats import RejectedError
from llmjax.prepare.formats.text import looks_binary

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how the compressed data begin
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")


def decoded(body: bytes, headers: Any, max_bytes: int) -> bytes:
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


# Each function undoes an encoding and returns at most `most` bytes.


def _inflated(body: bytes, most: int, bits: int) -> tuple[bytes, bytes]:
    """What one compressed stream holds, and the bytes behind it."""
    inflater = zlib.decompressobj(bits)
    result = inflater.decompress(body, most)
    if not inflater.eof and len(result) < most:
        raise ValueError("cut off")
    return result, inflater.unused_data


def _gzip(body: bytes, most: int) -> bytes:
    if not body.startswith(GZIP):
        return body
    members, size = [], 0
    while body.startswith(GZIP) and size < most:  # several members are one body; what else is behind them is padding
        member, body = _inflated(body, most - size, 31)
        members.append(member)
        size += len(member)
    return b"".join(members)


def _deflate(body: bytes, most: int) -> bytes:
    for bits in (15, -15):  # zlib's format, as the standard says, or raw deflate, as some servers send it
        try:
            return _inflated(body, most, bits)[0]
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

    frames, size = [], 0
    while body.startswith(ZSTD) and size < most:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            # A frame may unpack to any size, so its beginning is looked at in pieces.
            for at in range(0, len(body), 4096):
                frames.append(frame.decompress(body[at : at + 4096]))
                size += len(frames[-1])
                if frame.eof or size >= most:
                    break
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
        if not frame.eof and size < most:
            raise ValueError("cut off")
        body = frame.unused_data + body[at + 4096 :]
    return b"".join(frames)[:most] if frames else body


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
