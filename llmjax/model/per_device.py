"""Run a function on each device's piece of its arguments, cut by the letters of their dimensions.

For what the compiler would not divide well by itself: work whose order depends on the data. Like `layers.constrain` this
knows letters only; parallel/placement.py says on which axes they live, and without a mesh the function is just called.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec


def platform() -> str:
    """What a program that is being traced will run on: the mesh's devices, which may be another machine's, else JAX's own."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def summable(x: jax.Array) -> jax.Array:
    """The array in a type that devices can add up: XLA on CPU cannot in bfloat16."""
    return x.astype(jnp.float32) if platform() == "cpu" and x.dtype == jnp.bfloat16 else x


def per_device(function: Callable[..., jax.Array], arguments: Sequence[jax.Array], dims: Sequence[str]) -> jax.Array:
    """function(*pieces, copies), added up over the devices that work on the same piece of the first argument.

    The output is cut as the first argument is, so it must have as many dimensions. `copies` is the number of devices
    whose outputs are added: what must count once is to be divided by it.

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
    # compiler turns into whatever the parameter's placement asks for (and XLA on CPU has no sum of bfloat16 otherwise).
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
    """The axes that cut dimensions of this letter here; none when they do not divide the size."""
    return divided(letter, (size,))[letter]


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


def ways(axes: tuple[str, ...]) -> int:
    """Over how many devices these axes of the mesh divide a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in axes)


def left_to_the_compiler() -> set[str]:
    """The axes of the mesh that are not manual yet. A kernel has to make all of them so: where even one of size 1 is left,
    the compiler for TPU refuses it."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types or (), strict=True) if kind == AxisType.Auto}


def run_whole(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """kernel(*arrays) for a kernel that nothing divides further: every device has all of what this region has."""
    region = left_to_the_compiler()
    if not region:
        return kernel(*arrays)
    whole = PartitionSpec()
    return jax.shard_map(kernel, in_specs=whole, out_specs=whole, axis_names=region, check_vma=False)(*arrays)
