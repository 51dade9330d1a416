"""POST /read: the text of a PDF, an HTML page or a mail, by the readers of `llmjax prepare`, so that a page can ask about it.

The file is read in a process of its own (`file_child.py`): no environment, limits of time and memory, and no file can be
written. Its name only says what it is. A client that leaves ends the process.
"""

import asyncio
import base64
import binascii
import importlib.util
import json
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import PurePosixPath

from llmjax.prepare.formats.text import line_ends
from llmjax.serve.calls import Call
from llmjax.serve.messages import ReadBody
from llmjax.serve.refusals import Refusal

KINDS = {".pdf": "pdf", ".html": "html", ".htm": "html", ".xhtml": "html", ".eml": "mail"}
MODULES = {"pdf": "pypdfium2", "html": "resiliparse", "mail": "resiliparse"}  # of the extra `data`
CPU_SECONDS, SECONDS, MEMORY = 10, 30.0, 1 << 30
TEXT_BYTES = 3 << 20


async def read(call: Call) -> None:
    """The text of a file in base64, whose kind is that of its name."""
    body = call.read(ReadBody)
    kind = KINDS.get(PurePosixPath(body.name).suffix.lower())
    if kind is None:
        raise Refusal(400, f"name must end with one of {', '.join(KINDS)}", code="unsupported_file", param="name")
    if importlib.util.find_spec(MODULES[kind]) is None:
        raise Refusal(400, f"the server cannot read {kind}: it needs pip install 'llmjax[data]'", code="unsupported_file", param="name")  # fmt: skip
    try:
        data = base64.b64decode(body.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"data is no base64: {error}", param="data") from error
    call.server.check_ready()
    place = call.server.admission.enter(1, call.key)
    try:
        async with call.server.readers:
            text = await _text(call, kind, data)
    finally:
        place.leave()
    await call.reply.json({"object": "file", "name": body.name, "text": text})


async def _text(call: Call, kind: str, data: bytes) -> str:
    """The text of a file, read in a process. Raises Refusal for a file that is damaged, or beyond the limits."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from llmjax.serve import file_child; file_child.main()"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, kind, str(CPU_SECONDS), str(MEMORY), stdin=PIPE, stdout=PIPE, stderr=PIPE, env={}, cwd="/"
    )  # fmt: skip
    try:
        async with asyncio.timeout(SECONDS):
            out, errors = await child.communicate(data)
    except TimeoutError:
        raise _unreadable(f"it takes more than {SECONDS:.0f} s") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        call.facts["reader"] = errors.decode("utf-8", "replace")[-500:]
        slow = child.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
        raise _unreadable(f"it takes more than {CPU_SECONDS} s" if slow else "its reader ended with an error")
    reply = json.loads(out)
    if "reason" in reply:
        raise _unreadable(reply["reason"])
    text = reply["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if len(text.encode()) > TEXT_BYTES:
        raise _unreadable(f"its text has more than {TEXT_BYTES:,} bytes")
    return line_ends(text)


def _unreadable(reason: str) -> Refusal:
    return Refusal(400, f"the file cannot be read: {reason}", code="unreadable_file", param="data")
