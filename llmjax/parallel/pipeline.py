"""Pipelining: another way to run a stack of layers, not another model.

The layers are divided among the stages, the devices along the mesh axis `pipeline`, and a micro-batch into parts that
follow each other through them: at tick t stage s works on item t - s, and its output moves on to stage s + 1. With one
round that is GPipe (Huang et al. 2019). With several rounds each stage holds as many shorter runs of layers and the parts
go round (the circular or interleaved schedule, Narayanan et al. 2021), which makes the bubble that many times smaller.
Only the axis `pipeline` is manual. What happens inside a stage on the other axes is left to the compiler, as without
pipelining. Embedding, head, and layers outside of the repeated pattern are outside of the stages, which share that work by
dividing the vocabulary.

The derivative is JAX's own. With rematerialisation a stage keeps only its inputs, of every part and round.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.model.block import REMAT_POLICIES, Layer
from llmjax.model.observed import is_observed
from llmjax.model.per_device import summable
from llmjax.model.stacks import Stack
from llmjax.parallel.mesh import ROWS, row_ways

AXIS = "pipeline"


def parts(c: ConfigDict, *, stages: int, rows: int) -> int:
    """Into how many parts `rows` rows (those of one device of a micro-batch) are cut for the stages.

    Raises UserError when `parallel.parts` does not divide them, or rounds need more parts.
    """
    return _parts(c.parallel.parts, c.parallel.rounds, stages=stages, rows=rows)


def _parts(wanted: int, rounds: int, *, stages: int, rows: int) -> int:
    if wanted and rows % wanted:
        raise UserError(
            f"parallel.parts={wanted} does not divide the {rows} rows that each device has of a micro-batch: change it, "
            "train.batch_size or train.micro_batches"
        )
    found = wanted or max(n for n in range(1, min(rows, 4 * stages) + 1) if rows % n == 0)
    if rounds > 1 and found < stages:
        raise UserError(
            f"parallel.rounds={rounds} needs at least as many parts as stages ({stages}), or the first stage "
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


@dataclass(frozen=True)
class Pipeline:
    """Runs the stack of repeated layers in the stages of the mesh: the `run_layers` of a `Transformer`."""

    parts: int  # as parallel.parts
    rounds: int
    remat: str
    scan_unroll: int
    sparse: bool  # layers count how experts are used

    def __call__(
        self,
        stack: Stack,
        layer: Layer,
        params: Any,
        x_BLD: jax.Array,
        inputs: Any,
        state: dict[str, Any],
        key: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Any], dict[str, Any]] | None:
        """See `block.RunLayers`. Stacks outside of the stages, and layers with a cache or a memory, are left to the scan.

        Of the losses that layers sow it returns the mean over the parts, of the counts the sum, by layer.
        """
        if stack.name != "layers" or set(state) > {"depth"}:
            return None
        mesh = jax.sharding.get_abstract_mesh()
        if AXIS not in mesh.axis_names:
            raise UserError("this network runs in the stages of a pipeline: call it inside `placement.active(mesh, c)`")
        plan = _plan(self, mesh, rows=x_BLD.shape[0], layers=stack.repeats)
        by_stage = functools.partial(_by_stage, plan=plan)
        by_part = functools.partial(_by_part, plan=plan)
        numbers = jnp.arange(plan.stages * plan.rounds * plan.each).reshape(plan.rounds, plan.stages, plan.each)
        items = jax.tree.map(by_stage, (params, state)), numbers, numbers < stack.repeats
        given, x = jax.tree.map(by_part, inputs), summable(by_part(x_BLD))

        stage: Callable[..., Any] = functools.partial(_stage, layer, key, plan)
        if self.remat != "none":
            stage = jax.checkpoint(stage, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        divided = PartitionSpec(None, AXIS)
        staged = jax.shard_map(
            functools.partial(_schedule, stage, plan, x_BLD.dtype),
            in_specs=(divided, PartitionSpec(), PartitionSpec()),
            out_specs=(PartitionSpec(), PartitionSpec(), divided),
            axis_names={AXIS},
            check_vma=False,
        )
        y, losses, counts = staged(items, given, x)
        y_BLD = _place(jnp.moveaxis(y, 0, 1).reshape(x_BLD.shape).astype(x_BLD.dtype), ROWS)
        by_layer = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:])[: stack.repeats], counts)
        return y_BLD, {}, {"losses": losses / plan.parts, "routing": by_layer}


class Plan(NamedTuple):
    """The sizes of one pipeline."""

    stages: int
    rounds: int
    parts: int
    each: int  # layers of a stage in a round; the last stage's may be copies that do nothing
    unroll: int
    sparse: bool


def runner(c: ConfigDict, mesh: Mesh) -> Pipeline | None:
    """The pipeline of a config on a mesh; None where the mesh has no stages."""
    if mesh.shape[AXIS] == 1:
        return None
    m, p = c.model, c.parallel
    return Pipeline(p.parts, p.rounds, m.remat, m.scan_unroll, bool(m.moe.experts))


def _plan(pipeline: Pipeline, mesh: Any, *, rows: int, layers: int) -> Plan:
    stages, rounds = mesh.shape[AXIS], pipeline.rounds
    here = rows // math.prod(mesh.shape[axis] for axis in ROWS)
    each = -(-layers // (stages * rounds))
    parts = _parts(pipeline.parts, rounds, stages=stages, rows=here)
    return Plan(stages, rounds, parts, each, min(pipeline.scan_unroll, each), pipeline.sparse)


def _place(x: jax.Array, *axes: Any) -> jax.Array:
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes, *free))


def _by_stage(x: jax.Array, *, plan: Plan) -> jax.Array:
    """(layers, ...) -> (rounds, stages, layers of a stage, ...), filled up with copies of the last layer."""
    more = plan.stages * plan.rounds * plan.each - x.shape[0]
    x = jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1), mode="edge") if more else x
    return _place(x.reshape(plan.rounds, plan.stages, plan.each, *x.shape[1:]), None, AXIS, None)


def _by_part(x: jax.Array, *, plan: Plan) -> jax.Array:
    """(rows, ...) -> (parts, rows of a part, ...): every device cuts the rows it already has."""
    x = x.reshape(x.shape[0] // plan.parts, plan.parts, *x.shape[1:])
    return _place(jnp.moveaxis(x, 1, 0), None, ROWS)


def _stage(
    layer: Layer,
    key: jax.Array | None,
    plan: Plan,
    items: Any,
    given: Any,
    x: jax.Array,
    turn: jax.Array,
    part: jax.Array,
    busy: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
    """One stage's layers of one round, on one part: (x, the sum of their losses, their counts by layer).

    The round's layers and the part's inputs are picked in here: an index outside becomes a residual of every tick.
    """
    own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, turn, keepdims=False), items)
    inputs = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, part, keepdims=False), given)

    def averaged(path: Any, leaf: jax.Array) -> jax.Array:
        """The leaf; the gradient of an observed one is a mean over the parts, and an idle stage observes none."""
        if not is_observed(str(path[-1].key)):
            return leaf
        kept = jax.lax.stop_gradient(leaf)
        return kept + jnp.where(busy, (leaf - kept) / plan.parts, 0)

    def one(x: jax.Array, item: Any) -> tuple[jax.Array, Any]:
        (params, state), number, real = item
        params = jax.tree_util.tree_map_with_path(averaged, params)
        own_key = None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), part)
        y, _, sown = layer(params, x, inputs, state, own_key)
        return jnp.where(real, y, x), jax.tree.map(lambda a: jnp.where(real, a, 0.0), (sown["losses"], sown["routing"]))

    x, (losses, counts) = jax.lax.scan(one, x, own, unroll=plan.unroll)
    return x, jnp.sum(losses), counts


def _schedule(
    stage: Callable[..., Any], plan: Plan, dtype: Any, items: Any, given: Any, x: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """All ticks of one stage: (the output of the last stage, the sum of all losses, this stage's counts)."""
    stages, rounds, parts = plan.stages, plan.rounds, plan.parts
    items = jax.tree.map(lambda a: jnp.squeeze(a, 1), items)  # this stage's
    x, here = x.astype(dtype), jax.lax.axis_index(AXIS)
    after = [(s, (s + 1) % stages) for s in range(stages)]

    def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
        arrived, waiting, done, total, counts = carry
        item = t - here
        busy = (item >= 0) & (item < parts * rounds)
        turn, part = jnp.divmod(jnp.clip(item, 0, parts * rounds - 1), parts)
        if rounds > 1:  # parts come back to the first stage before it has begun the next round
            back = jnp.clip(t - stages, 0, parts * rounds - 1) % parts
            waiting = jnp.where(t >= stages, waiting.at[back].set(arrived), waiting)
        first = jnp.where(turn == 0, x[part], waiting[part] if rounds > 1 else x[part])
        y, losses, new = stage(items, given, jnp.where(here == 0, first, arrived), turn, part, busy)
        last = busy & (here == stages - 1) & (turn == rounds - 1)
        done = jnp.where(last, done.at[part].set(y), done)
        total = total + jnp.where(busy, losses, 0.0)
        counts = jax.tree.map(lambda all, one: all.at[turn].add(jnp.where(busy, one, 0.0)), counts, new)
        return (jax.lax.ppermute(y, AXIS, after), waiting, done, total, counts), None

    empty, counts = jnp.zeros_like(x), {}
    if plan.sparse:  # asked only then: it traces the layers once more
        zero = jnp.int32(0)
        like = jax.eval_shape(stage, items, given, empty[0], zero, zero, jnp.bool_(True))[2]
        counts = jax.tree.map(lambda a: jnp.zeros((rounds, *a.shape), a.dtype), like)
    start = (empty[0], empty if rounds > 1 else empty[:0], empty, jnp.zeros((), jnp.float32), counts)
    (_, _, done, total, counts), _ = jax.lax.scan(tick, start, jnp.arange(parts * rounds + stages - 1))
    done = summable(jnp.where(here == stages - 1, done, 0))
    counts = jax.tree.map(lambda a: a[:, None], counts)  # this stage's
    return jax.lax.psum(done, AXIS), jax.lax.psum(total, AXIS), counts
