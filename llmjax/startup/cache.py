"""What commands keep between starts, in one folder of the user's: compiled programs and weights that can be mapped.

    cache = open_cache("auto", limit=5_000_000_000)
    content = cache.read("programs", key)  # None: not there
    cache.write("programs", key, [b"..."])

A key is a hash of everything that the content follows from, so that an entry may be unused but never stale. Nothing is
lost with an entry: a damaged one is removed and made again, and when the folder grows beyond its limit those that
were not used for the longest time go. Any number of processes may use a folder at a time, and may be killed.

Programs are pickled, and loading them runs what is in them. So a folder that another user owns or can write in is not
used, nor such a file, nor a link; the header of an entry says which key it belongs to.
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

HEADER = 4096  # bytes before the content, which so begins on a page of memory
BLOCK = 1 << 20  # bytes
LARGE = 1 << 26  # bytes from which on content is summed up by blocks, at the speed of memory
ABANDONED = 3600  # seconds after which the temporary file of a process is taken for that of a killed one
ENVIRONMENT = "LLMJAX_CACHE"  # a folder, or off


@dataclass(frozen=True)
class Cache:
    """A folder with entries KIND/KEY, `limit` bytes of them at most. An entry is never more than half of that."""

    folder: Path
    limit: int

    def read(self, kind: str, key: str) -> np.ndarray | None:
        """The content of an entry, uint8, mapped from its file at an address that 4,096 divides; None: there is none."""
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
        """Keep the bytes of the parts one after another. Nothing happens where they are too many, or cannot be written."""
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
        """Remove the entries that were not used for the longest time, until the others keep the limit."""
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
    """The cache of a config, by `c.infer`. Raises UserError as `open_cache` does."""
    return open_cache(c.infer.cache, limit=c.infer.cache_bytes)


def open_cache(where: str, *, limit: int) -> Cache | None:
    """The cache of a setting; None: nothing is kept.

    Args:
        where: a folder, or "off", or "auto": what LLMJAX_CACHE says, and without it `llmjax` in the user's folder for
            caches (XDG_CACHE_HOME, or ~/.cache).
        limit: bytes.

    Raises UserError for a folder that was named and cannot be used. A folder that was not named is then not used.
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
    """The key for what follows from the parts, which are told apart by their `repr`."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()


def stamp(*folders: Path) -> str:
    """Says which files lie in the folders: another text after any of them was written, whatever wrote it."""
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
    """A hash that tells damage; of much content it is that of the sums of blocks, a hundredth of a second for each 300 MB."""
    if content.size >= LARGE:
        words = content[: content.size // 8 * 8].view(np.uint64)
        whole = words.size // (BLOCK // 8) * (BLOCK // 8)
        sums = words[:whole].reshape(-1, BLOCK // 8).sum(axis=1)
        content = np.concatenate([sums.view(np.uint8), content[whole * 8 :]])
    return hashlib.blake2b(content.data, digest_size=20).hexdigest()
