"""Mailboxes: the messages of an mbox file, one document each; a thread stays together when some is held out."""

import email
import email.policy
import re
from collections.abc import Iterator
from email.errors import MessageError
from typing import Any

from llmjax.prepare.formats import RejectedError, html
from llmjax.prepare.formats.charsets import codec_of
from llmjax.prepare.formats.text import decode, line_ends

# A line "From ADDRESS DATE" after an empty line begins a message (RFC 4155); quoted ones in bodies are ">From ".
BEGIN = re.compile(rb"From [^\n]*\d{4}\r?\n")
THREAD = re.compile(rb"^(References|In-Reply-To|Message-ID):\s*(<[^>\s]+>)", re.MULTILINE | re.IGNORECASE)
LINE_BYTES = 1 << 20  # longer lines are read in pieces
SUBJECT_CHARACTERS = 2_000
_ENCODED = re.compile(r"=\?([\w.:-]{1,40})(?:\*[\w-]{0,20})?\?([BbQq])\?")  # an encoded word begins so (RFC 2047)


def messages(opened: Any, path: str, *, max_bytes: int) -> Iterator[dict[str, Any]]:
    """A raw row for each message of an open mailbox (mbox, RFC 4155), read line by line, so its size has no limit.

    The standard library's `mailbox` reads only local, uncompressed files. A file that does not begin with a "From " line
    becomes one rejected row, as does a message of more than max_bytes.
    """
    number = start = at = size = 0
    lines: list[bytes] = []
    is_after_blank = True
    while line := opened.readline(LINE_BYTES):
        if is_after_blank and BEGIN.match(line):
            if number:
                yield _message(lines, path, number, start, size > max_bytes)
            number, start, size, lines = number + 1, at, 0, []
        elif number and size <= max_bytes:
            lines.append(line[1:] if line.startswith(b">From ") else line)
            size += len(line)
        elif not number and line.strip():
            break
        at += len(line)
        is_after_blank = line in (b"\n", b"\r\n")
    if number:
        yield _message(lines, path, number, start, size > max_bytes)
    else:
        reason = "broken mailbox: it does not begin with a From line"
        yield {"path": path, "group": path, "text": line[:1000].decode("utf-8", "replace"), "reason": reason}


def _message(lines: list[bytes], path: str, number: int, start: int, is_large: bool) -> dict[str, Any]:
    message = b"".join(lines)
    head = message.replace(b"\r\n", b"\n").partition(b"\n\n")[0]
    found = {match[1].lower(): match[2] for match in reversed(list(THREAD.finditer(head)))}
    root = next((found[key] for key in (b"references", b"in-reply-to", b"message-id") if key in found), b"")
    where = f"{path}:{number}"
    row = {"path": where, "offset": start, "group": f"{path}#{root.decode('utf-8', 'replace')}" if root else where}
    if is_large:
        return {**row, "text": message[:4000].decode("utf-8", "replace"), "reason": "too large: a message of more "
                "than prepare.max_document_bytes"}  # fmt: skip
    return {**row, "format": "mail", "data": message}


def text_of(data: bytes, encodings: tuple[str, ...] = ("utf-8",)) -> tuple[str, dict[str, int]]:
    """Subject and body of one message (RFC 5322 and MIME), and facts about its encoding; attachments are dropped.

    The plain text is taken where there is one, else the visible text of the HTML part.

    Raises:
        RejectedError: "mail: no text", or "mail: ..." for what the parser cannot read.
    """
    try:
        message = email.message_from_bytes(data, policy=email.policy.default)
        for kind in ("plain", "html"):  # some mail has an empty part of plain text
            part = message.get_body(preferencelist=(kind,))
            body, facts = _body(part, encodings) if part is not None else ("", {})
            if body.strip():
                subject = _subject(message, encodings)
                return (f"{subject}\n\n{body}\n" if subject else f"{body}\n"), facts
    except (RecursionError, MessageError, LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise RejectedError(f"mail: broken, {type(error).__name__}") from error
    raise RejectedError("mail: no text")


def _body(part: Any, encodings: tuple[str, ...]) -> tuple[str, dict[str, int]]:
    """The text of a part of a message, and facts about its encoding."""
    payload, is_html = part.get_payload(decode=True), part.get_content_type() == "text/html"
    if not isinstance(payload, bytes) or not payload:
        return "", {}
    text, facts = decode(payload, encodings, declared=part.get_content_charset() or "", markup=is_html)
    if is_html:
        text, _ = html.extract(text, "all")
    return line_ends(text).strip("\n"), facts


def _subject(message: Any, encodings: tuple[str, ...]) -> str:
    """The subject: encoded words by the charset that each declares, other bytes by that of the body."""
    raw = next((str(value) for name, value in message.raw_items() if name.lower() == "subject"), "")
    data = raw[:SUBJECT_CHARACTERS].encode("utf-8", "surrogateescape")
    declared = next((part.get_content_charset() for part in message.walk() if part.get_content_charset()), "")
    try:
        raw, _ = decode(data, encodings, declared=declared)
    except RejectedError:
        raw = data.decode("utf-8", "replace")
    words = _ENCODED.sub(lambda match: f"=?{codec_of(match[1]) or match[1]}?{match[2]}?", raw)
    return " ".join(str(email.policy.default.header_factory("subject", " ".join(words.split()))).split())
