"""The coordinate check: do activations keep their size, and move alike, when the width or the depth grows?

The check takes the same few steps at several widths (or depths), at full rate from the first step. At every step it
measures activations at named places on a batch that is not trained on: their mean absolute value, and the mean absolute
change since the start. With the right parametrisation neither depends on the width (Yang et al. 2021, Tensor Programs
V, appendix D.1). The slope of log change over log width says so: 0 where the parametrisation holds, about 1/2 to 1
where rates are too high for the width.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.model import transformer
from llmjax.model.attention import Attention
from llmjax.model.block import Block
from llmjax.model.head import Head
from llmjax.model.layers import mlp_width
from llmjax.model.moe import expert_width
from llmjax.model.parametrization import attention_scale
from llmjax.model.recurrent import MIXERS
from llmjax.objectives import OBJECTIVES, losses
from llmjax.parallel import mesh as meshes
from llmjax.parallel import placement
from llmjax.train.frozen import combine
from llmjax.train.optimizer import make_optimizer
from llmjax.train.step import init_state, make_train_step

WATCHED = "intermediates"  # the collection that the scan over layers stacks
LIMIT = 0.25  # the largest slope, either way, of a place that holds; narrow models are off by as much as 0.2
SEEDS = 3
# Modules of a block, by name -> the place whose activations they return.
BRANCHES = {"attention": "attention", "cross": "cross attention", "mlp": "MLP", "moe": "MLP"}
BRANCHES |= {name: name for name in MIXERS}
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Place:
    """The measurements at one place: by size (width or layers), then by step from 0; means over the seeds."""

    name: str
    value: list[list[float]]  # mean absolute activation
    change: list[list[float]]  # mean absolute difference to step 0
    value_slope: float  # of the last step, log over log
    slope: float  # the same of the change
    verdict: str  # holds, grows or vanishes


@dataclass(frozen=True)
class Check:
    """A coordinate check."""

    over: str  # width or layers
    sizes: list[int]
    steps: int
    limit: float
    places: list[Place]
    loss: list[float]  # of the last batch that was trained on, by size

    @property
    def holds(self) -> bool:
        return all(place.verdict == "holds" for place in self.places)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


# ------------------------------------------------------------------ models of other sizes


def at_width(c: ConfigDict, width: int, *, keep_heads: bool) -> ConfigDict:
    """The config with another width, and with every size that grows with the width.

    Args:
        keep_heads: the size of the heads grows, not their number.

    Raises:
        UserError: for a width at which some size is no whole number.
    """
    made = c.copy_and_resolve_references()
    m, old = made.model, c.model

    def scaled(key: str, value: int) -> int:
        if value * width % old.width:
            raise UserError(
                f"at width {width} model.{key} would be {value} x {width} / {old.width}, which is no whole number: give "
                f"widths that {old.width} divides, or that divide it"
            )
        return value * width // old.width

    with made.unlocked():
        m.mlp_width = scaled("mlp_width", mlp_width(old))
        if old.moe.experts:
            m.moe.width = scaled("moe.width", expert_width(old))
        for key in ("latent.kv_rank", "latent.query_rank", "recurrent.width"):
            group, _, name = key.partition(".")
            m[group][name] = scaled(key, old[group][name])
        if not keep_heads:
            m.heads = scaled("heads", old.heads)
            m.kv_heads = old.kv_heads if old.kv_heads < 2 else scaled("kv_heads", old.kv_heads)
        elif old.head_size:
            m.head_size = scaled("head_size", old.head_size)
        m.width = width
    return made


def keeps_heads(c: ConfigDict, widths: Sequence[int]) -> bool:
    """Whether the size of the heads must grow: some width has no whole number of heads of the present size."""
    groups = c.model.kv_heads if c.model.kv_heads > 1 else c.model.heads
    return any(groups * width % c.model.width for width in widths)


def at_depth(c: ConfigDict, layers: int) -> ConfigDict:
    """The config with another number of layers."""
    made = c.copy_and_resolve_references()
    with made.unlocked():
        made.model.layers = layers
    return made


def resized(c: ConfigDict, *, over: str, sizes: Sequence[int]) -> list[ConfigDict]:
    """The configs of a check, one for each width or depth."""
    if over == "layers":
        return [at_depth(c, size) for size in sizes]
    keep = keeps_heads(c, sizes)
    return [at_width(c, size, keep_heads=keep) for size in sizes]


# ------------------------------------------------------------------ what is measured


def _sow(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """An interceptor that sows activations under the names of their places."""
    module, made = context.module, call(*args, **kwargs)
    if isinstance(module, Attention) and context.method_name == "_attend":
        q_BLHK, k_BMGK = args[:2]
        B, L, H, K = q_BLHK.shape
        G = k_BMGK.shape[2]
        scores = jnp.einsum("blgrk,bmgk->bgrlm", q_BLHK.reshape(B, L, G, H // G, K), k_BMGK)
        module.sow(WATCHED, "attention logits", scores * attention_scale(module.c))
    if context.method_name == "__call__":
        if isinstance(module, Block):
            module.sow(WATCHED, "residual stream", made[0])
        elif isinstance(module, Head):
            module.sow(WATCHED, "logits", made)
        elif module.name in BRANCHES:
            module.sow(WATCHED, BRANCHES[module.name], jax.tree.leaves(made)[0])
    return made


def activations(module: transformer.Transformer, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, list[Any]]:
    """The activations of a batch by place, a list of arrays each: all layers of a stack are one array."""
    with nn.intercept_methods(_sow):
        (_, found), _ = losses.call(module, params, dict(batch), None, output="logits", mutable=[WATCHED])
    by_place: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(found[WATCHED]):
        name = placement.path_name(path).split("/")
        place = name[-2]  # the last is the number of the call
        by_place.setdefault(f"encoder {place}" if name[0] == "encoder" else place, []).append(leaf)
    return by_place


def _mean(arrays: Sequence[np.ndarray]) -> float:
    """The mean absolute value of all numbers."""
    total = sum(float(np.sum(np.abs(x), dtype=np.float64)) for x in arrays)
    return total / sum(x.size for x in arrays)


def measure(
    c: ConfigDict, batches: Sequence[Batch], *, seeds: int
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """Train on all batches but the last. Measure activations on the last one before every step and at the end.

    Returns:
        Place -> (mean absolute activation, mean absolute change since step 0), each (steps + 1,), means over the seeds;
        and the mean loss of the last batch that was trained on.
    """
    mesh = meshes.make_mesh("data=1", devices=jax.devices()[:1])
    module = transformer.build(c.model)
    rate = jnp.ones_like  # no warm-up and no decay
    optimizer = make_optimizer(c.optimizer, rate, model=c.model)
    make_state, _ = init_state(module, optimizer, c, mesh)
    step = jax.jit(make_train_step(module, OBJECTIVES[c.objective.name], optimizer, rate, c))

    look = jax.jit(functools.partial(activations, module))

    *train, probe = batches
    seen: list[dict[str, list[tuple[float, float]]]] = []
    last: list[float] = []
    with placement.active(mesh, c):
        for seed in range(seeds):
            state = make_state(jax.random.key(c.seed + seed))
            first: dict[str, list[np.ndarray]] = {}
            rows: dict[str, list[tuple[float, float]]] = {}
            for k, batch in enumerate([*train, None]):
                made = look(combine(state.params, state.frozen), probe)
                now = jax.tree.map(lambda x: np.asarray(x, np.float32), jax.device_get(made))
                first = first or now
                for name, arrays in now.items():
                    moved = [x - before for x, before in zip(arrays, first[name], strict=True)]
                    rows.setdefault(name, []).append((_mean(arrays), _mean(moved)))
                if batch is not None:
                    state, metrics = step(state, batch, jax.random.key(k))
            seen.append(rows)
            last.append(float(metrics["loss"]))
    means = {name: np.mean([rows[name] for rows in seen], axis=0) for name in seen[0]}
    return {name: (both[:, 0], both[:, 1]) for name, both in means.items()}, float(np.mean(last))


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of log value over log size, by least squares; NaN where a value is 0 or not finite."""
    if not all(math.isfinite(value) and value > 0 for value in values):
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def verdict(of: float, *, limit: float = LIMIT) -> str:
    """The verdict of a slope: holds, grows or vanishes."""
    if abs(of) <= limit:
        return "holds"
    return "vanishes" if of < 0 else "grows"  # NaN: something is not finite any more


def check(
    c: ConfigDict,
    batches: Sequence[Batch],
    *,
    over: str,
    sizes: Sequence[int],
    seeds: int = SEEDS,
    limit: float = LIMIT,
) -> Check:
    """The coordinate check of a config.

    Args:
        c: with model.vocab_size set.
        batches: as many as steps, and one to look at.
        over: "width" or "layers", which take the values `sizes`.
        limit: the largest slope, either way, of a place that holds.
    """
    found, lost = [], []
    for one in resized(c, over=over, sizes=sizes):
        made, loss = measure(one, batches, seeds=seeds)
        found.append(made)
        lost.append(loss)
    places = []
    for name in found[0]:
        value, change = ([[float(x) for x in by_place[name][i]] for by_place in found] for i in (0, 1))
        of = slope(sizes, [row[-1] for row in change])
        places.append(
            Place(name, value, change, slope(sizes, [row[-1] for row in value]), of, verdict(of, limit=limit))
        )
    return Check(over, list(sizes), len(batches) - 1, limit, places, lost)
