"""Texts with labels: the numbers of the classes, and the measures of held-out texts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from llmjax import storage
from llmjax.config.ranges import LARGEST
from llmjax.data.conversations import Row, RowError
from llmjax.data.source import Batch
from llmjax.errors import UserError
from llmjax.objectives import classify
from llmjax.post.tables import Beside, Table, write_tables

SHOWN_CLASSES = 30  # of which the report shows every pair


def with_labels(c: ConfigDict, rows: Sequence[Row]) -> ConfigDict:
    """The config with the names of the classes of the rows, unless it has them or learns no classes.

    Names are in the order of the alphabet, and numbers by size. Raises UserError for fewer than two classes.
    """
    if c.objective.name != "classify" or c.objective.classify.target == "number" or c.objective.classify.labels:
        return c
    names = {str(row.label) for row in rows if row.label is not None}
    if len(names) < 2:
        raise UserError(
            f"the rows have {len(names)} classes ({', '.join(names) or 'no row has text and label'}), and telling apart needs "
            "two: give more rows, or objective.classify.target=number"
        )
    numbers = all(isinstance(row.label, int | float) for row in rows if row.label is not None)
    return with_names(c, sorted(names, key=float if numbers else None))


def with_names(c: ConfigDict, names: Sequence[str]) -> ConfigDict:
    """The config with these classes, and a classifier of as many; without names it is of one number."""
    c = c.copy_and_resolve_references()
    with c.unlocked():
        c.objective.classify.labels = tuple(names)
        c.model.classes = len(names) or 1
    return c.lock()


def resolve(c: ConfigDict, workdir: Path) -> ConfigDict:
    """The config with the classes that the rows stage found."""
    index = storage.read_json(workdir / "rows" / "index.json", mend="run the rows stage again")
    return with_names(c, index["labels"])


def number_of(row: Row, c: ConfigDict) -> float:
    """The number of a row's class, or its numeric label. Raises RowError for a row without a label, or with an unknown
    class."""
    labels = c.objective.classify.labels
    if row.label is None:
        raise RowError("there is no label: give text and label")
    if c.objective.classify.target == "number":
        try:
            number = float(row.label)
        except ValueError:
            number = math.nan
        if not abs(number) <= LARGEST:
            raise RowError(f"label is {row.label!r}, and objective.classify.target is a number")
        return number
    if str(row.label) not in labels:
        raise RowError(f"label is {row.label!r}, which is none of objective.classify.labels={', '.join(labels)}")
    return float(labels.index(str(row.label)))


def beside(c: ConfigDict, workdir: Path, batches: Sequence[Batch]) -> Beside:
    """The measures of held-out texts beside the loss: `of_classes` or `of_numbers`, and tables for the report."""
    labels_S = np.concatenate([rows["labels"][rows["exists"] > 0] for rows in batches])

    def outputs(network: Any, params: Any, batch: Any) -> jax.Array:
        return classify.outputs(network, params, batch, None)[0]

    def measure(made: Sequence[np.ndarray]) -> dict[str, float]:
        outputs_SC = np.concatenate([x[rows["exists"] > 0] for x, rows in zip(made, batches, strict=True)])
        if c.objective.classify.target == "number":
            return of_numbers(outputs_SC[:, 0], labels_S)
        confusion_CC = confusion(outputs_SC, labels_S.astype(int))
        write_tables(workdir, tables(confusion_CC, c.objective.classify.labels))
        return of_classes(confusion_CC)

    return Beside(outputs, measure)


def tables(confusion_CC: np.ndarray, labels: Sequence[str]) -> list[Table]:
    """A row for each class, and for few classes also the confusion counts."""
    rows: list[list[str | int | float]] = []
    for i, label in enumerate(labels):
        right, taken, there = (int(x) for x in (confusion_CC[i, i], confusion_CC[:, i].sum(), confusion_CC[i].sum()))
        shares = [right / taken if taken else 0.0, right / there if there else 0.0]
        rows.append([label, there, *shares, 2 * right / (taken + there) if taken + there else 0.0])
    found = [Table("Held-out classes", ["class", "texts", "precision", "recall", "F1"], rows)]
    if len(labels) <= SHOWN_CLASSES:
        taken_for = [[label, *confusion_CC[i].tolist()] for i, label in enumerate(labels)]
        found.append(
            Table("Held-out texts of a class (row) that were taken for another (column)", ["class", *labels], taken_for)
        )
    return found


def confusion(outputs_SC: np.ndarray, labels_S: np.ndarray) -> np.ndarray:
    """How often a text of class i was taken for class j, (C, C) int."""
    size = outputs_SC.shape[1]
    pairs = labels_S * size + outputs_SC.argmax(axis=1)
    return np.bincount(pairs, minlength=size * size).reshape(size, size)


def of_classes(confusion_CC: np.ndarray) -> dict[str, float]:
    """macro_f1: the mean over classes of the harmonic mean of precision and recall; 0 for a class that is never found."""
    right = np.diagonal(confusion_CC)
    either = confusion_CC.sum(axis=0) + confusion_CC.sum(axis=1)
    seen = either > 0
    f1 = 2 * right[seen] / either[seen]
    return {"macro_f1": float(f1.mean())}


def of_numbers(found_S: np.ndarray, wanted_S: np.ndarray) -> dict[str, float]:
    """rmse, and the correlations of Pearson and Spearman, NaN where a side is constant."""
    return {
        "rmse": math.sqrt(float(np.mean(np.square(found_S - wanted_S)))),
        "pearson": _correlation(found_S, wanted_S),
        "spearman": _correlation(ranks_of(found_S), ranks_of(wanted_S)),
    }


def ranks_of(values_S: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values_S, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _correlation(a_S: np.ndarray, b_S: np.ndarray) -> float:
    a, b = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (a_S, b_S))
    scale = math.sqrt(float(np.sum(a * a)) * float(np.sum(b * b)))
    return float(np.sum(a * b)) / scale if scale else math.nan
