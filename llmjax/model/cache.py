"""What a network carries from one call to the next: the cache of decoding, and the memory of segment recurrence.

Both are trees by section of the stack and, where a section repeats several kinds of layers, by place in its period;
every array has the layers in front.

Global attention keeps the key of position p in slot p. Local attention sees no further back than its window, so it has
a ring of that many slots, p in slot p mod R: what decoding carries does not grow with the text. New keys come behind
the ring while their call looks at them, because the first of many queries still needs what the last new key replaces.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llmjax import config
from llmjax.model import recurrent
from llmjax.model.block import ATTENTION, sections
from llmjax.model.layers import dtype_of
from llmjax.model.views import Keys, Tokens, visible

Cache = dict[str, Any]


def init_cache(c: ConfigDict, *, batch: int, length: int, source_length: int = 0) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens (and `source_length` of an encoder's).

    Attention layers keep keys and values (N, B, M, G, K) in the compute type, local ones of a window at most; recurrent
    ones their state.
    """

    def layer(kind: str) -> Any:
        if kind not in ATTENTION:
            return recurrent.init_state(c, kind, batch)

        def pair(prefix: str, places: int) -> Any:
            shape = (batch, places, c.kv_heads or c.heads, config.head_size(c))
            return {f"{prefix}{name}": jnp.zeros(shape, dtype_of(c.dtype)) for name in ("key", "value")}

        slots = _ring_size(c, length) if kind == "local" else length
        return pair("", slots) | (pair("cross_", source_length) if c.encoder_layers else {})

    slots_BM = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    cache = {"slots": slots_BM, "layers": _per_layer(c, layer)}
    return cache | ({"source": jnp.zeros((batch, source_length), jnp.int32)} if c.encoder_layers else {})


def init_memory(c: ConfigDict, *, batch: int, length: int) -> dict[str, Any]:
    """An empty memory of the last `length` tokens, which nothing sees."""
    hidden_BMD = jnp.zeros((batch, length, c.width), dtype_of(c.dtype))
    return {"segments": jnp.full((batch, length), -1, jnp.int32), "layers": _per_layer(c, lambda _: hidden_BMD)}


def cached_keys(c: ConfigDict, cache: Cache, tokens: Tokens, kind: str, *, ordered: bool) -> Keys:
    """What queries find in the cache and behind it: those at position p see the slots of positions 0 to p.

    With `ordered`, at the start of the text, they see each other as their segments and orders say.
    """
    whole_BM, new_BL = cache["slots"], tokens.positions
    slots_BM = whole_BM if kind == "global" else _ring(c, whole_BM, new_BL[:, :1] - 1)
    held_BM = slots_BM if kind == "global" else jnp.concatenate([slots_BM, new_BL], axis=1)
    ones_BM = jnp.ones_like(held_BM)
    keys = Tokens(held_BM, held_BM, ones_BM, held_BM, jnp.zeros_like(held_BM))
    mask_BLM = (held_BM[:, None, :] <= new_BL[:, :, None]) & (held_BM[:, None, :] >= 0)
    if ordered:
        first = 0 if kind == "global" else slots_BM.shape[1]
        shown_BLL = visible(tokens, tokens)
        mask_BLM = jnp.zeros_like(mask_BLM).at[:, :, first : first + new_BL.shape[1]].set(shown_BLL)
    if kind == "global":
        return Keys(keys, mask_BLM, new_BL)
    last_B1 = new_BL[:, :1] + jnp.sum(tokens.segments > 0, axis=1, keepdims=True) - 1
    return Keys(keys, mask_BLM, new_BL, jnp.maximum(_ring(c, whole_BM, last_B1) - new_BL[:, :1], -1))


def _ring_size(c: ConfigDict, length: int) -> int:
    return min(c.window, length)


def _ring(c: ConfigDict, whole_BM: jax.Array, last_B1: jax.Array) -> jax.Array:
    """(B, R): the position in each slot of a ring when `last` was the last one written; negative: none yet."""
    slots_BR = whole_BM[:, : _ring_size(c, whole_BM.shape[1])]
    return last_B1 - (last_B1 - slots_BR) % slots_BR.shape[1]


def by_section(c: ConfigDict, **trees: Any) -> dict[str, Any]:
    """Trees by section and place, such as caches, as `run_stack` takes them: with the name below the place."""
    trees = {name: tree for name, tree in trees.items() if tree is not None}

    def named(section: str, place: str = "") -> dict[str, Any]:
        return {name: tree[section][place] if place else tree[section] for name, tree in trees.items()}

    return {
        s.name: {str(i): named(s.name, str(i)) for i in range(len(s.kinds))} if len(s.kinds) > 1 else named(s.name)
        for s in sections(c)
    }


def pick(c: ConfigDict, states: dict[str, Any], name: str) -> dict[str, Any]:
    """The inverse of `by_section` for one name."""
    return {
        s.name: {place: state[name] for place, state in states[s.name].items()}
        if len(s.kinds) > 1
        else states[s.name][name]
        for s in sections(c)
    }


def _per_layer(c: ConfigDict, make: Callable[[str], Any]) -> dict[str, Any]:
    """A tree by section and place with `make(kind)` for each, repeated over a leading layer dimension."""

    def stacked(kind: str, repeats: int) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (repeats, *x.shape)), make(kind))

    return {
        s.name: {str(i): stacked(kind, s.repeats) for i, (kind, _) in enumerate(s.kinds)}
        if len(s.kinds) > 1
        else stacked(s.kinds[0][0], s.repeats)
        for s in sections(c)
    }
