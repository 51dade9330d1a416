"""Attention: the module with its parameters, and the functions that may compute it.

Every way of computing attention is a function `(q_BLHK, k_BMGK, v_BMGK, mask_BLM, *, causal, scale, ...) -> y_BLHK` in
`KERNELS`, tested against `reference`. The mask carries everything (causality, packed documents, the cache's length);
`causal` only promises that L = M and nothing above the diagonal is wanted, so that a kernel may skip it. Those in
`BY_PATTERN` take a `views.Pattern` instead, which is all they can express; calls with another mask go to a kernel that
takes masks. `decode_attention` serves calls with a cache of up to `DECODE_QUERIES` tokens a row. No kernel but the
reference can do everything: `config.model_checks.KERNELS` lists what each can, and `choose` says why one is passed over.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config import model_checks
from llmjax.model import kernels, latent, layers
from llmjax.model import positions as P
from llmjax.model.cache import write_ring, write_slice, write_slot
from llmjax.model.layers import Linear, constrain
from llmjax.model.parametrization import attention_scale
from llmjax.model.per_device import heads_per_device, platform
from llmjax.model.two_stream import relative_scores
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
    sinks_H: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Attention as in the paper (Vaswani et al. 2017), softmax in float32; groups of H/G queries share keys and values.

    Args:
        scale: times the products of queries and keys; 0: 1/sqrt(K).
        soft_cap: scores become cap * tanh(scores / cap) (Gemma 2); 0: off.
        bias_BHLM: float32, added to the scores after that; B and H may be 1.
        sinks_H: float32, see `softmax`.
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
    weights = softmax(scores, None if sinks_H is None else sinks_H.reshape(1, G, H // G, 1, 1))
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum("bgrlm,bmgk->blgrk", weights.astype(v_BMGK.dtype), v_BMGK).reshape(B, L, H, K)


def softmax(scores: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    """Weights from scores (..., M), over the last dimension.

    sinks: the score (..., 1) of one more key, whose value is zero: a head that finds nothing can attend to it (gpt-oss;
        Xiao et al. 2023). It is not scaled, capped or masked.
    """
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    # What is subtracted cancels.
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    e = jnp.exp(scores - largest)
    return e / (jnp.sum(e, axis=-1, keepdims=True) + jnp.exp(sinks - largest))


DECODE_QUERIES = 512  # at most so many queries hold their scores with the whole cache at once


def decode_attention(
    q_BLHK: jax.Array,
    k_BGMK: jax.Array,
    v_BGMK: jax.Array,
    mask_BLM: jax.Array,
    *,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    bias_BHLM: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """`reference` for keys and values in the cache's layout (B, G, M, K), read in place."""
    B, L, H, K = q_BLHK.shape
    G = k_BGMK.shape[1]
    rows = q_BLHK.transpose(0, 2, 1, 3).reshape(B, G, H // G * L, K)
    scores = jnp.einsum("bgrk,bgmk->bgrm", rows, k_BGMK, preferred_element_type=jnp.float32) * (scale or K**-0.5)
    scores = scores.reshape(B, H, L, -1)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias_BHLM is not None:
        scores = scores + jnp.broadcast_to(bias_BHLM, scores.shape)
    sinks = None if sinks_H is None else sinks_H.reshape(1, H, 1, 1)
    weights = softmax(jnp.where(mask_BLM[:, None], scores, -1e30), sinks).astype(v_BGMK.dtype)
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
    """Blocks of queries, each with the keys up to its end, and a hand-written derivative: the fast form on CPU."""
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

    It has no segments, so the mask is a bias (B, 1, L, M), which all heads share; `causal` also skips blocks. Under a mesh
    each device computes its own rows, queries and heads.
    """

    def run(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        whole = q.shape[1] == k.shape[1]  # a device with some of the queries must go by the mask alone
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=scale or None, is_causal=causal and whole, implementation=implementation
        )

    return heads_per_device(run, q_BLHK, k_BMGK, v_BMGK, mask_BLM)


def splash(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    pattern: Pattern,
    *,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """JAX's Pallas kernel for TPU; see kernels_splash.py, which is imported when it is used."""
    from llmjax.model import kernels_splash

    return kernels_splash.attention(
        q_BLHK, k_BMGK, v_BMGK, pattern, interpret=platform() != "tpu", scale=scale, soft_cap=soft_cap, sinks_H=sinks_H
    )


KERNELS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference,
    "dot_product": dot_product,
    "blocked": blocked,
    "cudnn": cudnn,
}
BY_PATTERN: dict[str, Callable[..., jax.Array]] = {"splash": splash}
# (q_BLHK, k_BMGK, v_BMGK, view, *, scale, soft_cap, bias_BHLM, sinks_H, dropout) -> y_BLHK
Attend = Callable[..., jax.Array]
FASTEST = {  # on CPU as measured, on TPU by the memory of compiled programs (results/attention.json)
    "cpu": ("blocked", "dot_product", "reference"),
    "tpu": ("splash", "dot_product", "reference"),
    "gpu": ("dot_product", "reference"),  # cudnn only when asked for: it was not compared with the reference on a GPU
}


@dataclass(frozen=True)
class Choice:
    """An attention kernel, and the faster ones that were passed over, each with the reason."""

    name: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.name, *(f"not {name}, which {why}" for name, why in self.passed_over)])


def choose(c: ConfigDict, *, platform: str, any_mask: bool = False) -> Choice:
    """The kernel that the model's settings mean on a platform ("cpu", "gpu" or "tpu").

    Args:
        any_mask: there may be masks that are no patterns, as with objectives that order tokens themselves.
    """
    passed_over: list[tuple[str, str]] = []
    if c.attention == "cudnn" and platform != "gpu":
        passed_over.append((c.attention, "needs a GPU"))
    elif c.attention != "auto" and not (any_mask and c.attention in BY_PATTERN):
        return Choice(c.attention)
    elif platform == "gpu":
        passed_over.append(("cudnn", "is only taken when model.attention=cudnn asks for it"))
    asked = model_checks.beyond_scores(c)
    for name in FASTEST.get(platform, FASTEST["gpu"]):
        able = model_checks.KERNELS[name]
        lacking = [f"model.{key}={c[key]}" for key, needed in asked.items() if needed and key not in able]
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


def takes_patterns(c: ConfigDict, attend: Attend | None) -> bool:
    """Whether the model's attention needs no mask where there is a pattern."""
    return attend is not None or resolve(c, platform=platform()) in BY_PATTERN


class Attention(nn.Module):
    """Multi-head to multi-query attention (Ainslie et al. 2023). x_BLD -> y_BLD, and the cache when given one.

    Args of the call:
        x_BLD: inputs of the queries.
        keys_BMD: inputs of the keys; None: x itself, or for cross attention with a filled cache, the cache alone.
        view: mask, positions and biases for these queries and keys.
        starts_B: with a cache, the slot at which each row's new keys are written.
    """

    c: ConfigDict
    deterministic: bool = True
    cross: bool = False
    attend: Attend | None = None  # takes the place of a kernel where L = M; see `Transformer`

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
        if c.latent.kv_rank:
            q_BLHK = latent.queries(self, x_BLD)
        else:
            q_BLHK = Linear(c, (c.heads, size), "inward", bias=bias, name="query")(x_BLD)
        if c.qk_norm:
            q_BLHK = self._normalised(q_BLHK, "query_norm")
        if view.rotary is not None:
            q_BLHK = P.rotate(q_BLHK, view.rotary[0])
        if self.cross and keys_BMD is None:
            assert cache is not None
            return self._cached(q_BLHK, None, view, cache)
        else:
            keys_BMD = x_BLD if keys_BMD is None else keys_BMD
            if c.latent.kv_rank:
                k_BMGK, v_BMGK = latent.keys_and_values(self, keys_BMD)
            else:
                k_BMGK = Linear(c, (groups, size), "inward", bias=bias, name="key")(keys_BMD)
                v_BMGK = Linear(c, (groups, size), "inward", bias=bias, name="value")(keys_BMD)
            if c.qk_norm:
                k_BMGK = self._normalised(k_BMGK, "key_norm")
            if view.rotary is not None:
                k_BMGK = P.rotate(k_BMGK, view.rotary[1])
            if cache is not None:
                return self._cached(q_BLHK, {"key": k_BMGK, "value": v_BMGK}, view, cache, starts_B)
        q_BLHK, k_BMGK, v_BMGK = constrain(q_BLHK, "BLHK"), constrain(k_BMGK, "BMGK"), constrain(v_BMGK, "BMGK")
        bias_BHLM = view.bias_BHLM
        if view.distance_BLM is not None:
            q_BLHK, bias_BHLM = relative_scores(self, q_BLHK, view, k_BMGK.shape[1])
        y_BLHK = self._attend(q_BLHK, k_BMGK, v_BMGK, view, bias_BHLM)
        return self._out(checkpoint_name(y_BLHK, "context")), None

    def _cached(
        self,
        q_BLHK: jax.Array,
        new: Cache | None,
        view: View,
        cache: Cache,
        starts_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Write the new keys and values (B, L, G, K), if there are any, and attend to the cache with them."""
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
            q_BLHK, bias_BHLM = relative_scores(self, q_BLHK, view, k_BGMK.shape[2])
        if q_BLHK.shape[1] <= DECODE_QUERIES:
            scale, cap = attention_scale(self.c), self.c.attention_soft_cap
            y_BLHK = decode_attention(
                q_BLHK,
                k_BGMK,
                v_BGMK,
                view.mask(),
                scale=scale,
                soft_cap=cap,
                bias_BHLM=bias_BHLM,
                sinks_H=self._sinks(),
            )
        else:
            y_BLHK = self._attend(q_BLHK, k_BGMK.swapaxes(1, 2), v_BGMK.swapaxes(1, 2), view, bias_BHLM)
        return self._out(y_BLHK), cache

    def _normalised(self, x_BLHK: jax.Array, name: str) -> jax.Array:
        """Each head by itself, or all heads of a token as one vector."""
        norm = layers.Norm(self.c, "rms", name=name)
        if self.c.qk_norm_over == "head":
            return norm(x_BLHK)
        return norm(x_BLHK.reshape(*x_BLHK.shape[:2], -1)).reshape(x_BLHK.shape)

    def _sinks(self) -> jax.Array | None:
        """sinks_H, float32."""
        if not self.c.attention_sinks:
            return None
        sinks_H = self.param("sinks", nn.initializers.zeros, (self.c.heads,), layers.dtype_of(self.c.param_dtype))
        return sinks_H.astype(jnp.float32)

    def _out(self, y_BLHK: jax.Array) -> jax.Array:
        out = Linear(self.c, (self.c.width,), "outward", inputs=2, bias="out" in self.c.bias, name="out")
        if self.c.latent.kv_rank:
            y_BLHK = y_BLHK[..., : self.c.latent.value_size]
        return out(constrain(y_BLHK, "BLHK"))

    def _attend(
        self, q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, view: View, bias_BHLM: jax.Array | None
    ) -> jax.Array:
        c, scale = self.c, attention_scale(self.c)
        whole = q_BLHK.shape[1] == k_BMGK.shape[1]
        more: dict[str, Any] = {}
        if bias_BHLM is not None:
            more["bias_BHLM"] = bias_BHLM
        if c.attention_soft_cap:
            more["soft_cap"] = c.attention_soft_cap
        if c.attention_sinks:
            more["sinks_H"] = self._sinks()
        if c.attention_dropout and not self.deterministic:
            key = self.make_rng("dropout")
            more["dropout"] = lambda weights: layers.drop(weights, c.attention_dropout, key)
        if self.attend is not None and whole and not self.is_initializing():
            return self.attend(q_BLHK, k_BMGK, v_BMGK, view, scale=scale, **more)
        by_pattern = BY_PATTERN.get(resolve(c, platform=platform()))
        if by_pattern is not None and view.pattern is not None:
            return by_pattern(q_BLHK, k_BMGK, v_BMGK, view.pattern, scale=scale, **more)
        kernel = KERNELS[resolve(c, platform=platform(), any_mask=True)]
        return kernel(q_BLHK, k_BMGK, v_BMGK, view.mask(), causal=view.causal and whole, scale=scale, **more)
