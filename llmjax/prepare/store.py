"""Documents on disk between the steps: one Arrow file a part, and beside it an index of keys and sizes.

The Arrow files are read through the operating system's page cache, so a row can be fetched from any part; groupings
and joins are given the indexes, which hold no text.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmjax import storage
from llmjax.prepare.parts import ordinal

INDEX = pa.schema(
    [
        ("ordinal", pa.int64()),
        ("id", pa.binary()),
        ("source", pa.int32()),
        ("group", pa.int64()),  # hash of the group's name
        ("size", pa.int64()),  # UTF-8 bytes of the text
        ("language", pa.string()),
        ("kept", pa.bool_()),
    ]
)


class PartWriter:
    """Writes a part's batches to `path` and their index to the same name with .parquet, both at once when it closes.

    It is a context manager; nothing is left of a part that fails.
    """

    def __init__(self, path: Path, *, number: int, source: int) -> None:
        self._path, self._number, self._source, self._row = path, number, source, 0
        self._held = ExitStack()
        self._writer: Any = None
        self._index: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch, *, sizes: np.ndarray, groups: np.ndarray, kept: np.ndarray) -> None:
        """Append a batch; sizes and group hashes (int64) and `kept` (bool) of its rows."""
        if self._writer is None:
            temporary = self._held.enter_context(storage.replacing(self._path, shared=True))
            self._writer = self._held.enter_context(pa.ipc.new_file(str(temporary), batch.schema))
        self._writer.write_batch(batch)
        rows = np.arange(self._row, self._row + batch.num_rows, dtype=np.int64) + ordinal(self._number)
        sources = np.full(batch.num_rows, self._source, np.int32)
        columns = [rows, batch["id"].cast(pa.binary()), sources, groups, sizes, batch["language"], kept]
        arrays = [c if isinstance(c, pa.Array) else pa.array(c) for c in columns]
        self._index.append(pa.record_batch(arrays, schema=INDEX))
        self._row += batch.num_rows

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._held.__exit__(kind, error, trace)
        if kind is None:
            write_table(pa.Table.from_batches(self._index, INDEX), self._path.with_suffix(".parquet"))


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that is either whole or not there."""
    with storage.replacing(path, shared=True) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz file that is either whole or not there."""
    with storage.writing(path, shared=True) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file that is either whole or not there."""
    with storage.writing(path, shared=True) as file:
        np.save(file, array)


def part_path(folder: Path, number: int) -> Path:
    """Where the documents of a part are."""
    return folder / f"{number:06d}.arrow"


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a part, memory-mapped; nothing for a part without documents."""
    if path.exists():
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


def take(path: Path, rows: np.ndarray, *, columns: Sequence[str]) -> pa.Table:
    """Some rows of a part (any order, int64), copied out of the file, in the order asked for."""
    order = np.argsort(rows, kind="stable")
    wanted, chunks, start, done = rows[order], [], 0, 0
    for batch in read_batches(path):
        stop = done + int(np.searchsorted(wanted[done:], start + batch.num_rows))
        if stop > done:
            chosen = pa.table(batch.select(list(columns)).columns, names=list(columns))
            chunks.append(chosen.take(pa.array(wanted[done:stop] - start)))
        start, done = start + batch.num_rows, stop
        if done == len(wanted):
            break
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.concat_tables(chunks).take(pa.array(back))


def row_table(path: Path | None) -> pa.Table | None:
    """A side table of a part, or None where there is none for it."""
    return pq.read_table(path) if path is not None and path.exists() else None


def split_by_part(table: pa.Table, folder: Path, *, key: str = "ordinal") -> None:
    """Write a table's rows to FOLDER/NUMBER.parquet by the part that their ordinal names, sorted by the ordinal."""
    if not table.num_rows:
        return
    table = table.sort_by(key)
    parts = table[key].to_numpy() >> 32
    starts = np.flatnonzero(np.diff(parts, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(parts)], strict=True):
        write_table(table.slice(start, stop - start), folder / f"{parts[start]:06d}.parquet")


def files(folder: Path) -> list[str]:
    """The Parquet files of a folder, in order."""
    return sorted(map(str, folder.glob("*.parquet")))


def concat(paths: Iterable[str]) -> pa.Table:
    """All rows of some Parquet files, in order."""
    return pa.concat_tables([pq.read_table(path) for path in paths])
