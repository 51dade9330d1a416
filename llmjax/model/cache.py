"""What a network carries from one call to the next: the cache of decoding, and the memory of segment recurrence.

Both are trees by stack of the stack and, where a stack repeats several kinds of layers, by place in its period;
every array has the layers in front. `stacks.unstack` gives each layer its own arrays instead, which decoding wants: then
a step writes one key a layer in place, where a scan over layers would copy the whole cache.

Keys and values are (B, G, M, K): each group's keys lie together, so one query's scores are a product of a vector and a
matrix where they lie (on CPU 12 times faster than with the groups inside). Global attention keeps the key of position p
in slot p. Local attention sees no further back than its window, so it has a ring of that many slots, p in slot p mod R:
what decoding carries does not grow with the text. One new key takes its slot at once; several come behind the ring
while their call looks at them, because the first of many queries still needs what the last new key replaces.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config.model_checks import ATTENTION
from llmjax.model import recurrent
from llmjax.model.layers import dtype_of
from llmjax.model.stacks import Stack, layer_stacks, per_layer
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


def init_memory(c: ConfigDict, *, batch: int, length: int) -> dict[str, Any]:
    """An empty memory of the last `length` tokens, which nothing sees."""
    hidden_BMD = jnp.zeros((batch, length, c.width), dtype_of(c.dtype))
    return {"segments": jnp.full((batch, length), -1, jnp.int32), "layers": per_layer(c, lambda _: hidden_BMD)}


def cached_keys(c: ConfigDict, cache: Cache, tokens: Tokens, kind: str, *, ordered: bool) -> Keys:
    """What queries find in the cache and behind it: those at position p see the slots of positions 0 to p.

    With `ordered`, at the start of the text, they see each other as their segments and orders say.
    """
    whole_BM, new_BL = cache["slots"], tokens.positions
    last_B1 = new_BL[:, :1] + jnp.sum(tokens.segments > 0, axis=1, keepdims=True) - 1
    alone = new_BL.shape[1] == 1  # its key is written before it looks, so that there is nothing to put behind the ring
    slots_BM = whole_BM if kind == "global" else _ring(c, whole_BM, last_B1 if alone else new_BL[:, :1] - 1)
    behind = kind == "local" and not alone
    held_BM = jnp.concatenate([slots_BM, new_BL], axis=1) if behind else slots_BM
    ones_BM = jnp.ones_like(held_BM)
    keys = Tokens(held_BM, held_BM, ones_BM, held_BM, jnp.zeros_like(held_BM))
    mask_BLM = (held_BM[:, None, :] <= new_BL[:, :, None]) & (held_BM[:, None, :] >= 0)
    if alone:  # padding is written nowhere
        slot_B1 = jnp.where(tokens.segments > 0, new_BL % slots_BM.shape[1], slots_BM.shape[1])
        return Keys(keys, mask_BLM, new_BL, slot_B=slot_B1[:, 0])
    if ordered:
        first = slots_BM.shape[1] if behind else 0
        shown_BLL = visible(tokens, tokens)
        mask_BLM = jnp.zeros_like(mask_BLM).at[:, :, first : first + new_BL.shape[1]].set(shown_BLL)
    if kind == "global":
        return Keys(keys, mask_BLM, new_BL)
    return Keys(keys, mask_BLM, new_BL, jnp.maximum(_ring(c, whole_BM, last_B1) - new_BL[:, :1], -1))


def _ring_size(c: ConfigDict, length: int) -> int:
    return min(c.window, length)


def _ring(c: ConfigDict, whole_BM: jax.Array, last_B1: jax.Array) -> jax.Array:
    """(B, R): the position in each slot of a ring when `last` was the last one written; negative: none yet."""
    slots_BR = whole_BM[:, : _ring_size(c, whole_BM.shape[1])]
    return last_B1 - (last_B1 - slots_BR) % slots_BR.shape[1]


def by_stack(c: ConfigDict, **trees: Any) -> dict[str, Any]:
    """Trees by stack and place, such as caches, as `run_stacks` takes them: with the name below the place.

    A stack's tree has the layers in front of its arrays, or is a tuple of trees, one for each layer or period.
    """
    trees = {name: tree for name, tree in trees.items() if tree is not None}

    def named(stack: Stack, parts: dict[str, Any]) -> dict[str, Any]:
        if len(stack.kinds) == 1:
            return parts
        return {str(i): {name: part[str(i)] for name, part in parts.items()} for i in range(len(stack.kinds))}

    found: dict[str, Any] = {}
    for s in layer_stacks(c):
        own = {name: tree[s.name] for name, tree in trees.items()}
        if any(isinstance(part, tuple) for part in own.values()):
            found[s.name] = tuple(named(s, {name: part[i] for name, part in own.items()}) for i in range(s.repeats))
        else:
            found[s.name] = named(s, own)
    return found


def pick(c: ConfigDict, states: dict[str, Any], name: str) -> dict[str, Any]:
    """The inverse of `by_stack` for one name."""

    def picked(stack: Stack, state: Any) -> Any:
        if isinstance(state, tuple):
            return tuple(picked(stack, one) for one in state)
        if len(stack.kinds) > 1:
            return {place: part[name] for place, part in state.items()}
        return state[name]

    return {s.name: picked(s, states[s.name]) for s in layer_stacks(c)}
