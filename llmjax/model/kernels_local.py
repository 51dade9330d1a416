"""Where the arrays of a kernel live that the compiler cannot divide by itself: each device runs it on what it has.

Like `layers.label` this knows letters only; parallel/placement.py says on which axes they live.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec


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


def ways(axes: tuple[str, ...]) -> int:
    """Over how many devices these axes of the mesh divide a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in axes)


def left_to_the_compiler() -> set[str]:
    """The axes of the mesh that are not manual yet. A kernel has to make all of them so: where even one of size 1 is left,
    the compiler for TPU refuses it."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types or (), strict=True) if kind == AxisType.Auto}


def divided(letters: str, sizes: tuple[int, ...]) -> dict[str, tuple[str, ...]]:
    """The axes of the mesh over which the dimensions of an array are divided, as far as the compiler has them to give
    and they divide the sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)) if mesh.axis_names else {}
    found = {}
    entries = nn.logical_to_mesh_axes(tuple(letters)) or ()
    for letter, size, entry in zip(letters, sizes, entries, strict=True):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        names = tuple(name for name in names if kinds.get(name) == AxisType.Auto and mesh.shape[name] > 1)
        found[letter] = names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()
    return found
