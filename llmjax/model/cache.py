"""The cache of decoding: what a network carries from one call to the next.

A tree by stack of layers and by place in its pattern (`stacks.per_layer`); every array has the layers in front.

Keys and values are (B, G, M, K). Each group's keys are contiguous, so one query's scores are a product of a vector and a
matrix in place (on CPU 12 times faster than with the groups inside). Global attention keeps the key of position p in slot
p. Local attention sees no further back than its window, so it has a ring of R slots, p in slot p mod R, which does not
grow with the text. A single new key takes its slot at once. Several stand behind the ring during their call, because the
first of many queries still needs the key that the last new one replaces.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config.model_checks import ATTENTION
from llmjax.model import recurrent
from llmjax.model.layers import dtype_of
from llmjax.model.per_device import platform
from llmjax.model.stacks import per_layer
from llmjax.model.views import Keys, Tokens, visible

Cache = dict[str, Any]


def init_cache(c: ConfigDict, *, batch: int, length: int, source_length: int = 0) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens (and `source_length` of an encoder's).

    Attention layers keep keys and values (N, B, G, M, K) in the compute type, local ones of a window at most; recurrent
    ones their state.
    """

    def layer(kind: str) -> Any:
        if kind not in ATTENTION:
            return recurrent.init_state(c, kind, batch)

        def pair(prefix: str, places: int) -> Any:
            shape = (batch, c.kv_heads or c.heads, places, config.head_size(c))
            return {f"{prefix}{name}": jnp.zeros(shape, dtype_of(c.dtype)) for name in ("key", "value")}

        slots = _ring_size(c, length) if kind == "local" else length
        return pair("", slots) | (pair("cross_", source_length) if c.encoder_layers else {})

    slots_BM = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    cache = {"slots": slots_BM, "layers": per_layer(c, layer)}
    return cache | ({"source": jnp.zeros((batch, source_length), jnp.int32)} if c.encoder_layers else {})


def cached_keys(c: ConfigDict, cache: Cache, tokens: Tokens, kind: str, *, ordered: bool) -> Keys:
    """The keys in the cache and behind it: a query at position p sees the slots of positions 0 to p.

    With `ordered`, at the start of the text, they see each other as their segments and orders say.
    """
    whole_BM, new_BL = cache["slots"], tokens.positions
    last_B1 = new_BL[:, :1] + jnp.sum(tokens.segments > 0, axis=1, keepdims=True) - 1
    alone = new_BL.shape[1] == 1  # its key is written before attention, so nothing stands behind the ring
    slots_BM = whole_BM if kind != "local" else _ring(c, whole_BM, last_B1 if alone else new_BL[:, :1] - 1)
    behind = kind == "local" and not alone
    held_BM = jnp.concatenate([slots_BM, new_BL], axis=1) if behind else slots_BM
    ones_BM = jnp.ones_like(held_BM)
    keys = Tokens(held_BM, held_BM, ones_BM, held_BM, jnp.zeros_like(held_BM))
    mask_BLM = (held_BM[:, None, :] <= new_BL[:, :, None]) & (held_BM[:, None, :] >= 0)
    if alone:  # padding is not written
        slot_B1 = jnp.where(tokens.segments > 0, new_BL % slots_BM.shape[1], slots_BM.shape[1])
        return Keys(keys, mask_BLM, new_BL, slot_B=slot_B1[:, 0])
    if ordered:
        first = slots_BM.shape[1] if behind else 0
        shown_BLL = visible(tokens, tokens)
        mask_BLM = jnp.zeros_like(mask_BLM).at[:, :, first : first + new_BL.shape[1]].set(shown_BLL)
    if kind != "local":
        return Keys(keys, mask_BLM, new_BL)
    return Keys(keys, mask_BLM, new_BL, jnp.maximum(_ring(c, whole_BM, last_B1) - new_BL[:, :1], -1))


def _ring_size(c: ConfigDict, length: int) -> int:
    return min(c.window, length)


def _ring(c: ConfigDict, whole_BM: jax.Array, last_B1: jax.Array) -> jax.Array:
    """(B, R): the position in each slot of a ring when `last` was the last one written; negative: none yet."""
    slots_BR = whole_BM[:, : _ring_size(c, whole_BM.shape[1])]
    return last_B1 - (last_B1 - slots_BR) % slots_BR.shape[1]


def write_slice(cache_BGMK: jax.Array, new_BGLK: jax.Array, starts_B: jax.Array) -> jax.Array:
    """Put L new entries of each row at its own slot."""
    return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (0, start, 0)))(
        cache_BGMK, new_BGLK, starts_B
    )


def write_slot(cache_BGMK: jax.Array, new_BG1K: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Put one new entry of each row in its slot; a slot beyond the last drops it."""
    rows_B, new_BGK = jnp.arange(cache_BGMK.shape[0]), new_BG1K[:, :, 0].astype(cache_BGMK.dtype)
    if len(rows_B) == 1 and platform() == "cpu":
        # XLA turns a scatter of one entry into an update that it fuses with each of its two readers, which copies the
        # whole cache twice. A second entry, which is dropped, keeps it a scatter in place.
        rows_B, new_BGK = jnp.zeros(2, jnp.int32), jnp.repeat(new_BGK, 2, axis=0)
        slot_B = jnp.concatenate([slot_B, jnp.full(1, cache_BGMK.shape[2], slot_B.dtype)])
    return cache_BGMK.at[rows_B, :, slot_B].set(new_BGK, mode="drop")


def write_ring(ring_BGRK: jax.Array, new_BGLK: jax.Array, from_BR: jax.Array) -> jax.Array:
    """Put in each slot of a ring the new entry of the given number; -1 leaves the slot as it is."""
    chosen_BGRK = jnp.take_along_axis(new_BGLK, jnp.maximum(from_BR, 0)[:, None, :, None], axis=2)
    return jnp.where(from_BR[:, None, :, None] >= 0, chosen_BGRK.astype(ring_BGRK.dtype), ring_BGRK)
