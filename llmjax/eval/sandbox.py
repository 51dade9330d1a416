"""Run programs that a model wrote, each in a process of its own with what Linux offers to keep it there.

What holds (where the system permits it; `fences` says what does here): no network, no sight of other processes and no
signal to them, no file but the system's libraries and Python readable and none writable outside of a small tmpfs that
vanishes, limits on time, memory, processes, open files, disk and output. All that a program started ends with it.

What does not: the kernel is shared, so a hole in it is a way out; memory and processor time are limited for each
process, not for all of a program's together; other users of the machine feel the load; a program that reads its own
source can claim to have passed its test. Where user namespaces are switched off, the network and other processes of the
same user are not fenced off. For programs from people who wish you ill, use a virtual machine.
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
    """Of one program. Sizes are bytes; memory and processor time are of each of its processes."""

    cpu_seconds: int = 3
    wall_seconds: float = 10.0
    memory: int = 1 << 30
    processes: int = 16
    files: int = 64
    disk: int = 16 << 20
    output: int = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """How a program ended: "passed" (it reached its end), "failed" (an exception, a limit, an exit before its end),
    "timeout" or "flood" (too much output); and what it printed."""

    status: str
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the program reached its end."""
        return self.status == "passed"


def run(program: str, *, limits: Limits | None = None) -> Outcome:
    """Run a Python program to its end, or to its limits.

    Raises UserError off Linux, where none of the fences exists.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    # A program that ends early, by sys.exit or os._exit, has not reached its last line.
    ending = f"\n\n__import__('sys').stdout.flush()\n__import__('os').write(1, b'{token}')\n"
    status, output, seconds = _start(program + ending, limits)
    if not status and token in output:
        status = "passed"
    return Outcome(status or "failed", output.replace(token, ""), seconds)


def run_all(programs: Sequence[str], *, limits: Limits | None = None, workers: int = 0) -> list[Outcome]:
    """Run programs, several at a time (`workers` 0: one a processor)."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: run(program, limits=limits), programs))


@cache
def fences() -> tuple[str, ...]:
    """Which of `ALL_FENCES` stand on this machine."""
    _, output, _ = _start(None, Limits(cpu_seconds=10, wall_seconds=60.0))
    try:
        return tuple(json.loads(output))
    except ValueError as error:
        raise UserError(f"programs cannot be run here: the sandbox did not start ({output.strip()[-500:]})") from error


def describe() -> str:
    """One line on what stands and what does not."""
    missing = [name for name in ALL_FENCES if name not in fences()]
    if not os.geteuid() and "another user" not in fences():
        missing.append("another user")
    line = f"programs run fenced in by {', '.join(fences())}"
    return f"{line}; NOT by {', '.join(missing)}, which this machine does not permit" if missing else line


def _start(program: str | None, limits: Limits) -> tuple[str, str, float]:
    """(why it was ended or "", output, seconds); None instead of a program asks which fences stand."""
    if not sys.platform.startswith("linux"):
        raise UserError("programs can be run on Linux only: other systems lack the fences that keep them in")
    with tempfile.TemporaryDirectory(prefix="llmjax-program-", ignore_cleanup_errors=True) as folder:
        # Nobody's number, so that limits count this program alone; only root may choose it.
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
                pass  # it ended before it read: its output says why
            why, output = _listen(process, began + limits.wall_seconds, limits.output)
        finally:
            _end(process)
        return why, output.decode("utf-8", "replace"), time.perf_counter() - began


def _listen(process: subprocess.Popen[bytes], deadline: float, most: int) -> tuple[str, bytes]:
    """("" or "timeout" or "flood", what the process printed)."""
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
    """Kill what is left of the program's session and wait for it; its namespace goes with its first process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
