"""Decoding's layout: every layer has arrays of its own, where training stacks them with the layers in front.

A scan over layers reads its parameters and its cache through slices, which cost as much as a small step computes, and puts
the new cache together again as a copy. With arrays of its own a layer writes one key in place. For many tokens at a time,
as in reading a prompt, that does not matter, and stacked layers compile faster.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llmjax.model.block import Inputs, Layer
from llmjax.model.stacks import Stack, layer_stacks
from llmjax.model.transformer import Transformer


def unstack(c: ConfigDict, tree: Any) -> dict[str, Any]:
    """Parameters, or a cache's layers, with a tuple of each layer's own arrays for every stack."""

    def parts(stack: Stack) -> tuple[Any, ...]:
        return tuple(jax.tree.map(lambda x, i=i: x[i], tree[stack.name]) for i in range(stack.repeats))

    return {**tree, **{stack.name: parts(stack) for stack in layer_stacks(c)}}


def restack(c: ConfigDict, tree: Any) -> dict[str, Any]:
    """The inverse of `unstack`."""
    return {
        **tree,
        **{s.name: jax.tree.map(lambda *layers: jnp.stack(layers), *tree[s.name]) for s in layer_stacks(c)},
    }


def unstacked_module(module: Transformer) -> Transformer:
    """The same network for parameters and caches that are unstacked."""
    return module.clone(run_layers=one_by_one)


def one_by_one(
    stack: Stack,
    layer: Layer,
    params: Any,
    x_BLD: jax.Array,
    inputs: Inputs,
    state: dict[str, Any],
    key: jax.Array | None,
) -> tuple[jax.Array, dict[str, Any], dict[str, Any]] | None:
    """`block.RunLayers` for layers that have arrays of their own; an encoder's are stacked, and left to the scan."""
    if not isinstance(params, tuple):
        return None
    made: list[dict[str, Any]] = []
    for i, own in enumerate(params):
        own_state = jax.tree.map(lambda x, i=i: x[i], state, is_leaf=lambda x: isinstance(x, tuple))
        x_BLD, new_state, _ = layer(own, x_BLD, inputs, own_state, key)
        made.append(new_state)
    return x_BLD, {name: tuple(one[name] for one in made) for name in made[0]}, {}
