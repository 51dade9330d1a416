"""The optimizers, all from optax, with one rule for what is decayed and what Muon updates.

A *matrix* is a parameter with two or more dimensions besides the stacked layer dimension's; norm scales and biases
are not. Weight decay is decoupled (Loshchilov & Hutter 2019), multiplied by the learning rate, and applied to
matrices only. Muon updates the matrices inside the layers; embeddings, the head and vectors get AdamW.
"""

import math
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from optax import contrib

from llmjax.parallel.placement import path_name


def is_matrix(name: str) -> bool:
    """Whether a parameter of this path is decayed and counted by L1 and L2: kernels and embeddings."""
    return name.endswith("kernel") or name.endswith("embedding")


def matrices(params: Any) -> Any:
    """A tree of booleans: the parameters that are matrices."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path_name(path)), params)


def muon_dimensions(params: Any) -> Any:
    """For each parameter the dimensions that Muon orthogonalises: inputs against outputs; None: AdamW's.

    (N, D, H, K) is a stack of N matrices D x (H K), and (N, H, K, D) of N matrices (H K) x D.
    """

    def dimensions(path: Any, leaf: Any) -> contrib.MuonDimensionNumbers | None:
        name = path_name(path)
        if not (name.startswith("layers/") and name.endswith("kernel")):
            return None
        last = leaf.ndim - 1
        if name.endswith("attention/out/kernel"):
            return contrib.MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(last,))
        return contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=tuple(range(2, last + 1)))

    return jax.tree_util.tree_map_with_path(dimensions, params)


def spread_layers(x: jax.Array) -> jax.Array:
    """On a mesh of data alone, divide a stack of layers among the devices, which would otherwise all do the same.

    Muon's products are a quarter of a small model's step; so each device does those of its layers only.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or mesh.shape.get("data") != mesh.size or x.ndim < 3 or x.shape[0] % mesh.size:
        return x
    # Whole first: else XLA would divide the gradients' stack already where it is put together, layer by layer.
    whole = jax.lax.with_sharding_constraint(x, PartitionSpec(*(None,) * x.ndim))
    return jax.lax.with_sharding_constraint(whole, PartitionSpec("data", *(None,) * (x.ndim - 1)))


def updated_by(params: Any) -> Any:
    """A tree of "muon" and "adamw": which of the two updates each parameter under Muon."""
    dimensions = muon_dimensions(params)
    return jax.tree.map(
        lambda d: "adamw" if d is None else "muon", dimensions, is_leaf=lambda d: d is None or hasattr(d, "output_axis")
    )


def make_optimizer(c: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of the settings under `optimizer`; `schedule` is a factor of the peak learning rates.

    Clipping by the global norm (Pascanu et al. 2013) is part of the step, which needs the norm anyway.
    """

    def rate(step: jax.Array) -> jax.Array:
        return c.learning_rate * schedule(step)

    adamw = optax.adamw(rate, b1=c.beta1, b2=c.beta2, eps=c.epsilon, weight_decay=c.weight_decay, mask=matrices)
    if c.name == "adamw":
        return adamw
    if c.name == "muon":  # Jordan et al. 2024
        muon = contrib.muon(
            lambda step: c.muon_learning_rate * schedule(step),
            beta=c.muon_momentum,
            weight_decay=c.weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
        )
        muon = optax.chain(optax.stateless(lambda updates, _: jax.tree.map(spread_layers, updates)), muon)
        # Not contrib.muon's own AdamW for the rest, which decays norm scales and biases too.
        return optax.partition({"muon": muon, "adamw": adamw}, updated_by)
    if c.name == "adafactor":  # Shazeer & Stern 2018
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(c.weight_decay, mask=matrices),
            optax.scale_by_learning_rate(rate),
        )
    if c.name == "lion":  # Chen et al. 2023
        return optax.lion(rate, b1=c.beta1, b2=c.beta2, weight_decay=c.weight_decay, mask=matrices)
    return optax.chain(  # sgd with momentum
        optax.trace(decay=c.beta1),
        optax.add_decayed_weights(c.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(rate),
    )


def table(c: ConfigDict, params: Any) -> str:
    """What happens to which parameters, in two or three lines."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    groups: dict[str, int] = {}
    for (path, leaf), by in zip(leaves, jax.tree.leaves(updated_by(params)), strict=True):
        decay = f"weight decay {c.weight_decay:g}" if is_matrix(path_name(path)) else "no weight decay"
        if c.name == "muon":
            name, peak = ("muon", c.muon_learning_rate) if by == "muon" else ("adamw", c.learning_rate)
        else:
            name, peak = c.name, c.learning_rate
        key = f"{name}, learning rate {peak:g}, {decay}"
        groups[key] = groups.get(key, 0) + math.prod(leaf.shape)
    return "\n".join(f"{count:>15,} parameters: {what}" for what, count in groups.items())
