"""How parameters start: one row per kind of parameter and scheme, and the table that `train` prints.

Kinds: `embedding` and `position` are looked up; `inward` matrices read the residual stream, `outward` ones
write to it; `head` makes logits. Norm scales start at one and biases at zero in every scheme.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def initializer(c: ConfigDict, kind: str, *, inputs: int = 1) -> Initializer:
    """The initialiser for a kind of parameter.

    Args:
        c: the model's settings; `c.init` chooses the scheme.
        kind: embedding, position, inward, outward or head.
        inputs: how many leading dimensions of the parameter are summed over (fan-in).

    gpt2: normal(0, init_std), outward matrices divided by sqrt(2 N), N layers with two branches each
    (Radford et al. 2019, "scaled by 1/sqrt(N)" counted in residual branches).
    lecun: normal(0, 1/sqrt(fan-in)), embeddings normal(0, 1) (LeCun et al. 1998; T5's choice without its scaling).
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(std(c, kind, shape, inputs=inputs), dtype)

    return init


def std(c: ConfigDict, kind: str, shape: tuple[int, ...], *, inputs: int = 1) -> float:
    """Standard deviation with which a parameter of this kind and shape (without the layer dimension) starts."""
    if c.init == "gpt2":
        return c.init_std / math.sqrt(2 * c.layers) if kind == "outward" else c.init_std
    if kind in ("embedding", "position"):
        return 1.0
    return 1 / math.sqrt(math.prod(shape[:inputs]))


def parameter_table(params: Any, *, shardings: Any = None) -> str:
    """Path, shape, type, measured mean and standard deviation (and placement) of every parameter, as text.

    The statistics are measured from the arrays, so that the table shows what is, not what was asked for.
    """
    rows = [("parameter", "shape", "count", "dtype", "mean", "std", "placement" if shardings is not None else "")]
    places = jax.tree.leaves(shardings) if shardings is not None else None
    total = 0
    statistics = jax.device_get(
        jax.jit(lambda tree: jax.tree.leaves(jax.tree.map(lambda x: (jnp.mean(x), jnp.std(x)), tree)))(params)
    )
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        name = "/".join(str(getattr(k, "key", k)) for k in path)
        spec = "" if places is None else " ".join(str(axis or ".") for axis in places[i].spec) or "replicated"
        mean, deviation = statistics[2 * i], statistics[2 * i + 1]
        total += leaf.size
        rows.append(
            (name, str(tuple(leaf.shape)), f"{leaf.size:,}", str(leaf.dtype), f"{mean:+.4f}", f"{deviation:.4f}", spec)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            *lines,
            f"{total:,} parameters, {sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params)) / 1e6:,.1f} MB",
        ]
    )
