"""Attention: the module with its parameters, and the functions that may compute it.

Every way of computing attention is a function `(q_BLHK, k_BMGK, v_BMGK, mask_BLM, *, causal, scale, ...) -> y_BLHK` in
`KERNELS`, tested against `reference`. The mask carries everything (causality, packed documents, the cache's length);
`causal` only promises that L = M and nothing above the diagonal is wanted, so that a kernel may skip it. Those in
`BY_PATTERN` take a `views.Pattern` instead, which is all they can express; calls with another mask go to a kernel that
takes masks. Calls with a cache of up to `DECODE_QUERIES` tokens a row have a way of their own, `decode_attention`. Not every kernel can do everything: `CAN` says what, and `choose` why one is
passed over.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax import config
from llmjax.model import kernels, kernels_local, layers
from llmjax.model import positions as P
from llmjax.model.init import attention_scale, initializer
from llmjax.model.layers import Linear, constrain, dtype_of
from llmjax.model.per_device import platform
from llmjax.model.views import Pattern, View

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


DECODE_QUERIES = 512  # queries whose scores with the whole cache may be held at once


def decode_attention(
    q_BLHK: jax.Array,
    k_BGMK: jax.Array,
    v_BGMK: jax.Array,
    mask_BLM: jax.Array,
    *,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    bias_BHLM: jax.Array | None = None,
) -> jax.Array:
    """`reference` for keys and values as the cache has them, which are read where they lie."""
    B, L, H, K = q_BLHK.shape
    G = k_BGMK.shape[1]
    rows = q_BLHK.transpose(0, 2, 1, 3).reshape(B, G, H // G * L, K)
    scores = jnp.einsum("bgrk,bgmk->bgrm", rows, k_BGMK, preferred_element_type=jnp.float32) * (scale or K**-0.5)
    scores = scores.reshape(B, H, L, -1)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias_BHLM is not None:
        scores = scores + jnp.broadcast_to(bias_BHLM, scores.shape)
    weights = jax.nn.softmax(jnp.where(mask_BLM[:, None], scores, -1e30), axis=-1).astype(v_BGMK.dtype)
    y = jnp.einsum("bgrm,bgmk->bgrk", weights.reshape(B, G, H // G * L, -1), v_BGMK)
    return y.reshape(B, H, L, K).transpose(0, 2, 1, 3)


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


def cudnn(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    mask_BLM: jax.Array,
    *,
    causal: bool = False,
    scale: float = 0.0,
    implementation: Any = "cudnn",
) -> jax.Array:
    """cuDNN's flash attention for GPU, in bfloat16: it never holds the scores of more than a few blocks.

    It has no segments, so the mask goes in as a bias (B, 1, L, M), which all heads share; `causal` skips blocks besides.
    Under a mesh each device computes its own rows, queries and heads.
    """

    def run(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        whole = q.shape[1] == k.shape[1]  # a device that has some of the queries has the mask alone to go by
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=scale or None, is_causal=causal and whole, implementation=implementation
        )

    return kernels_local.on_each_device(run, q_BLHK, k_BMGK, v_BMGK, mask_BLM)


def splash(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    pattern: Pattern,
    *,
    scale: float = 0.0,
    soft_cap: float = 0.0,
) -> jax.Array:
    """JAX's Pallas kernel for TPU; see kernels_splash.py, which is imported when it is used."""
    from llmjax.model import kernels_splash

    return kernels_splash.attention(
        q_BLHK, k_BMGK, v_BMGK, pattern, interpret=platform() != "tpu", scale=scale, soft_cap=soft_cap
    )


KERNELS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference,
    "dot_product": dot_product,
    "blocked": blocked,
    "cudnn": cudnn,
}
BY_PATTERN: dict[str, Callable[..., jax.Array]] = {"splash": splash}
CAN: dict[str, frozenset[str]] = {
    "reference": frozenset({"soft_cap", "bias", "dropout"}),
    "dot_product": frozenset({"bias"}),
    "blocked": frozenset(),
    "cudnn": frozenset(),  # its bias would have no gradient
    "splash": frozenset({"soft_cap"}),
}
# What takes the place of a kernel where a row's queries meet all its keys; parallel/context.py sets it.
WHOLE: ContextVar[Callable[..., jax.Array] | None] = ContextVar("WHOLE", default=None)
FASTEST = {  # on CPU as measured, on TPU by the memory of compiled programs (results/attention.json)
    "cpu": ("blocked", "dot_product", "reference"),
    "tpu": ("splash", "dot_product", "reference"),
    "gpu": ("dot_product", "reference"),  # cudnn when asked for: there was no GPU to hold it against the reference
}


@dataclass(frozen=True)
class Choice:
    """An attention kernel, and the faster ones that were passed over: (name, why)."""

    name: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.name, *(f"not {name}, which {why}" for name, why in self.passed_over)])


def choose(c: ConfigDict, *, platform: str, any_mask: bool = False) -> Choice:
    """The kernel that the model's settings mean on a platform ("cpu", "gpu" or "tpu").

    Args:
        any_mask: masks are to be expected that are no patterns, as with objectives that order tokens themselves.
    """
    passed_over: list[tuple[str, str]] = []
    if c.attention == "cudnn" and platform != "gpu":
        passed_over.append((c.attention, "needs a GPU"))
    elif c.attention != "auto" and not (any_mask and c.attention in BY_PATTERN):
        return Choice(c.attention)
    elif platform == "gpu":
        passed_over.append(("cudnn", "is only taken when model.attention=cudnn asks for it"))
    asked = {
        "soft_cap": (c.attention_soft_cap, f"model.attention_soft_cap={c.attention_soft_cap}"),
        "bias": (c.position in P.RELATIVE, f"model.position={c.position}"),
        "dropout": (c.attention_dropout, f"model.attention_dropout={c.attention_dropout}"),
    }
    for name in FASTEST.get(platform, FASTEST["gpu"]):
        lacking = [said for what, (needed, said) in asked.items() if needed and what not in CAN[name]]
        if lacking:
            passed_over.append((name, f"cannot do {' and '.join(lacking)}"))
        elif any_mask and name in BY_PATTERN:
            passed_over.append((name, "cannot do masks that come with the rows"))
        else:
            return Choice(name, tuple(passed_over))
    raise AssertionError("the reference can do everything")


def resolve(c: ConfigDict, *, platform: str, any_mask: bool = False) -> str:
    """The name of `choose`."""
    return choose(c, platform=platform, any_mask=any_mask).name


def takes_patterns(c: ConfigDict) -> bool:
    """Whether the model's attention does without masks where there is a pattern."""
    return WHOLE.get() is not None or resolve(c, platform=platform()) in BY_PATTERN


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
            return self._cached(q_BLHK, None, view, cache)
        else:
            keys_BMD = x_BLD if keys_BMD is None else keys_BMD
            k_BMGK = Linear(c, (groups, size), "inward", bias=bias, name="key")(keys_BMD)
            v_BMGK = Linear(c, (groups, size), "inward", bias=bias, name="value")(keys_BMD)
            if c.qk_norm:
                k_BMGK = layers.Norm(c, "rms", name="key_norm")(k_BMGK)
            if view.rotary is not None:
                k_BMGK = P.rotate(k_BMGK, view.rotary[1])
            if cache is not None:
                return self._cached(q_BLHK, {"key": k_BMGK, "value": v_BMGK}, view, cache, starts_B)
        q_BLHK, k_BMGK, v_BMGK = constrain(q_BLHK, "BLHK"), constrain(k_BMGK, "BMGK"), constrain(v_BMGK, "BMGK")
        bias_BHLM = view.bias_BHLM
        if view.distance_BLM is not None:
            q_BLHK, bias_BHLM = self._relative(q_BLHK, view, k_BMGK.shape[1])
        y_BLHK = self._attend(q_BLHK, k_BMGK, v_BMGK, view, bias_BHLM)
        return self._out(y_BLHK), None

    def _cached(
        self,
        q_BLHK: jax.Array,
        new: Cache | None,
        view: View,
        cache: Cache,
        starts_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Write the new keys and values (B, L, G, K), if there are any, and attend to what the cache then has."""
        seen = cache
        if new is not None:
            new = {name: x_BLGK.swapaxes(1, 2) for name, x_BLGK in new.items()}
            if view.slot_B is not None:
                cache = seen = {name: write_slot(cache[name], x_BG1K, view.slot_B) for name, x_BG1K in new.items()}
            elif view.ring_BR is not None:
                seen = {name: jnp.concatenate([cache[name], x_BGLK], axis=2) for name, x_BGLK in new.items()}
                cache = {name: write_ring(cache[name], x_BGLK, view.ring_BR) for name, x_BGLK in new.items()}
            else:
                starts_B = jnp.zeros(q_BLHK.shape[0], jnp.int32) if self.cross or starts_B is None else starts_B
                cache = seen = {name: write_slice(cache[name], x_BGLK, starts_B) for name, x_BGLK in new.items()}
        q_BLHK = constrain(q_BLHK, "BLHK")
        k_BGMK, v_BGMK = (constrain(seen[name].astype(q_BLHK.dtype), "BGMK") for name in ("key", "value"))
        bias_BHLM = view.bias_BHLM
        if view.distance_BLM is not None:
            q_BLHK, bias_BHLM = self._relative(q_BLHK, view, k_BGMK.shape[2])
        if q_BLHK.shape[1] <= DECODE_QUERIES:
            scale, cap = attention_scale(self.c), self.c.attention_soft_cap
            y_BLHK = decode_attention(
                q_BLHK, k_BGMK, v_BGMK, view.mask(), scale=scale, soft_cap=cap, bias_BHLM=bias_BHLM
            )
        else:
            y_BLHK = self._attend(q_BLHK, k_BGMK.swapaxes(1, 2), v_BGMK.swapaxes(1, 2), view, bias_BHLM)
        return self._out(y_BLHK), cache

    def _out(self, y_BLHK: jax.Array) -> jax.Array:
        out = Linear(self.c, (self.c.width,), "outward", inputs=2, bias="out" in self.c.bias, name="out")
        return out(constrain(y_BLHK, "BLHK"))

    def _attend(
        self, q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, view: View, bias_BHLM: jax.Array | None
    ) -> jax.Array:
        c = self.c
        whole = q_BLHK.shape[1] == k_BMGK.shape[1]
        kernel = WHOLE.get() if whole else None
        fast = resolve(c, platform=platform())
        if kernel is None and view.pattern is not None and fast in BY_PATTERN:
            attend = BY_PATTERN[fast]
            return attend(q_BLHK, k_BMGK, v_BMGK, view.pattern, scale=attention_scale(c), soft_cap=c.attention_soft_cap)
        name = resolve(c, platform=platform(), any_mask=True)
        more: dict[str, Any] = {}
        if bias_BHLM is not None:
            more["bias_BHLM"] = bias_BHLM
        if c.attention_soft_cap:
            more["soft_cap"] = c.attention_soft_cap
        if c.attention_dropout and not self.deterministic:
            key = self.make_rng("dropout")
            more["dropout"] = lambda weights: layers.drop(weights, c.attention_dropout, key)
        if kernel is not None:
            return kernel(q_BLHK, k_BMGK, v_BMGK, view, scale=attention_scale(c), **more)
        causal = view.causal and whole
        return KERNELS[name](q_BLHK, k_BMGK, v_BMGK, view.mask(), causal=causal, scale=attention_scale(c), **more)

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


def write_slice(cache_BGMK: jax.Array, new_BGLK: jax.Array, starts_B: jax.Array) -> jax.Array:
    """Put L new entries of each row at its own slot."""
    return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (0, start, 0)))(
        cache_BGMK, new_BGLK, starts_B
    )


def write_slot(cache_BGMK: jax.Array, new_BG1K: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Put one new entry of each row in its slot, or nowhere if the slot is beyond the last."""
    rows_B, new_BGK = jnp.arange(cache_BGMK.shape[0]), new_BG1K[:, :, 0].astype(cache_BGMK.dtype)
    if len(rows_B) == 1 and platform() == "cpu":
        # XLA turns a scatter of one into an update that it fuses with each of its two readers, as a copy of the
        # whole cache each. A second one, which goes nowhere, keeps it a scatter, in place.
        rows_B, new_BGK = jnp.zeros(2, jnp.int32), jnp.repeat(new_BGK, 2, axis=0)
        slot_B = jnp.concatenate([slot_B, jnp.full(1, cache_BGMK.shape[2], slot_B.dtype)])
    return cache_BGMK.at[rows_B, :, slot_B].set(new_BGK, mode="drop")


def write_ring(ring_BGRK: jax.Array, new_BGLK: jax.Array, from_BR: jax.Array) -> jax.Array:
    """Put in each slot of a ring the new entry with the given number, or leave it as it is (-1)."""
    chosen_BGRK = jnp.take_along_axis(new_BGLK, jnp.maximum(from_BR, 0)[:, None, :, None], axis=2)
    return jnp.where(from_BR[:, None, :, None] >= 0, chosen_BGRK.astype(ring_BGRK.dtype), ring_BGRK)
