"""PEFT's format of adapters, a folder with adapter_config.json and adapter_model.safetensors: written and read.

Where a matrix of theirs is a matrix of ours up to the order of inputs and outputs, an adapter's A and B are ours in that
order. Where it is several of ours side by side (queries, keys and values), B has a block for each of them. Each family's rows
are asked which it is (`places`). A matrix that is neither has no adapter in this format, and is refused by name.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config, human, storage
from llmjax.errors import UserError
from llmjax.interop.mapping import Family, Row, renamed, to_ours, to_theirs
from llmjax.interop.merged import MergedReader
from llmjax.interop.read import parameters_of
from llmjax.interop.stacked import StackedWriter
from llmjax.interop.tensors import Safetensors, Tensor, Writer
from llmjax.interop.write import choose_family
from llmjax.model import adapters
from llmjax.train import base, folders

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Fields that change what an adapter computes and that are not supported, with the values that mean nothing.
UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "layer_replication", "lora_bias", "megatron_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
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


# ------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    model_type: str
    matrices: int
    nbytes: int
    form: str  # of the kernels that the adapters were trained on

    def __str__(self) -> str:
        said = f"{self.folder}: adapters of {self.matrices} matrices of a {self.model_type} model, {human.size(self.nbytes)}"
        if self.form == "stored":
            return said
        return f"{said}; they were trained on kernels in {self.form}, so on unrounded ones they compute something else"


def export_peft(source: Path, folder: Path, *, model_type: str = "") -> Exported:
    """Write the adapters of a run as PEFT reads them. `folder` appears when everything is written.

    Args:
        source: a run of adapters, or one of its checkpoint folders.
        model_type: of the base, as for `write.export_model`.

    Raises UserError for a run without adapters, one whose base is no model on disk, and what has no place in the format.
    """
    step = folders.newest(source)
    reader, meta = MergedReader(step), folders.read_meta(step)
    c = config.from_json(json.dumps(meta["config"]))
    if not reader.adapted:
        raise UserError(f"{source} has no adapters: export it without --peft")
    if reader.base is None:
        raise UserError(
            f"the adapters of {source} stand on weights that are in no other run (adapters that were merged): export it "
            "without --peft, which merges them"
        )
    under = folders.read_meta(reader.base.folder(step.parent))
    model = adapters.plain(c.model)
    model.value_head = False
    family, theirs = choose_family(model, model_type, under.get("imported", {}).get("model_type", ""))
    found = places(family, model)
    tensors, ranks, names = _written(reader, found)
    extra = _whole(reader, family, model)
    task = "CAUSAL_LM" if c.model.direction == "causal" else None
    turned = all(place.transposed for name in names if (place := found[name]) is not None)
    whole = sorted({name.rpartition(".")[0] for name in extra})
    said = _described(c.model.adapter, names, found, ranks, whole, task, transposed=turned)
    all_tensors = {
        f"{PREFIX}{name}": np.ascontiguousarray(a, np.float32) for name, a in sorted((tensors | extra).items())
    }
    with storage.staged(folder, purpose="--to") as unfinished:
        storage.write_json(unfinished / CONFIG, said, indent=2)
        writer = Writer(unfinished / WEIGHTS, {n: Tensor(a.dtype, a.shape) for n, a in all_tensors.items()})
        for name, array in all_tensors.items():
            writer.write(name, array)
        writer.close()
    nbytes = sum(array.nbytes for array in all_tensors.values())
    return Exported(folder, theirs["model_type"], len(names), nbytes, reader.base.form)


def _written(reader: MergedReader, found: Mapping[str, Place | None]) -> tuple[Arrays, dict[str, int], list[str]]:
    """The tensors of all adapters, the number of blocks in those with several, and the names of the modules."""
    tensors: Arrays = {}
    blocks: dict[str, int] = {}
    names, left = [], set(reader.adapted)
    for name, place in found.items():
        if place is None:
            continue
        parts = [part for part in place.parts if part.path in reader.adapted]
        if not parts:
            continue
        left -= {part.path for part in parts}
        names.append(name)
        own = [{kind: reader.own.read(f"{part.path}/{kind}", part.layer) for kind in adapters.ARRAYS
                if f"{part.path}/{kind}" in reader.own.params} for part in parts]  # fmt: skip
        same = all(np.array_equal(one["lora_a"], own[0]["lora_a"]) for one in own)
        rank = own[0]["lora_a"].shape[1]
        count = 1 if same else len(parts)
        b = np.zeros((place.count, count * rank), np.float32)
        for i, (part, one) in enumerate(zip(parts, own, strict=True)):
            at = 0 if same else i * rank
            b[part.outputs, at : at + rank] = one["lora_b"][:, part.own].T
        tensors[f"{name}.lora_A.weight"] = np.concatenate([one["lora_a"][place.inputs].T for one in own[:count]])
        tensors[f"{name}.lora_B.weight"] = b
        if count > 1:
            blocks[name] = count
        if "magnitude" in own[0]:
            if len(parts) < len(place.parts):
                raise UserError(f"{name} has DoRA for some of its outputs only: {', '.join(p.path for p in parts)}")
            magnitude = np.zeros(place.count, np.float32)
            for part, one in zip(parts, own, strict=True):
                magnitude[part.outputs] = one["magnitude"][part.own]
            tensors[f"{name}.lora_magnitude_vector"] = magnitude
    if left:
        raise UserError(
            f"there is no matrix of theirs that is {', '.join(sorted(left))} in another order: leave it out"
        )
    return tensors, blocks, names


def _whole(reader: MergedReader, family: Family, model: ConfigDict) -> Arrays:
    """The tensors of what was trained beside the adapters, whole."""
    trained = {path for path in reader.own.params if not adapters.is_adapter(path)}
    tensors: Arrays = {}
    for row in family.rows(model):
        slots = {slot.path for slot in row.ours}
        if slots and slots <= trained:
            made = to_theirs(row, [reader.read(slot.path, slot.layer) for slot in row.ours])
            tensors |= dict(zip(row.theirs, made, strict=True))
    whole = {slot.path for row in family.rows(model) for slot in row.ours}
    if left := sorted(trained - whole):
        raise UserError(f"{', '.join(left)} was trained too, and has no place in PEFT's format")
    return tensors


def _described(
    adapter: ConfigDict,
    names: list[str],
    found: Iterable[str],
    blocks: Mapping[str, int],
    whole: list[str],
    task: str | None,
    *,
    transposed: bool,
) -> dict[str, Any]:
    """adapter_config.json."""
    grow = math.sqrt if adapter.scale == "root" else float
    return {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": None, "inference_mode": True, "bias": "none",
        "r": adapter.rank, "lora_alpha": _short(adapter.alpha), "lora_dropout": adapter.dropout,
        "use_rslora": adapter.scale == "root", "use_dora": adapter.kind == "dora", "fan_in_fan_out": transposed,
        "target_modules": _targets(names, found), "modules_to_save": whole or None,
        "rank_pattern": {name: adapter.rank * count for name, count in blocks.items()},
        "alpha_pattern": {name: _short(adapter.alpha * grow(count)) for name, count in blocks.items()},
        "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip


def _short(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _targets(names: list[str], found: Iterable[str]) -> list[str]:
    """The names that choose these modules and no others: their last parts, where that says it."""
    chosen, last = set(names), lambda name: name.rpartition(".")[2]
    loose = {last(name) for name in found if name not in chosen}
    return sorted({name if last(name) in loose else last(name) for name in names})


# ------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Read:
    """The adapters of a folder, in the names and the layout here."""

    settings: dict[str, Any]  # of `model.adapter`
    arrays: Arrays  # path -> array, stacked
    whole: Arrays  # parameters that it has beside adapters


def is_peft(folder: Path) -> bool:
    """Whether a folder has adapters in PEFT's format."""
    return (folder / CONFIG).is_file()


def read_peft(folder: Path, model: ConfigDict, *, model_type: str = "") -> Read:
    """The adapters of a folder, for a model with these settings (`config.model`, without adapters).

    Raises UserError for what is missing, damaged or not supported, and for adapters of another model.
    """
    said = storage.read_json(folder / CONFIG, mend="save the adapters again with PEFT")
    _check(folder, said)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}: save the adapters again with PEFT, as safetensors")
    file = Safetensors([folder / WEIGHTS])
    tied = model.tie_embeddings and not any(name.endswith("lm_head.weight") for name in file.tensors)
    model = ConfigDict(model.to_dict())
    model.tie_embeddings = tied
    family, _ = choose_family(model, model_type, model_type)
    found = places(family, model)
    shapes = {path: tensor.shape for path, tensor in parameters_of(model).items()}
    modules, whole = _sorted(folder, file, family)
    if not modules:
        raise UserError(f"{folder} has no adapters of linear maps")
    # The common rank and scale here; a module of its own scale has it in B.
    ranks = {name: parts["lora_A"].shape[0] for name, parts in modules.items()}
    root, rank = bool(said.get("use_rslora")), max(ranks.values())
    scale = said["lora_alpha"] / _grown(said["r"], root)
    arrays: Arrays = {}
    for name, parts in modules.items():
        place = found.get(name)
        if place is None:
            raise UserError(
                f"{folder} has an adapter of {name}, which is no linear map of this model: is it of another model?"
            )
        own = (
            _pattern(said.get("rank_pattern"), name, said["r"]),
            _pattern(said.get("alpha_pattern"), name, said["lora_alpha"]),
        )
        if own[0] != ranks[name]:
            raise UserError(
                f"{folder} says rank {own[0]} of {name}, whose A has {ranks[name]}: {CONFIG} is not of these files"
            )
        factor = own[1] / _grown(own[0], root) / scale
        _put(arrays, folder, place, parts, shapes, rank=rank, factor=factor)
    targets = sorted({path.rpartition("/")[0] for path in arrays})
    settings = {
        "kind": "dora" if said.get("use_dora") else "lora", "rank": rank, "alpha": float(scale * _grown(rank, root)),
        "scale": "root" if root else "rank", "dropout": float(said.get("lora_dropout") or 0.0),
        "targets": tuple(f"^{path}$" for path in targets),
    }  # fmt: skip
    return Read(settings, arrays, _theirs_whole(folder, family, model, whole, shapes))


def _check(folder: Path, said: Mapping[str, Any]) -> None:
    """Raise UserError for adapters that are not understood."""
    if said.get("peft_type") != "LORA":
        raise UserError(f"{folder} has adapters of the type {said.get('peft_type')}; LORA is supported")
    for name in ("r", "lora_alpha"):
        if not isinstance(said.get(name), (int, float)) or said[name] <= 0:
            raise UserError(
                f"{folder / CONFIG} has {name}={said.get(name)!r}: without it the adapters' scale is not known"
            )
    if said.get("bias", "none") != "none":
        raise UserError(f"{folder / CONFIG} has bias={said['bias']!r}: biases must be trained as modules_to_save")
    if wrong := [name for name in UNSUPPORTED if said.get(name)]:
        raise UserError(f"{folder / CONFIG} has {wrong[0]}={said[wrong[0]]!r}, which is not supported")


def _sorted(folder: Path, file: Safetensors, family: Family) -> tuple[dict[str, Arrays], Arrays]:
    """The arrays of each adapted module, and the tensors that are there whole."""
    modules: dict[str, Arrays] = {}
    whole: Arrays = {}
    for name in file.tensors:
        inner = name.removeprefix(PREFIX)
        found = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?", inner)
        if found is None and ("lora_" in inner or "modules_to_save" in inner):
            raise UserError(f"{folder} has {name}, which is no adapter of a linear map: it is not supported")
        array = file.read(name).astype(np.float32)
        if found is None:
            whole[renamed(inner, family.renames)] = array
        else:
            module = renamed(f"{found[1]}.weight", family.renames).removesuffix(".weight")
            modules.setdefault(module, {})[found[2]] = array
    for module, parts in modules.items():
        if missing := {"lora_A", "lora_B"} - parts.keys():
            raise UserError(f"{folder} has no {', '.join(sorted(missing))} of {module}: save the adapters again")
    return modules, whole


def _put(
    arrays: Arrays,
    folder: Path,
    place: Place,
    parts: Arrays,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int,
    factor: float,
) -> None:
    """Put an adapter of theirs into ours."""
    a, b = parts["lora_A"], parts["lora_B"]
    if a.shape[1] != len(place.inputs) or b.shape != (place.count, a.shape[0]):
        raise UserError(
            f"{folder} has an adapter of {place.name} with {a.shape[1]} inputs and {b.shape[0]} outputs, and the model has "
            f"{len(place.inputs)} and {place.count}: it is of another model"
        )
    for part in place.parts:
        lead = () if part.layer is None else (shapes[f"{part.path}/kernel"][0],)
        index: Any = ... if part.layer is None else part.layer
        sizes: dict[str, tuple[int, ...]] = {"lora_a": (len(place.inputs), rank), "lora_b": (rank, len(part.own))}
        if "lora_magnitude_vector" in parts:
            sizes["magnitude"] = (len(part.own),)
        for kind, size in sizes.items():
            arrays.setdefault(f"{part.path}/{kind}", np.zeros((*lead, *size), np.float32))
        arrays[f"{part.path}/lora_a"][index][place.inputs, : a.shape[0]] = a.T
        arrays[f"{part.path}/lora_b"][index][: a.shape[0], part.own] = b[part.outputs].T * np.float32(factor)
        if "magnitude" in sizes:
            arrays[f"{part.path}/magnitude"][index][part.own] = parts["lora_magnitude_vector"].reshape(-1)[part.outputs]


def _theirs_whole(
    folder: Path, family: Family, model: ConfigDict, whole: Arrays, shapes: Mapping[str, tuple[int, ...]]
) -> Arrays:
    """The parameters of tensors that are there whole (modules_to_save)."""
    found: Arrays = {}
    left = set(whole)
    for row in family.rows(model):
        if row.ours and set(row.theirs) <= whole.keys():
            for slot, array in zip(row.ours, to_ours(row, [whole[name] for name in row.theirs]), strict=True):
                target = found.setdefault(slot.path, np.full(shapes[slot.path], np.nan, np.float32))
                target[... if slot.layer is None else slot.layer] = array
            left -= set(row.theirs)
    if left:
        raise UserError(f"{folder} has {', '.join(sorted(left))}, which no parameter of this model is made of")
    for path, array in found.items():
        if np.isnan(array).any():
            raise UserError(
                f"{folder} has {path} of some layers only, which is not supported: train it in all, or in none"
            )
    return found


def _grown(rank: float, root: bool) -> float:
    return math.sqrt(rank) if root else float(rank)


def _pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says of a module, as PEFT finds it."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


@dataclass(frozen=True)
class Imported:
    """What was read."""

    run: Path
    matrices: int
    base: str

    def __str__(self) -> str:
        return f"{self.run}: adapters of {self.matrices} linear maps, on the base {self.base}"


def import_peft(source: Path, run: Path, under: Path) -> Imported:
    """Read adapters in PEFT's format into the new run `run`, on the run `under` that has their base.

    `train.init_from`, `load`, `chat` and `export` take the run as one that was trained here.

    Raises UserError as `read_peft` does, and when the base has adapters itself.
    """
    step = folders.newest(under)
    meta = folders.read_meta(step)
    c = config.from_json(json.dumps(meta["config"]))
    if c.model.adapter.kind != "none":
        raise UserError(f"the base {under} has adapters itself: give the run that they stand on")
    found = read_peft(source, c.model, model_type=meta.get("imported", {}).get("model_type", ""))
    with c.unlocked():
        c.name, c.train.init_from = run.name, str(under)
        c.model.adapter.update(found.settings)
        c.model.tie_embeddings = c.model.tie_embeddings and "head/kernel" not in found.whole
        if found.whole:
            c.optimizer.train = "|".join(f"^{path}$" for path in sorted(found.whole))
    config.check(c)
    arrays = {**found.arrays, **found.whole}
    wanted = parameters_of(c.model)
    for path, array in found.arrays.items():
        if path.endswith("/magnitude") and not array.all():
            raise UserError(
                f"{source} has DoRA in some layers of {path.rpartition('/')[0]} only, which is not supported"
            )
        assert wanted[path].shape == array.shape, (path, wanted[path].shape, array.shape)
    with storage.staged(run, purpose="--to") as folder:
        if (step.parent.parent / "tokenizer").is_dir():
            storage.copy(step.parent.parent / "tokenizer", folder / "tokenizer", without=("tokens",))
        storage.write_text(folder / "config.json", config.to_json(c))
        target = folder / "checkpoints" / "0"
        target.mkdir(parents=True)
        kept = {path: Tensor(array.dtype, array.shape) for path, array in arrays.items()}
        writer = StackedWriter(target, kept, stacked=())
        for path, array in arrays.items():
            writer.write(path, None, array)
        notes = {name: meta[name] for name in ("tokenizer", "imported") if name in meta}
        writer.close(meta={**meta, **notes, "step": 0, "train_seconds": 0.0, "tokens": 0, "config": c.to_dict()})
        base.write(folder / "checkpoints", base.of_checkpoint(step, run=run))
    return Imported(run, sum(path.endswith("/lora_a") for path in found.arrays), str(under))
