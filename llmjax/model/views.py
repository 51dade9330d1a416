"""Who sees whom: the mask of attention and its positional terms, for each kind of attention layer.

One rule covers every architecture: a token sees the tokens of its own segment whose order is not above its own. Causal
models order by index, bidirectional ones give all tokens the same order, prefix and sequence-to-sequence models give the
first part one order, and a permutation is an order itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from llmjax.model import positions as P


@struct.dataclass
class Pattern:
    """A mask as a kernel can compute it: a query sees the keys of its own segment, with `causal` none after itself, with
    `window` those closer than that. With either, queries and keys are the same tokens in the same order (L = M).
    """

    queries_BL: jax.Array  # int32 segments
    keys_BM: jax.Array
    causal: bool = struct.field(pytree_node=False, default=False)
    window: int = struct.field(pytree_node=False, default=0)  # 0: none

    @property
    def banded(self) -> bool:
        """Whether the mask depends on places in the row, not on segments alone."""
        return self.causal or self.window > 0

    def mask(self) -> jax.Array:
        """mask_BLM, bool."""
        seen_BLM = self.keys_BM[:, None, :] == self.queries_BL[:, :, None]
        distance_LM = jnp.arange(seen_BLM.shape[1])[:, None] - jnp.arange(seen_BLM.shape[2])[None, :]
        if self.causal:
            seen_BLM &= (distance_LM >= 0)[None]
        if self.window:
            seen_BLM &= (jnp.abs(distance_LM) < self.window)[None]
        return seen_BLM


@struct.dataclass
class View:
    """What one kind of attention needs beside its inputs, for L queries, M keys and R slots of a ring (see `cache.py`)."""

    mask_BLM: jax.Array | None  # bool, true where a query may look; None: as the pattern says
    bias_BHLM: jax.Array | None = None  # float32, added to the scores (ALiBi, T5)
    rotary: tuple[P.Rotary, P.Rotary] | None = None  # for the queries and for the new keys
    distance_BLM: jax.Array | None = None  # int32, query's position minus key's (XLNet)
    differs_BLM: jax.Array | None = None  # bool, the key is of another type (XLNet)
    ring_BR: jax.Array | None = None  # int32, which new key goes to each slot of a ring; -1: the slot stays
    slot_B: jax.Array | None = None  # int32, where in the cache a row's only new key goes; beyond its end: nowhere
    pattern: Pattern | None = None  # the same mask, where a pattern can say it
    causal: bool = struct.field(pytree_node=False, default=False)  # a promise: L = M, nothing above the diagonal

    def mask(self) -> jax.Array:
        """mask_BLM, bool; kernels that take patterns do not need it."""
        if self.mask_BLM is None:
            assert self.pattern is not None
            return self.pattern.mask()
        return self.mask_BLM


@struct.dataclass
class Tokens:
    """Positions, segments, orders and types of some tokens, (B, L) int32 each; index is the place in the row.

    `until` makes rows that are trees: a key is seen by queries of lower order than that alone (see `Transformer`).
    """

    index: jax.Array
    positions: jax.Array
    segments: jax.Array
    orders: jax.Array
    types: jax.Array | None = None
    until: jax.Array | None = None


def make_tokens(
    ids_BL: jax.Array,
    positions_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
    orders_BL: jax.Array | None = None,
    types_BL: jax.Array | None = None,
    until_BL: jax.Array | None = None,
    *,
    bidirectional: bool,
    cached: bool = False,
) -> Tokens:
    """The tokens of a row. What is not given: positions 0, 1, ..., one segment, type 0, and orders by the direction.

    Args:
        cached: the row goes on from what is in a cache. There, as in a tree, positions say how far apart tokens are.
    """
    index_BL = jnp.broadcast_to(jnp.arange(ids_BL.shape[1])[None], ids_BL.shape)
    positions_BL = index_BL if positions_BL is None else positions_BL
    if orders_BL is None:
        orders_BL = jnp.zeros_like(index_BL) if bidirectional else positions_BL if cached else index_BL
    return Tokens(
        index=positions_BL if cached or until_BL is not None else index_BL,
        positions=positions_BL,
        segments=jnp.ones_like(ids_BL) if segments_BL is None else segments_BL,
        orders=orders_BL,
        types=jnp.zeros_like(ids_BL) if types_BL is None else types_BL,
        until=until_BL,
    )


def visible(queries: Tokens, keys: Tokens, *, strict: bool = False) -> jax.Array:
    """mask_BLM by segments and orders; `strict`: only keys of lower order (XLNet's query stream)."""
    orders, limit = keys.orders[:, None, :], queries.orders[:, :, None]
    seen = orders < limit if strict else orders <= limit
    if keys.until is not None:
        seen &= limit < keys.until[:, None, :]
    return seen & (keys.segments[:, None, :] == queries.segments[:, :, None])


@struct.dataclass
class Keys:
    """The M keys of a call, and which of them each of the L queries may look at."""

    tokens: Tokens
    mask_BLM: jax.Array
    new_BL: jax.Array | None = None  # positions of the keys that this call makes; None: it makes all of them
    ring_BR: jax.Array | None = None  # see `View`
    slot_B: jax.Array | None = None


def make_view(
    c: ConfigDict,
    kind: str,
    queries: Tokens,
    keys: Keys,
    *,
    bidirectional: bool,
    causal: bool = False,
    in_order: bool = False,
    by_pattern: bool = False,
    relative_embedding: Any = None,
) -> View:
    """The view of one kind of attention layer: "global", "local", or "nope", which is global without rotary positions.

    Args:
        bidirectional: whether T5's buckets tell keys that come later apart.
        causal: the promise of `View.causal`.
        in_order: the promise that queries and keys are the same tokens, and see each other by their places in the row
            (`causal`) or all their own segment.
        by_pattern: the layers can do without the mask itself, given a pattern.
        relative_embedding: (buckets, H), T5's table.
    """
    local, found = kind == "local", keys.tokens
    distance_BLM = queries.index[:, :, None] - found.index[:, None, :]
    bias = None
    if c.position == "alibi":
        bias = P.alibi_bias(distance_BLM, c, keys_BM=found.positions)
    elif c.position == "t5":
        buckets_BLM = P.t5_buckets(distance_BLM, c, bidirectional=bidirectional)
        # float32 before the lookup, whose gradient is a sum over all pairs of tokens.
        bias = jnp.take(relative_embedding.astype(jnp.float32), buckets_BLM, axis=0).transpose(0, 3, 1, 2)
    rotary = None
    if c.position == "rotary" and kind != "nope":
        q = P.rotary_table(queries.positions, c, local=local)
        rotary = (q, q if keys.new_BL is None else P.rotary_table(keys.new_BL, c, local=local))
    xlnet = c.position == "xlnet"
    differs = None
    if xlnet and queries.types is not None and found.types is not None:
        differs = queries.types[:, :, None] != found.types[:, None, :]
    pattern = Pattern(queries.segments, found.segments, causal, c.window if local else 0) if in_order else None
    mask_BLM: jax.Array | None = keys.mask_BLM
    if pattern is not None and by_pattern:
        mask_BLM = None
    elif local:
        mask_BLM = keys.mask_BLM & (jnp.abs(distance_BLM) < c.window)
    return View(
        mask_BLM=mask_BLM,
        bias_BHLM=bias,
        rotary=rotary,
        distance_BLM=distance_BLM if xlnet else None,
        differs_BLM=differs,
        ring_BR=keys.ring_BR,
        slot_B=keys.slot_B,
        pattern=pattern,
        causal=causal,
    )
