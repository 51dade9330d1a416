"""Pipelining: another way to run a stack of layers, not another model.

The layers are divided among the stages, the devices along the mesh axis `pipeline`, and a micro-batch into parts that
follow each other through them: at tick t stage s works on item t - s, and what it made moves on to stage s + 1. With
one round that is GPipe (Huang et al. 2019); with several each stage holds as many shorter runs of layers and the parts
go round (the circular or interleaved schedule, Narayanan et al. 2021), which makes the bubble that many times smaller.
Only the axis `pipeline` is manual; what happens inside a stage on the other axes is left to the compiler, as without
pipelining. Embedding, head, and layers outside of the repeated pattern are outside of the stages, which share their work
by dividing the vocabulary.

The derivative is JAX's own. With rematerialisation a stage keeps only what came in, of every part and round.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.model.block import REMAT_POLICIES, RUNNER
from llmjax.model.observed import is_observed
from llmjax.model.per_device import summable
from llmjax.parallel.mesh import ROWS, row_ways

AXIS = "pipeline"
Layer = Callable[[Any, jax.Array, Any, Any, Any], tuple[jax.Array, jax.Array, Any]]


def parts(c: ConfigDict, *, stages: int, rows: int) -> int:
    """Into how many parts `rows` rows (those of one device of a micro-batch) are cut for the stages.

    Raises UserError when `parallel.parts` does not divide them, or rounds need more parts.
    """
    wanted = c.parallel.parts
    if wanted and rows % wanted:
        raise UserError(
            f"parallel.parts={wanted} does not divide the {rows} rows that each device has of a micro-batch: change it, "
            "train.batch_size or train.micro_batches"
        )
    found = wanted or max(n for n in range(1, min(rows, 4 * stages) + 1) if rows % n == 0)
    if c.parallel.rounds > 1 and found < stages:
        raise UserError(
            f"parallel.rounds={c.parallel.rounds} needs at least as many parts as stages ({stages}), or the first stage "
            f"would wait for the last; there are {found} of {rows} rows on each device: give larger batches or rounds=1"
        )
    return found


def bubble(*, stages: int, parts: int, rounds: int) -> float:
    """The share of the stages' time in which they have nothing to do: (S - 1) / (T R + S - 1)."""
    return (stages - 1) / (parts * rounds + stages - 1)


def describe(c: ConfigDict, mesh: Mesh, *, rows: int) -> str:
    """One line for people about the pipeline of a micro-batch of so many rows; empty without one."""
    stages = mesh.shape[AXIS]
    if stages == 1:
        return ""
    count, rounds = parts(c, stages=stages, rows=rows // row_ways(mesh)), c.parallel.rounds
    idle = bubble(stages=stages, parts=count, rounds=rounds)
    turns = f" in {rounds} rounds" if rounds > 1 else ""
    return f"{stages} stages, {count} parts of a micro-batch{turns}: {idle:.1%} of a stage's time is bubble"


@contextmanager
def active(mesh: Mesh, c: ConfigDict) -> Iterator[None]:
    """While tracing, run repeated layers in the stages of the mesh, if it has any."""
    if mesh.shape[AXIS] == 1:
        yield
        return
    token = RUNNER.set(functools.partial(run, c=c))
    try:
        yield
    finally:
        RUNNER.reset(token)


def run(
    layer: Layer,
    params: Any,
    x_BLD: jax.Array,
    inputs: Any,
    states: Any,
    key: jax.Array | None,
    *,
    c: ConfigDict,
) -> tuple[jax.Array, jax.Array, Any]:
    """The stack in stages: (x_BLD, the sum of the layers' auxiliary losses, a mean over the parts, their counts).

    Args:
        layer: (parameters of one layer, x, inputs, states of one layer, key) -> (x, auxiliary loss, a tree of float
            sums over the tokens). Of the sums those of all parts are added up, by layer.
        params, states: trees with the layers in front.
        inputs: a tree with the rows in front.
        key: of random numbers, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stages, rounds, rows = mesh.shape[AXIS], c.parallel.rounds, x_BLD.shape[0]
    count = parts(c, stages=stages, rows=rows // math.prod(mesh.shape[axis] for axis in ROWS))
    dtype = x_BLD.dtype
    layers = jax.tree.leaves(params)[0].shape[0]
    each = -(-layers // (stages * rounds))  # layers of a stage in a round; the last ones may be copies that do nothing

    def place(x: jax.Array, *axes: Any) -> jax.Array:
        free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(axes))
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes, *free))

    def by_stage(x: jax.Array) -> jax.Array:
        """(layers, ...) -> (rounds, stages, each, ...)."""
        more = stages * rounds * each - layers
        x = jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1), mode="edge") if more else x
        return place(x.reshape(rounds, stages, each, *x.shape[1:]), None, AXIS, None)

    def by_part(x: jax.Array) -> jax.Array:
        """(rows, ...) -> (parts, rows of a part, ...): every device cuts the rows it already has."""
        assert x.shape[0] == rows, x.shape
        return place(jnp.moveaxis(x.reshape(rows // count, count, *x.shape[1:]), 1, 0), None, ROWS)

    numbers = jnp.arange(stages * rounds * each).reshape(rounds, stages, each)
    items = jax.tree.map(by_stage, (params, states)), numbers, numbers < layers
    given, x = jax.tree.map(by_part, inputs), summable(by_part(x_BLD))

    def stage(
        items: Any, given: Any, x: jax.Array, turn: jax.Array, part: jax.Array, busy: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        """One stage's layers of one round, on one part. What belongs to the turn and the part is picked in here: picked
        outside it would be kept for the derivative, once for every tick."""
        own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, turn, keepdims=False), items)
        inputs = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, part, keepdims=False), given)

        def counted(path: Any, leaf: jax.Array) -> jax.Array:
            """The leaf; the gradient of one that follows what the layer observes is a mean over the parts, of which a
            stage that has nothing to do observes none."""
            if not is_observed(str(path[-1].key)):
                return leaf
            kept = jax.lax.stop_gradient(leaf)
            return kept + jnp.where(busy, (leaf - kept) / count, 0)

        def one(x: jax.Array, item: Any) -> tuple[jax.Array, Any]:
            (p, state), number, real = item
            p = jax.tree_util.tree_map_with_path(counted, p)
            own_key = None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), part)
            y, *more = layer(p, x, inputs, state, own_key)
            return jnp.where(real, y, x), jax.tree.map(lambda a: jnp.where(real, a, 0.0), more)

        x, (auxiliary, sums) = jax.lax.scan(one, x, own, unroll=min(c.model.scan_unroll, each))
        return x, jnp.sum(auxiliary), sums

    if c.model.remat != "none":
        stage = jax.checkpoint(stage, policy=REMAT_POLICIES[c.model.remat], prevent_cse=False)

    def body(items: Any, given: Any, x: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        items = jax.tree.map(lambda a: jnp.squeeze(a, 1), items)  # this stage's
        x, here = x.astype(dtype), jax.lax.axis_index(AXIS)
        after = [(s, (s + 1) % stages) for s in range(stages)]

        def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
            arrived, waiting, done, total, counted = carry
            item = t - here
            busy = (item >= 0) & (item < count * rounds)
            turn, part = jnp.divmod(jnp.clip(item, 0, count * rounds - 1), count)
            if rounds > 1:  # parts come back to the first stage before it has begun the next round
                back = jnp.clip(t - stages, 0, count * rounds - 1) % count
                waiting = jnp.where(t >= stages, waiting.at[back].set(arrived), waiting)
            first = jnp.where(turn == 0, x[part], waiting[part] if rounds > 1 else x[part])
            y, auxiliary, sums = stage(items, given, jnp.where(here == 0, first, arrived), turn, part, busy)
            last = busy & (here == stages - 1) & (turn == rounds - 1)
            done = jnp.where(last, done.at[part].set(y), done)
            total = total + jnp.where(busy, auxiliary, 0.0)
            counted = jax.tree.map(lambda all, new: all.at[turn].add(jnp.where(busy, new, 0.0)), counted, sums)
            return (jax.lax.ppermute(y, AXIS, after), waiting, done, total, counted), None

        empty, none = jnp.zeros_like(x), {}
        if c.model.moe.experts:  # asked only then: it traces the layers once more
            zero = jnp.int32(0)
            sums = jax.eval_shape(stage, items, given, empty[0], zero, zero, jnp.bool_(True))[2]
            none = jax.tree.map(lambda a: jnp.zeros((rounds, *a.shape), a.dtype), sums)
        start = (empty[0], empty if rounds > 1 else empty[:0], empty, jnp.zeros((), jnp.float32), none)
        (_, _, done, total, counted), _ = jax.lax.scan(tick, start, jnp.arange(count * rounds + stages - 1))
        done = summable(jnp.where(here == stages - 1, done, 0))
        counted = jax.tree.map(lambda a: a[:, None], counted)  # this stage's
        return jax.lax.psum(done, AXIS), jax.lax.psum(total, AXIS), counted

    cut = PartitionSpec(None, AXIS)
    staged = jax.shard_map(
        body,
        in_specs=(cut, PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec(), PartitionSpec(), cut),
        axis_names={AXIS},
        check_vma=False,
    )
    y, auxiliary, sums = staged(items, given, x)
    y_BLD = jnp.moveaxis(y, 0, 1).reshape(x_BLD.shape).astype(dtype)
    by_layer = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:])[:layers], sums)
    return place(y_BLD, ROWS), auxiliary / count, by_layer
