"""Folders that appear whole or not at all."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmjax import human
from llmjax.errors import UserError

ROOM_BYTES = 1_000_000  # for what is written beside the weights


@contextmanager
def staged(target: Path, *, purpose: str) -> Iterator[Path]:
    """A new folder to fill, which becomes `target` when the block ends without an error and is removed when it does not.

    What a killed process left behind is removed by the next one with the same target.

    Raises:
        UserError: when the target exists and is not an empty folder, or another process is filling it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists: choose another {purpose} folder, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.unfinished")
    lock = target.with_name(f".{target.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {target}: wait for it, or choose another folder") from None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) when there is no room for so many bytes, before anything is written."""
    free = shutil.disk_usage(folder).free
    if free < needed + ROOM_BYTES:
        reason = f"{os.strerror(errno.ENOSPC)}: {human.size(needed)} are to be written and {human.size(free)} are free"
        raise OSError(errno.ENOSPC, reason, str(folder))
