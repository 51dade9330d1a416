"""Run programs that a model wrote, each in a process that Linux isolates.

A program has no network. It neither sees other processes nor signals them. It reads only the system's libraries and
Python, and writes only to a small tmpfs that vanishes. Time, memory, processes, open files, disk and output are limited.
All processes that it started end with it. Some systems do not permit all of this: `fences` lists what works here.

The isolation has limits. The kernel is shared, so a hole in it is a way out. Memory and processor time are limited for
each process, not for all of a program together. Other users of the machine notice the load. A program that reads its own
source can claim that it passed its test. Without user namespaces, the network and other processes of the same user are
not isolated. For programs of attackers, use a virtual machine.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmjax.errors import UserError

JAIL = Path(__file__).with_name("jail.py")
ALL_FENCES = ("network namespace", "process namespace", "tmpfs", "resource limits", "landlock")


@dataclass(frozen=True)
class Limits:
    """Limits of one program, sizes in bytes. Memory and processor time are for each of its processes."""

    cpu_seconds: int = 3
    wall_seconds: float = 10.0
    memory: int = 1 << 30
    processes: int = 16
    files: int = 64
    disk: int = 16 << 20
    output: int = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """The end of a program and its output. `status` is "passed" (it reached its end), "failed" (an exception, a limit or an
    early exit), "timeout" or "flood" (too much output)."""

    status: str
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the program reached its end."""
        return self.status == "passed"


def run(program: str, *, limits: Limits | None = None) -> Outcome:
    """Run a Python program to its end or its limits.

    Raises UserError on other systems than Linux, which cannot isolate it.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    # A program that ends early, by sys.exit or os._exit, does not reach this last line.
    ending = f"\n\n__import__('sys').stdout.flush()\n__import__('os').write(1, b'{token}')\n"
    status, output, seconds = _start(program + ending, limits)
    if not status and token in output:
        status = "passed"
    return Outcome(status or "failed", output.replace(token, ""), seconds)


def run_all(programs: Sequence[str], *, limits: Limits | None = None, workers: int = 0) -> list[Outcome]:
    """Run programs, several at a time (`workers` 0: one for each processor)."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: run(program, limits=limits), programs))


@cache
def fences() -> tuple[str, ...]:
    """Which of `ALL_FENCES` this machine permits."""
    _, output, _ = _start(None, Limits(cpu_seconds=10, wall_seconds=60.0))
    try:
        return tuple(json.loads(output))
    except ValueError as error:
        raise UserError(f"programs cannot be run here: the sandbox did not start ({output.strip()[-500:]})") from error


def describe() -> str:
    """One line on the isolation that works here, and that does not."""
    missing = [name for name in ALL_FENCES if name not in fences()]
    if not os.geteuid() and "another user" not in fences():
        missing.append("another user")
    line = f"programs are isolated by {', '.join(fences())}"
    return f"{line}; NOT by {', '.join(missing)}, which this machine does not permit" if missing else line


def _start(program: str | None, limits: Limits) -> tuple[str, str, float]:
    """(why it was ended or "", output, seconds). None in place of a program asks for the fences."""
    if not sys.platform.startswith("linux"):
        raise UserError("programs can be run on Linux only, because other systems cannot isolate them")
    with tempfile.TemporaryDirectory(prefix="llmjax-program-", ignore_cleanup_errors=True) as folder:
        # A number of no user, so that limits count this program only. Only root may choose it.
        user = 0 if os.geteuid() else 100_000 + secrets.randbelow(1 << 29)
        given = {"folder": folder, "user": user, "probe": program is None, "limits": vars(limits)}
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(JAIL), json.dumps(given)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={}, cwd=folder, start_new_session=True, close_fds=True,
        )  # fmt: skip
        try:
            assert process.stdin is not None
            try:
                process.stdin.write((program or "").encode("utf-8", "replace"))
                process.stdin.close()
            except BrokenPipeError:
                pass  # it ended before it read; its output says why
            why, output = _listen(process, began + limits.wall_seconds, limits.output)
        finally:
            _end(process)
        return why, output.decode("utf-8", "replace"), time.perf_counter() - began


def _listen(process: subprocess.Popen[bytes], deadline: float, most: int) -> tuple[str, bytes]:
    """("" or "timeout" or "flood", the output of the process)."""
    assert process.stdout is not None
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.perf_counter()
            if left <= 0 or not selector.select(left):
                return "timeout", output
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return "", output
            output += piece
            if len(output) > most:
                return "flood", output[:most]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the rest of the program's session and wait for it. Its namespace ends with its first process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
