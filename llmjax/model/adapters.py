"""Adapters of linear maps: LoRA (Hu et al. 2022), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024).

Beside a frozen kernel W stand a matrix A from the inputs to a few numbers, and a matrix B from those to the outputs, both
float32. With the scale s = alpha / rank, or alpha / sqrt(rank) for rsLoRA:

    lora   y = x W + s (x A) B
    dora   y = (x W + s (x A) B) * magnitude / |W + s A B|, where |.| is the norm over the inputs of each output

B starts at 0 and the magnitude at |W|, so a model with new adapters computes what it did. No gradient flows through the
norm, as in section 4.3 of Liu et al. A and B read and write all inputs and all outputs as one dimension each.

A linear map has an adapter if its parameters have one (`model.adapter.targets` says so when they are made). So the same
module computes with adapters, and without them when they are left out or merged.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from llmjax import config
from llmjax.errors import UserError
from llmjax.model import blockwise

ARRAYS = ("lora_a", "lora_b", "magnitude")
ADAPTER = re.compile(rf"(^|/)({'|'.join(ARRAYS)})$")
OTHER_SETTINGS = ("dropout",)  # those that change neither the arrays nor what they mean


def scale_of(adapter: ConfigDict) -> float:
    """s of the settings `model.adapter`."""
    return float(adapter.alpha / (math.sqrt(adapter.rank) if adapter.scale == "root" else adapter.rank))


def is_adapter(path: str) -> bool:
    """Whether the parameter of this path is one of an adapter."""
    return ADAPTER.search(path) is not None


def targeted(adapter: ConfigDict, path: str) -> bool:
    """Whether the linear map of this path has an adapter."""
    return adapter.kind != "none" and any(re.search(pattern, path) for pattern in adapter.targets)


def plain(model: ConfigDict) -> ConfigDict:
    """The settings of a model without adapters, whose kernels are as they are stored."""
    c = ConfigDict(model.to_dict())
    c.adapter.update(config.base().model.adapter.to_dict())
    return c


def same_arrays(one: ConfigDict, other: ConfigDict) -> bool:
    """Whether two settings `model.adapter` have the same arrays, which mean the same."""
    if one.kind == other.kind == "none":
        return True
    first, second = one.to_dict(), other.to_dict()
    return all(first[name] == second[name] for name in first if name not in OTHER_SETTINGS)


# ------------------------------------------------------------------ in a linear map


def adapted(module: nn.Module, rows_RI: jax.Array, y_RO: jax.Array, matrix: Callable[[], jax.Array]) -> jax.Array:
    """What a linear map returns for rows of inputs, before its bias: y_RO with what its adapter adds, if it has one.

    Args:
        module: the linear map, with the settings `c`; its path says whether it gets an adapter.
        y_RO: the rows times the kernel.
        matrix: makes the kernel, (inputs, outputs).
    """
    c = module.c.adapter
    making = module.is_initializing()
    if not (targeted(c, "/".join(module.path)) if making else module.has_variable("params", "lora_a")):
        return y_RO
    I, O = rows_RI.shape[1], y_RO.shape[1]  # noqa: E741
    if making:
        a_IR = module.param("lora_a", _uniform, (I, c.rank), jnp.float32)
        b_RO = module.param("lora_b", nn.initializers.zeros, (c.rank, O), jnp.float32)
    else:
        a_IR, b_RO = (module.get_variable("params", name) for name in ("lora_a", "lora_b"))
    x_RI = rows_RI
    if c.dropout and module.has_rng("dropout"):
        keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - c.dropout, x_RI.shape)
        x_RI = jnp.where(keep, x_RI / (1.0 - c.dropout), 0.0).astype(rows_RI.dtype)
    y_RO = y_RO + added(x_RI, a_IR, b_RO, scale_of(c))
    if making and c.kind == "dora":
        module.param("magnitude", lambda _, shape: _norm(matrix()), (O,))
    if module.has_variable("params", "magnitude"):
        magnitude_O: jax.Array = module.get_variable("params", "magnitude")
        y_RO = y_RO * gain(matrix(), a_IR, b_RO, magnitude_O, scale_of(c)).astype(y_RO.dtype)[None]
    return y_RO


def added(rows: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """s (x A) B, in the type of the rows: the small product first, and the scale where the numbers are few."""
    inner = (rows @ a.astype(rows.dtype)) * jnp.asarray(scale, rows.dtype)
    return inner @ b.astype(rows.dtype)


def gain(matrix: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array, scale: float) -> jax.Array:
    """DoRA's factor of each output: float32."""
    return magnitude / jax.lax.stop_gradient(_norm(matrix.astype(jnp.float32) + scale * (a @ b)))


def _norm(matrix: jax.Array) -> jax.Array:
    """The norm of each output's inputs."""
    return jnp.sqrt(jnp.sum(jnp.square(matrix.astype(jnp.float32)), axis=-2))


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform in +-1/sqrt(inputs), as `peft` starts A."""
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / math.sqrt(shape[0])


# ------------------------------------------------------------------ in a tree of parameters


def linear_maps(params: Any) -> dict[str, dict[str, Any]]:
    """path -> parameters of every linear map that has an adapter."""
    flat = traverse_util.flatten_dict(params, sep="/")
    paths = [name.rpartition("/")[0] for name in flat if name.endswith("/lora_a")]
    return {path: {n.rpartition("/")[2]: x for n, x in flat.items() if n.rpartition("/")[0] == path} for path in paths}


def kernel_of(path: str, own: Mapping[str, jax.Array]) -> jax.Array:
    """The kernel of a linear map, dequantized if it is in few bits."""
    if "kernel" in own:
        return own["kernel"]
    codes = next(own[name] for name in blockwise.CODES.values() if name in own)
    return blockwise.dequantize(codes, own[blockwise.SCALE], blockwise.axis_of(f"{path}/", codes.ndim))


def matrix_of(path: str, own: Mapping[str, jax.Array]) -> jax.Array:
    """The kernel as (..., inputs, outputs), with layers in front where they are stacked."""
    inputs, outputs = own["lora_a"].shape[-2], own["lora_b"].shape[-1]
    kernel = kernel_of(path, own)
    return kernel.reshape(*own["lora_a"].shape[:-2], inputs, outputs)


def norms(path: str, own: Mapping[str, jax.Array], *, shape: tuple[int, ...]) -> jax.Array:
    """The norms of the outputs of a linear map's kernel, of the shape (..., outputs): the magnitudes of a new adapter."""
    return _norm(kernel_of(path, own).reshape(*shape[:-1], -1, shape[-1]))


def merged_kernel(adapter: ConfigDict, path: str, own: Mapping[str, jax.Array]) -> jax.Array:
    """The kernel that computes what a linear map computes with its adapter: float32, of the kernel's shape."""
    matrix, s = matrix_of(path, own).astype(jnp.float32), scale_of(adapter)
    new = matrix + s * (own["lora_a"] @ own["lora_b"])
    if "magnitude" in own:
        new = new * (own["magnitude"] / _norm(new))[..., None, :]
    return new.reshape(kernel_of(path, own).shape)


def merged(adapter: ConfigDict, params: Any) -> Any:
    """The parameters of the model without adapters that computes the same, of `plain` settings.

    Kernels with adapters become float32; those in few bits become what they stand for, in float32.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    made = {path: merged_kernel(adapter, path, own) for path, own in linear_maps(params).items()}
    found: dict[str, Any] = {}
    for name, leaf in flat.items():
        path, _, last = name.rpartition("/")
        if is_adapter(name) or last == blockwise.SCALE:
            continue
        if last in ("kernel", *blockwise.CODES.values()):
            own = {last: leaf, blockwise.SCALE: flat.get(f"{path}/{blockwise.SCALE}")}
            found[f"{path}/kernel"] = made[path] if path in made else kernel_of(path, own)
        else:
            found[name] = leaf
    return traverse_util.unflatten_dict(found, sep="/")


def check_targets(model: ConfigDict, paths: Mapping[str, Any]) -> None:
    """Raise UserError for a pattern of `model.adapter.targets` that gives no linear map an adapter.

    Args:
        paths: the parameters of a model with these settings.
    """
    have = [path.rpartition("/")[0] for path in paths if path.endswith("/lora_a")]
    for pattern in model.adapter.targets if model.adapter.kind != "none" else ():
        if re.search(pattern, "head") and model.tie_embeddings:
            raise UserError(
                f"model.adapter.targets has {pattern!r}, which is in the path of the head, and the head is the embedding "
                "itself: set model.tie_embeddings=False, with which the head gets a matrix of its own, or leave the head out"
            )
        if not any(re.search(pattern, path) for path in have):
            kernels = sorted({path.rpartition("/")[0] for path in paths if path.endswith("kernel")})
            raise UserError(
                f"model.adapter.targets has {pattern!r}, which is in the path of no linear map: paths are "
                f"{', '.join(kernels[:8])}, ... (experts and convolutions have no adapters)"
            )
