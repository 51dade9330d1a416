"""Points of a scaling law: parameters, tokens and loss of many runs, from a table or from run folders."""

import csv
import io
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmjax.errors import UserError

FLOPS_PER_PARAMETER = 6.0  # of training, a parameter and token (Kaplan et al. 2020)
DELIMITERS = ",;\t"
MISSING = ("", "nan", "na", "n/a", "#n/a", "null", "none", "-", "?")
GROUPED = re.compile(r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?")
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Points:
    """P runs: float64 arrays (P,), and the runs' names. Numbers are floats, because 6 N D overflows an int64."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    names: tuple[str, ...]
    missing: tuple[str, ...] = ()  # names of rows without a number, which are no points

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops(self) -> np.ndarray:
        return FLOPS_PER_PARAMETER * self.parameters * self.tokens

    def taken(self, keep: np.ndarray) -> "Points":
        """The points that a mask selects."""
        names = tuple(name for name, kept in zip(self.names, keep, strict=True) if kept)
        return Points(self.parameters[keep], self.tokens[keep], self.loss[keep], names, self.missing)


def read_table(
    file: Path, *, loss: str, parameters: str = "", tokens: str = "", flops: str = "", name: str = ""
) -> Points:
    """The points of a CSV file with a header. Of parameters, tokens and FLOPs (6 N D) two columns are needed.

    Columns are divided by commas, semicolons or tabs. A row with an empty cell, or with NaN, NA, null or -, gives no
    point.

    Raises:
        UserError: for a file that cannot be read, a column that is not there, and a number that is not above 0.
    """
    given = {"parameters": parameters, "tokens": tokens, "flops": flops}
    if sum(map(bool, given.values())) != 2:
        raise UserError("give two of --parameters, --tokens and --flops: the columns that say how large each run was")
    asked = {key: column.strip() for key, column in {**given, "loss": loss, "name": name}.items() if column}
    for key, column in asked.items():
        if others := [other for other, its in asked.items() if its == column and other != key]:
            raise UserError(f"--{key} and --{others[0]} are one column, {column!r}: give a column for each")
    rows, delimiter = _rows(file, asked.values())
    values: dict[str, list[float]] = {key: [] for key in asked if key != "name"}
    names, missing = [], []
    for line, row in rows:
        called = row[asked["name"]] if name else f"row {line}"
        found = {key: _value(row[asked[key]], delimiter) for key in values}
        for key, value in found.items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{file}, line {line}: {asked[key]} is {row[asked[key]]!r}, which is no number above 0")
        if None in found.values():
            missing.append(called)
            continue
        names.append(called)
        for key, value in found.items():
            values[key].append(value or 0.0)
    if not names:
        raise UserError(f"{file} has no rows with {' and '.join(map(repr, asked.values()))}: give a row a run")
    columns = {key: np.array(column) for key, column in values.items()}
    if "parameters" not in columns:
        columns["parameters"] = columns["flops"] / (FLOPS_PER_PARAMETER * columns["tokens"])
    if "tokens" not in columns:
        columns["tokens"] = columns["flops"] / (FLOPS_PER_PARAMETER * columns["parameters"])
    return Points(columns["parameters"], columns["tokens"], columns["loss"], tuple(names), tuple(missing))


def _rows(file: Path, columns: Collection[str]) -> tuple[list[tuple[int, dict[str, str]]], str]:
    """The rows with the numbers of their last lines, and the delimiter: the one with which the header has the
    columns."""
    try:
        data = file.read_bytes()
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        tables = []
        for delimiter in DELIMITERS:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
            header = [cell.strip() for cell in next(reader, [])]
            tables.append((sum(column in header for column in columns), len(header), delimiter, header, reader))
        *_, delimiter, header, reader = max(tables, key=lambda one: one[:2])
        lines = [(reader.line_num, cells) for cells in reader]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{file} is no CSV file: {error}") from error
    if not any(header):
        raise UserError(f"{file} has no rows: give a CSV file with a header and a row a run")
    for column in columns:
        if header.count(column) != 1:
            said = f"no column {column!r}" if column not in header else f"several columns {column!r}"
            raise UserError(f"{file} has {said}; there are {', '.join(map(repr, header))}")
    rows = []
    for line, cells in lines:
        if any(cells[len(header) :]):
            raise UserError(
                f"{file}, line {line}, has {len(cells)} cells where the header has {len(header)}: put quotes around numbers "
                "with commas"
            )
        if any(map(str.strip, cells)):
            rows.append((line, dict(zip(header, [*cells, *[""] * len(header)], strict=False))))
    if not rows:
        raise UserError(f"{file} has no rows: give a CSV file with a header and a row a run")
    return rows, delimiter


def _value(text: str, delimiter: str) -> float | None:
    """The number in a cell, such as 7B or 1,000,000; None for an empty cell; NaN for a text that is no number.

    With semicolons as delimiters a comma is a decimal point. There 1,234 is ambiguous, and counts as no number.
    """
    text = "".join(text.split()).replace("'", "")
    if text.lower() in MISSING:
        return None
    if delimiter == ";" and text.count(",") == 1:
        if re.fullmatch(r"[1-9]\d{0,2},\d{3}", text):
            return math.nan
        text = text.replace(".", "").replace(",", ".")
    elif GROUPED.fullmatch(text):
        text = text.replace(",", "")
    unit = UNITS.get(text[-1].upper(), 1.0)
    try:
        return float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        return math.nan


def read_runs(folders: Sequence[Path]) -> Points:
    """The points of finished runs: parameters without embeddings, tokens and held-out loss of their results.json.

    Raises UserError for a folder that has no finished training.
    """
    names = ("train/parameters_without_embeddings", "train/tokens", "loss")
    found = []
    for folder in folders:
        file = folder / "results.json"
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            one = [float(results[name]) for name in names]
            if not all(0 < value < math.inf for value in one):
                raise ValueError(f"{', '.join(names)} are {one}")
            found.append(one)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is no finished run with an evaluation ({error}): run its config first"
            ) from error
    parameters, tokens, loss = np.array(found, float).T
    return Points(parameters, tokens, loss, tuple(map(str, folders)))
