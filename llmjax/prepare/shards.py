"""Writes the output: SOURCE-NNNNN.jsonl in train/, heldout/ and rejected/, each shard by a task of its own.

The plan lists the documents of each shard in order, and the task fetches them from the parts. So a shard's bytes depend
on the plan alone: any process can write a shard, twice or beside another.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmjax import storage
from llmjax.prepare import clean, split
from llmjax.prepare.documents import beginning, part_path, read_batches, side_table, take_rows
from llmjax.prepare.summary import SAMPLE_CHARACTERS, add_counts

COLUMNS = ("source", "group", "path", "url", "licence", "language", "text", "reason", "facts", "id")
LENGTHS = tuple(2**n for n in range(6, 31, 2))  # upper ends of the length histogram, in bytes
OPTIONAL = ("url", "licence", "language")


@dataclass
class Shard:
    """One output file that is being planned."""

    split: str
    source: int
    language: str  # "" unless shards are routed by language
    number: int  # within split, source and language
    documents: int = 0
    bytes: int = 0
    chunks: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # ordinals and pieces


def assign(places: Iterable[pa.Table], *, shard_bytes: int) -> Iterator[Shard]:
    """Complete shards of sorted places. A new shard begins where the next document would not fit."""
    current: Shard | None = None
    for table in places:
        splits, sources = table["split"].to_pylist(), table["source"].to_numpy()
        languages = table["language"].to_pylist()
        sizes, ordinals, pieces = (table[name].to_numpy() for name in ("size", "ordinal", "piece"))
        start = 0
        for row, size in enumerate(sizes.tolist()):
            here = (splits[row], int(sources[row]), languages[row])
            same = current is not None and (current.split, current.source, current.language) == here
            if current is None or not same or (current.bytes and current.bytes + size > shard_bytes):
                if current is not None:
                    current.chunks.append((ordinals[start:row], pieces[start:row]))
                    yield current
                number = current.number + 1 if current is not None and same else 0
                current, start = Shard(*here, number), row
            current.documents += 1
            current.bytes += size
        if current is not None:
            current.chunks.append((ordinals[start:], pieces[start:]))
    if current is not None:
        yield current


def write_shard(
    *, documents: str, rows: str, holdout: dict[str, Any], split_name: str, count_bias: bool, out: str
) -> dict[str, Any]:
    """Task: write the shard OUT of the documents that the file ROWS (ordinals, pieces) lists, in that order.

    Returns:
        documents, bytes (UTF-8 of the text) and sha256 of the file; `about`: counts and samples of its documents.
    """
    with np.load(rows) as plan:
        table = fetch(Path(documents), plan["ordinals"])
        return write_documents(
            table, plan["pieces"], holdout=holdout, split_name=split_name, count_bias=count_bias, out=out
        )


def write_documents(
    table: pa.Table, pieces: np.ndarray, *, holdout: dict[str, Any], split_name: str, count_bias: bool, out: str
) -> dict[str, Any]:
    """Write a shard of the documents of a table (COLUMNS) and describe it, as `write_shard` does."""
    from llmjax.prepare import bias

    about: dict[str, Any] = {
        "language": {},
        "licence": {},
        "length": {},
        "words": 0,
        "compressed": 0,
        "samples": [],
        "bias": [],
    }
    squeeze = zlib.compressobj(1)

    def lines() -> Iterator[tuple[bytes, int]]:
        for row, piece in zip(_rows(table), pieces, strict=True):
            line, text = shard_line(row, int(piece), holdout, split_name)
            size = len(text.encode())
            _describe(about, row, text, size)
            if count_bias and row["language"][:2] in ("", "en"):
                about["bias"] = add_counts(about["bias"], bias.count_texts([text]).tolist())
            about["compressed"] += len(squeeze.compress(text.encode()))
            yield line, size

    described = write_lines(lines(), Path(out))
    about["compressed"] += len(squeeze.flush())
    return {**described, "about": about}


def _describe(about: dict[str, Any], row: dict[str, Any], text: str, size: int) -> None:
    for name in ("language", "licence"):
        about[name][row[name]] = about[name].get(row[name], 0) + 1
    end = str(next((end for end in LENGTHS if size <= end), "more"))
    about["length"][end] = about["length"].get(end, 0) + 1
    about["words"] += len(text.split())
    if len(about["samples"]) < 3:
        about["samples"].append(text[:SAMPLE_CHARACTERS])


def write_lines(lines: Iterable[tuple[bytes, int]], path: Path) -> dict[str, Any]:
    """Write (line, bytes of its text) to a file, whole or not at all, and describe it."""
    digest, count, total = hashlib.sha256(), 0, 0
    with storage.writing(path, shared=True) as file:
        for line, size in lines:
            digest.update(line)
            file.write(line)
            count, total = count + 1, total + size
    return {"name": path.name, "documents": count, "bytes": total, "sha256": digest.hexdigest()}


def fetch(documents: Path, ordinals: np.ndarray, columns: tuple[str, ...] = COLUMNS) -> pa.Table:
    """Documents by their ordinals, in that order."""
    parts = ordinals >> 32
    order = np.argsort(parts, kind="stable")
    tables = []
    for part in np.unique(parts):
        rows = ordinals[order[np.searchsorted(parts[order], part) : np.searchsorted(parts[order], part, "right")]]
        tables.append(take_rows(part_path(documents, int(part)), rows & 0xFFFFFFFF, columns=columns))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.concat_tables(tables).take(pa.array(back))


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def shard_line(row: dict[str, Any], piece: int, holdout: dict[str, Any], split_name: str) -> tuple[bytes, str]:
    """One JSONL row (id, source, group, path, url, licence, language, facts and reason where known, text), and its text."""
    text = row["text"] or ""
    identity = row["id"]
    if piece != split.WHOLE:
        head, tail = split.cut_tail(text, percent=holdout["tail_percent"], min_bytes=holdout["min_bytes"])
        text = head if piece == split.HEAD else tail
        identity = hashlib.blake2b(text.encode(), digest_size=16).digest()
    values = {"id": identity.hex(), "source": row["source"], "group": row["group"], "path": row["path"]}
    values |= {name: row[name] for name in OPTIONAL if row[name]}
    if row["facts"]:
        values["facts"] = json.loads(row["facts"])
    if split_name == "rejected":
        values["reason"] = row["reason"]
        text = beginning(text)
    return json.dumps({**values, "text": text}, ensure_ascii=False).encode() + b"\n", text


def write_rejected(
    *, documents: str, removed: str, number: int, holdout: dict[str, Any], seen: str, out: str
) -> dict[str, Any]:
    """Task: the rejected documents of one part in the order of reading, with their reasons, as OUT.

    Args:
        seen: a file of ordinals whose tails are also training texts; "": none.

    Returns:
        the file's description, and `removed`: the documents that no step counted (size, path, reason, text).
    """
    path = Path(documents)
    gone = side_table(Path(removed) / f"{number:06d}.parquet") if removed else None
    reasons = clean.removal_reasons(gone, path) if gone is not None else {}
    tails: set[int] = set()
    if seen:
        with np.load(seen) as found:
            tails = {int(o) & 0xFFFFFFFF for o in found["ordinals"] if o >> 32 == number}
    lines: list[tuple[bytes, int]] = []
    counted: list[dict[str, Any]] = []
    start = 0
    for batch in read_batches(part_path(path, number)):
        given = batch["reason"].to_pylist()
        wanted = [n for n, reason in enumerate(given) if reason or n + start in reasons or n + start in tails]
        for n, row in zip(wanted, batch.take(pa.array(wanted, pa.int64())).to_pylist(), strict=True):
            piece = split.WHOLE
            if not row["reason"]:
                row["reason"] = reasons.get(n + start, "held-out part also trained on")
                piece = split.WHOLE if n + start in reasons else split.TAIL
                size = row["size"] if piece == split.WHOLE else _tail_size(row["text"], holdout)
                shown = row["text"][:SAMPLE_CHARACTERS]
                counted.append({"size": size, "path": row["path"], "reason": row["reason"], "text": shown})
            line, text = shard_line(row, piece, holdout, "rejected")
            lines.append((line, len(text.encode())))
        start += batch.num_rows
    if not lines:
        return {"documents": 0, "removed": []}
    return {**write_lines(lines, Path(out)), "removed": counted}


def _tail_size(text: str, holdout: dict[str, Any]) -> int:
    return len(split.cut_tail(text, percent=holdout["tail_percent"], min_bytes=holdout["min_bytes"])[1].encode())
