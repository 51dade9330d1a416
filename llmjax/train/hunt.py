"""Find the first value that is not finite: run a bad step again and look at the output of every module.

One infinity in a layer makes the loss NaN, and then every gradient. So the order of computation decides: forward from
the embedding to the loss, backward from the loss to the embedding. Modules are numbered as they are traced. Looking
costs a few sums a layer, in a program of its own that is compiled when it is first needed.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llmjax.model.block import Block
from llmjax.model.stacks import layer_slots
from llmjax.objectives import Objective
from llmjax.parallel import placement

Batch = dict[str, jax.Array]
Slot = tuple[str, int]  # a path, and the index in its stack of layers
# The first number of the scan, the layer, the number: the layers of a scan are traced once, and run one after another.
Order = tuple[int, int, int]

WATCHED = "intermediates"  # the collection that the scan over layers stacks
INPUT, OUTPUT = "input", "output"
LAST = 1 << 30  # a number above all


class Summary(NamedTuple):
    """Of an array, or of each layer's part of a stacked one: how many numbers are not finite, and the largest that are."""

    bad: jax.Array
    largest: jax.Array
    order: jax.Array  # the number of the module's call in the trace; 0 for parameters


class Place(NamedTuple):
    """One array of one layer."""

    order: Order
    where: str
    bad: int
    largest: float


def summarize(x: jax.Array, *, stacked: bool = False, order: int = 0) -> Summary:
    """The summary of an array; `stacked`: one for each index of its first dimension."""
    x = jax.lax.stop_gradient(x)
    axes = tuple(range(1 if stacked else 0, x.ndim))
    finite = jnp.isfinite(x)
    largest = jnp.max(jnp.where(finite, jnp.abs(x), 0).astype(jnp.float32), axis=axes, initial=0.0)
    return Summary(jnp.sum(~finite, axis=axes, dtype=jnp.int32), largest, jnp.int32(order))


def _watch(numbers: Iterator[int]) -> Callable[..., Any]:
    """An interceptor that sows a summary of what each module returns, and of what each block is given."""

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        watched = context.method_name == "__call__"
        if watched and isinstance(context.module, Block):
            context.module.sow(WATCHED, INPUT, summarize(args[0], order=next(numbers)))
        made = call(*args, **kwargs)
        first = jax.tree.leaves(made)[:1]
        if watched and first and jnp.issubdtype(jnp.result_type(first[0]), jnp.floating):
            context.module.sow(WATCHED, OUTPUT, summarize(first[0], order=next(numbers)))
        return made

    return intercept


class _Watched:
    """Stands in for the module in a call of an objective: `apply` also collects the summaries."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._numbers = module, itertools.count(1)
        self.seen: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def apply(self, *args: Any, mutable: Any = (), **kwargs: Any) -> Any:
        with nn.intercept_methods(_watch(self._numbers)):
            made, found = self._module.apply(*args, mutable=[*mutable, WATCHED], **kwargs)
        sown = dict(found)
        self.seen.append(sown.pop(WATCHED, {}))
        return (made, sown) if mutable else made


def make_examine(
    module: nn.Module, objective: Objective, c: ConfigDict, mesh: Mesh
) -> Callable[[Any, Batch, jax.Array, int, int], dict[str, Any]]:
    """A function (parameters, batch, the step's key, t, T) -> summaries of micro-batch t of T, on the host.

    `module` scans its layers: those in the stages of a pipeline could not be watched.

    "loss" is the objective's sum; "forward" has a tree of summaries for each call of the model, "params" and "gradients"
    one for each parameter, by layer where they are stacked.
    """

    def by_layer(tree: Any) -> dict[str, Summary]:
        stacks = {path for encoder in (False, True) for path, _ in layer_slots(c.model, encoder=encoder)}
        named = {placement.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        return {
            name: summarize(leaf, stacked=any(name.startswith(f"{stack}/") for stack in stacks))
            for name, leaf in named.items()
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        }

    def look(params: Any, batch: Batch, key: jax.Array, part: jax.Array, parts: int) -> dict[str, Any]:
        if parts > 1:  # as the training step cuts the batch
            batch = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)[part], batch)
            key = jax.random.split(key, parts)[part]
        watched = _Watched(module)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            sums = objective(watched, params, batch, key, c.objective)
            return sums.objective, (sums.objective, watched.seen)

        gradients, (total, seen) = jax.grad(loss, has_aux=True)(params)
        numbers = {name: summarize(x) for name, x in batch.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        return {
            "loss": total,
            "batch": numbers,
            "forward": seen,
            "params": by_layer(params),
            "gradients": by_layer(gradients),
        }

    jitted = jax.jit(look, static_argnames="parts", out_shardings=NamedSharding(mesh, PartitionSpec()))

    def examine(params: Any, batch: Batch, key: jax.Array, part: int, parts: int) -> dict[str, Any]:
        with placement.active(mesh, c):
            return jax.device_get(jitted(params, batch, key, np.int32(part), parts=parts))

    return examine


def explain(found: dict[str, Any], c: ConfigDict) -> str:
    """The first array that is not finite, in words; empty when everything is finite.

    Args:
        found: as `make_examine`'s function returns it.
        c: the settings under `model`.
    """
    layers = {slot: i for encoder in (False, True) for i, slot in enumerate(layer_slots(c, encoder=encoder))}
    for name, summary in found["batch"].items():
        if summary.bad:
            return f"the batch itself: {int(summary.bad)} numbers of {name}"
    calls = [_modules(seen, layers) for seen in found["forward"]]
    forward = [place for call in calls for place in sorted(call.values())]
    orders = {key: place.order for call in calls for key, place in call.items()}
    for place in _parameters(found["params"], layers, orders):
        if place.bad:
            return f"the parameters, before the step: {place.where}, {place.bad} numbers"
    first = next((i for i, place in enumerate(forward) if place.bad), len(forward))
    if first < len(forward) or not np.isfinite(found["loss"]):
        what = f"{forward[first].where}: {forward[first].bad} numbers" if forward[first:] else "the head or the loss"
        known = ((place.largest, place.where) for place in forward[first - 1 : first])
        before = "".join(f"; just before it the largest number was {most:.3g} in {where}" for most, where in known)
        return f"in the forward pass, {what}{before}"
    for place in reversed(_parameters(found["gradients"], layers, orders)):
        if place.bad:
            return (
                f"in the backward pass, the gradient of {place.where}: {place.bad} numbers; the forward pass was finite"
            )
    return ""


def _modules(seen: Any, layers: Mapping[Slot, int]) -> dict[Slot, Place]:
    """What the modules were given and returned in one call of the model: (path, index in its stack) -> place."""
    watched = []
    for path, summary in jax.tree_util.tree_leaves_with_path(seen, is_leaf=lambda x: isinstance(x, Summary)):
        name = placement.path_name(path).rpartition("/")[0]  # without the number of the call
        stack = _stack(name, layers)
        if np.ndim(summary.bad) == bool(stack):  # the scan over layers has a summary too, as a whole
            watched.append((name, stack, summary))
    starts: dict[str, int] = {}  # of the scans
    for _, stack, summary in watched:
        starts[_scan(stack)] = min(starts.get(_scan(stack), LAST), int(np.min(summary.order)))
    found = {}
    for name, stack, summary in watched:
        for i, (bad, largest, number) in enumerate(zip(*map(np.atleast_1d, summary), strict=True)):
            order = (starts[_scan(stack)], layers[stack, i], int(number)) if stack else (int(number), 0, 0)
            found[name, i] = Place(order, _where(name, stack, layers.get((stack, i), 0)), int(bad), float(largest))
    return found


def _parameters(
    summaries: Mapping[str, Summary], layers: Mapping[Slot, int], orders: Mapping[Slot, Order]
) -> list[Place]:
    """Parameters, or their gradients, in the order in which their modules run; embeddings come first."""

    def order(name: str, i: int) -> Order:
        if name.endswith("embedding"):
            return (-1, 0, 0)
        owners = itertools.accumulate(name.split("/")[:-1], "{}/{}".format)  # layers, layers/mlp, layers/mlp/up
        known = [orders[slot] for owner in owners if (slot := (f"{owner}/{OUTPUT}", i)) in orders]
        return known[-1] if known else (LAST, 0, 0)

    found = []
    for name, summary in summaries.items():
        stack = _stack(name, layers)
        for i, (bad, largest) in enumerate(zip(*map(np.atleast_1d, summary[:2]), strict=True)):
            where = _where(name, stack, layers.get((stack, i), 0))
            found.append(Place(order(name, i), where, int(bad), float(largest)))
    return sorted(found)


def _stack(name: str, layers: Iterable[Slot]) -> str:
    """The path of the stack of layers that a path is in; "" outside of the layers."""
    return max((path for path, _ in layers if f"{name}/".startswith(f"{path}/")), key=len, default="")


def _scan(stack: str) -> str:
    """The path of the scan that a stack is in: without the place in a period of several layers."""
    return re.sub(r"/\d+$", "", stack)


def _where(name: str, stack: str, layer: int) -> str:
    """A path in words."""
    if not stack:
        return "the last hidden states" if name == OUTPUT else name.removesuffix(f"/{OUTPUT}")
    inner = name.removeprefix(f"{stack}/")
    if inner == INPUT and not layer:
        return "embedding"
    said = {INPUT: "the residual stream that goes in", OUTPUT: "the residual stream that comes out"}
    coder = "encoder layer" if stack.startswith("encoder") else "layer"
    return f"{coder} {layer}, {said.get(inner, inner.removesuffix(f'/{OUTPUT}'))}"


def warn(findings: Iterable[str], *, step: int, gradients_finite: bool = False) -> str:
    """The line that a run prints about a bad step, from what `explain` says of its micro-batches.

    Args:
        gradients_finite: the step's loss and gradients were finite, so that its update was not.
    """
    first = next((text for text in findings if text), "")
    if not first and gradients_finite:
        return (
            f"WARNING: step {step:,} had finite gradients, of which the optimizer made an update that is not finite: "
            "raise optimizer.epsilon, or lower optimizer.learning_rate"
        )
    if not first:
        return (
            f"WARNING: step {step:,} was not finite, and the same batch is when it is run again: look at the hardware, or "
            "at an operation whose result depends on chance"
        )
    return f"WARNING: step {step:,} was not finite. The first that is not is {first}"
