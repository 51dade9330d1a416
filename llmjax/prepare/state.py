"""The corpus between two steps: where its documents are, and the decisions about them since they were written.

A step over all documents (`dedup/`) makes three moves: every part gives keys (numbers, never text), a query brings equal
keys together, and pure functions decide. The decisions are small tables by part: documents to remove, with the one they
duplicate, or bytes to take out of texts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmjax.prepare.documents import split_by_part, table_files
from llmjax.prepare.engine import Engine, Job
from llmjax.prepare.parts import Part

REMOVED = pa.schema([("ordinal", pa.int64()), ("kind", pa.string()), ("of", pa.int64()), ("detail", pa.string())])
SPANS = pa.schema([("ordinal", pa.int64()), ("start", pa.int64()), ("stop", pa.int64())])


@dataclass
class State:
    """The state that the steps share and change."""

    engine: Engine
    parts: list[Part]
    work: Path
    settings: dict[str, Any]
    documents: Path = Path()
    removed: str = ""  # folder of REMOVED tables by part, "" none
    spans: str = ""  # folder of SPANS tables by part, "" none
    earlier: int = 0  # so many sources at the start are earlier runs
    linked: list[str] = field(default_factory=list)  # files (group, root): groups with near-duplicates of each other
    number: int = 0

    def map(self, function: Callable[..., Any], folder: str, *, label: str, **arguments: Any) -> list[Any]:
        """Call `function` for every part, with its number and the folder to write to."""
        jobs = [
            Job(part.number, self.work / folder / f"{part.number:06d}.json",
                {"number": part.number, "out": str(self.work / folder), **arguments}, part.size)
            for part in self.parts
        ]  # fmt: skip
        return self.engine.map(function, jobs, label=label)

    def remove(self, name: str, decided: pa.Table) -> None:
        """Add documents to the removed ones."""
        folder = self.work / f"{self.number:02d}-{name}-removed"
        known = [pq.read_table(path) for path in table_files(Path(self.removed))] if self.removed else []
        split_by_part(pa.concat_tables([*known, decided]), folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.removed = str(folder)

    def cut(self, name: str, spans: pa.Table) -> None:
        """Note bytes to take out of texts before the next step."""
        folder = self.work / f"{self.number:02d}-{name}-spans"
        folder.mkdir(parents=True, exist_ok=True)
        split_by_part(spans, folder)
        self.spans = str(folder)

    def query(self, name: str, sql: str, *, keys: list[str]) -> pa.Table:
        """Select from files of keys; the result is kept, so that a resumed run need not select again."""
        return self.engine.query(sql, keys=keys, out=self.work / f"{self.number:02d}-{name}.parquet")
