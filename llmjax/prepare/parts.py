"""Cuts sources into parts, the units of work. A task reads, cleans and writes one part; a resumed run skips it.

The cut depends on the files alone, never on the number of workers. Parts are numbered in the order of the sources and of
their paths. So a document's ordinal (its part's number and its row there) is the same in every run. Of duplicates the one
of the smallest ordinal stays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmjax.prepare import sources as files
from llmjax.prepare.sources import Source

PART_BYTES = 64_000_000  # of input; small files share a part, large files of rows are cut into several
SCAN_BYTES = 1 << 24


@dataclass(frozen=True)
class Item:
    """A file, or a range of it: bytes of a file of rows, row groups of a Parquet file."""

    file: str
    path: str  # within the source
    start: int = 0
    stop: int = -1  # -1: the end
    first: int = 0  # rows before `start`
    partner: str = ""  # the translation of `file`, line by line


@dataclass(frozen=True)
class Part:
    """What one task reads: items of one source."""

    number: int
    source: int  # number of the source
    name: str
    kind: str
    items: tuple[Item, ...]
    size: int  # bytes of input, for the progress bar; 0 unknown


def cut(sources: Sequence[Source], *, part_bytes: int = PART_BYTES) -> list[Part]:
    """The parts of all sources. OSError if a file cannot be looked at."""
    parts: list[Part] = []
    for number, source in enumerate(sources):
        if source.kind == "stdlib":
            items: list[tuple[Item, int]] = [(Item(source.spec, ""), 0)]
        elif source.kind == "parallel":
            first, second = source.files
            items = [(Item(first, files.relative(source, first), partner=second), files.size_of(first))]
        else:
            items = []
            for file in source.files:
                with files.naming(file):
                    items += _items(source, file, part_bytes)
        for group, size in _bundles(items, part_bytes):
            parts.append(Part(len(parts), number, source.name, source.kind, tuple(group), size))
    return parts


def _bundles(items: Sequence[tuple[Item, int]], part_bytes: int) -> Iterator[tuple[list[Item], int]]:
    group: list[Item] = []
    total = 0
    for item, size in items:
        if group and total + size > part_bytes:
            yield group, total
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group, total


def _items(source: Source, file: str, part_bytes: int) -> Iterator[tuple[Item, int]]:
    path, size = files.relative(source, file), files.size_of(file)
    kind, compression = files.format_of(file)
    if size <= part_bytes or compression or files.is_url(file):
        yield Item(file, path), size
    elif kind == "rows":
        yield from _row_ranges(file, path, size, part_bytes)
    elif kind == "parquet":
        yield from _row_groups(file, path, size, part_bytes)
    else:
        yield Item(file, path), size


def _row_ranges(file: str, path: str, size: int, part_bytes: int) -> Iterator[tuple[Item, int]]:
    """Ranges of whole lines, and the number of lines before each: documents are named by the number of their line."""
    start = first = lines = position = 0
    with open(file, "rb") as opened:
        while block := opened.read(SCAN_BYTES):
            end = start + part_bytes
            if position + len(block) > end and (newline := block.find(b"\n", max(end - position, 0))) >= 0:
                stop = position + newline + 1
                if stop < size:
                    lines += block.count(b"\n", 0, newline + 1)
                    yield Item(file, path, start, stop, first), stop - start
                    start, first = stop, lines
                    position = stop
                    opened.seek(stop)
                    continue
            lines += block.count(b"\n")
            position += len(block)
    yield Item(file, path, start, -1, first), size - start


def _row_groups(file: str, path: str, size: int, part_bytes: int) -> Iterator[tuple[Item, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            sizes = [table.metadata.row_group(n).total_byte_size for n in range(table.metadata.num_row_groups)]
            rows = [table.metadata.row_group(n).num_rows for n in range(table.metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
            raise
        yield Item(file, path), size  # the reader rejects it, with the reason
        return
    start = first = total = 0
    for number, group in enumerate(sizes):
        if number > start and total + group > part_bytes:
            yield Item(file, path, start, number, first), total
            start, first, total = number, sum(rows[:number]), 0
        total += group
    yield Item(file, path, start, len(sizes), first), total
