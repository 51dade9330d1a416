"""Mailboxes: the messages of an mbox file, one document each; a thread stays together when some is held out."""

import email
import email.policy
import re
from collections.abc import Iterator
from typing import Any

from llmjax.prepare.formats import RejectedError, html
from llmjax.prepare.formats.text import decode, decodes, line_ends

# A line "From ADDRESS DATE" after an empty line begins a message (RFC 4155); quoted ones in bodies are ">From ".
BEGIN = re.compile(rb"(?:\A|(?<=\n\n)|(?<=\n\r\n))From [^\n]*\d{4}\r?\n")
THREAD = re.compile(rb"^(?:References|In-Reply-To|Message-ID):\s*(<[^>\s]+>)", re.MULTILINE | re.IGNORECASE)


def messages(data: bytes, path: str) -> Iterator[dict[str, Any]]:
    """A raw row for each message of a mailbox; a file without a "From " line is rejected."""
    starts = [match.start() for match in BEGIN.finditer(data)]
    if not starts or data[: starts[0]].strip():
        text = data[:1000].decode("utf-8", "replace")
        yield {
            "path": path,
            "group": path,
            "text": text,
            "reason": "broken mailbox: it does not begin with a From line",
        }
        return
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(data)], strict=True), start=1):
        message = data[data.index(b"\n", start) + 1 : stop].replace(b"\n>From ", b"\nFrom ")
        head = message.partition(b"\n\n")[0]
        found = {match[0].split(b":")[0].lower(): match[1] for match in reversed(list(THREAD.finditer(head)))}
        root = next((found[key] for key in (b"references", b"in-reply-to", b"message-id") if key in found), b"")
        group = f"{path}#{root.decode('utf-8', 'replace')}" if root else f"{path}:{number}"
        yield {"path": f"{path}:{number}", "offset": start, "group": group, "format": "mail", "data": message}


def text_of(data: bytes, encodings: tuple[str, ...] = ("utf-8",)) -> str:
    """Subject and body of one message (RFC 5322 and MIME); attachments are dropped.

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
    body = ""
    if isinstance(payload, bytes) and payload:
        first = (declared,) if declared and decodes(payload, declared) else ()
        body, _ = decode(payload, (*first, *encodings), markup=kind == "text/html")
        if kind == "text/html":
            body, _ = html.make_extractor("all")(body)
    body = line_ends(body).strip("\n")
    if not body.strip():
        raise RejectedError("mail: no text")
    return f"{subject}\n\n{body}\n" if subject else f"{body}\n"
