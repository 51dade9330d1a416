"""Documents as Arrow record batches in memory and on disk.

A step of the preparation is a pure function from record batch to record batch. It never drops, adds or reorders rows:
a rejected document keeps its row, with a reason, so that the funnel can count it and rejected/ can show it.

Between the steps each part is one Arrow file, and beside it an index of keys and sizes. The Arrow files are memory-mapped,
so a row can be fetched from any part. Groupings and joins read the indexes, which hold no text.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmjax import storage

REJECTED_CHARACTERS = 1000
ROW_BITS = 32  # bits of an ordinal that number the row within its part
SCHEMA = pa.schema(
    [
        ("id", pa.binary(16)),  # BLAKE2b of the UTF-8 text: the same text has the same id in every run
        ("source", pa.string()),
        ("group", pa.string()),  # documents of one group are held out together
        ("path", pa.string()),  # within the source
        ("offset", pa.int64()),  # number of the row or byte of the record within the file, -1: the file is the document
        ("url", pa.string()),
        ("licence", pa.string()),
        ("language", pa.string()),  # ISO 639 code, "" unknown
        ("format", pa.string()),  # of `data` before extraction: text, html, pdf, mail
        ("data", pa.large_binary()),  # raw bytes before extraction, null afterwards
        ("text", pa.large_string()),
        ("size", pa.int64()),  # UTF-8 bytes of the text; of raw data where there is no text; as it was when rejected
        ("reason", pa.string()),  # "" for a kept document, else "KIND" or "KIND: detail"
        ("facts", pa.string()),  # "" or a JSON object of numbers, such as {"personal.email": 2, "toxicity": 0.93}
    ]
)
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
Step = Callable[[pa.RecordBatch], pa.RecordBatch]


def make_batch(rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """A batch of rows; columns not given are "" (offset -1, data and text null, id that of the text)."""
    columns: dict[str, list[Any]] = {}
    rows = [{**row, "text": well_formed(row["text"])} if row.get("text") else row for row in rows]
    for name in SCHEMA.names:
        default: Any = {"offset": -1, "data": None, "text": None, "id": None, "size": None}.get(name, "")
        columns[name] = [row.get(name, default) for row in rows]
    given = zip(columns["size"], columns["text"], columns["data"], strict=True)
    columns["size"] = [
        len((t or "").encode()) if s is None and d is None else len(d) if s is None else s for s, t, d in given
    ]
    columns["id"] = [
        known if known is not None else text_id(row.get("text") or "")
        for known, row in zip(columns["id"], rows, strict=True)
    ]
    return pa.record_batch([_array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def well_formed(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which have no UTF-8. Pairs of surrogates become characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values as an Arrow column. Lone surrogates, in texts and in names of files, are replaced."""
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array([well_formed(value) if isinstance(value, str) else value for value in values], kind)


def text_id(text: str) -> bytes:
    """The first 16 bytes of BLAKE2b of the text's UTF-8 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def beginning(text: str | bytes | None) -> str:
    """What is kept of a rejected document, to recognise it by: the first characters."""
    if isinstance(text, bytes):
        text = text[: 4 * REJECTED_CHARACTERS].decode("utf-8", "replace")
    return (text or "")[:REJECTED_CHARACTERS]


def replace(batch: pa.RecordBatch, **columns: Any) -> pa.RecordBatch:
    """The batch with some columns replaced, by Arrow arrays or by sequences of Python values, a value for every row."""
    arrays = []
    for field, old in zip(batch.schema, batch.columns, strict=True):
        new = columns.pop(field.name, old)
        arrays.append(new if isinstance(new, pa.Array) else _array(new, field.type))
    if columns:
        raise KeyError(f"documents have no column {', '.join(columns)}")
    return pa.record_batch(arrays, schema=batch.schema)


def kept(batch: pa.RecordBatch) -> np.ndarray:
    """Which rows are not rejected, bool (rows,)."""
    return np.fromiter((not reason for reason in batch["reason"].to_pylist()), bool, batch.num_rows)


def reject(batch: pa.RecordBatch, reasons: Mapping[int, str]) -> pa.RecordBatch:
    """The batch with reasons on some rows. A row that has one already keeps it."""
    if not reasons:
        return batch
    column = batch["reason"].to_pylist()
    for row, reason in reasons.items():
        column[row] = column[row] or reason
    return replace(batch, reason=column)


def add_facts(batch: pa.RecordBatch, facts: Mapping[int, Mapping[str, float]]) -> pa.RecordBatch:
    """The batch with numbers added to the facts of some rows. A number of the same name is replaced."""
    if not facts:
        return batch
    column = batch["facts"].to_pylist()
    for row, numbers in facts.items():
        if numbers:
            known = json.loads(column[row]) if column[row] else {}
            column[row] = json.dumps({**known, **numbers}, sort_keys=True)
    return replace(batch, facts=column)


def with_ids(batch: pa.RecordBatch, changed: np.ndarray | None = None) -> pa.RecordBatch:
    """The batch with the ids and sizes of the texts as they are now, of the kept rows, or of some of them (bool)."""
    rows = np.flatnonzero(kept(batch) if changed is None else changed)
    texts, ids, sizes = batch["text"].take(pa.array(rows)), batch["id"].to_pylist(), batch["size"].to_pylist()
    for row, text in zip(rows.tolist(), texts.to_pylist(), strict=True):
        data = (text or "").encode()
        ids[row], sizes[row] = hashlib.blake2b(data, digest_size=16).digest(), len(data)
    return replace(batch, id=ids, size=sizes)


def ordinal(part: int, row: int = 0) -> int:
    """The place of a document in the order of reading."""
    return (part << ROW_BITS) | row


class PartWriter:
    """Writes a part's batches to `path`, and their index to the same name with .parquet, when the context ends.

    Nothing is left of a part that fails.
    """

    def __init__(self, path: Path, *, number: int, source: int) -> None:
        self._path, self._number, self._source, self._row = path, number, source, 0
        self._held = ExitStack()
        self._writer: Any = None
        self._index: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch, *, sizes: np.ndarray, groups: np.ndarray, kept: np.ndarray) -> None:
        """Append a batch, with the sizes and group hashes (int64) of its rows, and which are kept (bool)."""
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
    """Write a Parquet file, whole or not at all."""
    with storage.replacing(path, shared=True) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz file, whole or not at all."""
    with storage.writing(path, shared=True) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file, whole or not at all."""
    with storage.writing(path, shared=True) as file:
        np.save(file, array)


def part_path(folder: Path, number: int) -> Path:
    """The file of a part's documents."""
    return folder / f"{number:06d}.arrow"


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a part, memory-mapped. A part without documents has none."""
    if path.exists():
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


def take_rows(path: Path, rows: np.ndarray, *, columns: Sequence[str]) -> pa.Table:
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


def side_table(path: Path | None) -> pa.Table | None:
    """A side table of a part, or None if it has none."""
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


def table_files(folder: Path) -> list[str]:
    """The Parquet files of a folder, in order."""
    return sorted(map(str, folder.glob("*.parquet")))


def read_tables(paths: Iterable[str]) -> pa.Table:
    """All rows of some Parquet files, in order."""
    return pa.concat_tables([pq.read_table(path) for path in paths])
