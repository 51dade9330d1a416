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

# Where blocks live: sections of the stack, of the encoder's stack, the place in a period of several kinds of layers.
LAYER = r"^((encoder/)?(first|layers|last)/(\d+/)?|ahead/)"

TABLE: tuple[Row, ...] = (
    (r"^embedding$", ("tensor", "fsdp")),  # V D
    (r"^(position|type|language)_embedding$", (None, "fsdp")),  # M D
    (r"^query_embedding$", (None,)),  # D
    (r"relative_embedding$", (None, None)),  # buckets H
    (r"^head/kernel$", ("fsdp", "tensor")),  # D V
    (r"^head_bias$", ("tensor",)),  # V
    (r"^(embedding_projection|output_projection|head_transform|pooler|classifier)/kernel$", ("fsdp", None)),  # D D
    (r"^(head_transform|pooler|classifier)/bias$", (None,)),  # D
    (LAYER + r"(attention|cross)/(query|key|value|position)/kernel$", (None, "fsdp", "tensor", None)),  # N D H K
    (LAYER + r"(attention|cross)/(query|key|value)/bias$", (None, "tensor", None)),  # N H K
    (LAYER + r"attention/(content|position|type)_bias$", (None, "tensor", None)),  # N H K
    (LAYER + r"attention/type_embedding$", (None, None, "tensor", None)),  # N 2 H K
    (LAYER + r"(attention|cross)/out/kernel$", (None, "tensor", None, "fsdp")),  # N H K D
    (LAYER + r"(mlp|moe/shared)/(up|gate)/kernel$", (None, "fsdp", "tensor")),  # N D F
    (LAYER + r"(mlp|moe/shared)/(up|gate)/bias$", (None, "tensor")),  # N F
    (LAYER + r"(mlp|moe/shared)/down/kernel$", (None, "tensor", "fsdp")),  # N F D
    (LAYER + r"(attention/out|cross/out|mlp/down|moe/shared/down)/bias$", (None, None)),  # N D
    (LAYER + r"moe/router/kernel$", (None, "fsdp", None)),  # N D E
    (LAYER + r"moe/expert_bias$", (None, None)),  # N E
    (LAYER + r"moe/(up|gate)/kernel$", (None, None, "fsdp", "tensor")),  # N E D F
    (LAYER + r"moe/(up|gate)/bias$", (None, None, "tensor")),  # N E F
    (LAYER + r"moe/down/kernel$", (None, None, "tensor", "fsdp")),  # N E F D
    (LAYER + r"moe/down/bias$", (None, None, None)),  # N E D
    (LAYER + r"(.*/)?\w*norm/(scale|bias|running_mean|running_var)$", (None, None)),  # N D or N K
    (r"norm/(scale|bias|running_mean|running_var)$", (None,)),  # D
    # Recurrent mixers: channels over tensor. In rnn and lstm each step then gathers the hidden state.
    (LAYER + r"(rnn|lstm)/input/kernel$", (None, "fsdp", None, "tensor")),  # N D I R
    (LAYER + r"(rnn|lstm)/hidden/kernel$", (None, "fsdp", None, "tensor")),  # N R I R
    (LAYER + r"(rnn|lstm)/bias$", (None, None, "tensor")),  # N I R
    (LAYER + r"(rglru|mamba2)/(gate|input)/kernel$", (None, "fsdp", "tensor")),  # N D R
    (LAYER + r"(rglru|mamba2)/(gate|input)/bias$", (None, "tensor")),  # N R
    (LAYER + r"rglru/(recurrence|input)_gate/kernel$", (None, "tensor", "fsdp", None)),  # N H K K
    (LAYER + r"rglru/(recurrence|input)_gate/bias$", (None, "tensor", None)),  # N H K
    (LAYER + r"mamba2/dt/kernel$", (None, "fsdp", "tensor")),  # N D H
    (LAYER + r"mamba2/(A_log|D|dt_bias)$", (None, "tensor")),  # N H
    (LAYER + r"mamba2/state/kernel$", (None, "fsdp", None)),  # N D 2GJ: groups' B and C, which all heads read
    (LAYER + r"mamba2/state/bias$", (None, None)),  # N 2GJ
    (LAYER + r"mamba2/state_conv/kernel$", (None, None, None)),  # N W 2GJ
    (LAYER + r"mamba2/state_conv/bias$", (None, None)),  # N 2GJ
    (LAYER + r"(rglru|mamba2)/conv/kernel$", (None, None, "tensor")),  # N W R
    (LAYER + r"((rglru|mamba2)/conv/bias|rglru/Lambda)$", (None, "tensor")),  # N R
    (LAYER + r"(rnn|lstm|rglru|mamba2)/out/kernel$", (None, "tensor", "fsdp")),  # N R D
    (LAYER + r"(rnn|lstm|rglru|mamba2)/out/bias$", (None, None)),  # N D
)

# Letter of the legend -> mesh axes, for activations labelled by `model.layers.label`. D is not sharded: the
# residual stream is whole on every device, parameters sharded over fsdp are gathered when they are used.
ACTIVATIONS: tuple[tuple[str, Any], ...] = (
    ("B", ("data", "fsdp")),
    ("H", "tensor"),
    ("G", "tensor"),
    ("F", "tensor"),
    ("R", "tensor"),  # channels inside a recurrent mixer
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
            if axis == "tensor" and re.search(r"(attention|cross)/(key|value)/", name):
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
