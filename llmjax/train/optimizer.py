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
from llmjax.model.init import width_ratio
from llmjax.model.stacks import layer_slots
from llmjax.parallel.placement import path_name
from llmjax.train import adafactor

IN_LAYERS = re.compile(r"(encoder/)?(first|layers|last|ahead)/")
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


def rate_factor(name: str, *, ratio: float, optimizer: str = "adamw") -> float:
    """muP's factor on the learning rate of a parameter (Yang et al. 2021, Table 8, Adam): 1 / width ratio for kernels.

    The head has a multiplier in the forward pass instead, and one dimension of embeddings and vectors never grows. Muon
    needs no factor: its updates have the right size at every width. Adafactor's updates have the size of the parameter,
    which muP's initialisation already makes smaller: by sqrt(ratio), the router's by ratio.
    """
    if not (is_matrix(name) and name.endswith("kernel") and name != "head/kernel"):
        return 1.0
    if optimizer == "adafactor" and name != "classifier/kernel":  # which starts at 0
        return 1.0 if name.endswith("router/kernel") else ratio**-0.5
    return 1 / ratio


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
        model: the model's settings, for muP's factors and the step of the experts' bias; None: use neither.
    """
    ratio = 1.0 if model is None else width_ratio(model)

    def rate(step: jax.Array) -> jax.Array:
        return c.learning_rate * schedule(step)

    def chain(*rule: optax.GradientTransformation) -> optax.GradientTransformation:
        """The rule, muP's factors if they are not 1, decay, and the rate. The factors do not change the decay."""

        def scale(updates: Any, _: Any) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, u: u * rate_factor(path_name(path), ratio=ratio, optimizer=c.name), updates
            )

        factors = () if ratio == 1 else (optax.stateless(scale),)
        decay = optax.add_decayed_weights(c.weight_decay, mask=matrices)
        return optax.chain(*rule, *factors, decay, optax.scale_by_learning_rate(rate))

    rules = {
        "average": optax.scale(-AVERAGE_RATE),
        "balance": optax.stateless(
            lambda updates, _: jax.tree.map(lambda g: -_bias_rate(model) * jnp.sign(g), updates)
        ),
    }
    if c.name in ("adamw", "muon"):
        rules["adamw"] = chain(optax.scale_by_adam(b1=c.beta1, b2=c.beta2, eps=c.epsilon))
    if c.name == "muon":  # Jordan et al. 2024
        muon = contrib.muon(
            lambda step: c.muon_learning_rate * schedule(step),
            beta=c.muon_momentum,
            weight_decay=c.weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
        )
        # Not contrib.muon's own AdamW for the rest, which decays norm scales and biases too.
        sharded = optax.stateless(lambda updates, _: jax.tree.map(shard_layers, updates))
        rules["muon"] = optax.chain(sharded, muon)
    elif c.name == "adafactor":  # Shazeer & Stern 2018
        rules["adafactor"] = chain(
            adafactor.scale_by_factored_rms(stack_dimensions), adafactor.scale_by_parameter(stack_dimensions)
        )
    elif c.name == "lion":  # Chen et al. 2023
        rules["lion"] = chain(optax.scale_by_lion(b1=c.beta1, b2=c.beta2))
    elif c.name == "sgd":  # with momentum
        rules["sgd"] = chain(optax.trace(decay=c.beta1))
    rule: Any = optax.partition(rules, lambda params: updated_by(params, optimizer=c.name))
    return in_float32(_with_own_rates(rule, c, model) if c.rates or c.layer_decay != 1 else rule)


def _with_own_rates(
    rule: optax.GradientTransformation, c: ConfigDict, model: ConfigDict | None
) -> optax.GradientTransformation:
    """The rule, whose updates are times their parameters' factors. The state is that of the rule alone."""
    scaled = own_rate(c, model)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = rule.update(grads, state, params)
        return jax.tree_util.tree_map_with_path(scaled, updates), state

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
    ratio = 1.0 if model is None else width_ratio(model)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    groups: dict[str, int] = {}
    for (path, leaf), by in zip(leaves, jax.tree.leaves(updated_by(params, optimizer=c.name)), strict=True):
        key = _group(c, path_name(path), by, ratio, model)
        groups[key] = groups.get(key, 0) + math.prod(leaf.shape)
    return "\n".join(f"{count:>15,} parameters: {what}" for what, count in groups.items())


def _group(c: ConfigDict, name: str, by: str, ratio: float, model: ConfigDict | None) -> str:
    if by == "average":
        return f"running averages of what is observed, rate {AVERAGE_RATE:g}"
    if by == "balance":
        return f"bias that balances the experts, step {_bias_rate(model):g}"
    peak = c.muon_learning_rate if by == "muon" else c.learning_rate
    factor = 1.0 if by == "muon" else rate_factor(name, ratio=ratio, optimizer=by)
    relative = " of the parameter" if by == "adafactor" else ""
    decay = f"weight decay {c.weight_decay:g}" if is_matrix(name) else "no weight decay"
    return f"{by}, learning rate {peak:g}{f' x {factor:g}' if factor != 1 else ''}{relative}, {decay}"
