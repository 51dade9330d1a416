"""Tools of a Python file, run in a process of its own, which can be ended: a thread that hangs cannot.

The file is loaded once, and its calls run at the same time, so what it keeps in memory stays from call to call. A call that
takes too long ends the process, when the other calls in it have ended, or have taken too long too. The next call starts
another, which loads the file again. `tool_child.py` is that process.
"""

import contextlib
import functools
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from llmjax.agents.tools import FailedError, Tool
from llmjax.errors import UserError

LOAD_SECONDS = 60.0  # for a file to be loaded
SECONDS = 300.0  # of a call without another limit

Outcome = tuple[str, bool]  # the result as text, and whether the call failed


class File:
    """See the module. Any thread may call."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._process: _Process | None = None
        self._all: set[_Process] = set()

    def tools(self) -> list[Tool]:
        """The tools. Raises UserError for a file without tools, as `tools.load`."""
        with self._used() as process:
            found = process.loaded(LOAD_SECONDS)
        if found is None:
            raise UserError(
                f"{self._path} takes more than {LOAD_SECONDS:.0f} s to load: let its functions do what takes long"
            )
        if "error" in found:
            raise UserError(found["error"])
        return [
            Tool(**one, run=functools.partial(self._run, one["name"]), within=functools.partial(self.call, one["name"]))
            for one in found["tools"]
        ]

    def call(self, name: str, arguments: Mapping[str, Any], seconds: float) -> Outcome:
        """The outcome of a call. After `seconds` nothing of it goes on."""
        until = time.monotonic() + seconds
        with self._used() as process:
            found = process.loaded(seconds)
            if found is not None and "error" in found:
                return found["error"], True
            outcome = process.call(name, arguments, until - time.monotonic()) if found else None
            process.late |= outcome is None
        return outcome or (f"the tool took more than {seconds:.0f} s, and was ended", True)

    def _run(self, name: str, **arguments: Any) -> str:
        text, failed = self.call(name, arguments, SECONDS)
        if failed:
            raise FailedError(text)
        return text

    @contextlib.contextmanager
    def _used(self) -> Any:
        """The process, which is not ended before the block."""
        with self._lock:
            if self._process is None or self._process.late or self._process.ended:
                self._process = _Process(self._path)
                self._all.add(self._process)
            process = self._process
            process.users += 1
        try:
            yield process
        finally:
            with self._lock:
                process.users -= 1
                if not process.users and (process.late or process.ended):
                    process.end()
                    self._all.discard(process)

    def close(self) -> None:
        """End the process, and what runs in it."""
        with self._lock:
            for process in self._all:
                process.end()


class _Process:
    """A process that loads a file of tools."""

    def __init__(self, path: Path) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from llmjax.agents import tool_child; tool_child.main()"
        self._child = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )  # fmt: skip
        self.users, self.late, self.ended = 0, False, False
        self._loaded: Future[dict[str, Any]] = Future()
        self._calls: dict[int, Future[Outcome]] = {}
        self._numbers = itertools.count()
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of `ended` and the calls
        for work in (self._read, self._write):
            threading.Thread(target=work, name="tools", daemon=True).start()

    def loaded(self, seconds: float) -> dict[str, Any] | None:
        """The first message of the process; None: it has not come after so many seconds."""
        try:
            return self._loaded.result(max(seconds, 0.0))
        except TimeoutError:
            self.late = True
            return None

    def call(self, name: str, arguments: Mapping[str, Any], seconds: float) -> Outcome | None:
        """The outcome of a call; None: it has not come after so many seconds."""
        number, outcome = next(self._numbers), Future[Outcome]()
        with self._lock:
            if self.ended:
                outcome.set_result(self._gone())
            self._calls[number] = outcome
        self._lines.put(json.dumps({"number": number, "tool": name, "arguments": dict(arguments)}).encode() + b"\n")
        try:
            return outcome.result(max(seconds, 0.0))
        except TimeoutError:
            return None
        finally:
            self._calls.pop(number, None)

    def end(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)

    def _write(self) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            while line := self._lines.get():
                self._child.stdin.write(line)
                self._child.stdin.flush()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            reply = json.loads(line)
            if "number" not in reply:
                self._loaded.set_result(reply)
            elif (outcome := self._calls.get(reply["number"])) is not None:
                outcome.set_result((reply["text"], reply["failed"]))
        self._child.wait()
        self._lines.put(b"")
        with self._lock:
            self.ended = True
            for outcome in self._calls.values():
                if not outcome.done():
                    outcome.set_result(self._gone())
        if not self._loaded.done():
            self._loaded.set_result({"error": self._gone()[0]})

    def _gone(self) -> Outcome:
        return f"the process of the tools ended with status {self._child.returncode}", True
