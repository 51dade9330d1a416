"""Which documents are held out, and where each document goes: the plan of the output shards.

Whole groups are held out. A hash of the group's name alone chooses them, so that further documents move none from one
side to the other. Documents of a split are in the order of their ids. An id is a hash of the text, so this order is a
shuffle that depends on the texts only.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmjax.prepare.documents import part_path, read_batches, side_table, table_files, write_table

WHOLE, HEAD, TAIL = 0, 1, 2  # the piece of a document that a row of the plan stands for
PIECES = pa.schema([("ordinal", pa.int64()), ("piece", pa.int8()), ("id", pa.binary()), ("size", pa.int64())])
PLAN_ROWS = 500_000


@dataclass(frozen=True)
class Holdout:
    """The settings of c.data that decide the split."""

    percent: float
    max_bytes: int
    tail_percent: float
    min_bytes: int


@functools.lru_cache(maxsize=1 << 16)
def _group_hash(group: str) -> int:
    digest = hashlib.blake2b(group.encode(), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest, "big") - 2**63  # signed, in the same order


def group_hashes(groups: Sequence[str]) -> np.ndarray:
    """A hash of each group's name, int64. The lowest `percent` of the range is held out."""
    return np.fromiter((_group_hash(group) for group in groups), np.int64, len(groups))


def threshold(percent: float) -> int:
    """Groups are held out if their hash is below this number."""
    return min(int(percent / 100 * 2**64), 2**64 - 1) - 2**63


def cut_tail(text: str, *, percent: float, min_bytes: int) -> tuple[str, str]:
    """Cut a text into its first characters and its last `percent` of them, as nanoGPT's data[:int(n * 0.9)] does.

    A text stays whole, and the second is "", if one of the two would have fewer than `min_bytes` bytes.
    """
    at = int(len(text) * (100 - percent) / 100)
    parts = text[:at], text[at:]
    return parts if min(len(part.encode()) for part in parts) >= max(min_bytes, 1) else (text, "")


def cut_part(*, documents: str, removed: str, number: int, percent: float, min_bytes: int, out: str) -> dict[str, int]:
    """Task: the heads and tails of a part's live documents, as rows of PIECES in OUT/NUMBER.parquet."""
    rows: list[tuple[int, int, bytes, int]] = []
    for ordinals, texts in live_texts(Path(documents), number, removed):
        for ordinal, text in zip(ordinals, texts.to_pylist(), strict=True):
            head, tail = cut_tail(text, percent=percent, min_bytes=min_bytes)
            for piece, part in ((HEAD if tail else WHOLE, head), (TAIL, tail)):
                if part or piece == WHOLE:
                    data = part.encode()
                    rows.append((int(ordinal), piece, hashlib.blake2b(data, digest_size=16).digest(), len(data)))
    columns = (
        [pa.array(list(c), f.type) for c, f in zip(zip(*rows, strict=True), PIECES, strict=True)] if rows else None
    )
    table = pa.table(columns, schema=PIECES) if columns else PIECES.empty_table()
    write_table(table, Path(out) / f"{number:06d}.parquet")
    return {"rows": len(rows)}


def live_texts(documents: Path, number: int, removed: str) -> Iterator[tuple[np.ndarray, pa.LargeStringArray]]:
    """(ordinals int64, texts) of a part's documents that no step has rejected or removed, batch by batch."""
    gone = side_table(Path(removed) / f"{number:06d}.parquet") if removed else None
    gone_rows = gone["ordinal"].to_numpy() if gone is not None else np.array([], np.int64)
    start = number << 32
    for batch in read_batches(part_path(documents, number)):
        ordinals = np.arange(start, start + batch.num_rows, dtype=np.int64)
        live = np.fromiter((not reason for reason in batch["reason"].to_pylist()), bool, batch.num_rows)
        live &= ~np.isin(ordinals, gone_rows)
        start += batch.num_rows
        if live.all():
            yield ordinals, batch["text"]
        elif live.any():
            yield ordinals[live], batch["text"].filter(pa.array(live))


# One row for every document (or piece of one) that is kept. Groups that hold near-duplicates of each other must be on the
# same side: `linked` maps them to one group, which decides for all.
PLACES = """
CREATE TEMP TABLE live AS
    SELECT i.ordinal, i.source, i.language, i.id, i.size, coalesce(l.root, i."group") AS "group"
    FROM read_parquet($index) i LEFT JOIN linked l ON i."group" = l."group"
    WHERE i.kept AND i.source >= $first AND i.ordinal NOT IN (SELECT ordinal FROM removed);
CREATE TEMP TABLE big AS
    SELECT "group" FROM live GROUP BY "group" HAVING $most > 0 AND sum(size) > $most;
"""
BY_GROUP = """
SELECT ordinal, 0::TINYINT AS piece, source, CASE WHEN $route THEN language ELSE '' END AS language, id, size,
    CASE WHEN ("group" < $threshold OR $all) AND "group" NOT IN (SELECT "group" FROM big)
         THEN 'heldout' ELSE 'train' END AS split
FROM live
"""
# A tail that is also the whole text of a training document measures nothing.
BY_TAIL = """
SELECT p.ordinal, p.piece, i.source, CASE WHEN $route THEN i.language ELSE '' END AS language, p.id, p.size,
    CASE WHEN p.piece <> 2 THEN 'train'
         WHEN p.id IN (SELECT id FROM read_parquet($pieces) WHERE piece <> 2) THEN 'seen'
         ELSE 'heldout' END AS split
FROM read_parquet($pieces) p JOIN live i USING (ordinal)
"""


def place(
    database: Any,
    holdout: Holdout,
    *,
    documents: Path,
    removed: Sequence[str],
    linked: Sequence[str],
    pieces: Sequence[str],
    first: int = 0,
    route: bool = False,
) -> Iterator[pa.Table]:
    """The rows (ordinal, piece, source, language, id, size, split) of every document that is kept.

    They are sorted by split, source, language and id; without `route` the language is "" for all.

    Args:
        database: of the engine; its tables are made here.
        removed, linked, pieces: Parquet files; pieces only with a tail.
        first: number of the first source that is not an earlier run.
    """
    for name, files, columns in (
        ("removed", removed, "ordinal BIGINT"),
        ("linked", linked, '"group" BIGINT, root BIGINT'),
    ):
        chosen = ", ".join(f'"{column.split()[0].strip(chr(34))}"' for column in columns.split(", "))
        database.execute(f"CREATE TEMP TABLE {name} ({columns})")
        if files:
            database.execute(f"INSERT INTO {name} SELECT {chosen} FROM read_parquet($files)", {"files": list(files)})
    create, big = PLACES.strip().rstrip(";").split(";")
    database.execute(create, {"index": table_files(documents), "first": first})
    database.execute(big, {"most": holdout.max_bytes})
    if holdout.tail_percent:
        query = BY_TAIL
        values: dict[str, Any] = {"pieces": list(pieces)}
    else:
        query = BY_GROUP
        values = {"threshold": threshold(holdout.percent), "all": holdout.percent >= 100}
    reader = database.sql(
        f"{query} ORDER BY split, source, language, id, ordinal, piece", params={**values, "route": route}
    )
    for batch in reader.to_arrow_reader(PLAN_ROWS):
        yield pa.Table.from_batches([batch])


def heldout_groups(database: Any, holdout: Holdout) -> dict[int, list[int]]:
    """Source number -> one document's ordinal of each of its held-out groups, after `place`."""
    found: dict[int, list[int]] = {}
    if holdout.tail_percent or not holdout.percent:
        return found
    rows = database.execute(
        'SELECT source, min(ordinal) FROM live WHERE ("group" < $threshold OR $all) AND "group" NOT IN '
        '(SELECT "group" FROM big) GROUP BY source, "group" HAVING count(*) > 0 ORDER BY 1, 2',
        {"threshold": threshold(holdout.percent), "all": holdout.percent >= 100},
    ).fetchall()
    for source, ordinal in rows:
        found.setdefault(source, []).append(ordinal)
    return found
