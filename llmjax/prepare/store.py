"""Documents on disk between the steps: one Arrow file a part, and beside it an index of keys and sizes.

The Arrow files are read through the operating system's page cache, so a row can be fetched from any part; groupings
and joins are given the indexes, which hold no text.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
    """Writes a part's batches to `path` and their index to the same name with .parquet, both at once when it closes."""

    def __init__(self, path: Path, *, number: int, source: int) -> None:
        self._path, self._number, self._source, self._row = path, number, source, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_suffix(f".{os.getpid()}.tmp")
        self._writer: Any = None
        self._index: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch, *, sizes: np.ndarray, groups: np.ndarray, kept: np.ndarray) -> None:
        """Append a batch; sizes and group hashes (int64) and `kept` (bool) of its rows."""
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self._temporary), batch.schema)
        self._writer.write_batch(batch)
        rows = np.arange(self._row, self._row + batch.num_rows, dtype=np.int64) + ordinal(self._number)
        sources = np.full(batch.num_rows, self._source, np.int32)
        columns = [rows, batch["id"].cast(pa.binary()), sources, groups, sizes, batch["language"], kept]
        arrays = [c if isinstance(c, pa.Array) else pa.array(c) for c in columns]
        self._index.append(pa.record_batch(arrays, schema=INDEX))
        self._row += batch.num_rows

    def close(self) -> None:
        """Put the finished files in their places."""
        if self._writer is not None:
            self._writer.close()
            os.replace(self._temporary, self._path)
        write_table(pa.Table.from_batches(self._index, INDEX), self._path.with_suffix(".parquet"))


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)


def write_json(values: Any, path: Path) -> None:
    """Write a JSON file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


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
