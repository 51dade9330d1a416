"""Losses of answers that are each good or bad, without a partner: KTO and its relatives.

A row has for each answer a second one: the same prompt with the answer to another one. Of those the policy's KL to the
reference is estimated, which is where KTO has its zero. Each loss takes log(policy / reference) of the answers, the KL, and
the settings under `objective.unpaired`, and returns two losses an answer, (P,) float32: as a good one, as a bad one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llmjax.objectives import losses
from llmjax.objectives.losses import Batch, Mean, Sums
from llmjax.objectives.preference import sides

log_sigmoid = jax.nn.log_sigmoid
Loss = Callable[[jax.Array, jax.Array, ConfigDict], tuple[jax.Array, jax.Array]]


def kto(log_ratio_P: jax.Array, kl: jax.Array, c: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """KTO (Ethayarajh et al. 2024): gains and losses are felt relative to the KL, and ever less far from it."""
    x_P = c.beta * (log_ratio_P - kl)
    return jax.nn.sigmoid(-x_P), jax.nn.sigmoid(x_P)


def apo_zero(log_ratio_P: jax.Array, kl: jax.Array, c: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """APO-zero (D'Oosterlinck et al. 2024): KTO with its zero at the reference."""
    return kto(log_ratio_P, jnp.zeros_like(kl), c)


def bco(log_ratio_P: jax.Array, kl: jax.Array, c: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """BCO (Jung et al. 2024): a classifier of rewards, shifted by `c.reward_shift`."""
    x_P = c.beta * log_ratio_P - c.reward_shift
    return -log_sigmoid(x_P), -log_sigmoid(-x_P)


LOSSES: dict[str, Loss] = {"kto": kto, "apo_zero": apo_zero, "bco": bco}


def kl_of(log_ratio_P: jax.Array, weights_P: jax.Array) -> jax.Array:
    """The KL's estimate, a scalar without gradient: the mean over mismatched answers of their log ratio, at least 0."""
    total = jnp.sum(jnp.where(weights_P > 0, log_ratio_P, 0.0) * weights_P)
    return jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(jnp.sum(weights_P), 1), 0))


def unpaired_loss(module: Any, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict) -> Sums:
    """The loss of single answers, one unit of weight each.

    Args:
        batch: as of `preference_loss`, where each even answer is learnt from and the odd one behind it is mismatched; good
            (B, A / 2), 1 or 0.
        c: the settings under `objective`.

    The KL is a mean over the whole batch, so a batch must not be cut into micro-batches. Metrics, means over answers:
    loss, accuracy (the log ratio is above the KL of good answers alone), good_reward, bad_reward; kl; over tokens: entropy.
    """
    u = c.unpaired
    own, mismatched, entropy, auxiliary = sides(module, params, batch, rng, c)
    weights_P, good_P = batch["pair_weights"].reshape(-1), batch["good"].reshape(-1)
    kl = kl_of(mismatched.log_ratio, weights_P)
    as_good_P, as_bad_P = LOSSES[u.loss](own.log_ratio, kl, u)
    loss_P = jnp.where(good_P > 0, u.good_weight * as_good_P, u.bad_weight * as_bad_P)

    def mean(values_P: jax.Array, weights_P: jax.Array = weights_P) -> Mean:
        return Mean(jnp.sum(jnp.where(weights_P > 0, values_P * weights_P, 0.0)), jnp.sum(weights_P))

    objective, reward_P = mean(loss_P), u.beta * own.log_ratio
    metrics = {
        "loss": objective,
        "accuracy": mean(((own.log_ratio > kl) == (good_P > 0)).astype(jnp.float32)),
        "good_reward": mean(reward_P, weights_P * good_P),
        "bad_reward": mean(reward_P, weights_P * (1 - good_P)),
        "kl": Mean(kl * objective.weight, objective.weight),
        "entropy": entropy,
    }
    return losses.with_auxiliary(Sums(objective.total, objective.weight, jax.lax.stop_gradient(metrics)), auxiliary)
