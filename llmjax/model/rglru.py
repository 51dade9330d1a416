"""Griffin's recurrent block around the Real-Gated Linear Recurrent Unit (De et al. 2024, arXiv 2402.19427).

Letters: `R` the block's inner width, `W` the taps of the convolution, `H` and `K` the gates' blocks and their size.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.model.convolution import ShortConvolution
from llmjax.model.layers import ACTIVATIONS, Linear, constrain, dtype_of
from llmjax.model.per_device import platform

SHARPNESS = 8.0  # the paper's c: a = (decay at rest) ** (c r)


def width(c: ConfigDict) -> int:
    """R, the size of the state and of both branches."""
    return c.recurrent.width or c.width


def init_state(c: ConfigDict, batch: int) -> dict[str, jax.Array]:
    """The state before the first token: hidden (B, R) float32 and the convolution's window (B, W - 1, R)."""
    window = (batch, c.recurrent.conv_width - 1, width(c))
    return {
        "hidden": jnp.zeros((batch, width(c)), jnp.float32),
        "conv": jnp.zeros(window, dtype_of(c.dtype)),
    }


def sequential(a_BLR: jax.Array, b_BLR: jax.Array, start_BR: jax.Array) -> jax.Array:
    """h_t = a_t h_{t-1} + b_t, one token after another: the readable form, and the fastest on CPU."""

    def step(h_BR: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a_BR, b_BR = token
        h_BR = a_BR * h_BR + b_BR
        return h_BR, h_BR

    return jax.lax.scan(step, start_BR, (a_BLR.swapaxes(0, 1), b_BLR.swapaxes(0, 1)))[1].swapaxes(0, 1)


def associative(a_BLR: jax.Array, b_BLR: jax.Array, start_BR: jax.Array) -> jax.Array:
    """The same as a tree of depth log2(L) (Blelloch 1990), for devices on which L steps are L kernels."""

    def join(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    b_BLR = b_BLR.at[:, 0].add(a_BLR[:, 0] * start_BR)
    return jax.lax.associative_scan(join, (a_BLR, b_BLR), axis=1)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_recurrence(a_BLR: jax.Array, b_BLR: jax.Array, start_BR: jax.Array, form: str = "auto") -> jax.Array:
    """h_BLR of h_t = a_t h_{t-1} + b_t with h_0 = start. Its derivative is such a recurrence too, from end to start.

    Args:
        a_BLR, b_BLR, start_BR: float32.
        form: sequential, associative, or auto: by the platform.
    """
    if form == "auto":
        form = "sequential" if platform() == "cpu" else "associative"
    return (sequential if form == "sequential" else associative)(a_BLR, b_BLR, start_BR)


def _recurrence_forward(a_BLR, b_BLR, start_BR, form):  # type: ignore[no-untyped-def]
    h_BLR = linear_recurrence(a_BLR, b_BLR, start_BR, form)
    return h_BLR, (a_BLR, h_BLR, start_BR)


def _recurrence_backward(form, saved, dy_BLR):  # type: ignore[no-untyped-def]
    a_BLR, h_BLR, start_BR = saved
    following = jnp.roll(a_BLR, -1, axis=1)  # dh_t = dy_t + a_{t+1} dh_{t+1}; the wrapped a_1 is multiplied by zero
    dh_BLR = linear_recurrence(following[:, ::-1], dy_BLR[:, ::-1], jnp.zeros_like(start_BR), form)[:, ::-1]
    before = jnp.concatenate([start_BR[:, None], h_BLR[:, :-1]], 1)
    return dh_BLR * before, dh_BLR, a_BLR[:, 0] * dh_BLR[:, 0]


linear_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


class BlockDiagonal(nn.Module):
    """A linear map in H independent blocks: kernel (H, K, K), bias (H, K). x_BLR -> y_BLR float32, R = H K."""

    c: ConfigDict

    @nn.compact
    def __call__(self, x_BLR: jax.Array) -> jax.Array:
        c, dtype = self.c, dtype_of(self.c.dtype)
        heads = c.recurrent.heads or c.heads
        size = x_BLR.shape[-1] // heads
        # LeCun's normal whatever model.init says, as in the paper: the gates must not start saturated.
        start = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=0)
        kernel_HKK = self.param("kernel", start, (heads, size, size), dtype_of(c.param_dtype))
        bias_HK = self.param("bias", nn.initializers.zeros, (heads, size), dtype_of(c.param_dtype))
        # Blocks first: one batch of matrix products.
        rows = x_BLR.astype(dtype).reshape(-1, heads, size).swapaxes(0, 1)
        y = jnp.matmul(rows, kernel_HKK.astype(dtype), preferred_element_type=jnp.float32)
        return (y.swapaxes(0, 1) + bias_HK.astype(jnp.float32)[None]).reshape(x_BLR.shape)


def _lambda_start(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Lambda with which a^c = exp(-c softplus(Lambda)) is uniform in [0.9, 0.999] (section 2.4 of the paper)."""
    decay = jax.random.uniform(key, shape, jnp.float32, 0.9, 0.999)
    return jnp.log(jnp.expm1(-jnp.log(decay) / SHARPNESS))


class RGLRU(nn.Module):
    """Griffin's recurrent block: out(gelu(gate branch) * RG-LRU(convolution(input branch))).

    The unit, with gates r, i = sigmoid(block-diagonal maps of x) and all of it in float32:
    a_t = exp(-8 softplus(Lambda) r_t), h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t; a document's first token has no past,
    so there h_t = i_t x_t. See `llmjax.model.recurrent` for the arguments.
    """

    c: ConfigDict

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, reset_BL: jax.Array, valid_BL: jax.Array, state: dict[str, jax.Array] | None
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        c, bias = self.c, "out" in self.c.bias
        # The tanh form, with which the published Griffin weights were trained.
        gate_BLR = ACTIVATIONS["gelu_tanh"](Linear(c, (width(c),), "inward", bias=bias, name="gate")(x_BLD))
        x_BLR = constrain(Linear(c, (width(c),), "inward", bias=bias, name="input")(x_BLD), "BLR")
        window = None if state is None else state["conv"]
        x_BLR, window = ShortConvolution(c, name="conv")(x_BLR, reset_BL, valid_BL, window)

        recurrence_BLR = jax.nn.sigmoid(BlockDiagonal(c, name="recurrence_gate")(x_BLR))
        input_BLR = jax.nn.sigmoid(BlockDiagonal(c, name="input_gate")(x_BLR))
        # float32 whatever param_dtype says: decays next to 1 differ in digits that bfloat16 does not have.
        lambda_R = self.param("Lambda", _lambda_start, (width(c),))
        log_a_BLR = -SHARPNESS * jax.nn.softplus(lambda_R)[None, None] * recurrence_BLR
        # 1 - a^2 without cancellation, and away from zero, where the root's slope is infinite.
        scale_BLR = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a_BLR), 1e-12))
        reset, valid = reset_BL[:, :, None], valid_BL[:, :, None]
        b_BLR = jnp.where(reset, 1.0, scale_BLR) * input_BLR * x_BLR.astype(jnp.float32)
        a_BLR = jnp.where(reset, 0.0, jnp.exp(log_a_BLR))
        a_BLR, b_BLR = jnp.where(valid, a_BLR, 1.0), jnp.where(valid, b_BLR, 0.0)
        start_BR = jnp.zeros_like(a_BLR[:, 0]) if state is None else state["hidden"]
        h_BLR = constrain(linear_recurrence(a_BLR, b_BLR, start_BR), "BLR")

        y_BLR = gate_BLR * h_BLR.astype(dtype_of(c.dtype))
        y_BLD = Linear(c, (c.width,), "outward", bias=bias, name="out")(y_BLR)
        return y_BLD, None if state is None or window is None else {"hidden": h_BLR[:, -1], "conv": window}
