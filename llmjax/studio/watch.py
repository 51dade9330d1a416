"""Files that are being written: read as far as they are there, and only once."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmjax.report.curves import CurveReader, Curves

KEPT = 64  # files whose curves stay in memory
TAIL_BYTES = 256  # of what was read, by which a file is known again
CHUNK_BYTES = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} for a file that is missing, damaged or something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def last_rows(path: Path, *, size: int = 1 << 18) -> Iterator[dict[str, Any]]:
    """The objects in the last `size` bytes of a file of JSON lines, the newest first. Lines that are cut are left out."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(end - size, 0))
            lines = file.read(size).split(b"\n")
    except OSError:
        return
    for line in reversed(lines[1 if end > size else 0 :]):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


class Follower:
    """The curves of a metrics.jsonl. Each call reads the lines that are new; a file that was replaced is read anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._reader, self._read, self._tail = CurveReader(), 0, b""

    def curves(self) -> tuple[Curves, int]:
        """The curves of the whole lines so far, and how many bytes these have; of a missing file nothing."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._read - len(self._tail))
                    if file.read(len(self._tail)) != self._tail:
                        self._begin()
                        file.seek(0)
                    self._take(file.read)
            except OSError:
                self._begin()
            return self._reader.curves(), self._read

    def _take(self, read: Callable[[int], bytes]) -> None:
        rest = b""
        while data := read(CHUNK_BYTES):
            whole, _, rest = (rest + data).rpartition(b"\n")
            if whole:
                self._reader.add(whole.split(b"\n"))
                self._read += len(whole) + 1
                self._tail = (self._tail + whole + b"\n")[-TAIL_BYTES:]


class Followers:
    """A follower for each file, the most recent ones."""

    def __init__(self) -> None:
        self._known: dict[Path, Follower] = {}
        self._lock = threading.Lock()

    def curves(self, path: Path) -> tuple[Curves, int]:
        """As `Follower.curves`, of a path."""
        with self._lock:
            follower = self._known.pop(path, None) or Follower(path)
            self._known[path] = follower
            while len(self._known) > KEPT:
                del self._known[next(iter(self._known))]
        return follower.curves()
