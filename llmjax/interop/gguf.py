"""GGUF files of Llama- and Gemma-shaped models, as llama.cpp and its kin use them, read like a Hugging Face folder.

The `gguf` package reads and dequantizes. Here the metadata becomes a config.json and a tokenizer.json, tensors get the
names they have at Hugging Face, and what llama.cpp's converter did to them is undone: queries and keys of `llama` files
have the two halves of each head's rotation interleaved, Gemma's norms have 1 added.
"""

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmjax.errors import UserError
from llmjax.interop import tokenizer_json
from llmjax.interop.gguf_metadata import ARCHITECTURES, ROPE_FACTORS, read_config, their_name
from llmjax.interop.tensors import Tensor

BLOCK_BYTES = 1 << 26  # dequantized at a time


def open_file(path: Path) -> "GgufFile":
    """Read the metadata of a GGUF file. Raises UserError if it is missing, damaged or of another architecture."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        import gguf
    except ImportError as error:
        raise UserError("reading GGUF files needs the package `gguf`: pip install 'llmjax[hf]'") from error
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package raises whatever numpy does when a file ends too soon
        raise UserError(f"{path} is no complete GGUF file ({error}): get it again") from error
    try:
        return GgufFile(reader, metadata)
    except UserError as error:
        raise UserError(f"{path} cannot be imported: {error}") from error


class GgufFile:
    """A `tensors.Source` with the config and the tokenizer of the same file."""

    def __init__(self, reader: Any, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self._architecture = str(metadata.get("general.architecture"))
        if self._architecture not in ARCHITECTURES:
            raise UserError(f"its architecture is {self._architecture!r}; known are {', '.join(sorted(ARCHITECTURES))}")
        if self._metadata.get(f"{self._architecture}.expert_count"):
            raise UserError("it has experts; of sparse models the safetensors can be imported")
        self._stored = {}
        _require_known(reader.tensors)
        for tensor in reader.tensors:
            if tensor.name != ROPE_FACTORS:
                self._stored[their_name(tensor.name, self._architecture)] = tensor
        factors = next((t for t in reader.tensors if t.name == ROPE_FACTORS), None)
        self.tensors = {
            name: Tensor(_dtype(tensor), tuple(int(size) for size in reversed(tensor.shape)))
            for name, tensor in self._stored.items()
        }
        stretched = None if factors is None else np.asarray(factors.data, np.float64)
        self.config = read_config(metadata, self.tensors, stretched)

    def read(self, name: str) -> np.ndarray:
        """A tensor under its Hugging Face name: dequantized to float32, or as stored if it is bfloat16."""
        import gguf

        tensor, wanted = self._stored[name], self.tensors[name]
        if wanted.dtype == ml_dtypes.bfloat16:
            array = np.array(tensor.data).reshape(-1).view(ml_dtypes.bfloat16)
        else:
            # By rows, because dequantizing takes several times the memory of what comes out.
            flat = np.empty((len(tensor.data), math.prod(wanted.shape) // len(tensor.data)), wanted.dtype)
            rows = max(1, BLOCK_BYTES // (flat.shape[1] * flat.itemsize))
            for start in range(0, len(flat), rows):
                part = gguf.quants.dequantize(tensor.data[start : start + rows], tensor.tensor_type)
                flat[start : start + rows] = part.reshape(-1, flat.shape[1])
            array = flat
        array = array.reshape(wanted.shape)
        if self._architecture == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            array = deinterleave(array, heads)
        if self._architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array - np.float32(1)
        return array

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json."""
        return tokenizer_json.from_gguf(self._metadata, gemma=self._architecture.startswith("gemma"))


def _require_known(tensors: Iterable[Any]) -> None:
    """UserError that names a tensor whose type the package does not unpack: it is given a block of zeros of each type."""
    import gguf

    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors}.items():
        _, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(
                f"its tensor {tensor.name} is stored as {kind.name}, which the package `gguf` cannot unpack: get the file in "
                "another type, or the model's safetensors"
            ) from error


def deinterleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the outputs of queries and keys, (out, in) or (out,).

    It rotates neighbouring pairs where Hugging Face rotates the first half of a head with the second.
    """
    paired = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """The reverse of `deinterleave`."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def _dtype(tensor: Any) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if tensor.tensor_type.name == "BF16" else np.dtype(np.float32)
