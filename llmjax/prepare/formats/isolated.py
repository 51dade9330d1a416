"""A process for documents that may take all the time or memory, or crash a parser written in C.

Python runs signal handlers between two bytecodes, so no timer in this process can stop a parser written in C. The other
process has limits of CPU time and memory that the kernel enforces. If it dies, its document is rejected, and the next
document starts a new process. The process starts when it is first needed and ends with this one.
"""

import atexit
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from llmjax.prepare.formats import RejectedError

MEMORY_BYTES = 4_000_000_000  # of addresses, for the interpreter, the document and what is made of it
_process: tuple[int, subprocess.Popen[bytes]] | None = None  # with the id of the process that started it


def call(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """function(*arguments) in the other process. The function, its arguments and its result must be picklable.

    Args:
        seconds: of CPU time that the call may take; 0: no limit.

    Raises:
        RejectedError: "too slow: ...", "too large: ..." or "broken: the parser ended with SIGNAL".
        Exception: what the function raises.
    """
    global _process
    if _process is None or _process[0] != os.getpid() or _process[1].poll() is not None:
        _process = os.getpid(), _start()
    process = _process[1]
    assert process.stdin is not None and process.stdout is not None
    try:
        _send(process.stdin, (function, arguments, seconds))
        is_result, value = _receive(process.stdout)
    except (EOFError, BrokenPipeError) as error:
        code = process.wait()
        _stop(process)
        if code == -signal.SIGPROF:
            raise RejectedError(f"too slow: more than prepare.max_document_seconds={seconds:g}") from error
        name = signal.Signals(-code).name if code < 0 else f"code {code}"
        raise RejectedError(f"broken: the parser ended with {name}") from error
    if not is_result:
        raise value
    return value


def _start() -> subprocess.Popen[bytes]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from llmjax.prepare.formats import isolated; isolated.serve()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.unregister(_stop)  # of one that has ended
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def serve() -> None:
    """The loop of the other process: it answers calls until its input ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # libraries print warnings about files
    os.dup2(nowhere, 2)
    if sys.platform == "linux":  # macOS refuses to limit it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            function, arguments, seconds = _receive(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nothing handles SIGPROF, so it ends the process
        try:
            reply: tuple[bool, Any] = (True, function(*arguments))
        except MemoryError:
            reply = (False, RejectedError(f"too large: more than {MEMORY_BYTES:,} bytes of memory to extract it"))
        except Exception as error:  # raised again in the process that asked
            reply = (False, error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(replies, reply)


def _send(pipe: BinaryIO | Any, value: Any) -> None:
    data = pickle.dumps(value)
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO | Any) -> Any:
    head = pipe.read(8)
    data = pipe.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else b""
    if not data:
        raise EOFError
    return pickle.loads(data)
