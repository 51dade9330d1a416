"""Preference losses: DPO and its relatives, as functions of the log-probabilities of a chosen and a rejected answer.

Each loss takes `Answers` of both sides and the settings under `objective.preference`, and returns one loss a pair, (P,)
float32. `log_ratio` is log(policy / reference) of an answer; `beta` times it is the answer's implied reward (Rafailov
et al. 2023).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llmjax.objectives import losses
from llmjax.objectives.answers import numbers_of, per_answer
from llmjax.objectives.log_probs import log_probs
from llmjax.objectives.losses import Batch, Mean, Sums

log_sigmoid = jax.nn.log_sigmoid


class Answers(NamedTuple):
    """One side of P pairs, each (P,) float32: summed log-probabilities by the policy and the reference, and lengths.

    `plain` is the policy's sum in which every token counts 1, where `policy` is length-desensitised; None: it is not.
    """

    policy: jax.Array
    reference: jax.Array
    tokens: jax.Array
    plain: jax.Array | None = None

    @property
    def log_ratio(self) -> jax.Array:
        return self.policy - self.reference

    @property
    def mean(self) -> jax.Array:
        """The policy's log-probability a token."""
        return self.policy / jnp.maximum(self.tokens, 1)


def difference(chosen: Answers, rejected: Answers, c: ConfigDict, *, by_length: bool = False) -> jax.Array:
    """The two sides' scores subtracted, (P,); with `by_length` each score is divided by its answer's tokens.

    A score is the derivative f' of an f-divergence at policy / reference (Wang et al. 2023, "Beyond reverse KL").
    `c.divergence`: "reverse_kl" (DPO's own: the log ratio), "forward_kl", "js", or "alpha" with 0 < `c.alpha` < 1. A score
    is 0 where both are equal: any other constant would not cancel once it is divided by lengths.
    """

    def score(answers: Answers) -> jax.Array:
        x = answers.log_ratio
        if c.divergence == "forward_kl":
            x = -jnp.expm1(-x)
        elif c.divergence == "js":
            x = math.log(2) + log_sigmoid(x)
        elif c.divergence == "alpha":
            x = -jnp.expm1(-c.alpha * x) / c.alpha
        return x / jnp.maximum(answers.tokens, 1) if by_length else x

    return score(chosen) - score(rejected)


def _sigmoid_of(x: jax.Array, c: ConfigDict) -> jax.Array:
    return -(1 - c.label_smoothing) * log_sigmoid(x) - c.label_smoothing * log_sigmoid(-x)


def sigmoid(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """DPO (Rafailov et al. 2023); with `c.label_smoothing`, the share of labels that are wrong, conservative DPO."""
    return _sigmoid_of(c.beta * difference(chosen, rejected, c), c)


def sigmoid_norm(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """DPO of log-probabilities a token (Lambert et al. 2024, Tulu 3)."""
    return _sigmoid_of(c.beta * difference(chosen, rejected, c, by_length=True), c)


def hinge(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """SLiC's hinge on the reward margin (Zhao et al. 2023; Liu et al. 2023, RSO)."""
    return jax.nn.relu(1 - c.beta * difference(chosen, rejected, c))


def ipo(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """IPO (Azar et al. 2023): a squared distance from the margin 1 / (2 beta), of log-probabilities a token."""
    return jnp.square(difference(chosen, rejected, c, by_length=True) - 1 / (2 * c.beta))


def robust(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """Robust DPO (Chowdhury et al. 2024): DPO's loss without bias when a share `c.label_smoothing` of labels is wrong."""
    x, e = c.beta * difference(chosen, rejected, c), c.label_smoothing
    return (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)


def exo(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """EXO (Ji et al. 2024): the reverse KL from the smoothed label to the policy's preference; smoothing must be above 0."""
    x, e = c.beta * difference(chosen, rejected, c), c.label_smoothing
    better, worse = jax.nn.sigmoid(x), jax.nn.sigmoid(-x)
    return better * (log_sigmoid(x) - jnp.log1p(-e)) + worse * (log_sigmoid(-x) - jnp.log(e))


def nca(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """NCA (Chen et al. 2024): noise contrastive, which keeps the chosen answer's own likelihood from falling."""
    better, worse = c.beta * chosen.log_ratio, c.beta * rejected.log_ratio
    return -log_sigmoid(better) - 0.5 * log_sigmoid(-better) - 0.5 * log_sigmoid(-worse)


def bco(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """BCO on pairs (Jung et al. 2024): a classifier of rewards, shifted by `c.reward_shift`, says which side is which."""
    better, worse = c.beta * chosen.log_ratio, c.beta * rejected.log_ratio
    return -log_sigmoid(better - c.reward_shift) - log_sigmoid(c.reward_shift - worse)


def sppo(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """SPPO with hard labels (Wu et al. 2024): each side's log ratio is drawn to plus or minus 1 / (2 beta)."""
    return jnp.square(chosen.log_ratio - 0.5 / c.beta) + jnp.square(rejected.log_ratio + 0.5 / c.beta)


def apo_zero(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """APO-zero (D'Oosterlinck et al. 2024): up with the chosen answer, down with the rejected one."""
    return jax.nn.sigmoid(-c.beta * chosen.log_ratio) + jax.nn.sigmoid(c.beta * rejected.log_ratio)


def apo_down(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """APO-down: both down, the rejected answer more; for a model that is better than its chosen answers."""
    margin = c.beta * (chosen.log_ratio - rejected.log_ratio)
    return jax.nn.sigmoid(c.beta * chosen.log_ratio) + jax.nn.sigmoid(-margin)


def discopop(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """DiscoPOP's log-ratio modulated loss (Lu et al. 2024), of temperature `c.temperature`."""
    x = c.beta * difference(chosen, rejected, c)
    share = jax.nn.sigmoid(x / c.temperature)
    return -(1 - share) * log_sigmoid(x) + share * jnp.exp(-x)


def aot(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """AOT on pairs (Melnyk et al. 2024): margins of policy and reference, each sorted over the batch."""
    policy, reference = chosen.policy - rejected.policy, chosen.reference - rejected.reference
    return _sigmoid_of(c.beta * (jnp.sort(policy) - jnp.sort(reference)), c)


def aot_unpaired(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """AOT of the two sides' distributions: log ratios, each sorted over the batch."""
    return _sigmoid_of(c.beta * (jnp.sort(chosen.log_ratio) - jnp.sort(rejected.log_ratio)), c)


def simpo(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """SimPO (Meng et al. 2024): log-probabilities a token, a target margin `c.margin`, no reference."""
    return _sigmoid_of(c.beta * (chosen.mean - rejected.mean) - c.margin, c)


def cpo(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """CPO's preference term (Xu et al. 2024): DPO with a uniform reference; add "sft" for its second term."""
    return _sigmoid_of(c.beta * (chosen.policy - rejected.policy), c)


def orpo(chosen: Answers, rejected: Answers, c: ConfigDict) -> jax.Array:
    """ORPO's odds ratio term (Hong et al. 2024), of log-probabilities a token; `c.beta` is its lambda; add "sft"."""

    def log_odds(mean: jax.Array) -> jax.Array:
        return mean - jnp.log(-jnp.expm1(jnp.minimum(mean, -1e-6)))  # a certain answer would have infinite odds

    return -c.beta * log_sigmoid(log_odds(chosen.mean) - log_odds(rejected.mean))


LOSSES: dict[str, Callable[[Answers, Answers, ConfigDict], jax.Array]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo": exo,
    "nca": nca,
    "bco": bco,
    "sppo": sppo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
}


def weighted_losses(text: str) -> dict[str, float]:
    """The losses of `objective.preference.loss` with their weights: "sigmoid", or "orpo=1 sft=0.5"."""
    parts = [part.partition("=") for part in text.split()]
    return {name: float(weight or 1) for name, _, weight in parts}


def summed(log_probs_BL: jax.Array, batch: Batch, *, answers: int) -> jax.Array:
    """The log-probability of each answer, (B, A), as preferences compare it: a sum over tokens, with their length weights."""
    weights_BL = batch["weights"] * batch.get("length_weights", 1.0)
    return per_answer(log_probs_BL * weights_BL, numbers_of(batch), answers)


def sides(
    module: Any, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict
) -> tuple[Answers, Answers, Mean, losses.Auxiliary]:
    """The even answers and the odd ones of a batch, the entropy of the trained tokens, and the auxiliary loss.

    Args:
        batch, c: as of `preference_loss`.
    """
    predictions = losses.predict(module, params, batch, rng)
    made = log_probs(predictions, loss_chunks=c.loss_chunks, vocab_size=c.vocab_size)
    weights_BL, segments_BL, answers = batch["weights"], numbers_of(batch), batch["reference"].shape[1]
    trained_BL = (weights_BL > 0).astype(jnp.float32)
    sums = [
        summed(made.targets, batch, answers=answers),
        batch["reference"],
        per_answer(trained_BL, segments_BL, answers),
        per_answer(made.targets * weights_BL, segments_BL, answers),
    ]
    even, odd = (Answers(*(x_BA[:, side::2].reshape(-1) for x_BA in sums)) for side in (0, 1))
    entropy = Mean(jnp.sum(made.entropy * trained_BL), jnp.sum(trained_BL))
    return even, odd, entropy, predictions.auxiliary


def preference_loss(module: Any, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict) -> Sums:
    """The loss of preference pairs, one unit of weight each.

    Args:
        batch: rows of answers (see answers.py), of which each even one is chosen and the odd one behind it rejected;
            `weights` (B, L) are 1 on the answers' tokens; reference (B, A), log-probabilities by the reference model
            (see `summed`); pair_weights (B, A / 2), 0 where a row has fewer pairs; token_share (B,), pairs / tokens of
            chosen answers of all training rows, which makes "sft" a mean over tokens. Length-desensitised rows also
            have length_weights (B, L), which "sft" and the lengths of answers leave aside.
        c: the settings under `objective`.

    Metrics, means over pairs: loss, accuracy (the chosen answer's reward is higher), margin, chosen_reward,
    rejected_reward, chosen_log_prob, rejected_log_prob; over tokens: entropy.
    """
    p, answers = c.preference, batch["reference"].shape[1]
    chosen, rejected, entropy, auxiliary = sides(module, params, batch, rng, c)
    weights_P = batch["pair_weights"].reshape(-1)
    loss_P = jnp.zeros_like(weights_P)
    for name, weight in weighted_losses(p.loss).items():
        if name == "sft":
            share_P = jnp.repeat(batch["token_share"], answers // 2)
            loss_P += -weight * (chosen.policy if chosen.plain is None else chosen.plain) * share_P
        else:
            loss_P += weight * LOSSES[name](chosen, rejected, p)
    total = jnp.sum(weights_P)

    def mean(values_P: jax.Array) -> Mean:
        return Mean(jnp.sum(jnp.where(weights_P > 0, values_P * weights_P, 0.0)), total)

    objective = mean(loss_P)
    chosen_reward, rejected_reward = p.beta * chosen.log_ratio, p.beta * rejected.log_ratio
    metrics = {
        "loss": objective,
        "accuracy": mean((chosen_reward > rejected_reward).astype(jnp.float32)),
        "margin": mean(chosen_reward - rejected_reward),
        "chosen_reward": mean(chosen_reward),
        "rejected_reward": mean(rejected_reward),
        "chosen_log_prob": mean(chosen.policy),
        "rejected_log_prob": mean(rejected.policy),
        "entropy": entropy,
    }
    return losses.with_auxiliary(Sums(objective.total, total, jax.lax.stop_gradient(metrics)), auxiliary)
