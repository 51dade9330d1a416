"""The records of a run: metrics.jsonl (a row a step), the progress line, and TensorBoard on request."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from llmjax import human, storage
from llmjax.errors import UserError


class Clock:
    """Counts seconds of training between `start` and `stop`, from an initial value on."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._seconds = self.seconds
        self._since = None

    @property
    def seconds(self) -> float:
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """The row with None for numbers that are not finite, which JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def tail_mean(path: Path, name: str, *, count: int) -> float | str:
    """Mean of a value over the last `count` rows; "unknown" if none of them has it."""
    rows = [json.loads(line) for line in storage.read_text(path).splitlines()[-count:]]
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else "unknown"


def last_heldout(path: Path) -> dict[str, float]:
    """The numbers of the last row whose names begin with "heldout_"; {} if it was not evaluated."""
    rows = storage.read_text(path).splitlines()
    return {k: v for k, v in json.loads(rows[-1]).items() if k.startswith("heldout_") and v is not None} if rows else {}


def keep_rows(path: Path, *, up_to: int) -> bool:
    """Drop the rows of steps after `up_to` from metrics.jsonl, and a last row that a kill cut off, in one replacement.

    Returns whether there is a row of step `up_to`.
    """
    if not path.exists():
        return False
    kept, found = [], False
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the row that was being written when the process died
        if row["step"] <= up_to:
            kept.append(line)
            found = found or row["step"] == up_to
    storage.write_text(path, "".join(line + "\n" for line in kept))
    return found


def first_start(workdir: Path, *, train_seconds: float) -> float:
    """Unix time of the first start of the run, which WORKDIR/train keeps for goodput.

    Args:
        train_seconds: training so far; gives an estimate for a run that did not keep the time.
    """
    path = workdir / "train" / "first_start.json"
    try:
        return float(json.loads(path.read_text())["unix_seconds"])
    except (OSError, ValueError, KeyError):
        unix_seconds = time.time() - train_seconds
        storage.write_json(path, {"unix_seconds": unix_seconds})
        return unix_seconds


class Writer:
    """Appends rows to metrics.jsonl, and scalars to TensorBoard on request. `silent`: does nothing."""

    def __init__(self, workdir: Path, *, tensorboard: bool, silent: bool = False) -> None:
        self._file: TextIO | None = None if silent else storage.appending(workdir / "metrics.jsonl")
        self._tensorboard: Any = None
        if tensorboard and not silent:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise UserError("train.tensorboard needs an extra: pip install 'llmjax[tensorboard]'") from error
            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, row: dict[str, Any]) -> None:
        """Write one row, cleaned."""
        if self._file is None:
            return
        row = clean(row)
        self._file.write(json.dumps(row) + "\n")
        if self._tensorboard is not None:
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(key, value, row["step"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class Progress:
    """The progress line of a run: redrawn in place on a terminal, printed every `every` seconds elsewhere."""

    def __init__(self, *, total: int, every: float) -> None:
        self._total, self._live = total, sys.stderr.isatty()
        self._every = 0.2 if self._live else every
        self._last = -math.inf
        self._width = 0

    def show(self, row: dict[str, Any], *, seconds_left: float) -> None:
        """Show a row of metrics, at most every `every` seconds, and always the final row."""
        now = time.perf_counter()
        if now - self._last < self._every and row["step"] < self._total:
            return
        self._last = now
        parts = [
            f"step {row['step']:,}/{self._total:,} ({row['step'] / self._total:.0%})",
            f"loss {row['loss']:.3f}",
            f"{human.count(row['tokens_per_second'])} tokens/s",
        ]
        if row["mfu"]:
            parts.append(f"MFU {row['mfu']:.0%}")
        if row["skipped"]:
            parts.append(f"{row['skipped']} skipped")
        if row["step"] < self._total:
            parts.append(f"{human.duration(seconds_left)} left")
        self._print("  ".join(parts))

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._live and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
        print(text, flush=True)
        self._width = 0

    def _print(self, text: str) -> None:
        if not self._live:
            print(text, file=sys.stderr, flush=True)
            return
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)

    def close(self) -> None:
        if self._live and self._width:
            sys.stderr.write("\n")
