"""The counts of documents: by step, how many came in, were changed and were rejected, and why."""

import collections
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from llmjax.prepare.documents import kept

EXAMPLES = 3  # rejected documents that are shown of each kind of reason
SAMPLE_CHARACTERS = 300  # of a document that the card shows


@dataclass
class Summary:
    """Counts of one part, or of several added up. Pairs are [documents, bytes]."""

    read_documents: int = 0
    read_bytes: int = 0
    steps: dict[str, dict[str, int]] = field(default_factory=dict)
    rejected: dict[str, list[int]] = field(default_factory=dict)  # by kind
    rejected_by: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # by step, then kind
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    facts: dict[str, list[float]] = field(default_factory=dict)  # [sum, documents with it]
    bias: list[list[int]] = field(default_factory=list)  # as `bias.count_texts` counts, of the texts as they were read
    fields: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of processor, by step

    def add_step(
        self, name: str, *, before: pa.RecordBatch, after: pa.RecordBatch, was_kept: np.ndarray, changed: int
    ) -> None:
        """Count a batch that went through a step."""
        row = self.steps.setdefault(
            name, dict.fromkeys(("documents", "bytes", "changed", "documents_out", "bytes_out"), 0)
        )
        is_kept = kept(after)
        row["documents"] += int(was_kept.sum())
        row["bytes"] += int(before["size"].to_numpy()[was_kept].sum())
        row["changed"] += changed
        row["documents_out"] += int(is_kept.sum())
        row["bytes_out"] += int(after["size"].to_numpy()[is_kept].sum())

    def add_rejected(self, step: str, batch: pa.RecordBatch, known: np.ndarray) -> None:
        """Count the rows that are rejected and were not `known` to be."""
        for row, reason in enumerate(batch["reason"].to_pylist()):
            if reason and not known[row]:
                self.add_one(
                    step, reason, batch["size"][row].as_py(), batch["path"][row].as_py(), batch["text"][row].as_py()
                )

    def add_one(self, step: str, reason: str, size: int, path: str, text: str | None) -> None:
        """Count one rejected document."""
        kind = reason.partition(":")[0]
        for counts in (self.rejected, self.rejected_by.setdefault(step, {})):
            pair = counts.setdefault(kind, [0, 0])
            pair[0] += 1
            pair[1] += size
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            shown.append({"path": path, "reason": reason, "text": (text or "")[:SAMPLE_CHARACTERS]})

    def add_facts(self, batch: pa.RecordBatch) -> None:
        """Count the facts of all rows, rejected ones included."""
        for text in batch["facts"].to_pylist():
            for name, value in json.loads(text).items() if text else ():
                pair = self.facts.setdefault(name, [0, 0])
                pair[0] += value
                pair[1] += 1

    def add_bias(self, batch: pa.RecordBatch) -> None:
        """Count identity terms near words of sentiment."""
        from llmjax.prepare import bias

        self.bias = add_counts(self.bias, bias.to_counts(bias.counts(batch)))

    def to_json(self) -> dict[str, Any]:
        """Values for a JSON file."""
        return asdict(self)


def total(summaries: Iterable[dict[str, Any]]) -> Summary:
    """The sum of summaries. Of the examples of each kind the first stay."""
    whole = Summary()
    names: set[str] = set()
    rows: collections.Counter[str] = collections.Counter()
    for given in summaries:
        part = Summary(**given)
        whole.read_documents += part.read_documents
        whole.read_bytes += part.read_bytes
        for step, numbers in part.steps.items():
            row = whole.steps.setdefault(step, dict.fromkeys(numbers, 0))
            for name, number in numbers.items():
                row[name] += number
        for name in ("rejected", "facts"):
            _add_pairs(getattr(whole, name), getattr(part, name))
        for step, kinds in part.rejected_by.items():
            _add_pairs(whole.rejected_by.setdefault(step, {}), kinds)
        for kind, shown in part.examples.items():
            have = whole.examples.setdefault(kind, [])
            have += shown[: EXAMPLES - len(have)]
        for name, seconds in part.seconds.items():
            whole.seconds[name] = whole.seconds.get(name, 0.0) + seconds
        whole.bias = add_counts(whole.bias, part.bias)
        names |= set(part.fields.get("names", ()))
        rows.update({name: part.fields.get(name, 0) for name in ("rows", "with_field")})
    whole.fields = {"rows": rows["rows"], "with_field": rows["with_field"], "names": sorted(names)}
    return whole


def add_counts(a: list[list[int]], b: list[list[int]]) -> list[list[int]]:
    """The sum of two tables of counts. An empty table counts as zeros."""
    return (np.array(a) + np.array(b)).tolist() if a and b else a or b


def _add_pairs(into: dict[str, list[Any]], pairs: dict[str, list[Any]]) -> None:
    for name, (a, b) in pairs.items():
        pair = into.setdefault(name, [0, 0])
        pair[0] += a
        pair[1] += b
