"""Where the arrays of a kernel live that the compiler cannot divide by itself: each device runs it on what it has.

Like `layers.constrain` this knows letters only; parallel/placement.py says on which axes they live.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.model.per_device import divided, left_to_the_compiler, ways


def on_each_device(
    function: Callable[..., jax.Array], q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, mask_BLM: jax.Array
) -> jax.Array:
    """function(q, k, v, mask) -> y_BLHK on each device's rows, queries and heads, with all keys of its rows."""
    axes = divided("BLH", q_BLHK.shape[:3])
    region = left_to_the_compiler()
    if not region:
        return function(q_BLHK, k_BMGK, v_BMGK, mask_BLM)
    k_BMGK, v_BMGK = (copied(x, axes["H"]) for x in (k_BMGK, v_BMGK))
    B, L, H = (names or None for names in axes.values())
    queries, keys = PartitionSpec(B, L, H, None), PartitionSpec(B, None, H, None)
    where = (queries, keys, keys, PartitionSpec(B, L, None))
    run = jax.shard_map(function, in_specs=where, out_specs=queries, axis_names=region, check_vma=False)
    return run(q_BLHK, k_BMGK, v_BMGK, mask_BLM)


def copied(k_BMGK: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Keys or values repeated such that the devices that divide the heads get a copy of those their heads look at."""
    groups, parts = k_BMGK.shape[2], ways(axes)
    return jnp.repeat(k_BMGK, math.lcm(groups, parts) // groups, axis=2) if groups % parts else k_BMGK
