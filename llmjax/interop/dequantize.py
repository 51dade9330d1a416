"""Published weights in fewer bits: the tensors that they stand for, computed one at a time when they are read.

| quantization_config | stored | stands for |
|---|---|---|
| mxfp4 (gpt-oss) | X_blocks: two numbers of 4 bits a byte, X_scales: exponents of blocks of 32 | X in bfloat16, exactly |
| fp8 (DeepSeek-V3, Qwen3), fbgemm_fp8, compressed-tensors, modelopt | X.weight in float8, X.weight_scale(_inv) | their product in float32 |

A scale belongs to the whole matrix, to each of its outputs, or to blocks of it. Other forms are refused by name. Scales of
activations and of the cache are left out: they say how others compute, not what the model is.
"""

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llmjax.errors import UserError
from llmjax.interop.fields import mapping
from llmjax.interop.tensors import Source, Tensor

FLOAT8 = tuple(np.dtype(name) for name in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
METHODS = ("mxfp4", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
SCALES = ("_scale_inv", "_scale")  # behind the name of a float8 tensor
IGNORED = (".input_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale", ".q_scale", ".output_scale")
# The numbers of 4 bits, one of sign, two of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
FP4 = np.concatenate([FP4, -FP4])
E8M0_BIAS = 127


def dequantized(theirs: Mapping[str, Any], weights: Source) -> tuple[dict[str, Any], Source]:
    """config.json without its quantization_config, and the tensors without their scales.

    Raises UserError for a form that is not known, naming it.
    """
    said = mapping(theirs, "quantization_config")
    rest = {name: value for name, value in theirs.items() if name != "quantization_config"}
    if not said:
        return rest, weights
    method = str(said.get("quant_method"))
    if method not in METHODS:
        raise UserError(
            f"config.json has a quantization_config with quant_method={method!r}; supported are {', '.join(METHODS)}, and "
            "weights that are not quantized: get the model in one of these forms"
        )
    if method == "mxfp4":
        return rest, Mxfp4(weights)
    return rest, Float8(weights, _block_size(said, method))


def _block_size(said: Mapping[str, Any], method: str) -> tuple[int, int] | None:
    """Outputs and inputs of a block that has a scale; None: a scale belongs to the whole matrix or to an output.

    Raises UserError for what is no float8.
    """
    size = said.get("weight_block_size")
    if method == "fp8" and (kind := said.get("fmt", "e4m3")) not in ("e4m3", "e5m2"):
        raise UserError(f"config.json has a quantization_config with fmt={kind!r}; supported: 'e4m3', 'e5m2'")
    if method == "modelopt" and (kind := said.get("quant_algo")) != "FP8":
        raise UserError(f"config.json has a quantization_config with quant_algo={kind!r}; supported: 'FP8'")
    if method == "compressed-tensors":
        if (kind := mapping(said, "sparsity_config").get("format", "dense")) != "dense":
            raise UserError(
                f"config.json has a quantization_config with sparsity of format={kind!r}; supported: 'dense'"
            )
        sizes = set()
        groups = mapping(said, "config_groups")
        for name in groups:
            form = mapping(mapping(groups, name), "weights")
            kind, bits = form.get("type"), form.get("num_bits")
            if (kind, bits) != ("float", 8) or not form.get("symmetric", True):
                raise UserError(
                    f"config.json has a quantization_config whose {name} has weights of type={kind!r}, num_bits={bits}, "
                    f"symmetric={form.get('symmetric', True)}; supported: symmetric 'float' of 8 bits"
                )
            block = form.get("block_structure")
            sizes.add(tuple(block) if form.get("strategy") == "block" and block else None)
        if len(sizes) > 1:
            raise UserError(
                "config.json has a quantization_config whose groups have blocks of several sizes; supported: one"
            )
        size = next(iter(sizes), None)
    if size is None:
        return None
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise UserError(f"config.json has a quantization_config with blocks of {size!r}; supported: two whole numbers")
    return size[0], size[1]


class Float8:
    """A `tensors.Source` of matrices that are stored in float8, with a scale for each block."""

    def __init__(self, weights: Source, block: tuple[int, int] | None) -> None:
        self._weights, self._scales = weights, {}
        known = weights.tensors
        for name, tensor in known.items():
            scale = next((name + end for end in SCALES if name + end in known), None)
            if scale is not None and tensor.dtype in FLOAT8:
                self._scales[name] = scale, _blocks(name, tensor, known[scale], block)
        used = {scale for scale, _ in self._scales.values()}
        self.tensors = {
            name: Tensor(np.dtype(np.float32), tensor.shape) if name in self._scales else tensor
            for name, tensor in known.items()
            if name not in used and not name.endswith(IGNORED)
        }

    def read(self, name: str) -> np.ndarray:
        array = self._weights.read(name)
        if name not in self._scales:
            return array
        scale, (rows, columns) = self._scales[name]
        factors = self._weights.read(scale).astype(np.float32).reshape(-1, math.ceil(array.shape[1] / columns))
        made = array.astype(np.float32)
        for i, row in enumerate(np.repeat(factors, columns, axis=1)[:, : array.shape[1]]):
            made[i * rows : (i + 1) * rows] *= row
        return made


def _blocks(name: str, tensor: Tensor, scale: Tensor, block: tuple[int, int] | None) -> tuple[int, int]:
    """Outputs and inputs that share a scale. UserError if the scale's shape says neither."""
    if len(tensor.shape) == 2:
        outputs, inputs = tensor.shape
        if math.prod(scale.shape) == 1:
            return outputs, inputs
        if scale.shape in ((outputs,), (outputs, 1)):
            return 1, inputs
        if block and scale.shape == (math.ceil(outputs / block[0]), math.ceil(inputs / block[1])):
            return block
    raise UserError(
        f"the scales of {name} {tensor.shape} are {scale.shape}; supported: one for all, one for each output, or one for "
        f"each block of {block or 'the size that quantization_config says'}"
    )


class Mxfp4:
    """A `tensors.Source` of stacks of matrices that are stored in MXFP4, (E, outputs, inputs), and read transposed."""

    def __init__(self, weights: Source) -> None:
        self._weights = weights
        self.tensors = dict(weights.tensors)
        for name in [n for n in self.tensors if n.endswith("_blocks")]:
            whole = name.removesuffix("_blocks")
            blocks, scales = self.tensors.pop(name), self.tensors.pop(f"{whole}_scales", None)
            if (
                blocks.dtype != np.uint8
                or scales != Tensor(np.dtype(np.uint8), blocks.shape[:-1])
                or len(blocks.shape) != 4
            ):
                raise UserError(
                    f"{name} is {blocks.dtype} {blocks.shape} with scales of {scales and scales.shape}; in MXFP4 both are "
                    "uint8, (experts, outputs, blocks, bytes) and without the last: get the file again"
                )
            experts, outputs, count, size = blocks.shape
            self.tensors[whole] = Tensor(np.dtype(ml_dtypes.bfloat16), (experts, 2 * count * size, outputs))

    def read(self, name: str) -> np.ndarray:
        if name in self._weights.tensors:
            return self._weights.read(name)
        blocks, scales = self._weights.read(f"{name}_blocks"), self._weights.read(f"{name}_scales")
        made = np.empty(self.tensors[name].shape, ml_dtypes.bfloat16)
        for expert, (codes, exponents) in enumerate(zip(blocks, scales, strict=True)):
            made[expert] = mxfp4(codes, exponents).T
        return made


def mxfp4(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """(..., blocks, bytes) uint8 and (..., blocks) uint8 -> (..., inputs) bfloat16, without rounding.

    The low four bits of a byte come first.
    """
    numbers = FP4[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(*codes.shape[:-1], -1)
    scaled = np.ldexp(numbers, exponents.astype(np.int32)[..., None] - E8M0_BIAS)
    return scaled.astype(ml_dtypes.bfloat16).reshape(*codes.shape[:-2], -1)
