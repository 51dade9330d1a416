"""Policy losses: how the log-probabilities of sampled tokens become a loss (PPO, GRPO and their relatives).

All functions are pure and per token. Shapes are (B, L); a row may pack several sampled texts, told apart by
`segments_BL` (see answers.py). `mask_BL` is 1 on the tokens that the policy sampled and 0 elsewhere (prompt, padding,
the output of tools). Log-probabilities are float32 nats of the distribution that was sampled from: `new` by the
parameters in training, `old` by the parameters that sampled, both by the trainer's own forward pass, and `reference` by
the model that the policy should stay near.

A loss never divides by what one micro-batch or device holds: `aggregate` returns a sum and a weight, and the step
divides once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llmjax.model import head
from llmjax.objectives import losses
from llmjax.objectives.answers import numbers_of, per_answer, per_token
from llmjax.objectives.log_probs import log_probs
from llmjax.objectives.losses import Batch, Mean, Sums

LARGEST = 20.0  # nats between two policies, beyond which a ratio of their probabilities is noise


def ratio(
    new_BL: jax.Array, old_BL: jax.Array, mask_BL: jax.Array, segments_BL: jax.Array, *, level: str, answers: int
) -> jax.Array:
    """new / old probability of each token, (B, L), 1 outside the mask.

    With the level "sequence" it is the geometric mean over the text's tokens (GSPO, Zheng et al. 2025).
    """
    log_BL = jnp.where(mask_BL > 0, new_BL - old_BL, 0.0)
    if level == "sequence":
        tokens_BA = per_answer((mask_BL > 0).astype(jnp.float32), segments_BL, answers)
        log_BL = per_token(per_answer(log_BL, segments_BL, answers) / jnp.maximum(tokens_BA, 1), segments_BL)
    # Far beyond every clip the ratio is bounded, so that the loss of a token is finite whatever its advantage.
    return jnp.exp(jnp.minimum(log_BL, LARGEST))


def clipped(ratio_BL: jax.Array, advantages_BL: jax.Array, new_BL: jax.Array, c: ConfigDict) -> jax.Array:
    """PPO's pessimistic bound (Schulman et al. 2017), with two limits (DAPO's clip-higher, Yu et al. 2025).

    `c.dual_clip` > 1 also bounds the loss of tokens with a negative advantage (Ye et al. 2020); 0: off.
    """
    inside_BL = jnp.clip(ratio_BL, 1 - c.clip, 1 + (c.clip_high or c.clip))
    loss_BL = -jnp.minimum(ratio_BL * advantages_BL, inside_BL * advantages_BL)
    if c.dual_clip:
        loss_BL = jnp.where(advantages_BL < 0, jnp.minimum(loss_BL, -c.dual_clip * advantages_BL), loss_BL)
    return loss_BL


def truncated(ratio_BL: jax.Array, advantages_BL: jax.Array, new_BL: jax.Array, c: ConfigDict) -> jax.Array:
    """CISPO (MiniMax 2025): the log-probability, weighted by the ratio up to `c.ratio_cap`; no token loses its gradient."""
    weight_BL = jax.lax.stop_gradient(jnp.minimum(ratio_BL, c.ratio_cap))
    return -weight_BL * advantages_BL * new_BL


def soft(ratio_BL: jax.Array, advantages_BL: jax.Array, new_BL: jax.Array, c: ConfigDict) -> jax.Array:
    """SAPO (Gao et al. 2025): a sigmoid gate around ratio 1 in place of the clip, steeper for negative advantages."""
    steepness_BL = jnp.where(advantages_BL > 0, c.gate_positive, c.gate_negative)
    return -jax.nn.sigmoid(steepness_BL * (ratio_BL - 1)) * 4 / steepness_BL * advantages_BL


LOSSES: dict[str, Callable[..., jax.Array]] = {"clip": clipped, "cispo": truncated, "sapo": soft}


def kl(new_BL: jax.Array, reference_BL: jax.Array, *, estimator: str) -> jax.Array:
    """An estimate of KL(policy | reference) from one sampled token each, (B, L) (Schulman 2020).

    With x = log(reference / new): "k1" is -x, "k2" is x^2 / 2, "k3" is exp(x) - 1 - x. k1 and k3 have the right mean.
    As a term of a loss their gradients differ: that of k1 has mean 0, that of k2 is the gradient of this KL, and that
    of k3 is the gradient of the KL the other way round, unless it is multiplied by the ratio (see `policy_loss`).
    """
    x_BL = reference_BL - new_BL
    if estimator == "k1":
        return -x_BL
    if estimator == "k2":
        return jnp.square(x_BL) / 2
    # Beyond e^20 the estimate is noise; the bound keeps it finite.
    return jnp.expm1(jnp.minimum(x_BL, LARGEST)) - x_BL


def aggregate(
    values_BL: jax.Array, mask_BL: jax.Array, segments_BL: jax.Array, exists_BA: jax.Array, *, how: str, length: int
) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) of values of tokens; their quotient, after both are added up over a step, is the mean.

    Args:
        exists_BA: 1 for a sampled text, 0 where a row has fewer of them.
        how: "constant": every token counts 1 / length, whatever its text's length (Dr. GRPO, Liu et al. 2025);
            "token": the mean over the step's tokens (DAPO, Yu et al. 2025); "sequence": the mean of the texts' means
            (GRPO, Shao et al. 2024), in which tokens of long texts count less; "sequence_sum": the mean of the texts'
            sums (LUSPO, Wang et al. 2025).
        length: the longest text that may be sampled, in tokens.
    """
    values_BL = jnp.where(mask_BL > 0, values_BL * mask_BL, 0.0)
    if how == "token":
        return jnp.sum(values_BL), jnp.sum(mask_BL)
    if how == "sequence":
        answers = exists_BA.shape[1]
        tokens_BA = per_answer(mask_BL, segments_BL, answers)
        means_BA = per_answer(values_BL, segments_BL, answers) / jnp.maximum(tokens_BA, 1)
        return jnp.sum(means_BA), jnp.sum((tokens_BA > 0).astype(jnp.float32))
    return jnp.sum(values_BL), jnp.sum(exists_BA) * (length if how == "constant" else 1)


def correction(
    old_BL: jax.Array, sampler_BL: jax.Array, mask_BL: jax.Array, segments_BL: jax.Array, c: ConfigDict, *, answers: int
) -> jax.Array:
    """Weights (B, L) for tokens that came from another distribution than the trainer's: its engine in bfloat16, say.

    `c.correction` names what is done with w = old / sampler: "" nothing; "token_truncate" min(w, high) of each token
    (truncated importance sampling); "sequence_truncate" min(product of w over the text, high); "token_mask" w
    where low <= w <= high, else 0 (IcePop, Ling Team 2025). Only the whole product, uncut, is unbiased; its variance
    grows with the length.
    """
    if not c.correction:
        return jnp.ones_like(old_BL)
    log_BL = jnp.where(mask_BL > 0, old_BL - sampler_BL, 0.0)
    if c.correction == "sequence_truncate":
        product_BA = jnp.exp(per_answer(log_BL, segments_BL, answers))
        return per_token(jnp.minimum(product_BA, c.correction_high), segments_BL)
    weight_BL = jnp.exp(log_BL)
    if c.correction == "token_truncate":
        return jnp.minimum(weight_BL, c.correction_high)
    return jnp.where((weight_BL >= c.correction_low) & (weight_BL <= c.correction_high), weight_BL, 0.0)


def value_loss(values_BL: jax.Array, old_BL: jax.Array, returns_BL: jax.Array, *, clip: float) -> jax.Array:
    """Half the squared error of predicted returns, (B, L); with `clip` > 0 PPO's bound on how far values move a step."""
    error_BL = jnp.square(values_BL - returns_BL)
    if clip:
        near_BL = old_BL + jnp.clip(values_BL - old_BL, -clip, clip)
        error_BL = jnp.maximum(error_BL, jnp.square(near_BL - returns_BL))
    return error_BL / 2


def policy_loss(module: Any, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict) -> Sums:
    """The loss of sampled texts: a policy loss, and what the settings add to it (KL, values, entropy).

    Args:
        batch: rows of sampled texts (see answers.py). `weights` (B, L) is the mask; old, reference, sampler and advantages
            (B, L) float32 belong to the targets, as the weights do; with a value head also returns and old_values
            (B, L); exists (B, A).
        c: the settings under `objective`; those of this loss under `objective.policy`.

    Metrics, over sampled tokens and never over padding: loss, ratio, clipped (the share of tokens whose ratio is outside
    the clip on the side that stops their gradient), kl (k3 to the reference), k1, k2, entropy, drift (mean |log(old /
    sampler)|), value_loss, value_error.
    """
    p, answers = c.policy, batch["exists"].shape[1]
    mask_BL, segments_BL, advantages_BL = batch["weights"], numbers_of(batch), batch["advantages"]
    predictions = losses.predict(module, params, batch, rng)
    made = log_probs(
        predictions, loss_chunks=c.loss_chunks, vocab_size=c.vocab_size, never=tuple(p.never), temperature=p.temperature
    )
    new_BL, old_BL = made.targets, batch["old"]
    ratio_BL = ratio(new_BL, old_BL, mask_BL, segments_BL, level=p.level, answers=answers)
    loss_BL = LOSSES[p.loss](ratio_BL, advantages_BL, new_BL, p)
    loss_BL *= correction(old_BL, batch["sampler"], mask_BL, segments_BL, p, answers=answers)
    if p.kl_weight:
        kl_BL = kl(new_BL, batch["reference"], estimator=p.kl_estimator.removesuffix("_uncorrected"))
        loss_BL += p.kl_weight * (kl_BL * ratio_BL if p.kl_estimator == "k3" else kl_BL)
    if p.entropy_weight:
        loss_BL -= p.entropy_weight * made.entropy
    metrics = {}
    tokens = jnp.sum((mask_BL > 0).astype(jnp.float32))

    def mean(values_BL: jax.Array) -> Mean:
        return Mean(jnp.sum(jnp.where(mask_BL > 0, values_BL, 0.0)), tokens)

    if "returns" in batch:
        values_BL = head.values(module, params, predictions.hidden)
        error_BL = value_loss(values_BL, batch["old_values"], batch["returns"], clip=p.value_clip)
        loss_BL += p.value_weight * error_BL
        metrics["value_loss"] = mean(error_BL)
    total, weight = aggregate(loss_BL, mask_BL, segments_BL, batch["exists"], how=p.aggregate, length=p.length)
    outside_BL = ((advantages_BL > 0) & (ratio_BL > 1 + (p.clip_high or p.clip))) | (
        (advantages_BL < 0) & (ratio_BL < 1 - p.clip)
    )
    metrics |= {
        "loss": Mean(total, weight),
        "ratio": mean(jnp.exp(new_BL - old_BL)),
        "clipped": mean(outside_BL.astype(jnp.float32)),
        **{name: mean(kl(new_BL, batch["reference"], estimator=name)) for name in ("k1", "k2", "k3")},
        "entropy": mean(made.entropy),
        "drift": mean(jnp.abs(old_BL - batch["sampler"])),
    }
    return losses.with_auxiliary(Sums(total, weight, jax.lax.stop_gradient(metrics)), predictions.auxiliary)
