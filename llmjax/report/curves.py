"""Metrics of any length as curves of at most a thousand points, read in one pass with constant memory."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_BINS = 500  # of a curve: about two for each pixel column of a plot
MAX_MARKS = 200  # skipped updates drawn; all are counted


@dataclass(frozen=True)
class Curve:
    """A metric over the steps. Each point is a bin of neighbouring rows. All arrays are float64 of the same length."""

    step: np.ndarray  # the mean step of the rows in the bin
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Curves:
    """The content of metrics.jsonl."""

    by_name: dict[str, Curve]
    rows: int
    last: dict[str, float]  # the last finite value of each metric
    # Steps with a loss or gradient that was not finite, or with a skipped update (the first MAX_MARKS).
    bad_steps: list[int]
    bad_count: int  # how many there are
    notes: list[str]  # damages of the file


@dataclass
class _Bins:
    """Bins of equal numbers of rows. If there are too many bins, neighbours are merged and the size doubles."""

    stride: int = 1
    pending: list[dict[str, float]] = field(default_factory=list)
    bins: list[dict[str, np.ndarray]] = field(default_factory=list)  # name -> (low, sum, high, count, sum of steps)

    def add(self, row: dict[str, float]) -> None:
        self.pending.append(row)
        if len(self.pending) >= self.stride:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        steps = np.array([row["step"] for row in self.pending])
        summary = {}
        for name in {name: None for row in self.pending for name in row}:
            values = np.array([row.get(name, math.nan) for row in self.pending])
            keep = np.isfinite(values)
            if keep.any():
                kept = values[keep]
                summary[name] = np.array([kept.min(), kept.sum(), kept.max(), keep.sum(), steps[keep].sum()])
        self.bins.append(summary)
        self.pending = []
        if len(self.bins) >= 2 * MAX_BINS:
            self.bins = [_merge(a, b) for a, b in zip(self.bins[::2], self.bins[1::2], strict=True)]
            self.stride *= 2

    def curves(self) -> dict[str, Curve]:
        self.flush()
        table: dict[str, list[np.ndarray]] = {}
        for summary in self.bins:
            for name, values in summary.items():
                table.setdefault(name, []).append(values)
        curves = {}
        for name, rows in table.items():
            low, total, high, number, steps = np.array(rows).T
            curves[name] = Curve(step=steps / number, low=low, mean=total / number, high=high)
        return curves


def _merge(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    merged = {**a, **b}
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        merged[name] = np.array([min(x[0], y[0]), x[1] + y[1], max(x[2], y[2]), x[3] + y[3], x[4] + y[4]])
    return merged


def read_curves(path: Path) -> Curves | None:
    """Read metrics.jsonl; None if there is no such file. A torn or damaged line is left out and noted, never an error."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return bin_rows(file)


def bin_rows(lines: Iterable[bytes]) -> Curves:
    """The curves of JSON lines in the order of their steps."""
    train, heldout = _Bins(), _Bins()  # apart, because held-out rows are few and should not be merged as often
    last: dict[str, float] = {}
    bad_steps: list[int] = []
    bad_count = rows = 0
    skipped_before = 0.0
    notes: list[str] = []
    for row in _rows(lines, notes):
        rows += 1
        skipped = row.get("skipped", 0.0)
        # A batch without weight has no loss, and is not bad.
        trained = [row[name] for name in ("loss", "grad_norm") if name in row and row.get("target_tokens", 1)]
        if skipped > skipped_before or not all(map(math.isfinite, trained)):
            bad_count += 1
            if len(bad_steps) < MAX_MARKS:
                bad_steps.append(int(row["step"]))
        if math.isfinite(skipped):
            skipped_before = skipped
        if any(name.startswith("heldout") for name in row):
            heldout.add({k: v for k, v in row.items() if k.startswith("heldout") or k == "step"})
        train.add({k: v for k, v in row.items() if not k.startswith("heldout")})
        for name, value in row.items():
            if math.isfinite(value):
                last[name] = value
    by_name = {**train.curves(), **{k: v for k, v in heldout.curves().items() if k != "step"}}
    return Curves(by_name=by_name, rows=rows, last=last, bad_steps=bad_steps, bad_count=bad_count, notes=notes)


def _rows(lines: Iterable[bytes], notes: list[str]) -> Iterator[dict[str, float]]:
    """The readable rows, numbers only (null is NaN); what is wrong with the others is appended to `notes` at the end."""
    damaged, torn = 0, False
    for line in lines:
        if not line.strip():
            continue
        torn = False
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError):
            torn = not line.endswith(b"\n")
            damaged += 1
            continue
        if isinstance(step, int):
            yield {k: math.nan if v is None else v for k, v in row.items() if v is None or isinstance(v, (int, float))}
        else:
            damaged += 1
    if torn:
        damaged -= 1
        notes.append(
            "The last line of metrics.jsonl is cut off: the process was killed (or is still writing). It is left out."
        )
    if damaged:
        notes.append(f"{damaged:,} lines of metrics.jsonl could not be read and are left out.")
