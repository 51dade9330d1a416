"""`llmjax export` makes a folder of a run that transformers loads with `from_pretrained`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config, human, progress, storage
from llmjax.data.hf_tokenizer import CONFIG_FILE, GENERATION_FILE
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.interop import scoring, tokenizer_json
from llmjax.interop.families import FAMILIES
from llmjax.interop.generation import write_generation
from llmjax.interop.mapping import Family, Row, to_theirs
from llmjax.interop.matching import Shapes, uncovered
from llmjax.interop.merged import MergedReader
from llmjax.interop.read import parameters_of
from llmjax.interop.tensors import Tensor, Writer, shard_names, write_index
from llmjax.model import adapters
from llmjax.train import folders

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Exported:
    """What was exported."""

    folder: Path
    model_type: str
    files: int
    nbytes: int
    shift: float = 0.0  # of a reward model's scores here above those there, which have no bias
    merged: int = 0  # adapters of single layers
    lost: float = 0.0  # share of the numbers that adapters change which are as they were, because 16 bits are too few

    def __str__(self) -> str:
        files = "1 file" if self.files == 1 else f"{self.files} files"
        told = f"{self.folder}: {self.model_type}, {human.size(self.nbytes)} of weights in {files}"
        if self.merged:
            told += f"; {self.merged} adapters are merged"
        if self.lost:
            told += f", and {self.lost:.1%} of the numbers that they change are lost in bfloat16"
        return told + f"; its scores are ours less {self.shift:.6g}, and compare alike" * bool(self.shift)


def export_model(source: Path, folder: Path, *, model_type: str = "", shard_bytes: int = SHARD_BYTES) -> Exported:
    """Write the model of a run (its newest checkpoint, the moving average where there is one) for transformers.

    Layers are read, turned and written one matrix at a time. Adapters are merged. `folder` appears when everything is
    written.

    Args:
        source: a run, or one of its checkpoint folders.
        folder: a folder that does not exist, or is empty.
        model_type: such as "llama"; empty: what the run was imported from, or the first that can say its config.
        shard_bytes: a new file is begun when the next tensors would make one larger than this.

    Raises:
        UserError: when the run cannot be read, or no model type can say its config; the message says why.
        OSError: when the disk is full.
    """
    if shard_bytes < 1:
        raise UserError("--shard-size must be at least 1 byte, such as 5GB")
    step, c, weights, imported = open_run(source)
    model = scoring.body(c)
    family, theirs = choose_family(model, model_type, imported)
    theirs = scoring.described(c, theirs)
    rows = [*family.rows(model), *scoring.rows(c)]
    require_covered(
        rows, weights, c, f"the checkpoint {step} does not fit its config as a {theirs['model_type']} model"
    )
    shards = plan(rows, parameters_of(c.model), shard_bytes)  # in the config's types: averages are float32 always
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())
    with storage.staged(folder, purpose="--to") as unfinished:
        storage.require_space(unfinished, total)
        _write_texts(unfinished, step.parent.parent / "tokenizer", theirs, c)
        with progress.bar("exporting", total) as advance:
            for name, shard in zip(shard_names(len(shards)), shards, strict=True):
                writer = Writer(unfinished / name, shard.tensors)
                for row in shard.rows:
                    arrays = to_theirs(row, [weights.read(slot.path, slot.layer) for slot in row.ours])
                    for tensor, array in zip(row.theirs, arrays, strict=True):
                        writer.write(tensor, array.astype(shard.tensors[tensor].dtype, copy=False))
                        advance(array.nbytes)
                writer.close()
        write_index(unfinished, [shard.tensors for shard in shards])
    shift = float(weights.read("value/bias", None)) if c.objective.name == "reward" else 0.0
    lost = weights.counts["lost"] / max(weights.counts["numbers"], 1) if c.model.param_dtype == "bfloat16" else 0.0
    return Exported(folder, theirs["model_type"], len(shards), total, shift, weights.counts["merged"], lost)


def open_run(source: Path) -> tuple[Path, ConfigDict, MergedReader, str]:
    """The checkpoint to export, its config without adapters, its weights, and the model_type that it was imported as or ""."""
    step = folders.newest(source)
    meta = folders.read_meta(step)
    c = config.from_json(json.dumps(meta["config"]))
    weights = MergedReader(step)
    if weights.base is not None:  # what the adapters were trained on says what it is
        meta = folders.read_meta(weights.base.folder(step.parent))
    c.model = adapters.plain(c.model)
    return step, c, weights, meta.get("imported", {}).get("model_type", "")


def require_covered(rows: Iterable[Row], weights: MergedReader, c: ConfigDict, otherwise: str) -> None:
    """Raise UserError, which begins with `otherwise`, unless rows write every parameter that is exported."""
    known = {path: tensor.shape for path, tensor in weights.params.items() if not scoring.left_out(c, path)}
    if wrong := uncovered(rows, known):
        raise UserError(f"{otherwise}:\n" + "\n".join(f"  {path} {about}" for path, about in wrong))


def choose_family(model: ConfigDict, model_type: str, imported: str) -> tuple[Family, dict[str, Any]]:
    """The family to write a model as, and its config.json. Raises UserError with the reasons if there is none."""
    if model_type and model_type not in FAMILIES:
        raise UserError(f"--family {model_type} is not known; known are {', '.join(sorted(FAMILIES))}")
    if model_type:
        return FAMILIES[model_type], FAMILIES[model_type].write_config(model)
    reasons = []
    first = [FAMILIES[imported]] if imported in FAMILIES else []
    for family in dict.fromkeys([*first, *FAMILIES.values()]):
        try:
            return family, family.write_config(model)
        except UserError as error:
            reasons.append(f"{family.model_types[0]}: {error}")
    lines = "\n".join(f"  {reason}" for reason in sorted(reasons, key=len))  # the fewest differences first
    raise UserError(f"no model type of transformers can say this model's config:\n{lines}")


@dataclass(frozen=True)
class Shard:
    """One file: the rows that make it, and its tensors in their order."""

    rows: list[Row]
    tensors: dict[str, Tensor]


def plan(rows: Iterable[Row], params: Mapping[str, Tensor], shard_bytes: int) -> list[Shard]:
    """Which rows go into which file: the tensors of a row stay together. What only repeats others is left out."""
    shapes, shards, size = Shapes(), [Shard([], {})], 0
    for row in rows:
        if not row.ours:
            continue
        dtype = np.result_type(*(params[slot.path].dtype for slot in row.ours))
        tensors = {name: Tensor(dtype, shape) for name, shape in zip(row.theirs, shapes.of(row), strict=True)}
        here = sum(tensor.nbytes for tensor in tensors.values())
        if size + here > shard_bytes and size:
            shards.append(Shard([], {}))
            size = 0
        shards[-1].rows.append(row)
        shards[-1].tensors.update(tensors)
        size += here
    return shards


def _write_texts(folder: Path, tokenizer_folder: Path, theirs: dict[str, Any], c: ConfigDict) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    theirs = {**theirs, "torch_dtype": c.model.param_dtype}  # the name that all versions of transformers read
    generation = write_generation(c.generate)
    if tokenizer_folder.is_dir():
        tokenizer = load_tokenizer(tokenizer_folder)
        ids = _save_tokenizer(tokenizer, folder)
        if scoring.judges(c) and ids["pad_token_id"] in tokenizer.eos_ids:
            ids["pad_token_id"] = (
                None  # else transformers would take a text's end for padding, and read the token before
            )
        theirs |= {key: i for key, i in ids.items() if i is not None and theirs.get(key) is None}
        path = folder / GENERATION_FILE
        known = json.loads(storage.read_text(path)) if path.is_file() else {}
        generation = {**ids, **known, **generation}
    if generation:
        storage.write_json(folder / GENERATION_FILE, generation, indent=2)
    storage.write_json(folder / "config.json", theirs, indent=2)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write the tokenizer as transformers reads it; the ids that go into config.json."""
    if tokenizer.kind == "huggingface":
        tokenizer.save(folder)
    else:
        for name, data in tokenizer_json.of_ours(tokenizer).items():
            storage.write_bytes(folder / name, data)
    assert (folder / CONFIG_FILE).is_file()
    ends = tokenizer.eos_ids
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(ends) if len(ends) > 1 else tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
