"""The small parts of a block: linear maps, norms, dropout and the MLP."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from llmjax.model import adapters, blockwise, kernels, kernels_quantized
from llmjax.model.init import initializer
from llmjax.model.observed import observe

CLAMP = 7.0  # the largest gate of swiglu_clamped


def quick_gelu(x: jax.Array) -> jax.Array:
    """GELU by a sigmoid (Hendrycks & Gimpel 2016, section 2)."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": kernels.gelu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),  # So et al. 2021, Primer
    "silu": nn.silu,
    "swiglu": nn.silu,  # Shazeer 2020: the gate's activation
    "swiglu_clamped": lambda gate: quick_gelu(jnp.minimum(gate, CLAMP)),  # gpt-oss, see `activated`
    "geglu": kernels.gelu,
    "geglu_tanh": functools.partial(nn.gelu, approximate=True),
    "reglu": nn.relu,
}
GATED = ("swiglu", "swiglu_clamped", "geglu", "geglu_tanh", "reglu")


def constrain(x: jax.Array, dimensions: str) -> jax.Array:
    """Constrain where an activation lives by the letters of its dimensions, which parallel/placement.py maps to axes."""
    return nn.with_logical_constraint(x, tuple(dimensions))


def dtype_of(name: str) -> Any:
    """The jax type for float32 or bfloat16."""
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def apart(c: ConfigDict, x: jax.Array) -> jax.Array:
    """`x`. With `model.barriers` XLA fuses nothing across it, in either pass.

    On TPU a fusion computes an activation, or its gradient, again for every block of a product that reads it.
    """
    return jax.lax.optimization_barrier(x) if c.barriers else x


class Linear(nn.Module):
    """A linear map from the last dimensions of the input to `features`: kernel (*inputs, *features), optional bias.

    Input (..., *inputs) -> output (..., *features), in the compute type of `c`. It may have an adapter (adapters.py), and
    then also a kernel in few bits (blockwise.py).
    """

    c: ConfigDict
    features: tuple[int, ...]
    kind: str  # inward, outward or head: the row of the initialisation table
    inputs: int = 1  # how many trailing dimensions of the input are summed over
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = dtype_of(self.c.dtype)
        shape = (*x.shape[x.ndim - self.inputs :], *self.features)
        # A product of two matrices: with more dimensions XLA on CPU copies the transposed cotangent for the kernel's gradient.
        batch = x.shape[: x.ndim - self.inputs]
        rows = apart(self.c, x.astype(dtype).reshape(math.prod(batch), -1))
        few_bits = self._few_bits(shape)
        if few_bits is not None:
            axis = self.inputs - 1 - len(shape)
            y = blockwise.product(rows, *few_bits, axis)
            y = adapters.adapted(
                self, rows, y, lambda: blockwise.dequantize(*few_bits, axis).reshape(rows.shape[1], -1)
            )
        else:
            start = initializer(self.c, self.kind, inputs=self.inputs, path="/".join(self.path))
            kernel = self.param("kernel", start, shape, dtype_of(self.c.param_dtype))
            matrix, low = kernel.astype(dtype).reshape(rows.shape[1], -1), self.c.quantization
            if low != "none" and self.kind != "head" and not self.is_initializing():
                y = kernels_quantized.product(rows, matrix, low)
            else:
                y = rows @ matrix
            y = adapters.adapted(self, rows, y, lambda: kernel.reshape(rows.shape[1], -1))
        y = y.reshape(*batch, *self.features)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, dtype_of(self.c.param_dtype))
            y = y + jnp.expand_dims(bias.astype(dtype), range(y.ndim - bias.ndim))
        return checkpoint_name(apart(self.c, y), self.name or self.kind)  # by which block.REMAT_POLICIES keep it

    def _few_bits(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array] | None:
        """The codes and scales of a kernel of this shape that is in few bits; None: it is not."""
        if not self.is_initializing():
            found = next((name for name in blockwise.CODES.values() if self.has_variable("params", name)), None)
            if found is None:
                return None
            return self.get_variable("params", found), self.get_variable("params", blockwise.SCALE)
        form = self.c.adapter.base_format
        if form == "stored" or self.kind == "head" or not blockwise.block_of(shape[self.inputs - 1]):
            return None
        kernel = jnp.zeros(shape)  # it comes from `train.init_from` always
        codes, scale = blockwise.quantize(kernel, form, self.inputs - 1 - len(shape))
        codes = self.param(blockwise.CODES[form], lambda _: codes)
        return codes, self.param(blockwise.SCALE, lambda _: scale)


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019), LayerNorm (Ba et al. 2016) or batch norm, in float32; "none" returns its input.

    Batch norm (Ioffe & Szegedy 2015) normalises every channel over the real tokens of the batch, in training by their
    statistics and otherwise by the running ones.
    """

    c: ConfigDict
    kind: str = ""  # rms, layer, batch or none; empty: as `c` says
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, valid_BL: jax.Array | None = None) -> jax.Array:
        kind = self.kind or self.c.norm
        if kind == "none":
            return x
        start = nn.initializers.zeros if self.c.norm_zero_centered else nn.initializers.ones
        scale_D = self._vector("scale", start, x) + (1.0 if self.c.norm_zero_centered else 0.0)
        bias_D = self._vector("bias", nn.initializers.zeros, x) if self._biased(kind) else None
        x = x.astype(jnp.float32)
        if kind == "batch":
            y = self._batch_norm(x, valid_BL, scale_D, bias_D)
        else:
            y = kernels.norm(x, scale_D, bias_D, self.c.norm_epsilon, kind == "layer")
        return y.astype(dtype_of(self.c.dtype))

    def _biased(self, kind: str) -> bool:
        return kind != "rms" and "norm" in self.c.bias

    def _vector(self, name: str, start: Any, x: jax.Array) -> jax.Array:
        return self.param(name, start, x.shape[-1:], dtype_of(self.c.param_dtype)).astype(jnp.float32)

    def _batch_norm(
        self, x_BLD: jax.Array, valid_BL: jax.Array | None, scale_D: jax.Array, bias_D: jax.Array | None
    ) -> jax.Array:
        # Float32 whatever param_dtype says: these are averages over many batches.
        mean_D = self.param("running_mean", nn.initializers.zeros, x_BLD.shape[-1:], jnp.float32)
        var_D = self.param("running_var", nn.initializers.ones, x_BLD.shape[-1:], jnp.float32)
        row = (1,) * (x_BLD.ndim - 1)
        if self.deterministic:
            mean, var = (jax.lax.stop_gradient(s).reshape(*row, -1) for s in (mean_D, var_D))
        else:
            weight = jnp.ones(x_BLD.shape[:-1]) if valid_BL is None else valid_BL.astype(jnp.float32)
            count, axes = jnp.maximum(jnp.sum(weight), 1.0), tuple(range(x_BLD.ndim - 1))
            mean = jnp.sum(x_BLD * weight[..., None], axes, keepdims=True) / count
            var = jnp.sum(jnp.square(x_BLD - mean) * weight[..., None], axes, keepdims=True) / count
            for running_D, seen in ((mean_D, mean), (var_D, var)):
                excess = jax.lax.stop_gradient(running_D - seen.reshape(-1))
                x_BLD = observe(x_BLD, running_D, excess)
        y = (x_BLD - mean) * jax.lax.rsqrt(var + self.c.norm_epsilon) * scale_D.reshape(*row, -1)
        return y if bias_D is None else y + bias_D.reshape(*row, -1)


def lookup(table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """The rows of a table for ids: (B, L, D), in the table's type; the table's gradient is added up in float32.

    A sum in bfloat16 stops growing at 256 times its terms, and a common token occurs thousands of times in a batch.
    """
    if table_VD.dtype == jnp.float32:
        return jnp.take(table_VD, ids_BL, axis=0)
    return _lookup(table_VD.shape[0], table_VD, ids_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(rows: int, table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
    return jnp.take(table_VD, ids_BL, axis=0)


def _lookup_backward(rows: int, ids_BL: jax.Array, dy_BLD: jax.Array) -> tuple[jax.Array, None]:
    zeros_VD = jnp.zeros((rows, dy_BLD.shape[-1]), jnp.float32)
    return zeros_VD.at[ids_BL].add(dy_BLD.astype(jnp.float32)).astype(dy_BLD.dtype), None


_lookup.defvjp(lambda rows, table_VD, ids_BL: (_lookup(rows, table_VD, ids_BL), ids_BL), _lookup_backward)


def drop(x: jax.Array, rate: float | jax.Array, key: jax.Array) -> jax.Array:
    """Dropout (Srivastava et al. 2014): each number is zero with this probability, the others are divided by 1 - rate."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def mlp_width(c: ConfigDict) -> int:
    """F: as set, or 4 D, or for gated activations the multiple of 64 at or above 8/3 D (the same count of parameters)."""
    if c.mlp_width:
        return c.mlp_width
    return -(-8 * c.width // 3 // 64) * 64 if c.activation in GATED else 4 * c.width


def activated(c: ConfigDict, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """What `down` reads: the activation of `up`, or with a gate `up` times the activation of `gate`.

    swiglu_clamped (gpt-oss, OpenAI 2025) also clips `up` to CLAMP on both sides and adds 1 to it.
    """
    if gate is None:
        return ACTIVATIONS[c.activation](up)
    if c.activation == "swiglu":
        return kernels.swiglu(up, gate)
    if c.activation == "swiglu_clamped":
        up = jnp.clip(up, -CLAMP, CLAMP) + 1.0
    return up * ACTIVATIONS[c.activation](gate)


class MLP(nn.Module):
    """The feed-forward branch: up, activation (times a gate's), down. x_BLD -> y_BLD."""

    c: ConfigDict
    width: int = 0  # F; 0: as `c` says

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c, bias = self.c, "mlp" in self.c.bias
        width = self.width or mlp_width(c)
        h_BLF = Linear(c, (width,), "inward", bias=bias, name="up")(x_BLD)
        gate_BLF = None
        if c.activation in GATED:
            gate_BLF = Linear(c, (width,), "inward", bias=bias, name="gate")(x_BLD)
        h_BLF = constrain(activated(c, h_BLF, gate_BLF), "BLF")
        return Linear(c, (c.width,), "outward", bias=bias, name="down")(h_BLF)
