"""Reward models: one number for a whole answer, learnt from comparisons (Bradley and Terry 1952; Ouyang et al. 2022).

The score of an answer is read by the value head at the answer's last token, whose place the batch names: ids cannot
tell it, because padding may have the id of an end of text.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llmjax.model import head
from llmjax.objectives import losses
from llmjax.objectives.losses import Batch, Mean, Sums


def scores(module: Any, params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, losses.Auxiliary]:
    """scores_BA float32 of a batch of answers, of which `last` (B, A) says where each ends in its row."""
    hidden_BLD, auxiliary = losses.call(module, params, batch, rng, output="hidden")
    return jnp.take_along_axis(head.values(module, params, hidden_BLD), batch["last"], axis=1), auxiliary


def reward_loss(module: Any, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict) -> Sums:
    """The mean over rankings of -log sigmoid(better - worse - margin) over all pairs of a ranking.

    All pairs of a ranking are one element of the batch and count 1 together: 1 / C(K, 2) a pair of K answers without ties
    (Ouyang et al. 2022).

    Args:
        batch: rows of answers (see answers.py); last (B, A) int32; groups (B, A) int32, equal for answers to one prompt; ranks (B, A) float32, the smaller the better, and equal
            ranks are no pair; margins (B, A), whose difference is what a pair's scores should differ by; exists (B, A), 1
            or 0.
        c: the settings under `objective`: `reward.centre` weighs the square of the sum of a pair's scores, which keeps
            scores near 0 (Eisenstein et al. 2023).

    Metrics: loss; accuracy, margin over pairs; reward and reward_square over answers.
    """
    scores_BA, auxiliary = scores(module, params, batch, rng)
    exists_BA, ranks_BA, margins_BA = batch["exists"], batch["ranks"], batch["margins"]
    # Dimension 1 is the better answer of a pair, dimension 2 the worse one.
    same_BAA = batch["groups"][:, :, None] == batch["groups"][:, None, :]
    same_BAA = same_BAA * exists_BA[:, :, None] * exists_BA[:, None, :]
    pairs_BAA = (ranks_BA[:, :, None] < ranks_BA[:, None, :]) * same_BAA
    of_ranking_BA = jnp.sum(same_BAA * jnp.sum(pairs_BAA, axis=2)[:, None, :], axis=2)  # pairs of the answer's ranking
    share_BAA = pairs_BAA / jnp.maximum(of_ranking_BA, 1)[:, :, None]
    gap_BAA = scores_BA[:, :, None] - scores_BA[:, None, :]
    wanted_BAA = margins_BA[:, :, None] - margins_BA[:, None, :]
    loss_BAA = -jax.nn.log_sigmoid(gap_BAA - wanted_BAA)
    if c.reward.centre:
        loss_BAA += c.reward.centre * jnp.square(scores_BA[:, :, None] + scores_BA[:, None, :])
    loss, rankings, pairs, answers = (
        jnp.sum(loss_BAA * share_BAA),
        jnp.sum(share_BAA),
        jnp.sum(pairs_BAA),
        jnp.sum(exists_BA),
    )
    metrics = {
        "loss": Mean(loss, rankings),
        "accuracy": Mean(jnp.sum((gap_BAA > 0) * pairs_BAA), pairs),
        "margin": Mean(jnp.sum(gap_BAA * pairs_BAA), pairs),
        "reward": Mean(jnp.sum(scores_BA * exists_BA), answers),
        "reward_square": Mean(jnp.sum(jnp.square(scores_BA) * exists_BA), answers),
    }
    return losses.with_auxiliary(Sums(loss, rankings, jax.lax.stop_gradient(metrics)), auxiliary)
