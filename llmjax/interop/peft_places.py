"""PEFT's format of adapters: which of its matrices are ours, in another order of inputs and outputs.

The format is a folder with adapter_config.json and adapter_model.safetensors (peft.py reads it, peft_write.py writes it).
Where a matrix of theirs is a matrix of ours up to the order of inputs and outputs, an adapter's A and B are ours in that
order. Where it is several of ours side by side (queries, keys and values), B has a block for each of them. Each family's rows
are asked which it is. A matrix that is neither has no adapter in this format, and is refused by name.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax.interop.mapping import Family, Row

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """A linear map of ours inside a matrix of theirs."""

    path: str
    layer: int | None
    outputs: np.ndarray  # numbers of their outputs that are ours, in the order of `own`
    own: np.ndarray  # numbers of our outputs


@dataclass(frozen=True)
class Place:
    """A matrix of theirs, and what it is here."""

    name: str  # of the module, such as model.layers.0.self_attn.q_proj
    inputs: np.ndarray  # for each input of theirs the number of ours
    count: int  # outputs of theirs
    transposed: bool  # stored as (inputs, outputs)
    parts: tuple[Part, ...]


def places(family: Family, model: ConfigDict) -> dict[str, Place | None]:
    """module -> its place, of every matrix of theirs that is made of kernels; None: it is not ours in another order."""
    found: dict[str, Place | None] = {}
    known: dict[Any, Place | None] = {}
    for row in family.rows(model):
        kernels = row.ours and all(slot.path.endswith("/kernel") for slot in row.ours)
        if not kernels or len(row.theirs) != 1 or not row.theirs[0].endswith(".weight"):
            continue
        name = row.theirs[0].removesuffix(".weight")
        key = tuple(slot.path for slot in row.ours), re.sub(r"\d+", "*", name)
        if key not in known:
            known[key] = _place(name, row)
        like = known[key]
        if like is not None:
            parts = zip(like.parts, row.ours, strict=True)
            like = Place(name, like.inputs, like.count, like.transposed,
                         tuple(Part(part.path, slot.layer, part.outputs, part.own) for part, slot in parts))  # fmt: skip
        found[name] = like
    return found


def _place(name: str, row: Row) -> Place | None:
    """The place of a row's matrix, by asking the row where each number goes."""
    numbered, first = [], 0
    shapes = []
    for slot in row.ours:
        inputs = 2 if re.search(r"(attention|cross)/out/", slot.path) else 1
        shapes.append((math.prod(slot.shape[:inputs]), math.prod(slot.shape[inputs:])))
        size = math.prod(slot.shape)
        numbered.append(np.arange(first, first + size).reshape(slot.shape))
        first += size
    made = np.asarray(row.to_theirs(numbered)[0])
    if made.ndim != 2 or made.size != first or not np.array_equal(np.sort(made, axis=None), np.arange(first)):
        return None
    for transposed in (False, True):
        found = _ordered(made.T if transposed else made, shapes)
        if found is not None:
            columns, rows = found
            parts = []
            for number, slot in enumerate(row.ours):
                outputs = np.flatnonzero(rows[:, 0] == number)
                parts.append(Part(slot.path.removesuffix("/kernel"), slot.layer, outputs, rows[outputs, 1]))
            return Place(name, columns, len(rows), transposed, tuple(parts))
    return None


def _ordered(numbers_OI: np.ndarray, shapes: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray] | None:
    """(our input of each column, (part, our output) of each row) of a matrix of numbers; None: it is none of ours."""
    starts = np.cumsum([0, *(i * o for i, o in shapes)])
    if {i for i, _ in shapes} != {numbers_OI.shape[1]}:
        return None
    part_OI = np.searchsorted(starts, numbers_OI, side="right") - 1
    width_OI = np.array([o for _, o in shapes])[part_OI]
    input_OI, output_OI = np.divmod(numbers_OI - starts[part_OI], width_OI)
    by_row = (part_OI == part_OI[:, :1]).all() and (output_OI == output_OI[:, :1]).all()
    if not (by_row and (input_OI == input_OI[:1]).all()):
        return None
    return input_OI[0], np.stack([part_OI[:, 0], output_OI[:, 0]], axis=1)
