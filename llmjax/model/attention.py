"""Attention: the module with its parameters, and the functions that may compute it.

Every way of computing attention is a function `(q_BLHK, k_BMGK, v_BMGK, mask_BLM, *, causal) -> y_BLHK` in `KERNELS`,
tested against `reference`. The mask carries everything (causality, packed documents, the cache's length); `causal`
only promises that L = M and nothing above the diagonal is wanted, so that a kernel may skip it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax import config
from llmjax.model import kernels, layers
from llmjax.model.layers import Linear, label

Cache = dict[str, jax.Array]


def reference(
    q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, mask_BLM: jax.Array, *, causal: bool = False
) -> jax.Array:
    """Attention as in the paper (Vaswani et al. 2017), softmax in float32; groups of H/G queries share keys and values."""
    B, L, H, K = q_BLHK.shape
    G = k_BMGK.shape[2]
    q = q_BLHK.reshape(B, L, G, H // G, K)
    scores = jnp.einsum("blgrk,bmgk->bgrlm", q, k_BMGK, preferred_element_type=jnp.float32) * K**-0.5
    scores = jnp.where(mask_BLM[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BMGK.dtype)
    return jnp.einsum("bgrlm,bmgk->blgrk", weights, v_BMGK).reshape(B, L, H, K)


def dot_product(
    q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, mask_BLM: jax.Array, *, causal: bool = False
) -> jax.Array:
    """`jax.nn.dot_product_attention`, which picks XLA's own fused form on each platform."""
    return jax.nn.dot_product_attention(q_BLHK, k_BMGK, v_BMGK, mask=mask_BLM[:, None])


def blocked(
    q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, mask_BLM: jax.Array, *, causal: bool = False
) -> jax.Array:
    """Blocks of queries, each with the keys up to its end, and a derivative written out: the fast form on CPU."""
    return kernels.blocked_attention(q_BLHK, k_BMGK, v_BMGK, mask_BLM, causal)


KERNELS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference,
    "dot_product": dot_product,
    "blocked": blocked,
}


def resolve(c: ConfigDict, *, platform: str) -> str:
    """The name in `KERNELS` that the model's settings mean on a platform ("cpu", "gpu" or "tpu")."""
    if c.attention != "auto":
        return c.attention
    return "blocked" if platform == "cpu" else "dot_product"


def training_mask(segments_BL: jax.Array) -> jax.Array:
    """mask_BLM, true where a token may look: at itself and earlier tokens of its own document."""
    length = segments_BL.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal[None] & (segments_BL[:, :, None] == segments_BL[:, None, :])


def cache_mask(positions_BL: jax.Array, length: int) -> jax.Array:
    """mask_BLM for decoding: a query at position p sees the cache's slots 0 to p."""
    return jnp.arange(length)[None, None, :] <= positions_BL[:, :, None]


class Attention(nn.Module):
    """Multi-head to multi-query attention (Ainslie et al. 2023). x_BLD -> y_BLD, and the cache when given one."""

    c: ConfigDict

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        mask_BLM: jax.Array,
        rotary: tuple[jax.Array, jax.Array] | None,
        starts_B: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.c
        size = config.head_size(c)
        q_BLHK = Linear(c, (c.heads, size), "inward", name="query")(x_BLD)
        k_BMGK = Linear(c, (c.kv_heads or c.heads, size), "inward", name="key")(x_BLD)
        v_BMGK = Linear(c, (c.kv_heads or c.heads, size), "inward", name="value")(x_BLD)
        if c.qk_norm:
            q_BLHK = layers.Norm(c, "rms", name="query_norm")(q_BLHK)
            k_BMGK = layers.Norm(c, "rms", name="key_norm")(k_BMGK)
        if rotary is not None:
            q_BLHK, k_BMGK = layers.rotate(q_BLHK, rotary), layers.rotate(k_BMGK, rotary)
        if cache is not None:
            assert starts_B is not None
            cache = {"key": write(cache["key"], k_BMGK, starts_B), "value": write(cache["value"], v_BMGK, starts_B)}
            k_BMGK, v_BMGK = cache["key"], cache["value"]
        q_BLHK, k_BMGK, v_BMGK = label(q_BLHK, "BLHK"), label(k_BMGK, "BMGK"), label(v_BMGK, "BMGK")
        name = resolve(c, platform=jax.default_backend())
        if cache is not None and x_BLD.shape[1] == 1 and name == "blocked":
            name = "dot_product"  # one query a row has no blocks, and `blocked` would transpose the whole cache for it
        y_BLHK = KERNELS[name](q_BLHK, k_BMGK, v_BMGK, mask_BLM, causal=cache is None)
        return Linear(c, (c.width,), "outward", inputs=2, name="out")(label(y_BLHK, "BLHK")), cache


def write(cache_BMGK: jax.Array, new_BLGK: jax.Array, starts_B: jax.Array) -> jax.Array:
    """Put L new entries of each row at its own slot."""
    return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (start, 0, 0)))(
        cache_BMGK, new_BLGK, starts_B
    )
