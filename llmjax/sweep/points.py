"""Points of a scaling law: parameters, tokens and loss of many runs, from a table or from run folders."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmjax.errors import UserError

FLOPS_PER_PARAMETER = 6.0  # of training, a parameter and token (Kaplan et al. 2020)


@dataclass(frozen=True)
class Points:
    """P runs: float64 arrays (P,), and what each is called. Nothing is an integer: 6 N D overflows one."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops(self) -> np.ndarray:
        return FLOPS_PER_PARAMETER * self.parameters * self.tokens

    def taken(self, keep: np.ndarray) -> "Points":
        """The points of a mask alone."""
        names = tuple(name for name, kept in zip(self.names, keep, strict=True) if kept)
        return Points(self.parameters[keep], self.tokens[keep], self.loss[keep], names)


def read_table(
    file: Path, *, loss: str, parameters: str = "", tokens: str = "", flops: str = "", name: str = ""
) -> Points:
    """The points of a CSV file with a header. Of parameters, tokens and FLOPs (6 N D) two columns are needed.

    Raises:
        UserError: for a file that cannot be read, a column that is not there, and a number that is not above 0.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not rows:
        raise UserError(f"{file} has no rows: give a CSV file with a header and a row a run")
    given = {"parameters": parameters, "tokens": tokens, "flops": flops}
    if sum(map(bool, given.values())) < 2:
        raise UserError("give two of --parameters, --tokens and --flops: the columns that say how large each run was")
    columns = {key: _column(file, rows, column) for key, column in {**given, "loss": loss}.items() if column}
    if "parameters" not in columns:
        columns["parameters"] = columns["flops"] / (FLOPS_PER_PARAMETER * columns["tokens"])
    if "tokens" not in columns:
        columns["tokens"] = columns["flops"] / (FLOPS_PER_PARAMETER * columns["parameters"])
    names = tuple(row[name] if name else f"row {i}" for i, row in enumerate(rows, start=2))
    return Points(columns["parameters"], columns["tokens"], columns["loss"], names)


def _column(file: Path, rows: Sequence[dict[str, str]], column: str) -> np.ndarray:
    if column not in rows[0]:
        raise UserError(f"{file} has no column {column!r}; there are {', '.join(map(repr, rows[0]))}")
    found = []
    for number, row in enumerate(rows, start=2):
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"{file}, line {number}: {column} is {row[column]!r}, which is no number above 0")
        found.append(value)
    return np.array(found)


def read_runs(folders: Sequence[Path]) -> Points:
    """The points of finished runs: parameters without embeddings, tokens and held-out loss of their results.json.

    Raises UserError for a folder that has no finished training.
    """
    found = []
    for folder in folders:
        file = folder / "results.json"
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            found.append((results["train/parameters_without_embeddings"], results["train/tokens"], results["loss"]))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder} is no finished run with an evaluation ({error}): run its config first"
            ) from error
    parameters, tokens, loss = np.array(found, float).T
    return Points(parameters, tokens, loss, tuple(map(str, folders)))
