"""The Mamba-2 mixer: a state space layer computed by state space duality (Dao & Gu 2024, arXiv 2405.21060).

Letters: `R` the inner width, `H` heads of size `K`, `G` groups of heads that share B and C, `J` the state's size for each
channel, `W` the taps of the convolutions; in the chunked form `U` chunks of `P` places, of which `q` is an earlier one.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.model.convolution import ShortConvolution
from llmjax.model.layers import Linear, constrain, dtype_of


def width(c: ConfigDict) -> int:
    """R, the width of the values and of the gate."""
    return c.recurrent.width or 2 * c.width


def heads(c: ConfigDict) -> int:
    """H; each head has one decay and R / H channels."""
    return c.recurrent.heads or c.heads


def init_state(c: ConfigDict, batch: int) -> dict[str, jax.Array]:
    """The state before the first token: (B, H, K, J) float32, and the windows of the two convolutions."""
    r, taps, dtype = c.recurrent, c.recurrent.conv_width - 1, dtype_of(c.dtype)
    return {
        "state": jnp.zeros((batch, heads(c), width(c) // heads(c), r.state_size), jnp.float32),
        "conv": jnp.zeros((batch, taps, width(c)), dtype),
        "state_conv": jnp.zeros((batch, taps, 2 * r.groups * r.state_size), dtype),
    }


def state_space(
    x_BLHK: jax.Array,
    dt_BLH: jax.Array,
    log_a_BLH: jax.Array,
    b_BLGJ: jax.Array,
    c_BLGJ: jax.Array,
    reset_BL: jax.Array,
    start_BHKJ: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """y_t = S_t c_t with S_t = exp(log_a_t) S_{t-1} + dt_t x_t b_t', and S = 0 before a reset: (y_BLHK, S after the last).

    Inside a chunk this is attention with decays for weights, a few matrix products; between chunks only the states
    are passed on, one after another (section 6 of the paper). Work and memory are linear in L.

    Args:
        x_BLHK, b_BLGJ, c_BLGJ: values, and the vectors that write to and read from the state; in the type of the products.
        dt_BLH, log_a_BLH: float32, steps and logarithms of decays; both 0 at tokens that must change nothing.
        reset_BL: bool, true where the state is emptied first.
        start_BHKJ: float32, the state before the first token.
        chunk: P; any L will do.

    Returns:
        y_BLHK and the state, both float32.
    """
    B, L, H, K = x_BLHK.shape
    (G, J), dtype = b_BLGJ.shape[2:], x_BLHK.dtype
    P = min(chunk, L)
    U = -(-L // P)

    def chunks(t: jax.Array, *dimensions: int) -> jax.Array:
        """(B, L, ...) -> (BU, P, *dimensions), the last chunk padded with zeros, which change nothing."""
        return jnp.pad(t, ((0, 0), (0, U * P - L), *((0, 0),) * (t.ndim - 2))).reshape(B * U, P, *dimensions)

    # Heads before places: every product below is then a plain batch of matrices. Rows and chunks are one dimension (n),
    # because XLA on CPU may crash in sums over arrays of seven dimensions (github.com/jax-ml/jax/issues/39257).
    dt = chunks(dt_BLH, G, H // G).transpose(0, 2, 3, 1)  # n g h p
    log_a = chunks(log_a_BLH, G, H // G).transpose(0, 2, 3, 1)
    b, c = (chunks(t, G, J).transpose(0, 2, 1, 3) for t in (b_BLGJ, c_BLGJ))  # n g p j
    x = chunks(x_BLHK, G, H // G, K).transpose(0, 2, 3, 1, 4)  # n g h p k
    x = (x * dt[..., None]).astype(dtype)
    resets = jnp.cumsum(chunks(reset_BL), -1)[:, None, None]  # n 1 1 p

    # Within a chunk: token p reads what token q wrote, decayed by the tokens between. The sums run over the tokens between:
    # differences of sums from the start would keep the rounding of an earlier document.
    earlier = jnp.tril(jnp.ones((1, 1, 1, P, P), bool), -1)
    seen = jnp.tril(jnp.ones((1, 1, 1, P, P), bool)) & (resets[..., :, None] == resets[..., None, :])
    between = jnp.cumsum(jnp.where(earlier, log_a[..., :, None], 0.0), -2)
    decay = jnp.exp(jnp.where(seen, between, -jnp.inf))
    scores = jnp.einsum("ngpj,ngqj->ngpq", c, b, preferred_element_type=jnp.float32)
    weights = (scores[:, :, None] * decay).astype(dtype)
    y = jnp.einsum("nghpq,nghqk->nghpk", weights, x, preferred_element_type=jnp.float32)

    # Between chunks: what each adds to the state, and the share of the earlier state that remains after it.
    written = (x * decay[..., -1, :, None]).astype(dtype)
    added = jnp.einsum("nghpk,ngpj->nghkj", written, b, preferred_element_type=jnp.float32)
    from_start = jnp.where(resets == 0, jnp.exp(jnp.cumsum(log_a, -1)), 0.0)

    def pass_on(state: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, added = chunk
        return kept[:, :, None, None] * state + added, state

    kept = from_start[..., -1].reshape(B, U, H).swapaxes(0, 1)
    state_BHKJ, starts = jax.lax.scan(pass_on, start_BHKJ, (kept, added.reshape(B, U, H, K, J).swapaxes(0, 1)))
    starts = starts.swapaxes(0, 1).reshape(B * U, G, H // G, K, J).astype(dtype)
    y = y + from_start[..., None] * jnp.einsum("ngpj,nghkj->nghpk", c, starts, preferred_element_type=jnp.float32)
    return y.transpose(0, 3, 1, 2, 4).reshape(B, U * P, H, K)[:, :L], state_BHKJ


class GatedNorm(nn.Module):
    """RMSNorm of y silu(z) in groups of channels, float32; the norm before Mamba-2's output projection."""

    c: ConfigDict

    @nn.compact
    def __call__(self, y_BLR: jax.Array, z_BLR: jax.Array) -> jax.Array:
        scale_R = self.param("scale", nn.initializers.ones, y_BLR.shape[-1:], dtype_of(self.c.param_dtype))
        y_BLR = y_BLR * jax.nn.silu(z_BLR.astype(jnp.float32))
        parts = y_BLR.reshape(*y_BLR.shape[:2], self.c.recurrent.groups, -1)
        parts = parts * jax.lax.rsqrt(jnp.mean(jnp.square(parts), -1, keepdims=True) + self.c.norm_epsilon)
        y_BLR = parts.reshape(y_BLR.shape) * scale_R.astype(jnp.float32)[None, None]
        return y_BLR.astype(dtype_of(self.c.dtype))


def _dt_bias_start(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse softplus of steps that are log-uniform in [0.001, 0.1]."""
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1)))
    return dt + jnp.log(-jnp.expm1(-dt))


def _a_log_start(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, 16.0))


class Mamba2(nn.Module):
    """out(norm(SSM(x, B, C, dt) silu(z))), where z, x, B, C and dt are linear in the input, all read at once.

    x, B and C pass a short convolution and silu; decays are exp(-exp(A_log) dt), one per head. The published model
    has one matrix for the five projections; here each is its own, so that heads divide over devices (the paper's
    section 8.1). See `llmjax.model.recurrent` for the arguments.
    """

    c: ConfigDict

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, reset_BL: jax.Array, valid_BL: jax.Array, state: dict[str, jax.Array] | None
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        c, H, groups, size = self.c, heads(self.c), self.c.recurrent.groups, self.c.recurrent.state_size
        B, L = x_BLD.shape[:2]
        bias = "out" in c.bias
        z_BLR = Linear(c, (width(c),), "inward", bias=bias, name="gate")(x_BLD)
        x_BLR = constrain(Linear(c, (width(c),), "inward", bias=bias, name="input")(x_BLD), "BLR")
        bc = Linear(c, (2 * groups * size,), "inward", bias=bias, name="state")(x_BLD)
        dt_BLH = Linear(c, (H,), "inward", name="dt")(x_BLD)

        before = init_state(c, B) if state is None else state
        windows = (None, None) if state is None else (before["conv"], before["state_conv"])
        x_BLR, conv = ShortConvolution(c, name="conv")(x_BLR, reset_BL, valid_BL, windows[0])
        bc, state_conv = ShortConvolution(c, name="state_conv")(bc, reset_BL, valid_BL, windows[1])
        x_BLHK = constrain(jax.nn.silu(x_BLR).reshape(B, L, H, -1), "BLHK")
        b_BLGJ, c_BLGJ = jnp.moveaxis(jax.nn.silu(bc).reshape(B, L, 2, groups, size), 2, 0)

        # These three are float32 whatever param_dtype says: decays near 1 differ in digits that bfloat16 does not have.
        a_log_H = self.param("A_log", _a_log_start, (H,))
        dt_bias_H = self.param("dt_bias", _dt_bias_start, (H,))
        skip_H = self.param("D", nn.initializers.ones, (H,), jnp.float32)
        dt_BLH = jax.nn.softplus(dt_BLH.astype(jnp.float32) + dt_bias_H[None, None])
        dt_BLH = jnp.where(valid_BL[:, :, None], dt_BLH, 0.0)
        y_BLHK, new = state_space(
            x_BLHK,
            dt_BLH,
            -jnp.exp(a_log_H)[None, None] * dt_BLH,
            b_BLGJ,
            c_BLGJ,
            reset_BL & valid_BL,
            before["state"],
            chunk=c.recurrent.chunk,
        )
        y_BLHK = y_BLHK + skip_H[None, None, :, None] * x_BLHK.astype(jnp.float32)
        y_BLR = GatedNorm(c, name="norm")(constrain(y_BLHK.reshape(B, L, -1), "BLR"), z_BLR)
        y_BLD = Linear(c, (c.width,), "outward", bias=bias, name="out")(y_BLR)
        if conv is None or state_conv is None:
            return y_BLD, None
        return y_BLD, {"state": new, "conv": conv, "state_conv": state_conv}
