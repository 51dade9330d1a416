"""The optimizers, from optax, with one rule for decay, for Muon and for parameters that the loss does not move.

A *matrix* is a kernel or an embedding: norm scales, biases, kernels of short convolutions and the vectors of recurrent
layers are not. Weight decay is decoupled (Loshchilov & Hutter 2019), multiplied by the learning rate, and applied to
matrices only. Muon updates the matrices inside the layers; embeddings, the head and vectors get AdamW.

*Observed* parameters (model/observed.py) have rules of their own here; neither clipping nor decay reaches them.

Gradients, optimizer state and updates are float32, whatever type parameters are stored in.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from optax import contrib

from llmjax.errors import UserError
from llmjax.model import observed
from llmjax.model.parametrization import Scales, is_base, scales
from llmjax.model.stacks import IN_LAYERS, layer_slots
from llmjax.parallel.placement import path_name
from llmjax.train import adafactor

AVERAGE_RATE = 0.1  # share of the distance to the observed statistics, each step


def is_matrix(name: str) -> bool:
    """Whether a parameter of this path is decayed and counted by L1 and L2: kernels, embeddings, factors of adapters."""
    return name.endswith(("kernel", "embedding", "lora_a", "lora_b")) and not name.endswith(
        ("conv/kernel", "query_embedding")
    )


def matrices(params: Any) -> Any:
    """A tree of booleans: the parameters that are matrices."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path_name(path)), params)


def muon_dimensions(params: Any) -> Any:
    """For each parameter the dimensions that Muon orthogonalises: inputs against outputs; None: AdamW's.

    (N, D, H, K) is a stack of N matrices D x (H K), and (N, H, K, D) of N matrices (H K) x D. Experts (N, E, D, F),
    block-diagonal gates (N, H, K, K) and a cell's maps (N, D, I, R) are N E, N H and N I matrices: what is not named in
    a parameter's row is a dimension of the stack.
    """

    def dimensions(path: Any, leaf: Any) -> contrib.MuonDimensionNumbers | None:
        name = path_name(path)
        if not (IN_LAYERS.match(name) and name.endswith("kernel") and is_matrix(name)):
            return None
        last = leaf.ndim - 1
        if re.search(r"(attention|cross)/out/kernel$", name):
            return contrib.MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(last,))
        if re.search(r"(moe|rglru)/\w+/kernel$", name) and leaf.ndim == 4:
            return contrib.MuonDimensionNumbers(reduction_axis=(2,), output_axis=(3,))
        if re.search(r"(rnn|lstm)/(input|hidden)/kernel$", name):
            return contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(3,))
        return contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=tuple(range(2, last + 1)))

    return jax.tree_util.tree_map_with_path(dimensions, params)


def stack_dimensions(params: Any) -> Any:
    """For each parameter the dimensions that number separate matrices or vectors: layers, experts, diagonal blocks."""

    def dimensions(path: Any, leaf: Any, muon: contrib.MuonDimensionNumbers | None) -> tuple[int, ...]:
        name = path_name(path)
        if muon is not None:
            return tuple(sorted(set(range(leaf.ndim)) - {*muon.reduction_axis, *muon.output_axis}))
        if re.search(r"moe/(up|gate|down)/bias$", name):
            return (0, 1)
        return (0,) if IN_LAYERS.match(name) else ()

    return jax.tree_util.tree_map_with_path(dimensions, params, muon_dimensions(params))


def shard_layers(x: jax.Array) -> jax.Array:
    """On a mesh of data alone, divide a stack of layers among the devices, so that each computes only its own layers.

    Muon's products are a quarter of a small model's step.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or mesh.shape.get("data") != mesh.size or x.ndim < 3 or x.shape[0] % mesh.size:
        return x
    # Whole first: otherwise XLA divides the stack of gradients already where it is built, layer by layer.
    whole = jax.lax.with_sharding_constraint(x, PartitionSpec(*(None,) * x.ndim))
    return jax.lax.with_sharding_constraint(whole, PartitionSpec("data", *(None,) * (x.ndim - 1)))


def updated_by(params: Any, *, optimizer: str) -> Any:
    """A tree of names: the rule that updates each parameter: muon, adamw, ... or that of an observed parameter."""
    muon = muon_dimensions(params) if optimizer == "muon" else None

    def rule(path: Any, _: Any, dimensions: Any = None) -> str:
        name = path_name(path)
        if observed.is_observed(name):
            return observed.RULES[name.rpartition("/")[2]]
        if optimizer == "muon":
            return "muon" if dimensions is not None else "adamw"
        return optimizer

    return jax.tree_util.tree_map_with_path(rule, params, *(() if muon is None else (muon,)))


def scales_of(c: ConfigDict, params: Any, *, model: ConfigDict | None) -> dict[str, Scales]:
    """Path -> the factors of muP or CompleteP on each parameter; {}: all rates, decays and epsilons are as set.

    Args:
        c: the settings under `optimizer`.
        model: the model's settings; None: none are known.
    """
    if model is None or is_base(model):
        return {}
    rules = jax.tree_util.tree_leaves_with_path(updated_by(params, optimizer=c.name))
    return {path_name(path): scales(model, path_name(path), optimizer=rule) for path, rule in rules}


def scale_by_adam(b1: float, b2: float, epsilon: Callable[[str], float]) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, with its state, and an epsilon for each parameter by its path."""
    plain = optax.scale_by_adam(b1=b1, b2=b2)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = plain.update(grads, state, params)
        mean = optax.tree.bias_correction(state.mu, b1, state.count)
        square = optax.tree.bias_correction(state.nu, b2, state.count)

        def one(path: Any, m: jax.Array, v: jax.Array) -> jax.Array:
            return m / (jnp.sqrt(v) + epsilon(path_name(path)))

        return jax.tree_util.tree_map_with_path(one, mean, square), state

    return optax.GradientTransformation(plain.init, update)


def in_float32(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule with float32 gradients and parameters, so that its state and its updates are float32.

    In bfloat16 a running mean stops moving when its steps fall below 1/256 of it: Adam's second moment with beta2 0.999
    would keep the size of the largest gradients for ever.
    """

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return rule.init(wide(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return rule.update(wide(grads), state, wide(params))

    return optax.GradientTransformation(init, update)


def apply_updates(params: Any, updates: Any, key: jax.Array) -> Any:
    """params + updates, each in the type of its parameter, added in float32.

    Parameters in bfloat16 are rounded up or down at random, with the probabilities that keep the mean. With rounding to
    nearest a parameter never moves by less than 1/512 of itself, which is more than the steps of fine-tuning (Zamirai et
    al. 2020, Revisiting BFloat16 Training).
    """
    leaves, structure = jax.tree.flatten(params)
    made = []
    for i, (p, u) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True)):
        x = p.astype(jnp.float32) + u
        if p.dtype == jnp.bfloat16:
            # bfloat16 is the upper half of float32: a random lower half is added before it is cut off.
            noise = jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint16).astype(jnp.uint32)
            bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
            x = jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(bits, jnp.float32), x)
        made.append(x.astype(p.dtype))
    return jax.tree.unflatten(structure, made)


def make_optimizer(
    c: ConfigDict, schedule: optax.Schedule, *, model: ConfigDict | None = None
) -> optax.GradientTransformation:
    """The optimizer for the settings under `optimizer`; `schedule` is a factor of the peak learning rates.

    The step clips by the global norm (Pascanu et al. 2013), because it needs the norm anyway.

    Args:
        model: the model's settings, for the factors of muP and CompleteP and the step of the experts' bias; None: use
            neither.
    """
    moved = model is not None and not is_base(model)

    def rate(step: jax.Array) -> jax.Array:
        return c.learning_rate * schedule(step)

    def scaled(updates: Any, optimizer: str) -> Any:
        """Times the factors of muP or CompleteP, which `decay` does not get: its product with the rate stays."""
        return jax.tree_util.tree_map_with_path(
            lambda path, u: u * scales(model, path_name(path), optimizer=optimizer).rate, updates
        )

    def chain(*rule: optax.GradientTransformation, by: str) -> optax.GradientTransformation:
        """The rule of that name, its factors if they are not 1, decay, and the rate."""
        factors = (optax.stateless(lambda updates, _: scaled(updates, by)),) if moved else ()
        decay = optax.add_decayed_weights(c.weight_decay, mask=matrices)
        return optax.chain(*rule, *factors, decay, optax.scale_by_learning_rate(rate))

    rules = {
        "average": optax.scale(-AVERAGE_RATE),
        "balance": optax.stateless(
            lambda updates, _: jax.tree.map(lambda g: -_bias_rate(model) * jnp.sign(g), updates)
        ),
    }
    if c.name in ("adamw", "muon"):
        adam = optax.scale_by_adam(b1=c.beta1, b2=c.beta2, eps=c.epsilon)
        if moved:
            adam = scale_by_adam(c.beta1, c.beta2, lambda name: c.epsilon * scales(model, name).epsilon)
        rules["adamw"] = chain(adam, by="adamw")
    if c.name == "muon":  # Jordan et al. 2024
        muon = contrib.muon(
            lambda step: c.muon_learning_rate * schedule(step),
            beta=c.muon_momentum,
            weight_decay=c.weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
        )
        # Not contrib.muon's own AdamW for the rest, which decays norm scales and biases too.
        sharded = optax.stateless(lambda updates, _: jax.tree.map(shard_layers, updates))
        muon = optax.chain(sharded, muon)
        rules["muon"] = _followed(muon, lambda updates: scaled(updates, "muon")) if moved else muon
    elif c.name == "adafactor":  # Shazeer & Stern 2018
        factored, sized = adafactor.scale_by_factored_rms, adafactor.scale_by_parameter
        rules["adafactor"] = chain(factored(stack_dimensions), sized(stack_dimensions), by="adafactor")
    elif c.name == "lion":  # Chen et al. 2023
        rules["lion"] = chain(optax.scale_by_lion(b1=c.beta1, b2=c.beta2), by="lion")
    elif c.name == "sgd":  # with momentum
        rules["sgd"] = chain(optax.trace(decay=c.beta1), by="sgd")
    rule: Any = optax.partition(rules, lambda params: updated_by(params, optimizer=c.name))
    if c.rates or c.layer_decay != 1:
        own = own_rate(c, model)
        rule = _followed(rule, lambda updates: jax.tree_util.tree_map_with_path(own, updates))
    return in_float32(rule)


def _followed(rule: optax.GradientTransformation, change: Callable[[Any], Any]) -> optax.GradientTransformation:
    """The rule, whose updates are changed. The state is that of the rule alone."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = rule.update(grads, state, params)
        return change(updates), state

    return optax.GradientTransformation(rule.init, update)


def own_rate(c: ConfigDict, model: ConfigDict | None) -> Callable[[Any, jax.Array], jax.Array]:
    """(path, update) -> the update times the factors of `optimizer.rates` and `optimizer.layer_decay` for its parameter.

    With a decay d layer i of N has d ** (N - 1 - i), embeddings d ** N and heads 1 (Clark et al. 2020). Weight decay is part of
    the update. Observed parameters have no rate.
    """
    factors = [(pattern, float(factor)) for pattern, _, factor in (rate.rpartition("=") for rate in c.rates)]

    def scaled(path: Any, update: jax.Array) -> jax.Array:
        name = path_name(path)
        if observed.is_observed(name):
            return update
        factor = next((factor for pattern, factor in factors if re.search(pattern, name)), 1.0)
        if c.layer_decay == 1:
            return update * factor
        assert model is not None, "layer_decay needs the model's settings"
        by_layer = jnp.asarray(c.layer_decay ** np.array(layers_after(name, model), np.float32) * factor, jnp.float32)
        return update * by_layer.reshape(-1, *(1,) * (update.ndim - 1)) if by_layer.ndim else update * by_layer

    return scaled


def layers_after(name: str, model: ConfigDict) -> list[int] | int:
    """How many layers come after a parameter, those of its own stack for the layers of a stacked one; heads: 0.

    The encoder's layers come before the decoder's.
    """
    encoder = name.startswith("encoder/")
    count, after = (model.encoder_layers, model.layers) if encoder else (model.layers, 0)
    if IN_LAYERS.match(name) and not name.startswith("ahead/"):
        slots = layer_slots(model, encoder=encoder)
        return [after + count - 1 - i for i, (path, _) in enumerate(slots) if name.startswith(f"{path}/")]
    if re.search(r"embedding(_norm|_projection)?(/|$)", name):
        return model.encoder_layers + model.layers
    return after if encoder else 0


def _bias_rate(model: ConfigDict | None) -> float:
    if model is None:
        raise UserError("the parameters have an expert_bias: give make_optimizer the model's settings")
    return model.moe.bias_rate


def table(c: ConfigDict, params: Any, *, model: ConfigDict | None = None) -> str:
    """Which rule updates how many parameters, in a few lines."""
    leaves, moved = jax.tree_util.tree_leaves_with_path(params), scales_of(c, params, model=model)
    groups: dict[str, int] = {}
    for (path, leaf), by in zip(leaves, jax.tree.leaves(updated_by(params, optimizer=c.name)), strict=True):
        key = _group(c, path_name(path), by, moved.get(path_name(path), Scales()), model)
        groups[key] = groups.get(key, 0) + math.prod(leaf.shape)
    return "\n".join(f"{count:>15,} parameters: {what}" for what, count in groups.items())


def _group(c: ConfigDict, name: str, by: str, factors: Scales, model: ConfigDict | None) -> str:
    if by == "average":
        return f"running averages of what is observed, rate {AVERAGE_RATE:g}"
    if by == "balance":
        return f"bias that balances the experts, step {_bias_rate(model):g}"

    def times(value: float, factor: float) -> str:
        return f"{value:g}{f' x {factor:g}' if factor != 1 else ''}"

    peak = c.muon_learning_rate if by == "muon" else c.learning_rate
    relative = " of the parameter" if by == "adafactor" else ""
    decay = f"weight decay {times(c.weight_decay, factors.decay)}" if is_matrix(name) else "no weight decay"
    epsilon = f", epsilon {times(c.epsilon, factors.epsilon)}" if by == "adamw" and factors.epsilon != 1 else ""
    return f"{by}, learning rate {times(peak, factors.rate)}{relative}, {decay}{epsilon}"
