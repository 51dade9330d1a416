"""The small parts of a block: linear maps, norms, the MLP and rotary positions."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.model import kernels
from llmjax.model.init import initializer

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": kernels.gelu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(nn.relu(x)),  # So et al. 2021, Primer
    "swiglu": nn.silu,  # Shazeer 2020: the gate's activation
    "geglu": kernels.gelu,
}
GATED = ("swiglu", "geglu")


def label(x: jax.Array, dimensions: str) -> jax.Array:
    """Name the dimensions of an activation by the letters of the legend; parallel/placement.py maps letters to axes."""
    return nn.with_logical_constraint(x, tuple(dimensions))


def dtype_of(name: str) -> Any:
    """The jax type for float32 or bfloat16."""
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


class Linear(nn.Module):
    """A linear map from the last dimensions of the input to `features`: kernel (*inputs, *features), optional bias.

    Input (..., *inputs) -> output (..., *features), in the compute type of `c`.
    """

    c: ConfigDict
    features: tuple[int, ...]
    kind: str  # inward, outward or head: the row of the initialisation table
    inputs: int = 1  # how many trailing dimensions of the input are summed over
    bias: bool | None = None  # None: as `c` says

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = dtype_of(self.c.dtype)
        shape = (*x.shape[x.ndim - self.inputs :], *self.features)
        kernel = self.param(
            "kernel", initializer(self.c, self.kind, inputs=self.inputs), shape, dtype_of(self.c.param_dtype)
        )
        # A product of two matrices: with more dimensions XLA on CPU copies a transposed cotangent for the kernel's gradient.
        batch = x.shape[: x.ndim - self.inputs]
        rows = x.astype(dtype).reshape(math.prod(batch), -1)
        y = (rows @ kernel.astype(dtype).reshape(rows.shape[1], -1)).reshape(*batch, *self.features)
        if self.c.bias if self.bias is None else self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, dtype_of(self.c.param_dtype))
            y = y + jnp.expand_dims(bias.astype(dtype), range(y.ndim - bias.ndim))
        return y


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last dimension, computed in float32."""

    c: ConfigDict
    kind: str = ""  # rms or layer; empty: as `c` says

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = self.kind or self.c.norm
        dtype = dtype_of(self.c.param_dtype)
        scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:], dtype).astype(jnp.float32)
        bias_D = None
        if kind == "layer" and self.c.bias:
            bias_D = self.param("bias", nn.initializers.zeros, x.shape[-1:], dtype).astype(jnp.float32)
        y = kernels.norm(x.astype(jnp.float32), scale_D, bias_D, self.c.norm_epsilon, kind == "layer")
        return y.astype(dtype_of(self.c.dtype))


def mlp_width(c: ConfigDict) -> int:
    """F: as set, or 4 D, or for gated activations the multiple of 64 at or above 8/3 D (the same count of parameters)."""
    if c.mlp_width:
        return c.mlp_width
    return -(-8 * c.width // 3 // 64) * 64 if c.activation in GATED else 4 * c.width


class MLP(nn.Module):
    """The feed-forward branch: up, activation (times a gate's), down. x_BLD -> y_BLD."""

    c: ConfigDict

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.c.activation]
        h_BLF = Linear(self.c, (mlp_width(self.c),), "inward", name="up")(x_BLD)
        if self.c.activation in GATED:
            h_BLF = h_BLF * activation(Linear(self.c, (mlp_width(self.c),), "inward", name="gate")(x_BLD))
        else:
            h_BLF = activation(h_BLF)
        h_BLF = label(h_BLF, "BLF")
        return Linear(self.c, (self.c.width,), "outward", name="down")(h_BLF)


def rotary_table(positions_BL: jax.Array, *, size: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each (B, L, 1, K/2) float32, of the angles of rotary positions (Su et al. 2021)."""
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHK: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the pairs (k, k + K/2) of every head by their position's angles; the layout of Llama in Hugging Face."""
    cos, sin = table
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHK.dtype)
