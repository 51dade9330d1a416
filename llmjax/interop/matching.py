"""Which tensors of a file fill which parameters: everything that does not fit is found before anything is read.

A row may leave out the shapes of its tensors. It is then applied to zeros, one byte an element, once for all layers of
a kind.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.interop.mapping import Family, Row, resolve
from llmjax.interop.tensors import Tensor

Shape = tuple[int, ...]


def fit(family: Family, c: ConfigDict, tensors: Mapping[str, Tensor], params: Mapping[str, Shape]) -> list[Row]:
    """The rows that read a file; `theirs` are its names. A row without `ours` says that one tensor repeats another.

    Args:
        c: `config.model`.
        tensors: what the file has.
        params: path -> shape, stacked, of every parameter of the model.

    Raises:
        UserError: naming, all at once and with their shapes, the tensors that are missing, misshapen or not known, and
            the parameters that nothing fills.
    """
    found, missing, unknown = resolve(family, c, tensors)
    problems, shapes = _Problems(), Shapes()
    for row, names in missing:
        for name, shape in zip(row.theirs, shapes.of(row), strict=True):
            if name in names:
                problems.add("missing", name, f"{shape} for {_ours(row)}")
    for row in filter(lambda row: row.ours, found):
        for name, shape in zip(row.theirs, shapes.of(row), strict=True):
            if tensors[name].shape != shape:
                problems.add("misshapen", name, f"{tensors[name].shape}, must be {shape} for {_ours(row)}")
    for name in sorted(unknown):
        problems.add("unknown", name, str(tensors[name].shape))
    for path, about in uncovered([*found, *(row for row, _ in missing)], params):
        problems.add("unfilled", path, about)
    problems.report()
    return found


class Shapes:
    """The shapes of rows' tensors on their side: what the row says, or else what it makes of zeros."""

    def __init__(self) -> None:
        self._known: dict[object, Sequence[Shape]] = {}

    def of(self, row: Row) -> Sequence[Shape]:
        if row.shapes:
            return row.shapes
        key = (tuple((s.path, s.shape) for s in row.ours), tuple(_kind(name) for name in row.theirs))
        if key not in self._known:
            zeros = [np.zeros(slot.shape, np.uint8) for slot in row.ours]
            self._known[key] = [array.shape for array in row.to_theirs(zeros)]
        return self._known[key]


def uncovered(rows: Iterable[Row], params: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """(path, what is wrong) of parameters, or layers of them, that rows fill not at all or in another shape."""
    layers: dict[str, set[int]] = {}
    wrong = []
    for slot in (slot for row in rows for slot in row.ours):
        stacked = params.get(slot.path)
        if stacked is None:
            wrong.append((slot.path, f"{slot.shape}, which the model of the config does not have"))
        elif slot.shape != (stacked if slot.layer is None else stacked[1:]):
            whole = stacked if slot.layer is None else stacked[1:]
            wrong.append((slot.path, f"{whole} in the model of the config and {slot.shape} in the family's row"))
        layers.setdefault(slot.path, set()).update(
            [] if stacked is None else range(stacked[0] if stacked else 1) if slot.layer is None else [slot.layer]
        )
    for path, shape in params.items():
        missing = sorted(set(range(shape[0] if shape else 1)) - layers.get(path, set()))
        if path not in layers:
            wrong.append((path, f"{shape}, which no tensor there fills"))
        elif missing:
            wrong.append((path, f"{shape}, of which no tensor there fills the layers {', '.join(map(str, missing))}"))
    return wrong


def _ours(row: Row) -> str:
    return " and ".join(f"{s.path}{'' if s.layer is None else f'[{s.layer}]'} {s.shape}" for s in row.ours)


def _kind(name: str) -> str:
    """A name with its numbers left out: the same for all layers."""
    return re.sub(r"\d+", "*", name)


class _Problems:
    """What does not fit, one line for all layers of a kind."""

    TITLES = {  # noqa: RUF012
        "missing": "tensors that are missing",
        "misshapen": "tensors of another shape",
        "unknown": "tensors that no parameter is made of",
        "unfilled": "parameters that no tensor fills",
    }

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], str] = {}
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, name: str, about: str) -> None:
        key = (kind, _kind(f"{name} {about}"))
        self._first.setdefault(key, f"{name} {about}")
        self._counts[key] += 1

    def report(self) -> None:
        if not self._counts:
            return
        lines = []
        for kind, title in self.TITLES.items():
            keys = [key for key in self._first if key[0] == kind]
            if keys:
                lines.append(f"{title} ({sum(self._counts[key] for key in keys)}):")
            for key in keys:
                more = f" (and {self._counts[key] - 1} more like it)" if self._counts[key] > 1 else ""
                lines.append(f"  {self._first[key]}{more}")
        raise UserError(
            "the weights do not fit the model of config.json (is it the one that was saved with them?):\n"
            + "\n".join(lines)
        )
