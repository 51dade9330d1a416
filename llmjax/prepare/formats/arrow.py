"""Files of rows in Arrow's types: Parquet, and the Arrow files and streams of Hugging Face's datasets."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from llmjax.prepare import sources
from llmjax.prepare.formats.rows import BLOCK_BYTES, MISSING, ORIGIN_COLUMNS, Reading, Row, document, rejected
from llmjax.prepare.parts import Item

BATCH_BYTES = 8_000_000  # of the rows of a Parquet file that are decoded at once
BATCH_ROWS = 1024


def parquet_rows(item: Item, reading: Reading) -> Iterator[Row]:
    """A document for each row of the row groups of an item. A damaged row group is one rejected row."""
    import pyarrow.parquet

    try:
        with (
            sources.open_file(item.file) as opened,
            pyarrow.parquet.ParquetFile(opened, buffer_size=BLOCK_BYTES) as table,
        ):
            groups = range(item.start, item.stop if item.stop >= 0 else table.metadata.num_row_groups)
            number, names, wanted = item.first, _names(table.schema_arrow), _wanted(table.schema_arrow, reading)
            for group in groups:
                count = table.metadata.row_group(group).num_rows
                size = _rows_at_once(count, table.metadata.row_group(group).total_byte_size)
                batches = table.iter_batches(size, row_groups=[group], columns=wanted)
                yield from _documents(batches, item, number, reading, names, "parquet")
                number += count
    except (pa.ArrowException, OSError) as error:
        yield _broken_arrow(error, item, "parquet")


def arrow_rows(item: Item, reading: Reading) -> Iterator[Row]:
    """A document for each row of an Arrow file or stream, such as those that `datasets` saves to disk."""
    try:
        with sources.open_file(item.file) as opened:
            is_file = opened.read(6) == b"ARROW1"
            opened.seek(0)
            read = pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)
            batches = (read.get_batch(n) for n in range(read.num_record_batches)) if is_file else read
            names, wanted = _names(read.schema), _wanted(read.schema, reading)
            pieces = (
                batch.slice(start, _rows_at_once(batch.num_rows, batch.nbytes)).select(wanted)
                for batch in batches
                for start in range(0, batch.num_rows, _rows_at_once(batch.num_rows, batch.nbytes))
            )
            yield from _documents(pieces, item, item.first, reading, names, "arrow")
    except (pa.ArrowException, OSError) as error:
        yield _broken_arrow(error, item, "arrow")


def _documents(
    batches: Iterable[pa.RecordBatch], item: Item, number: int, reading: Reading, names: Sequence[str], kind: str
) -> Iterator[Row]:
    """The documents of some record batches, whose first row has the number behind `number`."""
    try:
        for batch in batches:
            for row in _values(batch):
                number += 1
                yield document(row, item, number, reading, names=names)
    except (pa.ArrowException, OSError) as error:
        yield _broken_arrow(error, item, kind, after=number)


def _values(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch. A value that Python cannot hold is left out; strings that are no UTF-8 are bytes."""
    if not batch.num_columns:
        return [{}] * batch.num_rows
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError):  # bad UTF-8, or a time beyond those of Python
        return [
            {name: value for name in batch.schema.names if (value := _value(batch[name][n])) is not MISSING}
            for n in range(batch.num_rows)
        ]
    return rows


def _value(scalar: pa.Scalar) -> Any:
    """The value of an Arrow scalar, MISSING where Python cannot hold it."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if not isinstance(scalar, pa.StructScalar):
            return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else MISSING
    except (ValueError, OverflowError):
        if not isinstance(scalar, pa.StructScalar):
            return MISSING
    return {name: value for name in scalar if (value := _value(scalar[name])) is not MISSING}


def _wanted(schema: pa.Schema, reading: Reading) -> list[str]:
    """The columns of the text and of where it comes from."""
    names = {reading.text_field, reading.text_field.partition(".")[0], *ORIGIN_COLUMNS}
    return [name for name in schema.names if name in names]


def _names(schema: pa.Schema) -> list[str]:
    """What `names_in` gives of the rows of a schema."""
    names: list[str] = []
    for column in schema:
        inner = column.type if pa.types.is_struct(column.type) else ()
        names += [f"{column.name}.{part.name}" for part in inner] or [column.name]
    return names


def _rows_at_once(rows: int, size: int) -> int:
    """So many of `rows` rows of `size` bytes are some BATCH_BYTES."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


def _broken_arrow(error: Exception, item: Item, kind: str, *, after: int = 0) -> Row:
    if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
        raise error
    where = f"{item.path}:{after + 1}" if after else item.path
    return rejected(where, f"broken {kind}: {(str(error).splitlines() or [type(error).__name__])[0]}")
