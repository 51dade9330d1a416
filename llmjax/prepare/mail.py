"""Mailboxes: the messages of an mbox file, one document each; a thread stays together when some is held out."""

import re
from collections.abc import Iterator
from typing import Any

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
