"""The arrays of an engine: a fixed number of slots, each with the cache and the settings of one text.

Letters beside the project's: `R` rows of a call of prefill, `J` ids that end a text, `W` words of 32 bits, one bit a token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.errors import UserError
from llmjax.infer.request import STOP_IDS
from llmjax.infer.sample import Sampling, settings
from llmjax.infer.unstacked import unstack
from llmjax.model.cache import init_cache
from llmjax.model.transformer import Transformer
from llmjax.parallel.mesh import ROWS


@struct.dataclass
class Slots:
    """Arrays of shape (B, ...) for B slots. `caches` has one cache for the model and one for a draft model."""

    caches: tuple[Any, ...]
    token_B: jax.Array  # int32, fed next
    position_B: jax.Array  # int32, its position
    active_B: jax.Array  # bool, whether there is a text to write
    left_B: jax.Array  # int32, how many tokens may still be written
    key_B: jax.Array  # random keys; the position of each token is folded in
    adapter_B: jax.Array  # int32, the number of its adapter (adapters.py)
    sampling: Sampling
    stop_BJ: jax.Array  # int32, ids that end the text; -1: none
    bias_BV: jax.Array  # float32, added to the logits; -inf for ids that are never written
    seen_BV: jax.Array  # bool, the ids of the prompt, in rows with a repetition penalty
    counts_BV: jax.Array  # int32, how often each id was written
    history_BM: jax.Array  # int32, the tokens at positions 0, 1, ...; (B, 0) without prompt lookup


@struct.dataclass
class Row:
    """The values that `place` writes into a slot: as in `Slots`, without B and without the cache."""

    token: Any
    position: Any
    left: Any
    seed: Any
    number: Any
    adapter: Any
    sampling: Sampling  # of one row, arrays (1,)
    stop_J: Any
    bias_V: Any
    seen_V: Any
    history_M: Any


def empty(
    modules: tuple[Transformer, ...], *, count: int, length: int, source_length: int = 0, history: bool = False
) -> Slots:
    """Empty slots for `count` texts of up to `length` tokens."""

    def cache(module: Transformer) -> Any:
        made = init_cache(module.c, batch=count, length=length, source_length=source_length)
        return {**made, "layers": unstack(module.c, made["layers"])}

    V = modules[0].c.vocab_size
    zeros_B = jnp.zeros(count, jnp.int32)
    return Slots(
        caches=tuple(cache(module) for module in modules),
        token_B=zeros_B,
        position_B=zeros_B,
        active_B=jnp.zeros(count, bool),
        left_B=zeros_B,
        key_B=jax.vmap(jax.random.key)(zeros_B),
        adapter_B=zeros_B,
        sampling=jax.tree.map(jnp.asarray, settings(count)),
        stop_BJ=jnp.full((count, STOP_IDS), -1, jnp.int32),
        bias_BV=jnp.zeros((count, V), jnp.float32),
        seen_BV=jnp.zeros((count, V), bool),
        counts_BV=jnp.zeros((count, V), jnp.int32),
        history_BM=jnp.zeros((count, length if history else 0), jnp.int32),
    )


def place(slots: Slots, slot: jax.Array, row: Row) -> Slots:
    """Begin a text in a slot whose cache has all of the prompt but the last token."""

    def put(array: jax.Array, value: Any) -> jax.Array:
        return array.at[slot].set(value)

    key = jax.random.fold_in(jax.random.key(row.seed), row.number)
    return dataclasses.replace(
        slots,
        token_B=put(slots.token_B, row.token),
        position_B=put(slots.position_B, row.position),
        active_B=put(slots.active_B, True),
        left_B=put(slots.left_B, row.left),
        key_B=put(slots.key_B, key),
        adapter_B=put(slots.adapter_B, row.adapter),
        sampling=jax.tree.map(lambda all_B, one: put(all_B, one[0]), slots.sampling, row.sampling),
        stop_BJ=put(slots.stop_BJ, row.stop_J),
        bias_BV=put(slots.bias_BV, row.bias_V),
        seen_BV=put(slots.seen_BV, row.seen_V),
        counts_BV=put(slots.counts_BV, 0),
        history_BM=put(slots.history_BM, row.history_M),
    )


def advance(slots: Slots, tokens_LB: jax.Array, given_LB: jax.Array) -> Slots:
    """The slots after a step wrote the tokens that are given. In each row the given ones come first."""
    rows_B = jnp.arange(tokens_LB.shape[1])
    count_B = jnp.sum(given_LB, axis=0)
    last_B = jnp.take_along_axis(tokens_LB, jnp.maximum(count_B - 1, 0)[None], axis=0)[0]
    counts_BV, history_BM, ended_B = slots.counts_BV, slots.history_BM, jnp.zeros_like(slots.active_B)
    for i in range(tokens_LB.shape[0]):
        counts_BV = counts_BV.at[rows_B, tokens_LB[i]].add(given_LB[i].astype(jnp.int32))
        if history_BM.shape[1]:
            at_B = jnp.where(given_LB[i], slots.position_B + 1 + i, history_BM.shape[1])
            history_BM = history_BM.at[rows_B, at_B].set(tokens_LB[i], mode="drop")
        ended_B |= given_LB[i] & ends(slots, tokens_LB[i])
    left_B = slots.left_B - count_B
    return dataclasses.replace(
        slots,
        token_B=jnp.where(count_B > 0, last_B, slots.token_B),
        position_B=slots.position_B + count_B,
        left_B=left_B,
        active_B=slots.active_B & ~ended_B & (left_B > 0),
        counts_BV=counts_BV,
        history_BM=history_BM,
    )


def ends(slots: Slots, token_B: jax.Array) -> jax.Array:
    """Whether each token ends the text of its row."""
    return jnp.any(token_B[:, None] == slots.stop_BJ, axis=1)


def take_row(caches: tuple[Any, ...], slot: jax.Array) -> tuple[Any, ...]:
    """A copy of the caches of one slot."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), caches)


def put_row(slots: Slots, slot: jax.Array, row: tuple[Any, ...]) -> Slots:
    """The slots with such a copy in one of them."""
    write = jax.lax.dynamic_update_index_in_dim
    return dataclasses.replace(slots, caches=jax.tree.map(lambda x, one: write(x, one, slot, 0), slots.caches, row))


def copy_row(slots: Slots, source: jax.Array, slot: jax.Array) -> Slots:
    """The slots with the caches of one slot copied to another."""
    return put_row(slots, slot, take_row(slots.caches, source))


def shardings(slots: Any, mesh: Mesh) -> Any:
    """Shardings of the slots: rows over the axes for rows, and heads of keys and values over tensor where it divides them."""

    def of(path: Any, x: Any) -> NamedSharding:
        name = str(getattr(path[-1], "key", ""))
        axes: list[Any] = [ROWS, *[None] * (x.ndim - 1)]
        heads = name.removeprefix("cross_") in ("key", "value") and x.ndim == 4
        if heads and x.shape[1] % mesh.shape["tensor"] == 0:
            axes[1] = "tensor"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(of, slots)


def stop_row(ids: tuple[int, ...]) -> np.ndarray:
    """stop_J of the ids that end a text. Raises UserError for more ids than fit."""
    if len(ids) > STOP_IDS:
        raise UserError(f"{len(ids)} ids end the text (stop_ids and the tokenizer's), and at most {STOP_IDS} can")
    return np.array([*ids, *[-1] * (STOP_IDS - len(ids))], np.int32)
