"""Metrics of any length as curves of at most a thousand points, read in one pass with constant memory."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_BINS = 500  # of a curve: about two for each pixel column of a plot
ALONG = (
    ("train_seconds", "second", "seconds of training"),
    ("dollars", "dollar", "US dollars"),
)  # x of loss curves beside steps
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


def against(curves: Curves, name: str, x: str) -> Curve | None:
    """A metric over the steps or over what grows with them, such as train_seconds; None if one of them is missing."""
    curve, along = curves.by_name.get(name), curves.by_name.get(x)
    if curve is None or along is None or x == "step":
        return curve if along is not None else None
    return Curve(np.interp(curve.step, along.step, along.mean), curve.low, curve.mean, curve.high)


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
        self.bins.append(_summary(self.pending))
        self.pending = []
        if len(self.bins) >= 2 * MAX_BINS:
            self.bins = [_merge(a, b) for a, b in zip(self.bins[::2], self.bins[1::2], strict=True)]
            self.stride *= 2

    def curves(self) -> dict[str, Curve]:
        """The curves of what was added so far; more may be added afterwards."""
        table: dict[str, list[np.ndarray]] = {}
        for summary in [*self.bins, *([_summary(self.pending)] if self.pending else [])]:
            for name, values in summary.items():
                table.setdefault(name, []).append(values)
        curves = {}
        for name, rows in table.items():
            low, total, high, number, steps = np.array(rows).T
            curves[name] = Curve(step=steps / number, low=low, mean=total / number, high=high)
        return curves


def _summary(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """Name -> (low, sum, high, count, sum of steps) of the finite values."""
    steps = np.array([row["step"] for row in rows])
    summary = {}
    for name in {name: None for row in rows for name in row}:
        values = np.array([row.get(name, math.nan) for row in rows])
        keep = np.isfinite(values)
        if keep.any():
            kept = values[keep]
            summary[name] = np.array([kept.min(), kept.sum(), kept.max(), keep.sum(), steps[keep].sum()])
    return summary


def _merge(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    merged = {**a, **b}
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        merged[name] = np.array([min(x[0], y[0]), x[1] + y[1], max(x[2], y[2]), x[3] + y[3], x[4] + y[4]])
    return merged


def read_curves(path: Path) -> Curves | None:
    """Read metrics.jsonl; None if there is no such file. A torn or damaged line is left out and noted, never an error."""
    try:
        with path.open("rb") as file:
            return bin_rows(file)
    except (FileNotFoundError, NotADirectoryError):
        return None


def bin_rows(lines: Iterable[bytes]) -> Curves:
    """The curves of JSON lines in the order of their steps."""
    reader = CurveReader()
    reader.add(lines)
    return reader.curves()


class CurveReader:
    """The curves of JSON lines that come in parts, in the order of their steps."""

    def __init__(self) -> None:
        self._train, self._heldout = _Bins(), _Bins()  # apart: held-out rows are few and should not be merged as often
        self._last: dict[str, float] = {}
        self._bad_steps: list[int] = []
        self._bad_count = self._rows = self._damaged = 0
        self._skipped = 0.0  # updates, before the next row
        self._torn = False

    def add(self, lines: Iterable[bytes]) -> None:
        """Take more lines."""
        for row in self._readable(lines):
            self._rows += 1
            skipped = row.get("skipped", 0.0)
            # A batch without weight has no loss, and is not bad.
            trained = [row[name] for name in ("loss", "grad_norm") if name in row and row.get("target_tokens", 1)]
            if skipped > self._skipped or not all(map(math.isfinite, trained)):
                self._bad_count += 1
                if len(self._bad_steps) < MAX_MARKS:
                    self._bad_steps.append(int(row["step"]))
            if math.isfinite(skipped):
                self._skipped = skipped
            if any(name.startswith("heldout") for name in row):
                self._heldout.add({k: v for k, v in row.items() if k.startswith("heldout") or k == "step"})
            self._train.add({k: v for k, v in row.items() if not k.startswith("heldout")})
            self._last |= {name: value for name, value in row.items() if math.isfinite(value)}

    def curves(self) -> Curves:
        """The curves so far."""
        heldout = {k: v for k, v in self._heldout.curves().items() if k != "step"}
        notes, damaged = list[str](), self._damaged
        if self._torn:
            damaged -= 1
            notes.append(
                "The last line of metrics.jsonl is cut off: the process was killed (or is still writing). It is left out."
            )
        if damaged:
            notes.append(f"{damaged:,} lines of metrics.jsonl could not be read and are left out.")
        return Curves(
            by_name={**self._train.curves(), **heldout}, rows=self._rows, last=dict(self._last),
            bad_steps=list(self._bad_steps), bad_count=self._bad_count, notes=notes,
        )  # fmt: skip

    def _readable(self, lines: Iterable[bytes]) -> Iterator[dict[str, float]]:
        """The rows that can be read, numbers only (null is NaN); the others are counted."""
        for line in lines:
            if not line.strip():
                continue
            self._torn = False
            try:
                row = json.loads(line)
                step = row["step"]
            except (ValueError, KeyError, TypeError):
                self._torn = not line.endswith(b"\n")
                self._damaged += 1
                continue
            if isinstance(step, int):
                yield {
                    k: math.nan if v is None else v for k, v in row.items() if v is None or isinstance(v, (int, float))
                }
            else:
                self._damaged += 1
