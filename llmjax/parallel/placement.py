"""The one table that places every parameter, and the one that places activations by the letters of their shape.

A row is (regex on the parameter's path, one mesh axis or None for each dimension). The first row that matches
wins; a parameter that no row matches is an error, so nothing is replicated by accident. Optimizer state and moving
averages follow their parameter (ZeRO-3 when fsdp is more than one). Stacked layers have the layer dimension first.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Row = tuple[str, tuple[str | None, ...]]

TABLE: tuple[Row, ...] = (
    (r"^embedding$", ("tensor", "fsdp")),  # V D
    (r"^position_embedding$", (None, "fsdp")),  # M D
    (r"^head/kernel$", ("fsdp", "tensor")),  # D V
    (r"^layers/attention/(query|key|value)/kernel$", (None, "fsdp", "tensor", None)),  # N D H K
    (r"^layers/attention/(query|key|value)/bias$", (None, "tensor", None)),  # N H K
    (r"^layers/attention/out/kernel$", (None, "tensor", None, "fsdp")),  # N H K D
    (r"^layers/mlp/(up|gate)/kernel$", (None, "fsdp", "tensor")),  # N D F
    (r"^layers/mlp/(up|gate)/bias$", (None, "tensor")),  # N F
    (r"^layers/mlp/down/kernel$", (None, "tensor", "fsdp")),  # N F D
    (r"^layers/(attention/out|mlp/down)/bias$", (None, None)),  # N D
    (r"^layers/.*norm/(scale|bias)$", (None, None)),  # N D or N K
    (r"^final_norm/(scale|bias)$", (None,)),  # D
)

# Letter of the legend -> mesh axes, for activations labelled by `model.layers.label`. D is not sharded: the
# residual stream is whole on every device, parameters sharded over fsdp are gathered when they are used.
ACTIVATIONS: tuple[tuple[str, Any], ...] = (
    ("B", ("data", "fsdp")),
    ("H", "tensor"),
    ("G", "tensor"),
    ("F", "tensor"),
    ("V", "tensor"),
    ("L", None),
    ("M", None),
    ("D", None),
    ("K", None),
)

BATCH = PartitionSpec(("data", "fsdp"))


def path_name(path: Sequence[Any]) -> str:
    """A tree path as text, names joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def parameter_shardings(params: Any, mesh: Mesh, *, rules: Sequence[Row] = ()) -> Any:
    """A NamedSharding for every parameter of a tree of arrays or shapes.

    Args:
        params: tree of arrays or ShapeDtypeStructs.
        rules: rows to try before the table, from `config.parallel.rules`.

    Raises:
        ValueError: when no row matches a parameter, a row has the wrong number of dimensions, or a mesh axis does
            not divide its dimension (key and value heads fewer than the tensor axis are replicated instead, as
            multi-query attention needs).
    """
    rows = (*((pattern, tuple(axes)) for pattern, axes in rules), *TABLE)

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_name(path)
        axes = next((axes for pattern, axes in rows if re.search(pattern, name)), None)
        if axes is None:
            raise ValueError(
                f"no row places the parameter {name} {leaf.shape}: add one to parallel.rules or parallel/placement.py"
            )
        if len(axes) != len(leaf.shape):
            raise ValueError(
                f"the row for {name} has {len(axes)} dimensions and the parameter {len(leaf.shape)}: {leaf.shape}"
            )
        unknown = [axis for axis in axes if axis is not None and axis not in mesh.shape]
        if unknown:
            raise ValueError(
                f"the row for {name} names the axis {unknown[0]!r}; axes are {', '.join(mesh.shape)}, or None: mend parallel.rules"
            )
        kept = list(axes)
        for i, (axis, size) in enumerate(zip(axes, leaf.shape, strict=True)):
            if axis is None or size % mesh.shape[axis] == 0:
                continue
            if axis == "tensor" and re.search(r"attention/(key|value)/", name):
                kept[i] = None
                continue
            raise ValueError(
                f"the mesh axis {axis}={mesh.shape[axis]} does not divide dimension {i} of {name} {tuple(leaf.shape)}; "
                f"choose another size for {axis} in parallel.mesh or for the model"
            )
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree_util.tree_map_with_path(place, params)


def like_parameters(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree such as optimizer state, whose leaves follow the parameter that ends their path.

    A leaf of the same shape as its parameter gets the parameter's sharding; counters and factored statistics are replicated.
    """
    known = {
        path_name(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_name(path)
        for start in range(len(path)):
            shape, sharding = known.get(path_name(path[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        assert leaf.ndim == 0 or leaf.size < 1e9, f"{name} {leaf.shape} would be replicated"
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def activation_rules(mesh: Mesh, *, kv_heads: int) -> tuple[tuple[str, Any], ...]:
    """The letters' axes for flax's logical rules; key and value heads that tensor does not divide stay whole."""
    if kv_heads % mesh.shape["tensor"]:
        return tuple((letter, None if letter == "G" else axes) for letter, axes in ACTIVATIONS)
    return ACTIVATIONS


@contextmanager
def active(mesh: Mesh, *, kv_heads: int) -> Iterator[None]:
    """Trace under the mesh, with the letters of activations bound to its axes.

    `jax.set_mesh`, not `with mesh:`, under which flax makes its constraints do nothing.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(activation_rules(mesh, kv_heads=kv_heads)):
        yield
