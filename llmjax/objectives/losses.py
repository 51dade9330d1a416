"""From predictions to sums: cross entropy and what can be added to it, and one call of the model for all objectives."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.model import routing
from llmjax.model.head import Head, head_params
from llmjax.model.per_device import axes_of
from llmjax.objectives import chunks

Batch = dict[str, jax.Array]
# Keys of a batch that are inputs of the model under another name.
INPUTS = {name: f"{name}_BL" for name in ("positions", "segments", "orders", "until", "types", "languages")}
SOURCE = ("tokens", "positions", "segments", "languages")  # batch["source_tokens"] ... are the encoder's input


class Mean(NamedTuple):
    """A mean before the division: float32 scalars that are added up over devices and micro-batches."""

    total: jax.Array
    weight: jax.Array


class Sums(NamedTuple):
    """Sums over tokens, float32: what is minimised, its weight, and named metrics, each with its own weight.

    `usage` is how all sparse layers' experts were used, None without such layers.
    """

    objective: jax.Array
    weight: jax.Array
    metrics: dict[str, Mean]
    usage: routing.Usage | None = None


class Auxiliary(NamedTuple):
    """What layers give beside their output in training; None: nothing.

    A float32 scalar that is added to the loss of each token, and how all sparse layers' experts were used.
    """

    loss: jax.Array | None = None
    usage: routing.Usage | None = None


class Predictions(NamedTuple):
    """What a model predicts and what it should: hidden_BLD, from which the head makes logits, targets_BL and weights_BL.

    The weight of a target that is not asked for is 0. `head_params` are those of `model.head.head_params`. With `places`
    (B, Q) int32 the arrays hold these places of rows of `length` tokens alone, and their second dimension is Q.
    """

    hidden: jax.Array
    head: Head
    head_params: Any
    targets: jax.Array
    weights: jax.Array
    auxiliary: Auxiliary = Auxiliary()
    places: jax.Array | None = None
    length: int = 0

    @property
    def logits(self) -> jax.Array:
        """logits_BLV float32 of all tokens at once."""
        logits_BLV: Any = self.head.apply({"params": self.head_params}, self.hidden)
        return logits_BLV

    def at(self, places_BQ: jax.Array) -> "Predictions":
        """The predictions of some places of each row: different ones, in ascending order."""
        hidden, targets, weights = (
            x_BL.at[_rows(places_BQ), places_BQ].get(
                mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
            )
            for x_BL in (self.hidden, self.targets, self.weights)
        )
        return self._replace(
            hidden=hidden, targets=targets, weights=weights, places=places_BQ, length=self.hidden.shape[1]
        )

    def spread(self, values: jax.Array) -> jax.Array:
        """Values of what is predicted, (B, L), or (B, Q) of some places, as values of all tokens: 0 elsewhere."""
        if self.places is None:
            return values
        zeros_BL = jnp.zeros((values.shape[0], self.length), values.dtype)
        return zeros_BL.at[_rows(self.places), self.places].set(
            values, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
        )


def _rows(places_BQ: jax.Array) -> jax.Array:
    return jnp.arange(places_BQ.shape[0])[:, None]


def cross_entropy(logits_BLV: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nats of each target, and log Z, both (B, L) float32.

    The target's logit is picked by a masked sum, not a gather: it stays local when the vocabulary is sharded.
    """
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    is_target = jnp.arange(logits_BLV.shape[-1])[None, None, :] == targets_BL[:, :, None]
    target_BL = jnp.sum(jnp.where(is_target, logits_BLV, 0.0), axis=-1)
    return log_z_BL - target_BL, log_z_BL


def token_losses(logits_BLV: jax.Array, targets_BL: jax.Array, c: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """(what is minimised, plain nats) of each target, both (B, L) float32.

    Args:
        c: the settings under `objective`: label_smoothing (Szegedy et al. 2016; over the ids below `vocab_size`, if
            that is set, and not over the rows that only pad the embedding), focal (Lin et al. 2017: the loss of
            a target of probability p is weighted by (1 - p)^focal) and z_loss (Chowdhery et al. 2022).
    """
    nats_BL, log_z_BL = cross_entropy(logits_BLV, targets_BL)
    loss_BL = nats_BL
    if c.label_smoothing:
        rows = logits_BLV.shape[-1]
        size = c.vocab_size or rows
        # A masked sum, not a slice: it stays local when the vocabulary is sharded.
        used_BLV = jnp.where(jnp.arange(rows)[None, None] < size, logits_BLV, 0.0) if size < rows else logits_BLV
        uniform_BL = log_z_BL - jnp.sum(used_BLV, axis=-1) / size
        loss_BL = (1 - c.label_smoothing) * nats_BL + c.label_smoothing * uniform_BL
    if c.focal:
        # The floor keeps the slope of x^focal finite where the target is certain, for exponents below 1.
        miss_BL = jnp.maximum(-jnp.expm1(-nats_BL), 1e-12)
        loss_BL = miss_BL**c.focal * loss_BL
    if c.z_loss:
        loss_BL = loss_BL + c.z_loss * jnp.square(log_z_BL)
    return loss_BL, nats_BL


def add_up(predictions: Predictions, c: ConfigDict) -> Sums:
    """The sums of `token_losses` over what is predicted, and of the auxiliary loss."""
    weights_BL = predictions.weights
    if c.loss_chunks > 1:
        objective, nats = chunks.sums(token_losses, predictions, c)
    else:
        loss_BL, nats_BL = token_losses(predictions.logits, predictions.targets, c)
        objective, nats = jnp.sum(loss_BL * weights_BL), jnp.sum(nats_BL * weights_BL)
    weight = jnp.sum(weights_BL)
    return with_auxiliary(Sums(objective, weight, {"loss": Mean(nats, weight)}), predictions.auxiliary)


def with_auxiliary(sums: Sums, auxiliary: Auxiliary) -> Sums:
    """The sums with the auxiliary loss of a token added once for each unit of weight, and as a metric."""
    sums = sums._replace(usage=auxiliary.usage)
    if auxiliary.loss is None:
        return sums
    extra = auxiliary.loss * sums.weight
    metrics = {**sums.metrics, "auxiliary_loss": Mean(extra, sums.weight)}
    return sums._replace(objective=sums.objective + extra, metrics=metrics)


def call(module: nn.Module, params: Any, batch: Batch, rng: jax.Array | None, **settings: Any) -> tuple[Any, Auxiliary]:
    """The model's output for a batch, and what its layers sow: the sum of their losses, and the use of their experts.

    Args:
        batch: tokens (B, L), and of positions, segments, orders, until, types, languages and source_* what the objective
            gives.
        rng: key for what is random in training; None: evaluation.
        settings: passed on to the model.
    """
    inputs: dict[str, Any] = {name: batch[key] for key, name in INPUTS.items() if key in batch}
    if "source_tokens" in batch:
        inputs["source"] = {key: batch[f"source_{key}"] for key in SOURCE if f"source_{key}" in batch}
    inputs |= settings
    if rng is None:
        return module.apply({"params": params}, batch["tokens"], **inputs), Auxiliary()
    output, sown = module.apply(
        {"params": params},
        batch["tokens"],
        **inputs,
        deterministic=False,
        rngs={"dropout": rng},
        mutable=["losses", "routing"],
    )
    parts = [jnp.sum(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(sown.get("losses", {}))]
    found = jax.tree.leaves(sown.get("routing", {}), is_leaf=lambda x: isinstance(x, routing.Usage))
    usage = routing.all_layers(found) if found else None
    if usage is not None and module.c.moe.balance_over == "layers":
        parts.append(routing.pooled_balance_loss(usage, module.c.moe))
    return output, Auxiliary(sum(parts, start=jnp.zeros(())) if parts else None, usage)


def predictions_of(
    module: Any,
    params: Any,
    hidden_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    auxiliary: Auxiliary = Auxiliary(),  # noqa: B008
) -> Predictions:
    """Predictions from a model's output "hidden", by the model's own head."""
    return Predictions(hidden_BLD, module.output_head(), head_params(params), targets_BL, weights_BL, auxiliary)


def predict(
    module: nn.Module, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict | None = None
) -> Predictions:
    """Predictions of a batch: for all objectives that only differ by the batch.

    A batch with `places` (B, Q), which has all that are learnt among them, gets predictions of these alone: the head
    computes no logits for prompts. Where devices divide the rows' tokens, every position is predicted.
    """
    hidden_BLD, auxiliary = call(module, params, batch, rng, output="hidden")
    made = predictions_of(module, params, hidden_BLD, batch["targets"], batch["weights"], auxiliary)
    return made.at(batch["places"]) if "places" in batch and not axes_of("L", hidden_BLD.shape[1]) else made
