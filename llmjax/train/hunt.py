"""Hunting for what is not finite: a bad step is run again with every layer watched, and the first bad one is named.

Numbers spread: one infinity in a layer makes the loss NaN, and then every gradient. So the order of computation decides:
forward from the embedding to the loss, backward from the loss to the embedding. Watching costs a few sums a layer, in a
program of its own that is compiled when it is first needed.
"""

import re
from collections.abc import Callable, Iterable
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

BEHIND = 1 << 30  # a layer number above all
WATCHED = "intermediates"  # the collection that the scan over layers stacks
INPUT, OUTPUT = "input", "output"
# Parts in the order in which they run.
ORDER = (
    INPUT, "embedding", "position_embedding", "type_embedding", "language_embedding", "relative_embedding",
    "query_embedding", "embedding_projection", "embedding_norm", "encoder", "first", "layers", "last",
    "attention_norm", "recurrent_norm", "query", "key", "value", "position", "query_norm", "key_norm", "out",
    "attention", "rnn", "lstm", "rglru", "mamba2", "attention_post_norm", "recurrent_post_norm",
    "cross_norm", "cross", "cross_post_norm", "mlp_norm", "router", "gate", "up", "down", "shared", "mlp", "moe",
    "mlp_post_norm", "final_norm", "pooler", "head_transform", "output_projection", "head", "head_bias", "ahead", OUTPUT,
)  # fmt: skip


class Tally(NamedTuple):
    """Of an array, or of each layer's part of a stacked one: how many numbers are not finite, the largest that are."""

    bad: jax.Array
    largest: jax.Array


class Finding(NamedTuple):
    """One watched place of one layer."""

    order: tuple[int, ...]
    where: str
    bad: int
    largest: float


def tally(x: jax.Array, *, stacked: bool = False) -> Tally:
    """The tally of an array; `stacked`: one for each index of its first dimension."""
    x = jax.lax.stop_gradient(x)
    axes = tuple(range(1 if stacked else 0, x.ndim))
    finite = jnp.isfinite(x)
    largest = jnp.max(jnp.where(finite, jnp.abs(x), 0).astype(jnp.float32), axis=axes, initial=0.0)
    return Tally(jnp.sum(~finite, axis=axes, dtype=jnp.int32), largest)


def _watch(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Sow a tally of what each module returns, and of what each block is given."""
    made = next_fun(*args, **kwargs)
    if context.method_name == "__call__":
        if isinstance(context.module, Block):
            context.module.sow(WATCHED, INPUT, tally(args[0]))
        first = jax.tree.leaves(made)[:1]
        if first and jnp.issubdtype(jnp.result_type(first[0]), jnp.floating):
            context.module.sow(WATCHED, OUTPUT, tally(first[0]))
    return made


class _Watched:
    """Stands in for the module in a call of an objective: `apply` also collects the tallies."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.seen: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def apply(self, *args: Any, mutable: Any = (), **kwargs: Any) -> Any:
        with nn.intercept_methods(_watch):
            made, found = self._module.apply(*args, mutable=[*mutable, WATCHED], **kwargs)
        sown = dict(found)
        self.seen.append(sown.pop(WATCHED, {}))
        return (made, sown) if mutable else made


def make_examine(
    module: nn.Module, objective: Objective, c: ConfigDict, mesh: Mesh
) -> Callable[[Any, Batch, jax.Array, int, int], dict[str, Any]]:
    """A function (parameters, batch, the step's key, t, T) -> tallies of micro-batch t of T, on the host.

    `module` scans its layers: those in the stages of a pipeline could not be watched.

    "loss" is the objective's sum; "forward" has a tree of tallies for each call of the model, "params" and "gradients"
    one for each parameter, by layer where they are stacked.
    """

    def by_layer(tree: Any) -> dict[str, Tally]:
        stacks = {path for encoder in (False, True) for path, _ in layer_slots(c.model, encoder=encoder)}
        named = {placement.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        return {
            name: tally(leaf, stacked=any(name.startswith(f"{stack}/") for stack in stacks))
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
        numbers = {name: tally(x) for name, x in batch.items() if jnp.issubdtype(x.dtype, jnp.floating)}
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
    """What is not finite first, in words; empty when everything is finite.

    Args:
        found: as `make_examine`'s function returns it.
        c: the settings under `model`.
    """
    layers = {slot: i for i, slot in enumerate(layer_slots(c))}
    layers |= {slot: i for i, slot in enumerate(layer_slots(c, encoder=True))}
    for name, numbers in found["batch"].items():
        if numbers.bad:
            return f"the batch itself: {int(numbers.bad)} numbers of {name}"
    for one in _parameters(found["params"], layers):
        if one.bad:
            return f"the parameters, before the step: {one.where}, {one.bad} numbers"
    before = None
    for one in (one for seen in found["forward"] for one in _forward(seen, layers, c)):
        if one.bad:
            known = f"; just before it the largest number was {before.largest:.3g} in {before.where}" if before else ""
            return f"in the forward pass, {one.where}: {one.bad} numbers{known}"
        before = one
    if not np.isfinite(found["loss"]):
        known = f"; the largest number before it was {before.largest:.3g} in {before.where}" if before else ""
        return f"in the forward pass, the head or the loss{known}"
    for one in sorted(_parameters(found["gradients"], layers), key=lambda one: one.order, reverse=True):
        if one.bad:
            return f"in the backward pass, the gradient of {one.where}: {one.bad} numbers; the forward pass was finite"
    return ""


def _forward(seen: Any, layers: dict[tuple[str, int], int], c: ConfigDict) -> list[Finding]:
    """The tallies of one call of the model in the order of computation."""
    places: dict[str, list[Tally]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(seen, is_leaf=lambda x: isinstance(x, Tally)):
        parts = placement.path_name(path).split("/")
        places.setdefault("/".join(parts[:-1]), []).append(leaf)  # the last is the number of the call
    found = []
    for name, tallies in places.items():
        stack, inner = _split(name, layers)
        if re.fullmatch(r"(encoder/)?(first|layers|last)/(input|output)", name) and not stack:
            continue  # a period of several layers as a whole
        stacked = [one for one in tallies if np.ndim(one.bad) == (1 if stack else 0)]  # the scan as a whole is none
        found += [
            one for part in stacked for one in _by_layer(name, stack, inner, part, layers, c.norm_place == "post")
        ]
    return sorted(found, key=lambda one: one.order)


def _parameters(tallies: dict[str, Tally], layers: dict[tuple[str, int], int]) -> list[Finding]:
    """The tallies of parameters, those of the embedding first."""
    found = []
    for name, part in tallies.items():
        found += _by_layer(name, *_split(name, layers), part, layers, False)
    return sorted(found, key=lambda one: one.order)


def _split(name: str, layers: Iterable[tuple[str, int]]) -> tuple[str, str]:
    """A path as (path of the stack of layers, path inside of a layer); ("", path) outside of the stacks."""
    stack = max((path for path, _ in layers if f"{name}/".startswith(f"{path}/")), key=len, default="")
    return stack, name[len(stack) :].strip("/")


def _by_layer(
    name: str, stack: str, inner: str, part: Tally, layers: dict[tuple[str, int], int], post: bool
) -> list[Finding]:
    """A finding for each layer of a stack, or the one of a part outside of them."""
    if not stack:
        what = "the last hidden states" if name == OUTPUT else name.removesuffix(f"/{OUTPUT}")
        top, *rest = name.split("/")
        behind = top == "encoder" and rest[0] != "relative_embedding"  # its layers
        place = (_rank(top), BEHIND if behind else 0, *map(_rank, rest))
        return [Finding(place, what, int(part.bad), float(part.largest))]
    coder = "encoder layer" if stack.startswith("encoder") else "layer"
    words = inner.split("/")
    if words[-1] == INPUT:
        said = "the residual stream that goes in"
    else:
        said = "/".join(word for word in words if word != OUTPUT) or "the residual stream that comes out"
    ranks = [_rank(word) for word in words]
    if post and words[0].endswith("_norm") and len(words) > 1:  # after the sum, so behind the branch
        ranks[0] = _rank(words[0].removesuffix("_norm")) + 1
    bad, largest = np.atleast_1d(part.bad), np.atleast_1d(part.largest)
    found = []
    for i in range(len(bad)):
        layer = layers[stack, i]
        where = "embedding" if layer == 0 and words[-1] == INPUT else f"{coder} {layer}, {said}"
        order = (_rank("encoder" if coder != "layer" else "layers"), layer, *ranks)
        found.append(Finding(order, where, int(bad[i]), float(largest[i])))
    return found


def _rank(word: str) -> int:
    """The place of a part in the order of computation; what is not known comes in the middle of its whole."""
    return 2 * (ORDER.index(word) if word in ORDER else len(ORDER) // 2)


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
