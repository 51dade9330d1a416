"""`llmjax import` makes a run of a Hugging Face model or of a GGUF file."""

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from llmjax import config, human, progress, storage
from llmjax.data import hf_tokenizer
from llmjax.data.tokenizer import BYTE_FILE, MODEL_FILE, Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.interop import gguf, scoring, tensors
from llmjax.interop.dequantize import dequantized
from llmjax.interop.families import FAMILIES
from llmjax.interop.fields import mapping
from llmjax.interop.generation import not_read, read_generation
from llmjax.interop.mapping import Family, Row, to_ours
from llmjax.interop.matching import fit
from llmjax.interop.stacked import StackedWriter
from llmjax.interop.tensors import Source, Tensor
from llmjax.model import transformer
from llmjax.parallel.placement import path_name

DTYPES = ("float32", "bfloat16")
FLOATS = ("bfloat16", "float16", "float32", "float64")  # what a model's tensors can be stored in without a scale
QUANTIZATION_FILE = "hf_quant_config.json"  # where older files of ModelOpt say it
TOKENIZER_FILES = (BYTE_FILE, MODEL_FILE, *hf_tokenizer.SENTENCEPIECE_FILES)


@dataclass(frozen=True)
class Imported:
    """What was imported."""

    run: Path
    model_type: str
    parameters: int
    dtype: str
    tokenizer: Tokenizer | None
    told: str = ""  # what a user should know of how the model was read

    def __str__(self) -> str:
        ids = f"a tokenizer of {self.tokenizer.vocab_size:,} ids" if self.tokenizer else "no tokenizer"
        return f"{self.run}: {self.model_type}, {human.count(self.parameters)} parameters in {self.dtype}, {ids}{self.told}"


def import_model(source: Path, run: Path, *, dtype: str = "", tokenizer: str = "", max_length: int = 0) -> Imported:
    """Read the model of a folder or GGUF file into the new run folder `run`, tensor by tensor.

    No more than the tensors of one layer's matrix are in memory at a time, with what is needed to turn and compress
    them. `run` appears when everything is written.

    Args:
        source: a folder with config.json and safetensors, one file or shards with their index; or a .gguf file.
        run: a folder that does not exist, or is empty.
        dtype: of the parameters, float32 or bfloat16; empty: as stored, and float32 for float16, quantized weights and
            files of several types.
        tokenizer: a folder or file with the tokenizer if it is not beside the weights, or "none".
        max_length: of models with longrope positions, the most tokens that they read, which chooses their factors; 0: those
            of the first training.

    Raises:
        UserError: for files that are missing, damaged, not supported or do not fit each other; the message says which.
        OSError: when the disk is full.
    """
    if dtype and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known: choose float32 or bfloat16")
    weights: Source
    files = None
    if source.suffix == ".gguf":
        weights = file = gguf.open_file(source)
        theirs = file.config
        if not tokenizer:
            files = file.tokenizer_files
    else:
        theirs = read_config(source)
        weights = tensors.open_folder(source)
    model_type = str(theirs["model_type"])
    family = FAMILIES[model_type]
    try:
        theirs, weights = dequantized(theirs, weights)
        model = family.read_config(theirs)
        told = _set_length(model, max_length)
    except UserError as error:
        raise UserError(f"the config.json of {source} cannot be imported: {error}") from error
    model.param_dtype = model.dtype = dtype or _stored_dtype(weights, family)
    generation = {} if source.is_file() else hf_tokenizer.read_beside(source)[hf_tokenizer.GENERATION_FILE]
    c = run_config(model, name=run.name, generation=read_generation(generation))
    if unread := not_read(generation):
        told += f"; of its {hf_tokenizer.GENERATION_FILE} {', '.join(unread)} is not used"
    names = scoring.outputs(theirs) if model.direction == "causal" else []
    if names:
        c = scoring.judging(c, names)
        config.check(c)
        told += f"; it judges texts: {', '.join(names) if len(names) > 1 else 'a reward'}"
    params = parameters_of(c.model)
    rows_of = family.rows
    family = dataclasses.replace(family, rows=lambda model: [*rows_of(model), *scoring.rows(c)])
    found = fit(family, c.model, weights.tensors, {path: tensor.shape for path, tensor in params.items()})
    rows = [row for row in found if row.ours]
    _require_floats(weights, rows)
    for row in found:
        if not row.ours and len(row.theirs) == 2:
            _require_equal(weights, *row.theirs)
    with storage.staged(run, purpose="--to") as folder:
        known = None
        if tokenizer != "none":
            where = Path(tokenizer) if tokenizer else source
            known = _write_tokenizer(where, folder / "tokenizer", theirs, files)
            if known.vocab_size > model.vocab_size:
                raise UserError(
                    f"the tokenizer of {where} has ids up to {known.vocab_size - 1:,} and the model has only "
                    f"{model.vocab_size:,}: they do not belong together; give another --tokenizer, or --tokenizer none"
                )
        storage.write_text(folder / "config.json", config.to_json(c))
        notes = {"imported": {"model_type": model_type}} | ({"tokenizer": known.fingerprint} if known else {})
        _write_checkpoint(folder / "checkpoints" / "0", c, params, rows, weights, notes)
    size = sum(math.prod(tensor.shape) for tensor in params.values())
    return Imported(run, model_type, size, c.model.param_dtype, known, told)


def _set_length(model: ConfigDict, asked: int) -> str:
    """Set the most tokens that a model with longrope reads, and say how many that are. UserError for other models."""
    if model.rotary_scaling != "longrope":
        if asked:
            raise UserError("--max-length is for models with longrope positions, which compute by it: leave it out")
        return ""
    longest = round(model.rotary_original_length * model.rotary_factor)
    if not 0 <= asked <= longest:
        raise UserError(f"--max-length {asked} must be from 1 to the {longest:,} tokens that the model was trained for")
    model.max_length = asked or model.max_length
    which = "long" if model.max_length > model.rotary_original_length else "short"
    told = f"; it reads texts of up to {model.max_length:,} tokens, by its {which} factors"
    return told + f" (up to {longest:,} with --max-length)" * (which == "short")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError when there is none, or for a model_type that is not known."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give --from the folder of a model, or a .gguf file")
    path = folder / "config.json"
    if not path.is_file():
        if found := sorted(folder.glob("*.gguf")):
            raise UserError(
                f"{folder} has no config.json; to import the GGUF file give it itself: --from {shlex.quote(str(found[0]))}"
            )
        raise UserError(f"{folder} has no config.json: it is not the folder of a Hugging Face model")
    theirs = _read_json(path)
    beside = folder / QUANTIZATION_FILE
    if beside.is_file() and not theirs.get("quantization_config"):
        said = mapping(_read_json(beside), "quantization", where=QUANTIZATION_FILE)
        theirs["quantization_config"] = {"quant_method": "modelopt", **said}
    if str(theirs.get("model_type")) not in FAMILIES:
        raise UserError(
            f"{path} has model_type {theirs.get('model_type')!r}, which is not known here; known are "
            + ", ".join(sorted(FAMILIES))
        )
    return theirs


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(storage.read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it holds no object but {type(found).__name__}): get it again")
    return found


def run_config(model: ConfigDict, *, name: str, generation: Mapping[str, float] | None = None) -> ConfigDict:
    """The config of a run with this `config.model`, locked; the objective is the one that such a model is trained with.

    `generation`: settings of `config.generate` that the model comes with.
    """
    c = config.base()
    c.name = name
    c.model.update(model.to_dict())
    c.generate.update(generation or {})
    if model.two_stream:
        c.objective.name = "permutation"
    elif model.encoder_layers:
        c.objective.name = "span"
    elif model.direction == "bidirectional":
        c.objective.name = "masked"
    c.train.sequence_length = min(c.train.sequence_length, model.max_length)
    config.check(c)
    return c.lock()


def parameters_of(model: ConfigDict) -> dict[str, Tensor]:
    """path -> type and shape of every parameter of a model."""
    module = transformer.build(model)
    shapes = transformer.param_shapes(module)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {path_name(path): Tensor(np.dtype(leaf.dtype), tuple(leaf.shape)) for path, leaf in leaves}


def _stored_dtype(weights: Source, family: Family) -> str:
    """bfloat16 when all floats of a file are, else float32, which holds any of them exactly."""
    floats = {t.dtype.name for t in weights.tensors.values() if t.dtype.name in FLOATS}
    return "bfloat16" if floats == {"bfloat16"} else "float32"


def _require_floats(weights: Source, rows: list[Row]) -> None:
    """UserError that names a tensor which is stored in numbers that need a scale, and for which nothing gives one."""
    names = (name for row in rows for name in row.theirs if weights.tensors[name].dtype.name not in FLOATS)
    if (name := next(names, None)) is not None:
        raise UserError(
            f"the tensor {name} is stored as {weights.tensors[name].dtype.name}, and neither its folder nor "
            "quantization_config in config.json says what its numbers stand for: get the model in float32, bfloat16 or "
            "float16"
        )


def _require_equal(weights: Source, name: str, repeats: str) -> None:
    """UserError unless a tensor is the other one once more, which is what a tied head is. Holds one at a time."""

    def digest(name: str) -> bytes:
        return hashlib.blake2b(np.ascontiguousarray(weights.read(name)).reshape(-1).view(np.uint8).data).digest()

    one, other = weights.tensors[name], weights.tensors[repeats]
    if one != other or digest(name) != digest(repeats):
        raise UserError(
            f"config.json says that {name} repeats {repeats}, but the file has other values there: if the model has a "
            'head of its own, "tie_word_embeddings" must be false in config.json; if not, get the files again'
        )


def _write_tokenizer(
    source: Path, folder: Path, theirs: Mapping[str, Any], files: Mapping[str, bytes] | None
) -> Tokenizer:
    """Put the tokenizer into the run, with the ids that only their config.json has, and read it back."""
    if files is not None:
        for name, data in files.items():
            storage.write_bytes(folder / name, data)
    else:
        beside = source if source.is_dir() else source.parent
        names = TOKENIZER_FILES if source.is_dir() else (source.name,)
        found = next((beside / name for name in names if (beside / name).is_file()), None)
        if found is None:
            raise UserError(
                f"there is no tokenizer in {source} ({', '.join(TOKENIZER_FILES)}): write a tokenizer.json once with "
                "transformers, AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW_DIR), and give --tokenizer "
                "NEW_DIR; or import without one, --tokenizer none"
            )
        for path in (found, *(beside / name for name in hf_tokenizer.FILES)):
            if path.is_file():
                storage.copy(path, folder / path.name)
    for name in (hf_tokenizer.CONFIG_FILE, hf_tokenizer.GENERATION_FILE):
        if not (folder / name).is_file():
            storage.write_json(folder / name, {})
    path = folder / hf_tokenizer.GENERATION_FILE
    generation = hf_tokenizer.read_beside(folder)[hf_tokenizer.GENERATION_FILE]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        if generation.get(key) is None and theirs.get(key) is not None:
            generation[key] = theirs[key]
    storage.write_json(path, generation, indent=2)
    return load_tokenizer(folder)


def _write_checkpoint(
    folder: Path,
    c: ConfigDict,
    params: Mapping[str, Tensor],
    rows: list[Row],
    weights: Source,
    notes: Mapping[str, Any],
) -> None:
    """The checkpoint of step 0, row by row; `notes` are what its meta says beside the usual."""
    folder.mkdir(parents=True)
    total = sum(tensor.nbytes for tensor in params.values())
    storage.require_space(folder, total)
    stacked = {slot.path for row in rows for slot in row.ours if slot.layer is not None}
    writer = StackedWriter(folder, params, stacked=stacked)
    with progress.bar("importing", total) as advance:
        for row in rows:
            _write_row(writer, row, params, weights)
            advance(sum(math.prod(slot.shape) * params[slot.path].dtype.itemsize for slot in row.ours))
    meta = {"step": 0, "train_seconds": 0.0, "tokens": 0, "seed": c.seed, "config": c.to_dict()}
    writer.close(meta={**meta, **notes})


def _write_row(writer: StackedWriter, row: Row, params: Mapping[str, Tensor], weights: Source) -> None:
    dtypes = {params[slot.path].dtype for slot in row.ours}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    arrays = to_ours(row, [weights.read(name).astype(dtype, copy=False) for name in row.theirs])
    for slot, array in zip(row.ours, arrays, strict=True):
        writer.write(slot.path, slot.layer, array.astype(params[slot.path].dtype, copy=False))
