"""How parameters start: one row per scheme and kind of parameter, and the table that `train` prints.

Kinds: `embedding` and `position` are looked up; `relative` ones (T5's table, XLNet's vectors) enter attention scores;
`inward` matrices read the residual stream, `outward` ones write to it; `head` makes logits. A scheme may also look at a
parameter's path: the encoder's depth may differ from the decoder's, and some schemes scale an attention's values but not
its queries. Norm scales start at one and biases at zero in every scheme.

| scheme | matrices | looked up | source |
|---|---|---|---|
| gpt2 | init_std; outward: / sqrt(branches of the stack) | init_std | Radford et al. 2019 |
| xavier | uniform, variance 2 / (inputs + outputs) | 1 / sqrt(D) | Glorot & Bengio 2010 |
| lecun | 1 / sqrt(inputs) | 1 | LeCun et al. 1998 |
| t5 | 1 / sqrt(inputs); queries: / sqrt(K) more; wants attention_scale=1 | 1, relative 1 / sqrt(D) | Raffel et al. 2020 |
| t_fixup | xavier; values, outputs, MLP times (9 N)^-1/4, in an encoder 0.67 N^-1/4 | (9 N)^-1/4 / sqrt(D) | Huang et al. 2020 |
| deepnorm | xavier, normal; values, outputs, MLP times beta; residual_scale=1 becomes alpha | 1 / sqrt(D) | Wang et al. 2022 |
| mup, completep | gpt2 at the base, times the std of the table in parametrization.py; head and classifier 0 | init_std | Yang et al. 2021 |
| orthogonal | orthonormal rows or columns, whichever are fewer | 1 / sqrt(D) | Saxe et al. 2013 |

Numbers are standard deviations of normal distributions unless said otherwise. Examples of whole recipes:

    T-Fixup    model.init=t_fixup model.norm=none schedule.warmup="0 steps" (Adam, no warm-up, no norms)
    DeepNorm   model.init=deepnorm model.norm=layer model.norm_place=post
    T5         model.init=t5 model.attention_scale=1 (and model.logit_scale of 1/sqrt(width) where the head is tied)
    muP        model.init=mup model.mup_base_width=256: rates found at width 256 hold at every width
    CompleteP  model.init=completep model.mup_base_width=256 model.mup_base_layers=4: and at every depth
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from llmjax.model.parametrization import SCHEMES, Scales, depth_ratio, scales

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

UNIFORM = ("xavier", "t_fixup")
LOOKED_UP = ("embedding", "position", "relative")
# What T-Fixup and DeepNorm scale: the factors of a branch's output. A gate is not one of their papers' factors.
SCALED_PARTS = ("value", "out", "up", "down")


def initializer(c: ConfigDict, kind: str, *, inputs: int = 1, stacked: int = 0, path: str = "") -> Initializer:
    """The initialiser for a kind of parameter, by the scheme `c.init`.

    Args:
        c: the model's settings.
        kind: embedding, position, relative, inward, outward or head.
        inputs: how many dimensions of the parameter are summed over (fan-in), after the stacked ones.
        stacked: how many leading dimensions number separate matrices (experts, blocks of a block-diagonal one).
        path: where the parameter's module lives, names joined by slashes, such as encoder/layers/attention/value.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        matrix = shape[stacked:]
        if c.init == "orthogonal" and kind not in LOOKED_UP:
            keys = jax.random.split(key, math.prod(shape[:stacked]))
            return jax.vmap(lambda k: _orthogonal(k, matrix, inputs))(keys).reshape(shape).astype(dtype)
        # Drawn in float32: in bfloat16 jax.random draws one of 128 values, none of them far from the mean.
        deviation = jnp.asarray(std(c, kind, matrix, inputs=inputs, path=path), jnp.float32)
        if c.init in UNIFORM and kind not in LOOKED_UP:
            return (jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) * (deviation * math.sqrt(3.0))).astype(dtype)
        return (jax.random.normal(key, shape, jnp.float32) * deviation).astype(dtype)

    return init


def _orthogonal(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    """float32 with orthonormal rows or columns, whichever are fewer; uniform over all such matrices."""
    rows, columns = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    q, r = jnp.linalg.qr(jax.random.normal(key, (max(rows, columns), min(rows, columns))))
    q = q * jnp.sign(jnp.diag(r))[None, :]
    return (q if rows >= columns else q.T).reshape(shape)


def std(c: ConfigDict, kind: str, shape: tuple[int, ...], *, inputs: int = 1, path: str = "") -> float:
    """The standard deviation with which a parameter starts. Arguments as for `initializer`; `shape` is one matrix's."""
    if kind in LOOKED_UP:
        return _looked_up_std(c, kind, shape)
    part, encoder = path.rpartition("/")[2], path.startswith("encoder/")
    fan_in, fan_out = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    if c.init == "gpt2" or c.init in SCHEMES:
        added = branches(c, encoder=encoder) / depth_ratio(c)
        deviation = c.init_std / math.sqrt(added) if kind == "outward" else c.init_std
        return deviation * scales(c, f"{path}/kernel").std
    if c.init in ("xavier", "t_fixup", "deepnorm"):
        gain = branch_gain(c, encoder=encoder) if kind == "outward" or part in SCALED_PARTS else 1.0
        return gain * math.sqrt(2 / (fan_in + fan_out))
    if c.init == "orthogonal":
        return 1 / math.sqrt(max(fan_in, fan_out))
    if c.init == "t5" and part == "query":
        return 1 / math.sqrt(fan_in * shape[-1])
    return 1 / math.sqrt(fan_in)  # lecun, t5


def _looked_up_std(c: ConfigDict, kind: str, shape: tuple[int, ...]) -> float:
    if c.init == "gpt2" or c.init in SCHEMES:
        return float(c.init_std)
    if kind == "relative":
        return 1 / math.sqrt(c.width)
    if c.init in ("lecun", "t5"):
        return 1.0
    return (branch_gain(c) if c.init == "t_fixup" else 1.0) / math.sqrt(shape[-1])


def branches(c: ConfigDict, *, encoder: bool = False) -> int:
    """How many branches are added to the residual stream of the stack, two a layer in a decoder-only model."""
    if encoder:
        return 2 * c.encoder_layers
    return c.layers * (1 + (c.mlp != "none") + (c.encoder_layers > 0))


def branch_gain(c: ConfigDict, *, encoder: bool = False) -> float:
    """The factor of T-Fixup and DeepNorm on the matrices of a branch; 1 in other schemes.

    A model without encoder counts as a decoder, also a bidirectional one.
    """
    if c.init == "t_fixup":
        return 0.67 * c.encoder_layers**-0.25 if encoder else (9 * c.layers) ** -0.25
    if c.init == "deepnorm":
        return deepnorm(c.layers, c.encoder_layers, encoder=encoder)[1]
    return 1.0


def deepnorm(layers: int, encoder_layers: int = 0, *, encoder: bool = False) -> tuple[float, float]:
    """DeepNorm's (alpha, beta) of a stack: the residual stream's factor, and the gain of its branches' matrices.

    Figure 2 of Wang et al. 2022. layers: M, of the decoder or the only stack; encoder_layers: N, 0 without encoder.
    """
    if not encoder_layers:
        return (2 * layers) ** 0.25, (8 * layers) ** -0.25
    if encoder:
        depth = (encoder_layers**4 * layers) ** (1 / 16)
        return 0.81 * depth, 0.87 / depth
    return (3 * layers) ** 0.25, (12 * layers) ** -0.25


def residual_scale(c: ConfigDict, *, encoder: bool = False) -> float:
    """The factor on the residual stream of a stack: as set, or DeepNorm's alpha where 1 is set."""
    if c.init == "deepnorm" and c.residual_scale == 1:
        return deepnorm(c.layers, c.encoder_layers, encoder=encoder)[0]
    return c.residual_scale


def _axes(entry: Any, mesh: Any) -> str:
    """The axes that divide a dimension, as text."""
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return "+".join(axis for axis in axes if mesh.shape[axis] > 1) or "."


def parameter_table(params: Any, *, shardings: Any = None, factors: Mapping[str, Scales] | None = None) -> str:
    """Path, shape, type, mean and standard deviation (and placement) of every parameter, as text.

    The statistics are measured from the arrays, so the table shows the parameters as they are.

    Args:
        factors: by path, of muP or CompleteP; shown behind the rest, without that of the start, which std shows.
    """
    shown = ("multiplier", "rate", "decay", "epsilon") if factors else ()
    rows = [
        (
            "parameter", "shape", "count", "dtype", "mean", "std", "placement" if shardings is not None else "",
            *(f"x {name}" for name in shown),
        )
    ]  # fmt: skip
    places = jax.tree.leaves(shardings) if shardings is not None else None
    total = 0
    statistics = jax.device_get(
        jax.jit(lambda tree: jax.tree.leaves(jax.tree.map(lambda x: (jnp.mean(x), jnp.std(x)), tree)))(params)
    )
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        name = "/".join(str(getattr(k, "key", k)) for k in path)
        spec = "" if places is None else " ".join(_axes(entry, places[i].mesh) for entry in places[i].spec)
        mean, deviation = statistics[2 * i], statistics[2 * i + 1]
        total += leaf.size
        own = () if factors is None else tuple(f"{getattr(factors[name], column):.4g}" for column in shown)
        size = f"{leaf.size:,}"
        rows.append(
            (name, str(tuple(leaf.shape)), size, str(leaf.dtype), f"{mean:+.4f}", f"{deviation:.4f}", spec, *own)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            *lines,
            f"{total:,} parameters, {sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params)) / 1e6:,.1f} MB",
        ]
    )
