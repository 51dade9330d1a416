"""Mailboxes: the messages of an mbox file, one document each; a thread stays together when some is held out."""

import email
import email.policy
import re
from collections.abc import Iterator
from typing import Any

from llmjax.prepare.formats import RejectedError, html
from llmjax.prepare.formats.text import decode, line_ends

# A line "From ADDRESS DATE" after an empty line begins a message (RFC 4155); quoted ones in bodies are ">From ".
BEGIN = re.compile(rb"From [^\n]*\d{4}\r?\n")
THREAD = re.compile(rb"^(References|In-Reply-To|Message-ID):\s*(<[^>\s]+>)", re.MULTILINE | re.IGNORECASE)
LINE_BYTES = 1 << 20  # longer lines are read in pieces


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
        subject = " ".join(str(message.get("subject", "")).split())
        part = message.get_body(preferencelist=("plain", "html"))
        payload = part.get_payload(decode=True) if part is not None else b""
        kind = part.get_content_type() if part is not None else ""
        declared = part.get_content_charset() if part is not None else None
    except (RecursionError, LookupError, ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
        raise RejectedError(f"mail: broken, {type(error).__name__}") from error
    body, facts = "", dict[str, int]()
    if isinstance(payload, bytes) and payload:
        body, facts = decode(payload, encodings, declared=declared or "", markup=kind == "text/html")
        if kind == "text/html":
            body, _ = html.extract(body, "all")
    body = line_ends(body).strip("\n")
    if not body.strip():
        raise RejectedError("mail: no text")
    return (f"{subject}\n\n{body}\n" if subject else f"{body}\n"), facts
