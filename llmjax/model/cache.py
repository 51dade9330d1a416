"""What a network carries from one call to the next: the cache of decoding, and the memory of segment recurrence.

Both are trees by section of the stack and, where a section repeats several kinds of layers, by place in its period;
every array has the layers in front.
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

Cache = dict[str, Any]


def init_cache(c: ConfigDict, *, batch: int, length: int, source_length: int = 0) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens (and `source_length` of an encoder's).

    Attention layers keep keys and values (N, B, M, G, K) in the compute type, recurrent ones their state.
    """

    def layer(kind: str) -> Any:
        if kind not in ATTENTION:
            return recurrent.init_state(c, kind, batch)

        def pair(prefix: str, places: int) -> Any:
            shape = (batch, places, c.kv_heads or c.heads, config.head_size(c))
            return {f"{prefix}{name}": jnp.zeros(shape, dtype_of(c.dtype)) for name in ("key", "value")}

        return pair("", length) | (pair("cross_", source_length) if c.encoder_layers else {})

    slots_BM = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    cache = {"slots": slots_BM, "layers": _per_layer(c, layer)}
    return cache | ({"source": jnp.zeros((batch, source_length), jnp.int32)} if c.encoder_layers else {})


def init_memory(c: ConfigDict, *, batch: int, length: int) -> dict[str, Any]:
    """An empty memory of the last `length` tokens, which nothing sees."""
    hidden_BMD = jnp.zeros((batch, length, c.width), dtype_of(c.dtype))
    return {"segments": jnp.full((batch, length), -1, jnp.int32), "layers": _per_layer(c, lambda _: hidden_BMD)}


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
