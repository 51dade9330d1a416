"""The parameters that have a row for each token, for a tokenizer that was extended (`data/tokenizer_extension.py`).

A new token's row is the mean of the rows of the tokens that its text was made of before, in the embedding and in an output
head of its own. The rows that pad the vocabulary are the mean of all: their logits are then no larger than others'.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.data.tokenizer_extension import Extension

DIMENSION = {"embedding": 0, "head/kernel": 1, "head_bias": 0}  # path -> the dimension that numbers the tokens


def stored(abstract: Any, *, rows: int) -> Any:
    """The abstract parameters as a checkpoint of a vocabulary of `rows` has them; whole where they cannot be divided."""

    def of(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if path not in DIMENSION:
            return leaf
        shape = list(leaf.shape)
        shape[DIMENSION[path]] = rows
        place = leaf.sharding
        try:
            place.shard_shape(tuple(shape))
        except ValueError:
            place = NamedSharding(place.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=place)

    return _map(of, abstract)


def extended(params: Any, abstract: Any, extension: Extension) -> Any:
    """Parameters of the form `stored` in the shapes and places of `abstract`."""
    like = traverse_util.flatten_dict(abstract, sep="/")

    def of(path: str, old: jax.Array) -> jax.Array:
        if path not in DIMENSION:
            return old
        grow = partial(_grow, rows=like[path].shape[DIMENSION[path]], dimension=DIMENSION[path], extension=extension)
        return jax.jit(grow, out_shardings=like[path].sharding)(old)

    return _map(of, params)


def _grow(old: jax.Array, *, rows: int, dimension: int, extension: Extension) -> jax.Array:
    """The rows of old tokens, of new ones and of padding."""
    old_VX = jnp.moveaxis(old, dimension, 0).astype(jnp.float32)
    sizes = np.array([len(ids) for ids in extension.parts])
    ids = np.concatenate([np.array(ids, np.int32) for ids in extension.parts])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    sums = jax.ops.segment_sum(old_VX[ids], owners, num_segments=len(sizes))
    new_VX = sums / sizes.reshape(-1, *(1,) * (old_VX.ndim - 1))
    kept_VX = old_VX[: extension.base_size]
    padding = rows - len(kept_VX) - len(sizes)
    padding_VX = jnp.broadcast_to(kept_VX.mean(axis=0, keepdims=True), (padding, *kept_VX.shape[1:]))
    return jnp.moveaxis(jnp.concatenate([kept_VX, new_VX, padding_VX]), 0, dimension).astype(old.dtype)


def _map(of: Callable[[str, Any], Any], tree: Any) -> Any:
    flat = traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict({path: of(path, leaf) for path, leaf in flat.items()}, sep="/")
