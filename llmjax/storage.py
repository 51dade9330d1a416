"""Storage: reading, writing, renaming, locking and appending of the files that llmjax makes.

Every room writes its files through these functions. Two promises therefore hold everywhere: a file is whole or not
there, whenever the process is killed; and another back end (a bucket) can replace the local file system without touching
the callers. Libraries that write for themselves (orbax, Arrow, DuckDB) get paths. Files of the user are read where they
are parsed.
"""

import contextlib
import errno
import fcntl
import gzip
import json
import os
import platform
import shutil
import stat
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from llmjax import human
from llmjax.errors import UserError

ROOM_BYTES = 1_000_000  # for small files beside the counted ones


class Locked(UserError):  # noqa: N818
    """Another process holds the lock."""


def read_text(path: Path) -> str:
    """The whole file as UTF-8 text, without a byte order mark. Raises UserError for a file of another encoding."""
    return "".join(read_lines(path))


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file of UTF-8 text, plain or .gz, with their line feeds, without byte order marks.

    Raises:
        UserError: for a file of another encoding, or a .gz that is not whole.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        lines = enumerate(file, start=1)
        while True:
            try:
                number, line = next(lines)
                yield line.decode("utf-8-sig")
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}, is no UTF-8 ({error.reason}): save it as UTF-8") from error
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path} is no whole gzip file ({error}): get it again") from error


def read_json(path: Path, *, mend: str) -> Any:
    """The value in a JSON file.

    Args:
        mend: how the user can mend a damaged file; the end of the message.

    Raises:
        UserError: if the file holds no JSON.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is damaged ({error}): {mend}") from error


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write to. It replaces `path` when the block ends without an error.

    The folder is made if it is missing. A block that fails leaves nothing. A killed process leaves `.NAME.tmp`, which the
    next one overwrites. At most one process may write a path at a time, unless it is `shared`: then each thread has its
    own `.NAME.PROCESS-THREAD.tmp`, which nobody overwrites.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        raise UserError(f"{path} is a folder, and a file is to be written: name a file")
    own = f"{os.getpid()}-{threading.get_ident()}." if shared else ""
    temporary = path.with_name(f".{path.name}.{own}tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A binary file that becomes `path`, whole, when the block ends without an error; `shared` as in `replacing`."""
    with replacing(path, shared=shared) as temporary, temporary.open("wb") as file:
        yield file


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file with `data`, whole or not at all."""
    with writing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Replace a file with `text` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 1, shared: bool = False) -> None:
    """Replace a file with a JSON value and a line feed, whole or not at all; `shared` as in `replacing`."""
    with writing(path, shared=shared) as file:
        try:
            file.write(json.dumps(value, indent=indent, ensure_ascii=False).encode() + b"\n")
        except UnicodeEncodeError:  # half a character, as in names of files that are no UTF-8
            file.write(json.dumps(value, indent=indent).encode() + b"\n")


def appending(path: Path) -> TextIO:
    """The file opened to append text, a line at a time; the folder is made if it is missing.

    A last line without a line feed, left by a killed process, is cut off first, so that the next line stays apart.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_unfinished_line(path)
    return path.open("a", encoding="utf-8", buffering=1)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, on disk before this returns; the folder is made if it is missing.

    Threads and processes may append to one file: each line stays apart from the others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _keep_others_out(file)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def cut_unfinished_line(path: Path) -> None:
    """Shorten a file to the end of its last line feed; a missing file stays missing."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        _keep_others_out(file)
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 65536, 0)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                file.truncate(start + found + 1)
                return
            end = start
        file.truncate(0)


def _keep_others_out(file: IO[bytes]) -> None:
    """Wait until no other writer is at the end of this file, which then may have half of a line. Closing it ends that."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX)


def private_folder(path: Path) -> str:
    """Make a folder that only its user can use. Returns why an existing one is not private, or ""."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return "" if is_private(path.stat()) else "it is another user's, or others may write in it"


def is_private(found: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user and nobody else may write it."""
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def open_private(path: Path) -> BinaryIO | None:
    """A private file opened for reading; None: it is missing, a link, or not private."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    except OSError:
        return None
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and is_private(found):
        return file
    file.close()
    return None


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder on the same disk, atomically. The target must not be a folder with files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)


def link(source: Path, target: Path) -> None:
    """Make `target` a symbolic link to `source`, relative, so that a folder that holds both can be moved."""
    with replacing(target, shared=True) as temporary:
        temporary.symlink_to(os.path.relpath(source, target.parent))


def copy(source: Path, target: Path, *, without: Sequence[str] = ()) -> None:
    """Copy a file, or a folder without the entries of these names. The target must not exist."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without))
    else:
        shutil.copyfile(source, target)


def sizes(folder: Path) -> dict[str, int]:
    """Path from the folder -> size in bytes, of all files in it."""
    found = {}
    for root, _, names in os.walk(folder, followlinks=True):
        for path in (Path(root, name) for name in names):
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def crc32(path: Path) -> int:
    """The CRC-32 of a file's content."""
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            value = zlib.crc32(part, value)
    return value


def remove(path: Path) -> None:
    """Delete a file, or a folder with everything in it; a missing one is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, otherwise: str = "", waiting: str = "") -> Iterator[None]:
    """Hold the lock file `path`. The lock ends with the process, however that ends.

    Args:
        otherwise: the message of `Locked` if another process holds the lock; empty: wait for that process.
        waiting: what to print before waiting.

    Raises:
        Locked: see `otherwise`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if not _take(file):
            if otherwise:
                raise Locked(otherwise)
            if waiting:
                print(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _take(file: TextIO) -> bool:
    """Lock `file` if no other process holds the lock for longer than `is_locked` does, which holds it to look."""
    for attempt in range(5):
        if attempt:
            time.sleep(0.02)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock file `path`. It looks for a moment, and then waits for nobody."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it is missing, or its file system has no locks
        return False
    return False


def swap(path: Path, *, before: bytes | None, after: bytes | None) -> bool:
    """Compare and swap: replace the content of a file only if it is `before`. Of several processes one succeeds.

    Args:
        before: the expected content; None: the file does not exist.
        after: the new content; None: the file is deleted.

    Returns:
        Whether the content was `before`, and therefore is `after` now.
    """
    with locked(path.with_name(f".{path.name}.lock")):
        if (path.read_bytes() if path.exists() else None) != before:
            return False
        remove(path) if after is None else write_bytes(path, after)
        return True


@dataclass(frozen=True)
class Lease:
    """The right of this process to work on something until it expires or is given up."""

    path: Path
    content: bytes  # of the file, by which the process knows that the lease is still its own


def take_lease(path: Path, *, seconds: float) -> Lease | None:
    """Take the lease `path`, or None if another process has it.

    A lease that has expired is taken over, and so is one of a process of this machine that has ended. The clocks of
    machines that share leases must agree to within a small part of `seconds`.
    """
    before = path.read_bytes() if path.exists() else None
    if before is not None and _is_held(before):
        return None
    after = _lease(seconds)
    return Lease(path, after) if swap(path, before=before, after=after) else None


def renew_lease(lease: Lease, *, seconds: float) -> Lease | None:
    """The lease for another while from now, or None if another process has taken it."""
    after = _lease(seconds)
    return Lease(lease.path, after) if swap(lease.path, before=lease.content, after=after) else None


def end_lease(lease: Lease) -> None:
    """Give a lease up. Without effect if another process has taken it."""
    swap(lease.path, before=lease.content, after=None)


def _lease(seconds: float) -> bytes:
    process = os.getpid()
    who = {"host": platform.node(), "process": process, "born": _born(process), "thread": threading.get_ident()}
    return json.dumps(who | {"expires": time.time() + seconds}).encode()


def _is_held(content: bytes) -> bool:
    lease = json.loads(content)
    ended = lease["host"] == platform.node() and _born(lease["process"]) != lease["born"]
    return not ended and lease["expires"] > time.time()


def _born(process: int) -> str:
    """What tells a process from a later one with the same number: its start in clock ticks; "" if it does not run."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:  # a system without /proc
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"


@contextmanager
def staged(target: Path, *, purpose: str) -> Iterator[Path]:
    """A new folder to fill. It becomes `target` when the block ends without an error, and is removed otherwise.

    The next process with the same target removes what a killed one left.

    Raises:
        UserError: when the target exists and is not an empty folder, or another process is filling it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists: choose another {purpose} folder, or remove it first")
    folder, lock = target.with_name(f".{target.name}.unfinished"), target.with_name(f".{target.name}.lock")
    busy = f"another process is writing {target}: wait for it, or choose another folder"
    with locked(lock, otherwise=busy):
        remove(folder)
        folder.mkdir()
        try:
            yield folder
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def replace_folder(source: Path, target: Path) -> None:
    """Replace a folder with another one.

    A process that is killed in between may leave no `target`, and its old content as `.NAME.old`, which
    `recover_folder` puts back.
    """
    recover_folder(target)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        rename(target, old)
    rename(source, target)
    remove(old)


def recover_folder(target: Path) -> None:
    """Undo a `replace_folder` that was killed before the new folder was in place; finish one that was killed later."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        rename(old, target)
    remove(old)


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) if the disk has no room for so many bytes."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed + ROOM_BYTES:
        reason = f"{os.strerror(errno.ENOSPC)}: {human.size(needed)} are to be written and {human.size(free)} are free"
        raise OSError(errno.ENOSPC, reason, str(folder))
