"""The one table that places every parameter, and the one that places activations by the letters of their shape.

A row is (regex on the parameter's path, one mesh axis or None for each dimension). The first row that matches
wins; a parameter that no row matches is an error, so nothing is replicated by accident. Optimizer state and moving
averages live where their parameter does. Stacked layers have the layer dimension first, which `pipeline` divides.

ZeRO (Rajbhandari et al. 2020) is a matter of placement alone: with `parallel.zero=3` everything is as the table says, with
2 parameters are whole over fsdp, and gradients and optimizer state are divided; with 1 gradients are whole too.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.model.transformer import Transformer
from llmjax.parallel import context, pipeline
from llmjax.parallel.mesh import ROWS

Axes = str | tuple[str, ...] | None
Row = tuple[str, tuple[Axes, ...]]

VOCABULARY = ("tensor", "pipeline")  # embedding and head are outside of the stages, which divide them

# The paths of blocks: the stacks of the decoder or encoder, and the place in a pattern of several kinds of layers.
LAYER = r"^((encoder/)?(first|layers|last)/(\d+/)?|ahead/)"

TABLE: tuple[Row, ...] = (
    (r"^embedding$", (VOCABULARY, "fsdp")),  # V D
    (r"^(position|type|language)_embedding$", (None, "fsdp")),  # M D
    (r"^query_embedding$", (None,)),  # D
    (r"relative_embedding$", (None, None)),  # buckets H
    (r"^head/kernel$", ("fsdp", VOCABULARY)),  # D V
    (r"^head_bias$", (VOCABULARY,)),  # V
    (r"^value/kernel$", ("fsdp",)),  # D
    (r"^value/bias$", ()),
    (r"^(embedding_projection|output_projection|head_transform|pooler|classifier)/kernel$", ("fsdp", None)),  # D D
    (r"^(head_transform|pooler|classifier)/bias$", (None,)),  # D
    (LAYER + r"(attention|cross)/(query|key|value|position)/kernel$", (None, "fsdp", "tensor", None)),  # N D H K
    (LAYER + r"(attention|cross)/(query|key|value)/bias$", (None, "tensor", None)),  # N H K
    (LAYER + r"attention/(query_down|latent_down|rotary_key)/kernel$", (None, "fsdp", None)),  # N D R
    (LAYER + r"(attention|cross)/sinks$", (None, "tensor")),  # N H
    (LAYER + r"attention/(content|position|type)_bias$", (None, "tensor", None)),  # N H K
    (LAYER + r"attention/type_embedding$", (None, None, "tensor", None)),  # N 2 H K
    (LAYER + r"(attention|cross)/out/kernel$", (None, "tensor", None, "fsdp")),  # N H K D
    (LAYER + r"(mlp|moe/shared)/(up|gate)/kernel$", (None, "fsdp", "tensor")),  # N D F
    (LAYER + r"(mlp|moe/shared)/(up|gate)/bias$", (None, "tensor")),  # N F
    (LAYER + r"(mlp|moe/shared)/down/kernel$", (None, "tensor", "fsdp")),  # N F D
    (LAYER + r"(attention/out|cross/out|mlp/down|moe/shared/down)/bias$", (None, None)),  # N D
    (LAYER + r"moe/(router|shared_gate)/kernel$", (None, "fsdp", None)),  # N D E
    (LAYER + r"moe/(expert_bias|router/bias)$", (None, None)),  # N E
    (LAYER + r"moe/(up|gate)/kernel$", (None, "expert", "fsdp", "tensor")),  # N E D F
    (LAYER + r"moe/(up|gate)/bias$", (None, "expert", "tensor")),  # N E F
    (LAYER + r"moe/down/kernel$", (None, "expert", "tensor", "fsdp")),  # N E F D
    (LAYER + r"moe/down/bias$", (None, "expert", None)),  # N E D
    (LAYER + r"(.*/)?\w*norm/(scale|bias|running_mean|running_var)$", (None, None)),  # N D or N K
    (r"norm/(scale|bias|running_mean|running_var)$", (None,)),  # D
    # Adapters (model/adapters.py): what is as long as the width over fsdp, like the kernel beside it.
    (LAYER + r"(.*/)?(?!(out|down)/)\w+/lora_a$", (None, "fsdp", None)),  # N D R
    (LAYER + r"(.*/)?(out|down)/lora_a$", (None, None, None)),  # N F R
    (LAYER + r"(.*/)?(?!(out|down)/)\w+/lora_b$", (None, None, None)),  # N R F
    (LAYER + r"(.*/)?(out|down)/lora_b$", (None, None, "fsdp")),  # N R D
    (LAYER + r"(.*/)?magnitude$", (None, None)),  # N F
    (r"/lora_a$", ("fsdp", None)),  # D R
    (r"^head/lora_b$", (None, VOCABULARY)),  # R V
    (r"^head/magnitude$", (VOCABULARY,)),  # V
    (r"/lora_b$", (None, None)),
    (r"/magnitude$", (None,)),
    # Recurrent mixers: channels over tensor. In rnn and lstm each step then gathers the hidden state.
    (LAYER + r"(rnn|lstm)/input/kernel$", (None, "fsdp", None, "tensor")),  # N D I R
    (LAYER + r"(rnn|lstm)/hidden/kernel$", (None, "fsdp", None, "tensor")),  # N R I R
    (LAYER + r"(rnn|lstm)/bias$", (None, None, "tensor")),  # N I R
    (LAYER + r"(rglru|mamba2)/(gate|input)/kernel$", (None, "fsdp", "tensor")),  # N D R
    (LAYER + r"(rglru|mamba2)/(gate|input)/bias$", (None, "tensor")),  # N R
    (LAYER + r"conv/(before|after|input)/kernel$", (None, "fsdp", "tensor")),  # N D R
    (LAYER + r"conv/(before|after|input)/bias$", (None, "tensor")),  # N R
    (LAYER + r"rglru/(recurrence|input)_gate/kernel$", (None, "tensor", "fsdp", None)),  # N H K K
    (LAYER + r"rglru/(recurrence|input)_gate/bias$", (None, "tensor", None)),  # N H K
    (LAYER + r"mamba2/dt/kernel$", (None, "fsdp", "tensor")),  # N D H
    (LAYER + r"mamba2/(A_log|D|dt_bias)$", (None, "tensor")),  # N H
    (LAYER + r"mamba2/state/kernel$", (None, "fsdp", None)),  # N D 2GJ: groups' B and C, which all heads read
    (LAYER + r"mamba2/state/bias$", (None, None)),  # N 2GJ
    (LAYER + r"mamba2/state_conv/kernel$", (None, None, None)),  # N W 2GJ
    (LAYER + r"mamba2/state_conv/bias$", (None, None)),  # N 2GJ
    (LAYER + r"(rglru|mamba2|conv)/conv/kernel$", (None, None, "tensor")),  # N W R
    (LAYER + r"((rglru|mamba2|conv)/conv/bias|rglru/Lambda)$", (None, "tensor")),  # N R
    (LAYER + r"(rnn|lstm|rglru|mamba2|conv)/out/kernel$", (None, "tensor", "fsdp")),  # N R D
    (LAYER + r"(rnn|lstm|rglru|mamba2|conv)/out/bias$", (None, None)),  # N D
)

# Letter of the legend -> mesh axes, for the activations of `model.layers.constrain`. Of the rows for a letter the first holds
# whose axes no other dimension of the array has taken. D is not sharded: parameters sharded over fsdp are gathered when
# they are used. The keys' positions, M, are gathered over context (or go round in a ring, parallel/context.py).
ACTIVATIONS: tuple[tuple[str, Axes], ...] = (
    ("B", ROWS),
    ("H", "tensor"),
    ("G", "tensor"),
    ("F", "tensor"),
    ("R", "tensor"),  # channels inside a recurrent mixer
    ("E", "expert"),
    ("V", VOCABULARY),
    ("L", "context"),
    ("M", None),
    ("D", None),
    ("K", None),
)

BATCH = PartitionSpec(ROWS)
FEW_BITS = re.compile(r"/kernel_(int8|nf4|scale)$")
STACKED = re.compile(r"^(encoder/)?layers/")  # what is divided among the stages of a pipeline


def path_name(path: Sequence[Any]) -> str:
    """A tree path as text, names joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def parameter_specs(
    params: Any, sizes: Mapping[str, int], *, rules: Sequence[Row] = (), whole: Sequence[str] = ()
) -> Any:
    """A PartitionSpec for every parameter of a tree of arrays or shapes, on a mesh with axes of these sizes.

    Args:
        rules: rows to try before the table, from `config.parallel.rules`.
        whole: axes over which nothing is divided, whatever the rows say (fsdp, for ZeRO-1 and 2).

    Raises:
        UserError: when no row matches a parameter, a row has the wrong number of dimensions, or a mesh axis does
            not divide its dimension (key and value heads fewer than the tensor axis are replicated instead, as
            multi-query attention needs).
    """
    rows = (*((pattern, tuple(axes)) for pattern, axes in rules), *TABLE)

    def place(path: Sequence[Any], leaf: Any) -> PartitionSpec:
        name, shape = path_name(path), tuple(leaf.shape)
        kernel = FEW_BITS.sub("/kernel", name)  # codes and scales are where the kernel would be
        axes = next((axes for pattern, axes in rows if re.search(pattern, kernel)), None)
        if axes is None:
            raise UserError(
                f"no row places the parameter {name} {shape}: add one to parallel.rules or parallel/placement.py"
            )
        if len(axes) != len(shape):
            raise UserError(f"the row for {name} has {len(axes)} dimensions and the parameter {len(shape)}: {shape}")
        found = [tuple([entry] if isinstance(entry, str) else entry or ()) for entry in axes]
        unknown = [axis for entry in found for axis in entry if axis not in sizes]
        if unknown:
            raise UserError(
                f"the row for {name} names the axis {unknown[0]!r}; axes are {', '.join(sizes)}, or None: mend parallel.rules"
            )
        found = [tuple(axis for axis in entry if axis not in whole) for entry in found]
        if STACKED.search(name) and sizes["pipeline"] > 1:
            found = _among_stages(found, shape, sizes)
        for i, (entry, size) in enumerate(zip(found, shape, strict=True)):
            ways = math.prod(sizes[axis] for axis in entry)
            if size % ways == 0:
                continue
            if name != kernel or (entry == ("tensor",) and re.search(r"(attention|cross)/(key|value)/", name)):
                found[i] = ()
                continue
            said = " x ".join(f"{axis}={sizes[axis]}" for axis in entry if sizes[axis] > 1)
            raise UserError(
                f"the mesh axis {said} does not divide dimension {i} of {name} {shape}; "
                f"choose another size for {entry[0]} in the mesh (parallel.mesh; infer.mesh to read) or for the model"
            )
        return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in found))

    return jax.tree_util.tree_map_with_path(place, params)


def _among_stages(
    found: list[tuple[str, ...]], shape: Sequence[int], sizes: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """The axes of stacked layers with `pipeline`: it divides the layers, or where their number is not a multiple of the
    stages the dimension that fsdp divides; the step then gives each stage its layers (parallel/pipeline.py).
    """
    if shape[0] % sizes["pipeline"] == 0:
        return [("pipeline",), *found[1:]]
    for i, entry in enumerate(found):
        if "fsdp" in entry and shape[i] % (math.prod(sizes[axis] for axis in entry) * sizes["pipeline"]) == 0:
            return [*found[:i], (*entry, "pipeline"), *found[i + 1 :]]
    return found


def parameter_shardings(params: Any, mesh: Mesh, *, rules: Sequence[Row] = (), whole: Sequence[str] = ()) -> Any:
    """A NamedSharding for every parameter of a tree of arrays or shapes; see `parameter_specs`."""
    specs = parameter_specs(params, mesh.shape, rules=rules, whole=whole)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def like_parameters(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree such as optimizer state, whose leaves belong to the parameter that ends their path.

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


def activation_rules(mesh: Mesh, c: ConfigDict) -> tuple[tuple[str, Axes], ...]:
    """The letters' axes for flax's logical rules, for a config.

    Key and value heads that tensor does not divide stay whole. With `parallel.sequence` the positions of the residual
    stream are divided over tensor too, where heads or features do not need it (Korthikanti et al. 2022). With
    `parallel.features` its features are, as in PaLM: also where tensor does not divide the positions.
    """
    rules: list[tuple[str, Axes]] = []
    for letter, axes in ACTIVATIONS:
        if letter == "G" and (c.model.kv_heads or c.model.heads) % mesh.shape["tensor"]:
            axes = None
        if letter == "L" and c.parallel.sequence:
            rules.append(("L", ("context", "tensor")))
        if letter == "D" and c.parallel.features:
            rules.append(("D", "tensor"))
        rules.append((letter, axes))
    return tuple(rules)


def on_mesh(module: Transformer, mesh: Mesh, c: ConfigDict) -> Transformer:
    """The network as it runs on a mesh: in the stages of a pipeline, with attention in a ring, as `c.parallel` says.

    It computes the same as `module`, and is to be called where `active` is.
    """
    return module.clone(run_layers=pipeline.runner(c, mesh), attend=context.attention(c, mesh))


@contextmanager
def active(mesh: Mesh, c: ConfigDict) -> Iterator[None]:
    """Trace under the mesh, with the letters of activations bound to its axes.

    It decides where arrays live and changes no result; `on_mesh` decides how the network is run.

    `jax.set_mesh`, not `with mesh:`, under which flax makes its constraints do nothing.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(activation_rules(mesh, c)):
        yield
