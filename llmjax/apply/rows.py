"""Rows of one file, what a model makes of them in another. Run again, it goes on with the rows that are missing."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax.data.records import records
from llmjax.errors import UserError
from llmjax.infer import asking
from llmjax.infer.asking import Conversation
from llmjax.infer.engine import Engine
from llmjax.infer.resuming import MADE_FROM, MadeFrom, digest, resuming
from llmjax.progress import counter

Start = Callable[[Mapping[str, Any]], Conversation[dict[str, Any]]]  # a row -> the fields that are made of it


@dataclass(frozen=True)
class Row:
    """A row with its id: its own, else its number."""

    id: Any
    given: Mapping[str, Any]


def read(path: Path, field: str) -> list[Row]:
    """The rows of a JSONL, JSON, CSV or Parquet file, each with a text in `field` and maybe an id.

    Raises UserError, with the number of the row, for one without a text and for an id that comes twice.
    """
    found: dict[str, Row] = {}
    for number, given in records(path):
        if isinstance(given, str):
            raise UserError(f"{path}, row {number}: {given}")
        if not isinstance(given.get(field), str) or not given[field].strip():
            raise UserError(f"{path}, row {number} has no text in {field}: give the name of the field with --field")
        row = Row(given.get("id", number), given)
        if str(row.id) in found:
            raise UserError(f"{path}, row {number}: the id {row.id!r} comes twice")
        found[str(row.id)] = row
    return list(found.values())


def answer_file(
    engine: Engine, rows: list[Row], start: Start, out: Path, *, common: MadeFrom | None = None
) -> dict[str, int]:
    """Write what is made of each row that is not in `out` yet, when it is finished: counts of what was done.

    `common` is what all results are made from, see `infer.resuming`.
    """
    wanted = {str(row.id): {"row": digest(row.given), **(common or {})} for row in rows}
    show = counter("working", " rows")
    with resuming(out, wanted) as (done, file):
        todo = [row for row in rows if str(row.id) not in done]
        counts = {"done before": len(rows) - len(todo), "done": 0, "failed": 0}
        jobs = ((row, functools.partial(start, row.given)) for row in todo)
        for number, one in enumerate(asking.run(engine, jobs), start=1):
            made = {"error": one.error} if one.result is None else one.result
            file.write(json.dumps({"id": one.key.id, **made, MADE_FROM: wanted[str(one.key.id)]}) + "\n")
            counts["failed" if one.result is None else "done"] += 1
            if show is not None:
                show(number, len(todo))
    return counts
