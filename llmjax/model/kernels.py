"""Fast forms for CPU with hand-written derivatives, which XLA's CPU compiler does not find by itself.

Each is tested against a readable reference (attention.reference, the formulas in layers.py; tests/test_model.py). They are
plain jax.numpy, so they run, and are sharded, on any platform. They are used where they were measured to be faster
(benchmarks/nanogpt.py).
"""

import functools

import jax
import jax.numpy as jnp

from llmjax.model.per_device import heads_per_device

BLOCK = 64  # queries at a time: short enough to skip much of the upper triangle, long enough for products
SHORT = 512  # tokens; longer rows have blocks of an eighth of the row, at most so long: fewer copies of earlier keys
TILE = 128  # queries at a time where long rows are computed one by one: their scores stay in a core's cache


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked_attention(
    q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, mask_BLM: jax.Array, causal: bool
) -> jax.Array:
    """Attention over blocks of queries; with `causal`, a block computes nothing for the keys after its end.

    Softmax in float32, products in the inputs' type. The derivative reads the weights of the forward pass.

    Args:
        mask_BLM: true where a query may look; honoured exactly in every case.
        causal: a promise that L = M and that the mask is false above the diagonal.
    """
    if q_BLHK.shape[1] <= SHORT:
        return _attention_forward(q_BLHK, k_BMGK, v_BMGK, mask_BLM, causal)[0]
    return heads_per_device(functools.partial(_row_by_row, causal=causal), q_BLHK, k_BMGK, v_BMGK, mask_BLM)


def _row_by_row(
    q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, mask_BLM: jax.Array, *, causal: bool
) -> jax.Array:
    """The forward pass of long rows without a derivative, which would need all the weights."""
    causal &= q_BLHK.shape[1] == k_BMGK.shape[1]  # not where a device has some of the queries

    def attend(row: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, mask = (x[None] for x in row)
        return _attention_forward(q, k, v, mask, causal, TILE)[0][0]

    return jax.lax.map(attend, (q_BLHK, k_BMGK, v_BMGK, mask_BLM))


def _heads_first(x_BLHK: jax.Array, groups: int) -> jax.Array:
    """(B, L, H, K) -> (B, G, R, L, K), R = H/G queries for each key: in this layout every product is a plain batch."""
    B, L, H, K = x_BLHK.shape
    return x_BLHK.transpose(0, 2, 1, 3).reshape(B, groups, H // groups, L, K)


def _heads_last(x_BGRLK: jax.Array) -> jax.Array:
    B, G, R, L, K = x_BGRLK.shape
    return x_BGRLK.reshape(B, G * R, L, K).transpose(0, 2, 1, 3)


def _blocks(length: int, keys: int, causal: bool, tile: int) -> list[tuple[slice, slice]]:
    """(queries, keys they may need) of every block: of `tile` queries if given."""
    size = tile or (min(1 << (length // 8).bit_length() - 1, SHORT) if length > SHORT else BLOCK)
    ends = [*range(size, length, size), length] if causal or tile else [length]
    return [
        (slice(start, end), slice(0, end if causal else keys)) for start, end in zip([0, *ends], ends, strict=False)
    ]


def _attention_forward(q_BLHK, k_BMGK, v_BMGK, mask_BLM, causal, tile=0):  # type: ignore[no-untyped-def]
    G, scale = k_BMGK.shape[2], q_BLHK.shape[3] ** -0.5
    q, k, v = _heads_first(q_BLHK * scale, G), k_BMGK.transpose(0, 2, 1, 3), v_BMGK.transpose(0, 2, 1, 3)
    outputs, weights, factors = [], [], []
    for rows, columns in _blocks(q.shape[3], k.shape[2], causal, tile):
        scores = jnp.einsum("bgrlk,bgmk->bgrlm", q[:, :, :, rows], k[:, :, columns], preferred_element_type=jnp.float32)
        if tile:  # one select for all heads: it costs as much as the exponential
            scores += jax.lax.optimization_barrier(jnp.where(mask_BLM[:, None, None, rows, columns], 0, -1e30))
        else:
            scores = jnp.where(mask_BLM[:, None, None, rows, columns], scores, -1e30)
        e = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
        factor = 1 / jnp.sum(e, -1, keepdims=True)  # applied to the output, which is smaller than the weights
        e = e.astype(v.dtype)
        y = jnp.einsum("bgrlm,bgmk->bgrlk", e, v[:, :, columns], preferred_element_type=jnp.float32)
        outputs.append((y * factor).astype(v.dtype))
        weights.append(e)
        factors.append(factor)
    y_BLHK = _heads_last(jnp.concatenate(outputs, 3))
    return y_BLHK, (q, k, v, y_BLHK, weights, factors)


def _attention_backward(causal, saved, dy_BLHK):  # type: ignore[no-untyped-def]
    q, k, v, y_BLHK, weights, factors = saved
    L, M, G, scale = q.shape[3], k.shape[2], k.shape[1], q.shape[4] ** -0.5
    factor = jnp.concatenate(factors, 3)
    # The sum of p dp over the keys, from y and dy (Dao et al. 2022).
    sums_BLH1 = jnp.sum(dy_BLHK.astype(jnp.float32) * y_BLHK, -1, keepdims=True)
    sums = _heads_first(sums_BLH1, G) * factor
    dy = (_heads_first(dy_BLHK, G) * factor).astype(v.dtype)
    dq, dk, dv = [], jnp.zeros(k.mT.shape, jnp.float32), jnp.zeros(v.mT.shape, jnp.float32)
    for (rows, columns), e in zip(_blocks(L, M, causal, 0), weights, strict=True):
        later = ((0, 0), (0, 0), (0, 0), (0, M - columns.stop))
        dy_rows = dy[:, :, :, rows]
        # (k, m) rather than (m, k): then XLA transposes dy and q for the product, and not e and ds, which are larger.
        dv += jnp.pad(jnp.einsum("bgrlk,bgrlm->bgkm", dy_rows, e, preferred_element_type=jnp.float32), later)
        dp = jnp.einsum("bgrlk,bgmk->bgrlm", dy_rows, v[:, :, columns], preferred_element_type=jnp.float32)
        ds = (e * (dp - sums[:, :, :, rows])).astype(q.dtype)
        dq.append(jnp.einsum("bgrlm,bgmk->bgrlk", ds, k[:, :, columns]) * scale)
        dk += jnp.pad(jnp.einsum("bgrlk,bgrlm->bgkm", q[:, :, :, rows], ds, preferred_element_type=jnp.float32), later)
    dk, dv = (d.astype(k.dtype).transpose(0, 3, 1, 2) for d in (dk, dv))
    return _heads_last(jnp.concatenate(dq, 3)), dk, dv, None


blocked_attention.defvjp(_attention_forward, _attention_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (Hendrycks & Gimpel 2016), x Phi(x). Its derivative saves only x."""
    return _gelu_forward(x)[0]


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5)), x


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
    return (dy * (0.5 * (1 + jax.lax.erf(x * 2**-0.5)) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def swiglu(up: jax.Array, gate: jax.Array) -> jax.Array:
    """up times SiLU(gate) (Shazeer 2020). Its derivative saves `up` and `gate` alone, and not the two steps between."""
    return up * jax.nn.silu(gate)


def _swiglu_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    up, gate = saved
    share = jax.nn.sigmoid(gate)
    return dy * (gate * share), dy * up * (share * (1 + gate * (1 - share)))


swiglu.defvjp(lambda up, gate: (swiglu(up, gate), (up, gate)), _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float, center: bool) -> jax.Array:
    """LayerNorm (`center`) or RMSNorm over the last dimension, float32. Its derivative saves x and two numbers a row."""
    return _norm_forward(x, scale_D, bias_D, epsilon, center)[0]


def _norm_forward(x, scale_D, bias_D, epsilon, center):  # type: ignore[no-untyped-def]
    scale_D = scale_D.reshape(*(1,) * (x.ndim - 1), -1)
    mean = jnp.mean(x, -1, keepdims=True) if center else jnp.zeros((), x.dtype)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), -1, keepdims=True) + epsilon)
    y = (x - mean) * factor * scale_D
    return y if bias_D is None else y + bias_D.reshape(scale_D.shape), (x, mean, factor, scale_D, bias_D)


def _norm_backward(epsilon, center, saved, dy):  # type: ignore[no-untyped-def]
    x, mean, factor, scale_D, bias_D = saved
    z = (x - mean) * factor
    dz = dy * scale_D
    dx = dz - z * jnp.mean(dz * z, -1, keepdims=True)
    if center:
        dx -= jnp.mean(dz, -1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return dx * factor, jnp.sum(dy * z, rows), None if bias_D is None else jnp.sum(dy, rows)


norm.defvjp(_norm_forward, _norm_backward)
