"""The language in which a family says which tensors of a Hugging Face checkpoint are which parameters here.

A family is a table of fields (`fields.py`) and a list of rows. A row ties a few tensors of theirs to a few parameters of
ours, one layer at a time, so that reading and writing a model never holds more than a row. Kernels here are
(*inputs, *features); PyTorch's `nn.Linear` stores (out, in). `resolve` finds the rows of the tensors in a file, under
all the names that files give it; `to_ours` and `to_theirs` carry a row's arrays over and check their shapes.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.interop.fields import Entry, mapping, read_fields, require_same, write_fields
from llmjax.interop.rope import plain

Arrays = list[np.ndarray]
OUTER = ("tie_word_embeddings", "quantization_config")  # said of the whole, beside what describes the text's network


@dataclass(frozen=True)
class Slot:
    """A parameter of ours, or one layer of a stacked one: params[path][layer], of this shape (without the layer)."""

    path: str  # such as layers/attention/query/kernel
    layer: int | None  # None: the whole parameter
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """Tensors of a checkpoint and parameters of ours, each an exact function of the other.

    A row without `ours` covers a tensor that no parameter needs and that is never written. With a second tensor it says
    that the first repeats it (a tied head).
    """

    ours: tuple[Slot, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[Arrays], Arrays]
    to_theirs: Callable[[Arrays], Arrays]
    optional: bool = False  # theirs may lack it (some files store it and some do not); ours is then untouched
    shapes: tuple[tuple[int, ...], ...] = ()  # of theirs, where the row knows them: then they are checked


@dataclass(frozen=True, eq=False)
class Family:
    """One or more `model_type`s of Hugging Face.

    entries: which fields of config.json are which settings of `config.model`, in the order in which they are read.
    rows: `config.model` -> every row. Names not covered by a row, and parameters not covered, are errors.
    defaults: fields of config.json as the model type has them where a file says nothing.
    variants: by model_type, what such fields are in the types that differ.
    inner: where a file describes several networks, the field of config.json that holds the text's, by model_type.
    unsaid: settings that the tensors alone say.
    ignored: regular expressions (re.search) of tensor names that carry nothing (buffers such as masks or inverse
        frequencies) and are dropped, unless a row has them.
    renames: (regular expression, replacement) pairs, applied in this order to the names in a file before rows are
        looked up: for the prefixes that some files lack or have.
    other_rows: rows for what other versions write in place of `rows` (experts in one tensor); only read, never written,
        and only where the tensors of `rows` are missing.
    """

    model_types: tuple[str, ...]
    entries: tuple[Entry, ...]
    rows: Callable[[ConfigDict], Iterable[Row]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    inner: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsaid: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    other_rows: Callable[[ConfigDict], Iterable[Row]] = lambda c: ()

    def read_config(self, theirs: Mapping[str, Any]) -> ConfigDict:
        """config.json -> `config.model`. UserError names the fields that are missing, not understood or not supported."""
        model_type = str(theirs.get("model_type"))
        if inner := self.inner.get(model_type):
            outer = {name: theirs[name] for name in OUTER if theirs.get(name) is not None}
            theirs = {**outer, **mapping(theirs, inner)}
        return read_fields(self.entries, theirs, defaults={**self.defaults, **self.variants.get(model_type, {})})

    def write_config(self, c: ConfigDict) -> dict[str, Any]:
        """`config.model` -> config.json. UserError, naming the settings, if a model of this type cannot be that."""
        c, name = plain(c), self.model_types[0]
        theirs = {"model_type": name, **write_fields(self.entries, c)}
        require_same(c, self.read_config(theirs), name, unsaid=self.unsaid)
        return theirs


def resolve(
    family: Family, c: ConfigDict, names: Iterable[str]
) -> tuple[list[Row], list[tuple[Row, set[str]]], list[str]]:
    """Match the rows of a family with the names of a checkpoint's tensors.

    Returns:
        The rows whose tensors are there, `theirs` being the names they have there; the rows that lack tensors, with the
        names of those; and the names that no row knows.

    Raises UserError for a tensor that is there under two names.
    """
    rows, others = list(family.rows(c)), list(family.other_rows(c))
    known = {name for row in (*rows, *others) for name in row.theirs}
    stored: dict[str, str] = {}
    for name in names:
        here = renamed(name, family.renames)
        if here not in known and any(re.search(pattern, name) for pattern in family.ignored):
            continue
        if here in stored:
            raise UserError(f"the checkpoint has both {stored[here]} and {name}, which are the same tensor")
        stored[here] = name
    there = {_slots(row) for row in rows if stored.keys() >= set(row.theirs)}
    others = [row for row in others if stored.keys() >= set(row.theirs) and _slots(row) not in there]
    covered = {(slot.path, slot.layer) for row in others for slot in row.ours}
    found, missing, used = others, [], set()
    for row in rows:
        if all(name in stored for name in row.theirs):
            found.append(row)
        elif not row.optional and not all((slot.path, slot.layer) in covered for slot in row.ours):
            missing.append((row, set(row.theirs) - stored.keys()))
            used |= set(row.theirs)
    used |= {name for row in found for name in row.theirs}
    unknown = [stored[name] for name in stored.keys() - used]
    return [dataclasses.replace(row, theirs=tuple(stored[n] for n in row.theirs)) for row in found], missing, unknown


def _slots(row: Row) -> frozenset[tuple[str, int | None]]:
    return frozenset((slot.path, slot.layer) for slot in row.ours)


def renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """The name after all renames."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def said(row: Row) -> str:
    """The parameters of a row, in words."""
    return ", ".join(slot.path if slot.layer is None else f"{slot.path}[{slot.layer}]" for slot in row.ours)


def to_ours(row: Row, arrays: Arrays) -> Arrays:
    """A row's parameters from its tensors. UserError, naming both sides, if a shape is not as the row says."""
    for name, array, shape in zip(row.theirs, arrays, row.shapes or [a.shape for a in arrays], strict=True):
        if array.shape != shape:
            raise UserError(f"tensor {name} has shape {array.shape}, but {said(row)} needs {shape}; check config.json")
    made = row.to_ours(arrays)
    for slot, array in zip(row.ours, made, strict=True):
        if array.shape != slot.shape:
            raise UserError(f"tensor {', '.join(row.theirs)} makes {array.shape} of {slot.path}, not {slot.shape}")
    return made


def to_theirs(row: Row, arrays: Arrays) -> Arrays:
    """A row's tensors from its parameters. UserError, naming both sides, if a shape is not as the row says."""
    for slot, array in zip(row.ours, arrays, strict=True):
        if array.shape != slot.shape:
            raise UserError(f"{slot.path} has shape {array.shape}, but {', '.join(row.theirs)} needs {slot.shape}")
    made = row.to_theirs(arrays)
    for name, array, shape in zip(row.theirs, made, row.shapes or [a.shape for a in made], strict=True):
        if array.shape != shape:
            raise UserError(f"{said(row)} makes {array.shape} of tensor {name}, not {shape}")
    return made


def same(
    path: str,
    layer: int | None,
    shape: Sequence[int],
    theirs: str,
    *,
    theirs_shape: Sequence[int] | None = None,
    optional: bool = False,
) -> Row:
    """A tensor that is the same array on both sides, up to its shape (norms, embeddings, biases of heads).

    theirs_shape: None means the shape of ours for an embedding, and a vector for everything else.
    """
    shape = tuple(shape)
    if theirs_shape is None:
        theirs_shape = shape if path.endswith("embedding") else (math.prod(shape),)
    there = tuple(theirs_shape)
    return Row(
        (Slot(path, layer, shape),),
        (theirs,),
        lambda a: [a[0].reshape(shape)],
        lambda a: [a[0].reshape(there)],
        optional,
        (there,),
    )


def linear(
    path: str, layer: int | None, inputs: Sequence[int], features: Sequence[int], theirs: str, *, bias: bool = False
) -> list[Row]:
    """`nn.Linear`: theirs.weight (out, in) is path/kernel (*inputs, *features), theirs.bias is path/bias (*features)."""
    inputs, features = tuple(inputs), tuple(features)
    rows = [
        Row(
            (Slot(f"{path}/kernel", layer, inputs + features),),
            (f"{theirs}.weight",),
            lambda a: [np.ascontiguousarray(a[0].T).reshape(inputs + features)],
            lambda a: [np.ascontiguousarray(a[0].reshape(math.prod(inputs), -1).T)],
            shapes=((math.prod(features), math.prod(inputs)),),
        )
    ]
    return rows + ([same(f"{path}/bias", layer, features, f"{theirs}.bias")] if bias else [])


def norm(path: str, layer: int | None, width: int, theirs: str, *, bias: bool = True) -> list[Row]:
    """`nn.LayerNorm` or an RMS norm: theirs.weight is path/scale (width,), theirs.bias is path/bias (width,)."""
    rows = [same(f"{path}/scale", layer, (width,), f"{theirs}.weight")]
    return rows + ([same(f"{path}/bias", layer, (width,), f"{theirs}.bias")] if bias else [])


def unused(theirs: str) -> Row:
    """A tensor that may be there and is not needed."""
    return Row((), (theirs,), lambda a: [], lambda a: [], optional=True)


def tied(theirs: str, repeats: str) -> Row:
    """A tensor that is another one once more, such as a tied head: some files store it, some do not."""
    return Row((), (theirs, repeats), lambda a: [], lambda a: [], optional=True)
