"""A cache of commands between starts, in one folder of the user: compiled programs and weights to be mapped.

    cache = open_cache("auto", limit=5_000_000_000)
    content = cache.read("programs", key)  # None: not there
    cache.write("programs", key, [b"..."])

A key is a hash of everything that the content follows from, so an entry is never stale. Every entry can be made again:
a damaged one is removed, and when the folder exceeds its limit, the least recently used entries go. Any number of
processes may use a folder at the same time, and may be killed.

Programs are pickled, and loading a pickle runs it. Therefore a folder or file that another user owns or can write is not
used, and no link is followed. The header of an entry names its key.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import storage
from llmjax.errors import UserError

HEADER = 4096  # bytes before the content, which therefore begins on a page of memory
BLOCK = 1 << 20  # bytes
LARGE = 1 << 26  # bytes; larger content is hashed by sums of blocks, at the speed of memory
ABANDONED = 3600  # seconds; an older temporary file is that of a killed process
ENVIRONMENT = "LLMJAX_CACHE"  # a folder, or off


@dataclass(frozen=True)
class Cache:
    """A folder with entries KIND/KEY of at most `limit` bytes together. One entry has at most half of that."""

    folder: Path
    limit: int

    def read(self, kind: str, key: str) -> np.ndarray | None:
        """The content of an entry, uint8, mapped from its file at a multiple of 4,096; None: there is no entry."""
        path = self.folder / kind / key
        file = storage.open_private(path)
        if file is None:
            return None
        with file:
            try:
                whole = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                whole.madvise(mmap.MADV_WILLNEED)
                content = np.frombuffer(whole, np.uint8)[HEADER:]
                if json.loads(whole[:HEADER]) == _header(key, content):
                    os.utime(file.fileno())  # the last time that it was used
                    return content
            except (ValueError, OSError):  # too short to be mapped, or no JSON
                pass
        with contextlib.suppress(OSError):
            storage.remove(path)
        return None

    def write(self, kind: str, key: str, parts: Iterable[Any]) -> None:
        """Keep the bytes of the parts one after another. Does nothing if they are too many or cannot be written."""
        parts = [memoryview(part).cast("B") for part in parts]
        size = HEADER + sum(part.nbytes for part in parts)
        with contextlib.suppress(OSError):
            if 2 * size > min(self.limit, shutil.disk_usage(self.folder).free):
                return
            path = self.folder / kind / key
            with storage.replacing(path, shared=True) as temporary, temporary.open("w+b") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(bytes(HEADER))
                for part in parts:
                    file.write(part)
                file.flush()
                whole = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                header = _header(key, np.frombuffer(whole, np.uint8)[HEADER:])
                file.seek(0)
                file.write(json.dumps(header).encode().ljust(HEADER))
                file.flush()
            self.trim()

    def trim(self) -> None:
        """Remove the least recently used entries until the others are within the limit."""
        left, now = self.limit, time.time()
        entries = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):  # another process was faster
                found = path.stat()
                if path.name.endswith(".tmp") and now - found.st_mtime > ABANDONED:
                    storage.remove(path)
                else:
                    entries.append((found.st_mtime, found.st_size, path))
        for _, size, path in sorted(entries, reverse=True):
            left -= size
            if left < 0:
                with contextlib.suppress(OSError):
                    storage.remove(path)


def cache_of(c: ConfigDict) -> Cache | None:
    """The cache of the settings `c.infer`. Raises UserError as `open_cache` does."""
    return open_cache(c.infer.cache, limit=c.infer.cache_bytes)


def open_cache(where: str, *, limit: int) -> Cache | None:
    """The cache of a setting; None: nothing is kept.

    Args:
        where: a folder; "off"; or "auto": LLMJAX_CACHE if it is set, else `llmjax` in the user's folder for caches
            (XDG_CACHE_HOME, or ~/.cache).
        limit: bytes.

    Raises UserError for a folder that was named and cannot be used. If the usual folder cannot be used, nothing is kept.
    """
    named = where if where != "auto" else os.environ.get(ENVIRONMENT, "")
    if named == "off":
        return None
    try:
        folder = Path(named).expanduser() if named else _usual()
        reason = storage.private_folder(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        reason = str(error)
    if not reason:
        return Cache(folder, limit)
    if named:
        raise UserError(f"the cache {named} cannot be used ({reason}): name another folder in infer.cache, or off")
    return None


def _usual() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "llmjax"


def key_of(*parts: Any) -> str:
    """The key of content that follows from the parts; parts with the same `repr` are the same."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()


def stamp(*folders: Path) -> str:
    """A hash of the files in the folders; it changes when any program writes any of them."""
    found = []
    for folder in folders:
        for root, _, names in os.walk(folder):
            for path in (os.path.join(root, name) for name in names):
                info = os.stat(path)
                times = (info.st_mtime_ns, info.st_ctime_ns)
                found.append((os.path.relpath(path, folder), info.st_size, info.st_ino, *times))
    return key_of(sorted(found))


def _header(key: str, content: np.ndarray) -> dict[str, Any]:
    return {"key": key, "size": content.size, "hash": _hash(content)}


def _hash(content: np.ndarray) -> str:
    """A hash that detects damage. Large content is hashed by the sums of its blocks, 0.01 s for each 300 MB."""
    if content.size >= LARGE:
        words = content[: content.size // 8 * 8].view(np.uint64)
        whole = words.size // (BLOCK // 8) * (BLOCK // 8)
        sums = words[:whole].reshape(-1, BLOCK // 8).sum(axis=1)
        content = np.concatenate([sums.view(np.uint8), content[whole * 8 :]])
    return hashlib.blake2b(content.data, digest_size=20).hexdigest()
