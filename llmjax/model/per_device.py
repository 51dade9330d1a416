"""Run a function on each device's piece of its arguments, which are divided by the letters of their dimensions.

`per_device` is for work that the compiler would not divide well, because its order depends on the data; `run_manual` and
`heads_per_device` are for kernels, which it cannot divide. Like `layers.constrain` these know letters only.
parallel/placement.py says on which axes the letters live; without a mesh the function is just called.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

_given: ContextVar[str] = ContextVar("platform", default="")


@contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Trace for a platform, without asking JAX, which would start it."""
    before = _given.set(platform)
    try:
        yield
    finally:
        _given.reset(before)


def platform() -> str:
    """The platform that a traced program will run on: that of `traced_for`, or of the mesh, which may be another machine's,
    else JAX's own.
    """
    if given := _given.get():
        return given
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def summable(x: jax.Array) -> jax.Array:
    """The array in a type that devices can add up, which XLA on CPU cannot do in bfloat16."""
    return x.astype(jnp.float32) if platform() == "cpu" and x.dtype == jnp.bfloat16 else x


def per_device(function: Callable[..., jax.Array], arguments: Sequence[jax.Array], dims: Sequence[str]) -> jax.Array:
    """function(*pieces, copies), added up over the devices that work on the same piece of the first argument.

    The output is divided as the first argument is, so it must have as many dimensions. `copies` is the number of devices
    whose outputs are added: a term that must count once is to be divided by it.

    Args:
        dims: letters of each argument's dimensions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {
        letter: size for x, d in zip(arguments, dims, strict=True) for letter, size in zip(d, x.shape, strict=True)
    }
    axes = {letter: axes_of(letter, size) for letter, size in sizes.items()}
    region = tuple(axis for axis in mesh.axis_names if any(axis in names for names in axes.values()))
    if not region:
        return function(*arguments, 1)

    def spec(d: str) -> tuple[tuple[str, ...], PartitionSpec]:
        """The axes over which an array of these dimensions is repeated, and where it lives, these in front."""
        cuts: list[tuple[str, ...]] = []
        for letter in d:  # an axis cuts one dimension, the first whose letter asks for it
            taken = {axis for cut in cuts for axis in cut}
            cuts.append(() if taken & set(axes[letter]) else axes[letter])
        repeated = tuple(axis for axis in region if all(axis not in cut for cut in cuts))
        return repeated, PartitionSpec(repeated or None, *(cut or None for cut in cuts))

    # Copies become a dimension of their own, so that the gradients of copies are added by an ordinary sum, which the
    # compiler makes into the collective that the parameter's placement needs (XLA on CPU has none for bfloat16).
    repeated, specs = zip(*(spec(d) for d in dims), strict=True)
    given = []
    for x, names, where in zip(arguments, repeated, specs, strict=True):
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(*where[1:]))
        x = jnp.broadcast_to(x[None], (math.prod(mesh.shape[axis] for axis in names), *x.shape))
        given.append(jax.lax.with_sharding_constraint(x, where))
    copies = given[0].shape[0]

    def body(*pieces: jax.Array) -> jax.Array:
        return function(*(piece[0] for piece in pieces), copies)[None]

    run = jax.shard_map(body, in_specs=specs, out_specs=specs[0], axis_names=set(region), check_vma=False)
    return jnp.sum(run(*given), axis=0)


def axes_of(letter: str, size: int) -> tuple[str, ...]:
    """The axes that divide a dimension of this letter; none if they do not divide the size."""
    return divided(letter, (size,))[letter]


def divided(letters: str, sizes: tuple[int, ...]) -> dict[str, tuple[str, ...]]:
    """The axes of the mesh that divide each dimension of an array: none that are manual already, or of size 1, and none where
    they do not divide the size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)) if mesh.axis_names else {}
    found = {}
    entries = nn.logical_to_mesh_axes(tuple(letters)) or ()
    for letter, size, entry in zip(letters, sizes, entries, strict=True):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        names = tuple(name for name in names if kinds.get(name) == AxisType.Auto and mesh.shape[name] > 1)
        found[letter] = names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()
    return found


def ways(axes: tuple[str, ...]) -> int:
    """How many devices these axes of the mesh have."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in axes)


def run_manual(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    dims: Sequence[Any],
    out: str,
    axes: Mapping[str, tuple[str, ...]],
) -> Any:
    """function(*pieces) on each device, for a kernel that the compiler cannot divide by itself.

    All axes of the mesh become manual: where even one of size 1 is left, the compiler for TPU refuses a kernel.

    Args:
        dims: letters of each argument's dimensions, or for a tree a tree of PartitionSpecs.
        out: letters of the output's dimensions.
        axes: by letter, the axes that divide its dimension; letters that are not in it are whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    region = {name for name, kind in zip(mesh.axis_names, mesh.axis_types or (), strict=True) if kind == AxisType.Auto}
    if not region:
        return function(*arguments)

    def spec(letters: Any) -> Any:
        if not isinstance(letters, str):
            return letters
        return PartitionSpec(*(axes.get(letter) or None for letter in letters))

    where = tuple(map(spec, dims))
    run = jax.shard_map(function, in_specs=where, out_specs=spec(out), axis_names=region, check_vma=False)
    return run(*arguments)


def heads_per_device(
    function: Callable[..., jax.Array], q_BLHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, mask_BLM: jax.Array
) -> jax.Array:
    """function(q, k, v, mask) -> y_BLHK on each device's rows, queries and heads, with all keys of its rows."""
    axes = divided("BLH", q_BLHK.shape[:3])
    k_BMGK, v_BMGK = (copied(x, axes["H"]) for x in (k_BMGK, v_BMGK))
    dims = ("BLHK", "BMHK", "BMHK", "BLM")
    return run_manual(function, (q_BLHK, k_BMGK, v_BMGK, mask_BLM), dims, "BLHK", axes)


def copied(k_BMGK: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Keys or values repeated so that each of the devices that divide the heads gets those that its heads look at."""
    groups, parts = k_BMGK.shape[2], ways(axes)
    return jnp.repeat(k_BMGK, math.lcm(groups, parts) // groups, axis=2) if groups % parts else k_BMGK
