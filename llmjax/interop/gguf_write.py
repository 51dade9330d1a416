"""`export` to a `.gguf` file writes a run's model for llama.cpp and what else reads GGUF.

The metadata is read again, before anything is written, by the functions that import GGUF files. A model or a tokenizer
that does not come out the same is refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import human, progress, storage
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.interop import scoring
from llmjax.interop.families import FAMILIES
from llmjax.interop.fields import require_same
from llmjax.interop.gguf import interleave
from llmjax.interop.gguf_metadata import (
    ARCHITECTURES,
    ROPE_FACTORS,
    gguf_name,
    llama3_factors,
    read_config,
    write_metadata,
)
from llmjax.interop.gguf_tokenizer import to_gguf
from llmjax.interop.mapping import Family, to_theirs
from llmjax.interop.matching import Shapes
from llmjax.interop.rope import plain
from llmjax.interop.tensors import Tensor
from llmjax.interop.write import open_run, require_covered

FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2}  # llama.cpp's numbers for what most matrices of a file are
OUTER_TYPES = {"q4_0": "q8_0"}  # embeddings and output head in more bits, as llama.cpp's own tool keeps them
QUANTIZATION_VERSION = 2
F16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class ExportedFile:
    """What was exported."""

    file: Path
    architecture: str
    type_name: str
    nbytes: int
    merged: int  # adapters of single layers

    def __str__(self) -> str:
        told = f"{self.file}: {self.architecture}, {human.size(self.nbytes)} of weights in {self.type_name}"
        return told + f"; {self.merged} adapters are merged" * bool(self.merged)


def export_gguf(source: Path, file: Path, *, type_name: str = "f16", model_type: str = "") -> ExportedFile:
    """Write the model of a run (its newest checkpoint, the moving average where there is one) as a GGUF file.

    Matrices are read, turned, quantized and written one at a time. A matrix whose rows are no multiple of a block is
    written in float16. Vectors are written in float32. Adapters are merged.

    Args:
        source: a run, or one of its checkpoint folders.
        file: a file that does not exist. It appears when everything is written.
        type_name: of the matrices, one of FILE_TYPES.
        model_type: such as "llama"; empty: what the run was imported from, or the first that can say its config.

    Raises:
        UserError: when the run cannot be read, or GGUF cannot say its model or its tokenizer; the message says why.
        OSError: when the disk is full.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("writing GGUF files needs the package `gguf`: pip install 'llmjax[hf]'") from error
    if file.exists():
        raise UserError(f"{file} exists: choose another --to file, or remove it first")
    step, c, weights, imported = open_run(source)
    if scoring.judges(c):
        raise UserError("a model that judges texts cannot be written as a GGUF file: export it to a folder")
    model = scoring.body(c)
    arch, family, theirs, metadata = _choose(model, model_type, imported)
    rows = [row for row in family.rows(model) if row.ours]
    require_covered(rows, weights, c, f"the checkpoint {step} does not fit its config as a {arch} model")
    tokenizer_folder = step.parent.parent / "tokenizer"
    if not tokenizer_folder.is_dir():
        raise UserError(f"{source} has no tokenizer, which a GGUF file needs: export it to a folder")
    tokenizer = load_tokenizer(tokenizer_folder)
    metadata |= to_gguf(tokenizer, theirs["vocab_size"], gemma=arch.startswith("gemma"))
    metadata |= {"general.name": c.name, "general.file_type": FILE_TYPES[type_name]}
    metadata["general.quantization_version"] = QUANTIZATION_VERSION
    shapes = Shapes()
    plan = {name: shape for row in rows for name, shape in zip(row.theirs, shapes.of(row), strict=True)}
    types = {name: _type_of(name, shape, type_name) for name, shape in plan.items()}
    factors = _factors(theirs)
    total = sum(_nbytes(plan[name], types[name]) for name in plan)
    storage.require_space(file.parent, total)
    with storage.replacing(file) as temporary, progress.bar("exporting", total) as advance:
        writer = gguf.GGUFWriter(temporary, arch)
        _add_metadata(writer, metadata)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for name, shape in plan.items():
            kind = gguf.GGMLQuantizationType[types[name].upper()]
            # The writer takes a shape in numbers for every type but uint8, whose shape is in bytes.
            writer.add_tensor_info(
                gguf_name(name, arch), shape, np.dtype(np.float32), _nbytes(shape, types[name]), raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            if factors is not None:
                writer.write_tensor_data(factors)
            for row in rows:
                arrays = to_theirs(row, [weights.read(slot.path, slot.layer) for slot in row.ours])
                for name, array in zip(row.theirs, arrays, strict=True):
                    data = _encoded(name, _as_converted(arch, theirs, name, array), types[name])
                    writer.write_tensor_data(data)
                    advance(data.nbytes)
        finally:
            writer.close()
    return ExportedFile(file, arch, type_name, total, weights.counts["merged"])


def _choose(model: ConfigDict, model_type: str, imported: str) -> tuple[str, Family, dict[str, Any], dict[str, Any]]:
    """The architecture to write a model as, its family, its config.json and its metadata.

    Raises UserError with the reasons if no architecture says the same model.
    """
    by_type = {there: arch for arch, (there, _) in ARCHITECTURES.items()}
    if model_type and model_type not in by_type:
        raise UserError(f"--family {model_type} has no GGUF architecture here; known are {', '.join(sorted(by_type))}")
    wanted = [model_type] if model_type else sorted(by_type, key=lambda there: there != imported)
    reasons = []
    for there in wanted:
        family, arch = FAMILIES[there], by_type[there]
        try:
            theirs = {**family.write_config(model), "model_type": there}
            metadata = write_metadata(arch, theirs)
            shapes = Shapes()
            tensors = {
                name: Tensor(np.dtype(np.float32), shape)
                for row in family.rows(model) if row.ours
                for name, shape in zip(row.theirs, shapes.of(row), strict=True)
            }  # fmt: skip
            factors = _factors(theirs)
            again = family.read_config(
                read_config(metadata, tensors, None if factors is None else factors.astype(np.float64))
            )
            require_same(plain(model), again, f"GGUF {arch}", unsaid=family.unsaid)
        except UserError as error:
            reasons.append(f"{there}: {error}")
        else:
            return arch, family, theirs, metadata
    lines = "\n".join(f"  {reason}" for reason in sorted(reasons, key=len))  # the fewest differences first
    raise UserError(f"no architecture of GGUF that is known here can say this model's config:\n{lines}")


def _factors(theirs: Mapping[str, Any]) -> np.ndarray | None:
    scaling = theirs.get("rope_scaling") or {}
    if scaling.get("rope_type") != "llama3":
        return None
    return llama3_factors(scaling, base=theirs["rope_theta"], size=theirs["head_dim"])


def _type_of(name: str, shape: tuple[int, ...], type_name: str) -> str:
    """What a tensor is written in."""
    import gguf

    if len(shape) == 1:
        return "f32"
    kind = (
        OUTER_TYPES.get(type_name, type_name) if name.endswith(("embed_tokens.weight", "lm_head.weight")) else type_name
    )
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return kind if shape[-1] % block == 0 else "f16"


def _nbytes(shape: tuple[int, ...], type_name: str) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name.upper()]]
    return math.prod(shape) // block * size


def _as_converted(arch: str, theirs: Mapping[str, Any], name: str, array: np.ndarray) -> np.ndarray:
    """A tensor as llama.cpp wants it, in float32."""
    array = array.astype(np.float32)
    if arch == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        array = interleave(array, theirs["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"])
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        array = array + np.float32(1)
    return array


def _encoded(name: str, array: np.ndarray, type_name: str) -> np.ndarray:
    import gguf

    if not np.isfinite(array).all():
        raise UserError(f"{name} has numbers that are not finite: export an earlier checkpoint")
    if type_name == "f16" and np.abs(array).max(initial=0.0) > F16_MAX:
        raise UserError(f"{name} has numbers beyond {F16_MAX:g}, the most that f16 can say: choose --type q8_0")
    kind = gguf.GGMLQuantizationType[type_name.upper()]
    return np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(array), kind))


def _add_metadata(writer: Any, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if key == "general.architecture":
            continue  # the writer has it
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
