"""The bar that a person sees while bytes are read or written."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, none elsewhere: the function that is yielded is told of each further number of bytes.

    Args:
        total: bytes at the end; None where that is not known, and then there is no time left to show.
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
