"""Attention: the module with its parameters, and the functions that may compute it.

Every way of computing attention is a function `(q_BLHK, k_BMGK, v_BMGK, mask_BLM, *, causal, scale, ...) -> y_BLHK` in
`KERNELS`, tested against `reference`. The mask carries everything (causality, packed documents, the cache's length);
`causal` only promises that L = M and nothing above the diagonal is wanted, so that a kernel may skip it. Not every
kernel can do everything: `CAN` says what.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax import config
from llmjax.model import kernels, layers
from llmjax.model import positions as P
from llmjax.model.init import attention_scale, initializer
from llmjax.model.layers import Linear, dtype_of, label
from llmjax.model.views import View

Cache = dict[str, Any]


def reference(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    mask_BLM: jax.Array,
    *,
    causal: bool = False,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    bias_BHLM: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Attention as in the paper (Vaswani et al. 2017), softmax in float32; groups of H/G queries share keys and values.

    Args:
        scale: times the products of queries and keys; 0: 1/sqrt(K).
        soft_cap: scores become cap * tanh(scores / cap) (Gemma 2); 0: off.
        bias_BHLM: float32, added to the scores after that; B and H may be 1.
        dropout: applied to the weights.
    """
    B, L, H, K = q_BLHK.shape
    G = k_BMGK.shape[2]
    q = q_BLHK.reshape(B, L, G, H // G, K)
    scores = jnp.einsum("blgrk,bmgk->bgrlm", q, k_BMGK, preferred_element_type=jnp.float32) * (scale or K**-0.5)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias_BHLM is not None:
        scores = scores + bias_BHLM.reshape(bias_BHLM.shape[0], G, H // G, *bias_BHLM.shape[2:])
    scores = jnp.where(mask_BLM[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum("bgrlm,bmgk->blgrk", weights.astype(v_BMGK.dtype), v_BMGK).reshape(B, L, H, K)


def dot_product(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    mask_BLM: jax.Array,
    *,
    causal: bool = False,
    scale: float = 0.0,
    bias_BHLM: jax.Array | None = None,
) -> jax.Array:
    """`jax.nn.dot_product_attention`, which picks XLA's own fused form on each platform."""
    return jax.nn.dot_product_attention(
        q_BLHK, k_BMGK, v_BMGK, bias=bias_BHLM, mask=mask_BLM[:, None], scale=scale or None
    )


def blocked(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    mask_BLM: jax.Array,
    *,
    causal: bool = False,
    scale: float = 0.0,
) -> jax.Array:
    """Blocks of queries, each with the keys up to its end, and a derivative written out: the fast form on CPU."""
    if scale and scale != q_BLHK.shape[-1] ** -0.5:  # the kernel's own scale
        q_BLHK = q_BLHK * (scale * q_BLHK.shape[-1] ** 0.5)
    return kernels.blocked_attention(q_BLHK, k_BMGK, v_BMGK, mask_BLM, causal)


KERNELS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference,
    "dot_product": dot_product,
    "blocked": blocked,
}
CAN: dict[str, frozenset[str]] = {
    "reference": frozenset({"soft_cap", "bias", "dropout"}),
    "dot_product": frozenset({"bias"}),
    "blocked": frozenset(),
}
FASTEST = {"cpu": ("blocked", "dot_product", "reference")}  # measured; elsewhere:
FASTEST_ELSEWHERE = ("dot_product", "reference")


def needs(c: ConfigDict) -> frozenset[str]:
    """What the model's settings ask of an attention kernel beyond masks and scales."""
    wanted = {"soft_cap": c.attention_soft_cap, "bias": c.position in P.RELATIVE, "dropout": c.attention_dropout}
    return frozenset(name for name, value in wanted.items() if value)


def resolve(c: ConfigDict, *, platform: str) -> str:
    """The name in `KERNELS` that the model's settings mean on a platform ("cpu", "gpu" or "tpu")."""
    if c.attention != "auto":
        return c.attention
    return next(name for name in FASTEST.get(platform, FASTEST_ELSEWHERE) if needs(c) <= CAN[name])


class Attention(nn.Module):
    """Multi-head to multi-query attention (Ainslie et al. 2023). x_BLD -> y_BLD, and the cache when given one.

    Args of the call:
        x_BLD: what asks.
        keys_BMD: what is looked at; None: x itself, or with a cache that was filled before, the cache alone (cross).
        view: mask, positions and biases for these queries and keys.
        starts_B: with a cache, the slot at which each row's new keys are written.
    """

    c: ConfigDict
    deterministic: bool = True
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        view: View,
        *,
        keys_BMD: jax.Array | None = None,
        starts_B: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.c
        size, bias = config.head_size(c), "qkv" in c.bias
        groups = c.kv_heads or c.heads
        q_BLHK = Linear(c, (c.heads, size), "inward", bias=bias, name="query")(x_BLD)
        if c.qk_norm:
            q_BLHK = layers.Norm(c, "rms", name="query_norm")(q_BLHK)
        if view.rotary is not None:
            q_BLHK = P.rotate(q_BLHK, view.rotary[0])
        if self.cross and keys_BMD is None:
            assert cache is not None
            k_BMGK, v_BMGK = cache["key"], cache["value"]
        else:
            keys_BMD = x_BLD if keys_BMD is None else keys_BMD
            k_BMGK = Linear(c, (groups, size), "inward", bias=bias, name="key")(keys_BMD)
            v_BMGK = Linear(c, (groups, size), "inward", bias=bias, name="value")(keys_BMD)
            if c.qk_norm:
                k_BMGK = layers.Norm(c, "rms", name="key_norm")(k_BMGK)
            if view.rotary is not None:
                k_BMGK = P.rotate(k_BMGK, view.rotary[1])
            if cache is not None and view.renew_BR is not None:
                pairs = {"key": k_BMGK, "value": v_BMGK}
                k_BMGK, v_BMGK = (jnp.concatenate([cache[name], new], axis=1) for name, new in pairs.items())
                cache = {name: renew(cache[name], new, view.renew_BR) for name, new in pairs.items()}
            elif cache is not None:
                starts_B = jnp.zeros(x_BLD.shape[0], jnp.int32) if self.cross or starts_B is None else starts_B
                cache = {"key": write(cache["key"], k_BMGK, starts_B), "value": write(cache["value"], v_BMGK, starts_B)}
                k_BMGK, v_BMGK = cache["key"], cache["value"]
        q_BLHK, k_BMGK, v_BMGK = label(q_BLHK, "BLHK"), label(k_BMGK, "BMGK"), label(v_BMGK, "BMGK")
        bias_BHLM = view.bias_BHLM
        if view.distance_BLM is not None:
            q_BLHK, bias_BHLM = self._relative(q_BLHK, view, k_BMGK.shape[1])
        y_BLHK = self._attend(q_BLHK, k_BMGK, v_BMGK, view, bias_BHLM)
        out = Linear(c, (c.width,), "outward", inputs=2, bias="out" in c.bias, name="out")
        return out(label(y_BLHK, "BLHK")), cache

    def _attend(
        self, q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, view: View, bias_BHLM: jax.Array | None
    ) -> jax.Array:
        c = self.c
        name = resolve(c, platform=jax.default_backend())
        if q_BLHK.shape[1] == 1 and name == "blocked":
            name = "dot_product"  # one query a row has no blocks, and `blocked` would transpose the whole cache for it
        more: dict[str, Any] = {}
        if bias_BHLM is not None:
            more["bias_BHLM"] = bias_BHLM
        if c.attention_soft_cap:
            more["soft_cap"] = c.attention_soft_cap
        if c.attention_dropout and not self.deterministic:
            key = self.make_rng("dropout")
            more["dropout"] = lambda weights: layers.drop(weights, c.attention_dropout, key)
        causal = view.causal and q_BLHK.shape[1] == k_BMGK.shape[1]
        return KERNELS[name](q_BLHK, k_BMGK, v_BMGK, view.mask_BLM, causal=causal, scale=attention_scale(c), **more)

    def _relative(self, q_BLHK: jax.Array, view: View, keys: int) -> tuple[jax.Array, jax.Array]:
        """Transformer-XL's and XLNet's scores (Dai et al. 2019, Yang et al. 2019): (q + u) k + (q + v) r + (q + s) e.

        Returns q + u and the two other terms, scaled, as a bias (B, H, L, M).
        """
        c, size = self.c, config.head_size(self.c)
        dtype, shape = dtype_of(c.dtype), (c.heads, size)

        def vector(name: str) -> jax.Array:
            start = initializer(c, "relative")
            return self.param(name, start, shape, dtype_of(c.param_dtype)).astype(dtype)[None, None]

        assert view.distance_BLM is not None
        table_RD = P.sinusoids(jnp.arange(1 - keys, keys), c.width, interleaved=False).astype(dtype)
        r_RHK = Linear(c, shape, "inward", name="position")(table_RD)
        scores_BHLR = jnp.einsum("blhk,rhk->bhlr", q_BLHK + vector("position_bias"), r_RHK)
        bias_BHLM = P.by_distance(scores_BHLR, view.distance_BLM)
        if c.types:
            types_2HK = self.param(
                "type_embedding", initializer(c, "relative"), (2, *shape), dtype_of(c.param_dtype)
            ).astype(dtype)
            pair_BHL2 = jnp.einsum("blhk,thk->bhlt", q_BLHK + vector("type_bias"), types_2HK)
            assert view.differs_BLM is not None
            same, other = pair_BHL2[..., :1], pair_BHL2[..., 1:]
            bias_BHLM = bias_BHLM + jnp.where(view.differs_BLM[:, None], other, same)
        return q_BLHK + vector("content_bias"), bias_BHLM.astype(jnp.float32) * attention_scale(c)


def write(cache_BMGK: jax.Array, new_BLGK: jax.Array, starts_B: jax.Array) -> jax.Array:
    """Put L new entries of each row at its own slot."""
    return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (start, 0, 0)))(
        cache_BMGK, new_BLGK, starts_B
    )


def renew(ring_BRGK: jax.Array, new_BLGK: jax.Array, from_BR: jax.Array) -> jax.Array:
    """Put in each slot of a ring the new entry with the given number, or leave it as it is (-1)."""
    chosen_BRGK = jnp.take_along_axis(new_BLGK, jnp.maximum(from_BR, 0)[:, :, None, None], axis=1)
    return jnp.where(from_BR[:, :, None, None] >= 0, chosen_BRGK.astype(ring_BRGK.dtype), ring_BRGK)
