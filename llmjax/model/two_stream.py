"""What only Transformer-XL and XLNet have: a memory, queries that do not see their own token, and relative scores.

Segment recurrence (Dai et al. 2019): the keys of a layer begin with the inputs that it had in the part of the text before,
the memory. Two streams (Yang et al. 2019): behind the tokens of a row stand queries, each of which asks what is at a place
without seeing it; the tokens are keys for both, the queries for none.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax import config
from llmjax.model import positions as P
from llmjax.model.init import initializer
from llmjax.model.layers import Linear, dtype_of
from llmjax.model.parametrization import attention_scale
from llmjax.model.stacks import per_layer
from llmjax.model.views import Keys, Tokens, View, visible


def init_memory(c: ConfigDict, *, batch: int, length: int) -> dict[str, Any]:
    """An empty memory of the last `length` tokens, which no token sees."""
    hidden_BMD = jnp.zeros((batch, length, c.width), dtype_of(c.dtype))
    return {"segments": jnp.full((batch, length), -1, jnp.int32), "layers": per_layer(c, lambda _: hidden_BMD)}


def remember(memory_BMD: jax.Array, x_BLD: jax.Array) -> jax.Array:
    """A layer's memory after the tokens x, as long as before. No gradient flows into it (Dai et al. 2019)."""
    seen = jnp.concatenate([memory_BMD, x_BLD], axis=1)
    return jax.lax.stop_gradient(seen[:, seen.shape[1] - memory_BMD.shape[1] :])


def new_memory(memory: dict[str, Any], segments_BL: jax.Array, layers: Any) -> dict[str, Any]:
    """The memory after a call: `layers` are the layers' own, as `remember` made them."""
    return {"segments": remember(memory["segments"], segments_BL), "layers": layers}


def with_memory(memory: dict[str, Any], tokens: Tokens, keys: Keys) -> tuple[Tokens, Keys]:
    """Tokens and keys when the keys begin with a memory, of which tokens see what is of their own segment."""
    before_BM = memory["segments"]
    zeros_BM = jnp.zeros_like(before_BM)
    count = before_BM.shape[1]
    tokens = dataclasses.replace(tokens, index=tokens.index + count)
    first = Tokens(
        index=jnp.broadcast_to(jnp.arange(count)[None], before_BM.shape),
        positions=zeros_BM,
        segments=before_BM,
        orders=jnp.full_like(before_BM, jnp.iinfo(jnp.int32).min),
        types=None if tokens.types is None else zeros_BM,
    )
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, tokens)
    seen_BLM = before_BM[:, None, :] == tokens.segments[:, :, None]
    return tokens, Keys(both, jnp.concatenate([seen_BLM, keys.mask_BLM], axis=2), both.positions)


def with_queries(
    module: nn.Module, queries: dict[str, jax.Array], x_BLD: jax.Array, tokens: Tokens, keys: Keys
) -> tuple[jax.Array, Tokens, Keys]:
    """The residual stream, tokens and keys with the queries behind the tokens; their embedding is a parameter of `module`."""
    c = module.c
    start = initializer(c, "embedding")
    start_D = module.param("query_embedding", start, (c.width,), dtype_of(c.param_dtype)).astype(dtype_of(c.dtype))
    at_BQ = queries["positions"]
    assert tokens.types is not None
    asked = Tokens(
        index=at_BQ + tokens.index[:, :1],
        positions=jnp.take_along_axis(tokens.positions, at_BQ, axis=1),
        segments=queries["segments"],
        orders=queries["orders"],
        types=queries.get("types", jnp.take_along_axis(tokens.types, at_BQ, axis=1)),
    )
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), tokens, asked)
    mask_BLM = jnp.concatenate([keys.mask_BLM, visible(asked, keys.tokens, strict=True)], axis=1)
    start_BQD = jnp.broadcast_to(start_D[None, None], (*at_BQ.shape, c.width))
    return jnp.concatenate([x_BLD, start_BQD], axis=1), both, Keys(keys.tokens, mask_BLM, keys.tokens.positions)


def relative_scores(module: nn.Module, q_BLHK: jax.Array, view: View, keys: int) -> tuple[jax.Array, jax.Array]:
    """The attention scores of Dai et al. 2019 and Yang et al. 2019: (q + u) k + (q + v) r + (q + s) e.

    Returns q + u, and the two other terms, scaled, as a bias (B, H, L, M) float32. The vectors are parameters of `module`.
    """
    c, size = module.c, config.head_size(module.c)
    dtype, shape = dtype_of(c.dtype), (c.heads, size)

    def vectors(name: str, *more: int) -> jax.Array:
        return module.param(name, initializer(c, "relative"), (*more, *shape), dtype_of(c.param_dtype)).astype(dtype)

    assert view.distance_BLM is not None
    table_RD = P.sinusoids(jnp.arange(1 - keys, keys), c.width, interleaved=False).astype(dtype)
    r_RHK = Linear(c, shape, "inward", name="position")(table_RD)
    scores_BHLR = jnp.einsum("blhk,rhk->bhlr", q_BLHK + vectors("position_bias")[None, None], r_RHK)
    bias_BHLM = P.by_distance(scores_BHLR, view.distance_BLM)
    if c.types:
        types_2HK = vectors("type_embedding", 2)
        pair_BHL2 = jnp.einsum("blhk,thk->bhlt", q_BLHK + vectors("type_bias")[None, None], types_2HK)
        assert view.differs_BLM is not None
        same, other = pair_BHL2[..., :1], pair_BHL2[..., 1:]
        bias_BHLM = bias_BHLM + jnp.where(view.differs_BLM[:, None], other, same)
    return q_BLHK + vectors("content_bias")[None, None], bias_BHLM.astype(jnp.float32) * attention_scale(c)
