"""Adapters in PEFT's format are read; peft_places.py tells the format, and peft_write.py writes it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config, storage
from llmjax.errors import UserError
from llmjax.interop.mapping import Family, renamed, to_ours
from llmjax.interop.peft_places import CONFIG, PREFIX, WEIGHTS, Arrays, Place, places
from llmjax.interop.read import parameters_of
from llmjax.interop.stacked import StackedWriter
from llmjax.interop.tensors import Safetensors, Tensor
from llmjax.interop.write import choose_family
from llmjax.train import base, folders

# Fields that change what an adapter computes and that are not supported. Empty ones mean nothing.
UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "layer_replication", "lora_bias", "megatron_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip


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
