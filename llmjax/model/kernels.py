"""Fast forms for CPU, each with its derivative written out: what XLA's CPU compiler does not find by itself.

Each equals a readable form elsewhere (attention.reference, the formulas in layers.py), which tests/test_model.py
holds it to. They are plain jax.numpy, so they run, and are sharded, anywhere; they are chosen where they were measured
to pay (benchmarks/nanogpt.py).
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 128  # queries at a time: short enough to skip much of the upper triangle, long enough for large products


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
    return _attention_forward(q_BLHK, k_BMGK, v_BMGK, mask_BLM, causal)[0]


def _heads_first(x_BLHK: jax.Array, groups: int) -> jax.Array:
    """(B, L, H, K) -> (B, G, R, L, K), R = H/G queries for each key: the layout in which every product is a plain batch."""
    B, L, H, K = x_BLHK.shape
    return x_BLHK.transpose(0, 2, 1, 3).reshape(B, groups, H // groups, L, K)


def _heads_last(x_BGRLK: jax.Array) -> jax.Array:
    B, G, R, L, K = x_BGRLK.shape
    return x_BGRLK.reshape(B, G * R, L, K).transpose(0, 2, 1, 3)


def _blocks(length: int, keys: int, causal: bool) -> list[tuple[slice, slice]]:
    """(queries, keys they may need) of every block."""
    ends = [*range(BLOCK, length, BLOCK), length] if causal else [length]
    return [
        (slice(start, end), slice(0, end if causal else keys)) for start, end in zip([0, *ends], ends, strict=False)
    ]


def _attention_forward(q_BLHK, k_BMGK, v_BMGK, mask_BLM, causal):  # type: ignore[no-untyped-def]
    G, scale = k_BMGK.shape[2], q_BLHK.shape[3] ** -0.5
    q, k, v = _heads_first(q_BLHK * scale, G), k_BMGK.transpose(0, 2, 1, 3), v_BMGK.transpose(0, 2, 1, 3)
    outputs, weights = [], []
    for rows, columns in _blocks(q.shape[3], k.shape[2], causal):
        scores = jnp.einsum("bgrlk,bgmk->bgrlm", q[:, :, :, rows], k[:, :, columns], preferred_element_type=jnp.float32)
        scores = jnp.where(mask_BLM[:, None, None, rows, columns], scores, -1e30)
        e = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
        p = (e * (1 / jnp.sum(e, -1, keepdims=True))).astype(v.dtype)
        outputs.append(jnp.einsum("bgrlm,bgmk->bgrlk", p, v[:, :, columns]))
        weights.append(p)
    y_BLHK = _heads_last(jnp.concatenate(outputs, 3))
    return y_BLHK, (q, k, v, weights)


def _attention_backward(causal, saved, dy_BLHK):  # type: ignore[no-untyped-def]
    q, k, v, weights = saved
    L, M, G, scale = q.shape[3], k.shape[2], k.shape[1], q.shape[4] ** -0.5
    dy = _heads_first(dy_BLHK, G)
    dq, dk, dv = [], jnp.zeros(k.shape, k.dtype), jnp.zeros(v.shape, v.dtype)
    for (rows, columns), p in zip(_blocks(L, M, causal), weights, strict=True):
        later = ((0, 0), (0, 0), (0, M - columns.stop), (0, 0))
        dy_rows = dy[:, :, :, rows]
        dv += jnp.pad(jnp.einsum("bgrlm,bgrlk->bgmk", p, dy_rows), later)
        dp = jnp.einsum("bgrlk,bgmk->bgrlm", dy_rows, v[:, :, columns], preferred_element_type=jnp.float32)
        ds = (p * (dp - jnp.sum(p * dp, -1, keepdims=True))).astype(q.dtype)
        dq.append(jnp.einsum("bgrlm,bgmk->bgrlk", ds, k[:, :, columns]) * scale)
        dk += jnp.pad(jnp.einsum("bgrlm,bgrlk->bgmk", ds, q[:, :, :, rows]), later)
    return _heads_last(jnp.concatenate(dq, 3)), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3), None


blocked_attention.defvjp(_attention_forward, _attention_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (Hendrycks & Gimpel 2016), x Phi(x). Its derivative saves x alone."""
    return _gelu_forward(x)[0]


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5)), x


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
    return (dy * (0.5 * (1 + jax.lax.erf(x * 2**-0.5)) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)
