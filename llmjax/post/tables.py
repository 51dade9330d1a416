"""Measures of held-out rows beside the objective's metrics, and their tables for the report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llmjax import storage
from llmjax.parallel import processes


class Beside(NamedTuple):
    """What is measured of held-out batches beside the objective's metrics."""

    outputs: Callable[[Any, Any, Any], jax.Array]  # (network, parameters, batch) -> an array
    measure: Callable[[Sequence[np.ndarray]], dict[str, float]]  # the arrays of all batches -> numbers by name


class Table(NamedTuple):
    """A table of the report."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]


def write_tables(workdir: Path, tables: Sequence[Table]) -> None:
    """Write the tables of the last evaluation to WORKDIR/train/heldout.json, for the report."""
    if processes.is_first():
        storage.write_json(workdir / "train" / "heldout.json", [table._asdict() for table in tables])
