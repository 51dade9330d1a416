"""Next-token prediction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict


class Sums(NamedTuple):
    """Sums over tokens, float32 scalars: what is minimised, its weight, and named metrics of the same weight."""

    objective: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


def cross_entropy(logits_BLV: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nats of each target, and log Z, both (B, L) float32.

    The target's logit is picked by a masked sum, not a gather: it stays local when the vocabulary is sharded.
    """
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    is_target = jnp.arange(logits_BLV.shape[-1])[None, None, :] == targets_BL[:, :, None]
    target_BL = jnp.sum(jnp.where(is_target, logits_BLV, 0.0), axis=-1)
    return log_z_BL - target_BL, log_z_BL


def causal(module: nn.Module, params: Any, batch: dict[str, jax.Array], rng: jax.Array | None, c: ConfigDict) -> Sums:
    """Cross entropy of `targets` given `tokens`, weighted by `weights`.

    Args:
        batch: tokens, targets, positions, segments (B, L) int32 and weights (B, L) float32.
        rng: key for dropout; None: no dropout (evaluation).
        c: the settings under `objective`: z_loss (Chowdhery et al. 2022) and label_smoothing (Szegedy et al. 2016).
    """
    logits_BLV: Any = module.apply(
        {"params": params},
        batch["tokens"],
        positions_BL=batch["positions"],
        segments_BL=batch["segments"],
        deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng},
    )
    nats_BL, log_z_BL = cross_entropy(logits_BLV, batch["targets"])
    objective_BL = nats_BL
    if c.label_smoothing:
        uniform_BL = log_z_BL - jnp.mean(logits_BLV, axis=-1)
        objective_BL = (1 - c.label_smoothing) * nats_BL + c.label_smoothing * uniform_BL
    if c.z_loss:
        objective_BL = objective_BL + c.z_loss * jnp.square(log_z_BL)
    weights_BL = batch["weights"]
    return Sums(jnp.sum(objective_BL * weights_BL), jnp.sum(weights_BL), {"loss": jnp.sum(nats_BL * weights_BL)})
