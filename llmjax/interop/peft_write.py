"""A run's adapters are written in PEFT's format; peft_places.py tells the format."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config, human, storage
from llmjax.errors import UserError
from llmjax.interop.mapping import Family, to_theirs
from llmjax.interop.merged import MergedReader
from llmjax.interop.peft_places import CONFIG, PREFIX, WEIGHTS, Arrays, Place, places
from llmjax.interop.tensors import Tensor, Writer
from llmjax.interop.write import choose_family
from llmjax.model import adapters
from llmjax.train import folders


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
