"""Documents as Arrow record batches, and the few functions by which steps change them.

A step of the preparation is a pure function from record batch to record batch. It never drops, adds or reorders rows:
a document that is thrown away keeps its row with a reason, so that the funnel can be counted and the rejects kept.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

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
    """The text with U+FFFD for what is half a character: lone surrogates, which have no UTF-8. Pairs become characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values as an Arrow column. Texts come from strangers, and names of files, too: what has no UTF-8 is replaced."""
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array([well_formed(value) if isinstance(value, str) else value for value in values], kind)


def text_id(text: str) -> bytes:
    """The first 16 bytes of BLAKE2b of the text's UTF-8 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


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
    """The batch with reasons set on some kept rows; a row that has one already keeps it."""
    if not reasons:
        return batch
    column = batch["reason"].to_pylist()
    for row, reason in reasons.items():
        column[row] = column[row] or reason
    return replace(batch, reason=column)


def add_facts(batch: pa.RecordBatch, facts: Mapping[int, Mapping[str, float]]) -> pa.RecordBatch:
    """The batch with numbers added to the facts of some rows; a number that is there already is written over."""
    if not facts:
        return batch
    column = batch["facts"].to_pylist()
    for row, numbers in facts.items():
        if numbers:
            known = json.loads(column[row]) if column[row] else {}
            column[row] = json.dumps({**known, **numbers}, sort_keys=True)
    return replace(batch, facts=column)


def with_ids(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with the ids and sizes of the kept rows' texts as they are now; rejected rows stay as they were."""
    texts, ids, sizes = batch["text"].to_pylist(), batch["id"].to_pylist(), batch["size"].to_pylist()
    for row in np.flatnonzero(kept(batch)):
        data = (texts[row] or "").encode()
        ids[row], sizes[row] = hashlib.blake2b(data, digest_size=16).digest(), len(data)
    return replace(batch, id=ids, size=sizes)
