"""Progress on a terminal: a bar of bytes, or a count."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, none elsewhere; yields a function that takes each further number of bytes.

    Args:
        total: bytes at the end; None: not known, so no remaining time is shown.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    text, size = TextColumn("{task.description}"), DownloadColumn()
    columns = (
        (text, BarColumn(), size, Speed(), TimeRemainingColumn()) if total else (SpinnerColumn(), text, size, Speed())
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(label, total=total)
        yield lambda size: shown.advance(task, size)


def counter(label: str, unit: str = "") -> Callable[..., None] | None:
    """A function that shows (done, total) in a line, which disappears at the end; None without a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        sys.stderr.write(f"\r{label}: {done:,} of {total:,}{unit}" + ("\r\x1b[K" if done >= total else ""))
        sys.stderr.flush()

    return show
