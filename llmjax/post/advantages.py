"""From rewards to advantages, on the host in float64: baselines of groups, generalised advantage estimation, whitening.

Arrays have one row a sampled text, (S,), or one number a token of it, (S, T). Groups are told by ids, never by place:
shuffled rows keep their advantages. A reward of NaN says that a text could not be scored: the text takes part in no
baseline and has advantage 0. Normalisation takes `Rewards` and gives `Advantages`, so that nothing is normalised twice.
"""

from typing import NamedTuple

import numpy as np

from llmjax.errors import UserError

SMALL = 1e-4  # what the standard deviation of a group is never divided without (Shao et al. 2024)


class Rewards(NamedTuple):
    """One reward a text, (S,) float; NaN: not scored. `groups` (S,) has equal ids for texts of the same prompt."""

    values: np.ndarray
    groups: np.ndarray


class Advantages(NamedTuple):
    """One advantage a text, (S,) float64."""

    values: np.ndarray


def equal_groups(rewards: Rewards) -> dict[int, bool]:
    """Whether each group teaches nothing: fewer than two of its texts are scored, or all have the same reward."""
    values = np.asarray(rewards.values, np.float64)
    found = {}
    for group in np.unique(rewards.groups):
        inside = values[(rewards.groups == group) & ~np.isnan(values)]
        found[int(group)] = len(inside) < 2 or bool(np.all(inside == inside[0]))
    return found


def group_advantages(rewards: Rewards, *, baseline: str, scale: str) -> Advantages:
    """Advantages of texts against the others of their group.

    Args:
        baseline: "mean" of the group (GRPO); "leave_one_out", the mean of the group's other texts (RLOO, Ahmadian et
            al. 2024); "none" (REINFORCE++, with scale "batch").
        scale: "none" (Dr. GRPO); "group": divided by the group's standard deviation, which favours prompts that are nearly
            always or nearly never solved; "batch": the mean and the standard deviation of all texts are taken out
            (REINFORCE++, Hu 2025).

    Raises:
        UserError: when a baseline is asked for and no group has two scored texts.
    """
    if not isinstance(rewards, Rewards):
        raise TypeError("group_advantages takes Rewards: advantages are normalised once")
    values = np.asarray(rewards.values, np.float64)
    scored = ~np.isnan(values)
    advantages = np.where(scored, values, 0.0)
    for group, equal in ({} if baseline == "none" else equal_groups(rewards)).items():
        members = np.flatnonzero((rewards.groups == group) & scored)
        inside = values[members]
        if equal:
            advantages[members] = 0.0
            continue
        centred = inside - inside.mean()
        if baseline == "leave_one_out":
            centred *= len(inside) / (len(inside) - 1)
        advantages[members] = centred / (inside.std(ddof=1) + SMALL) if scale == "group" else centred
    sizes = np.unique(rewards.groups[scored], return_counts=True)[1]
    if baseline != "none" and not (sizes > 1).any():
        raise UserError(
            "no prompt has two scored texts, so no text has others to be compared with: set rollout.samples to 2 or more, "
            "or see why the rewards failed"
        )
    if scale == "batch":
        advantages = np.where(scored, whiten(advantages, scored), 0.0)
    return Advantages(advantages)


def whiten(values: np.ndarray, mask: np.ndarray, *, keep_mean: bool = False) -> np.ndarray:
    """Values with mean 0 and variance 1 over the mask of the whole batch; with `keep_mean` only the variance changes."""
    inside = values[mask > 0]
    mean = inside.mean()
    white = (values - mean) / np.sqrt(inside.var() + 1e-8)
    return np.where(mask > 0, white + mean if keep_mean else white, 0.0)


def generalised_advantages(
    rewards_ST: np.ndarray,
    values_ST: np.ndarray,
    mask_ST: np.ndarray,
    after_S: np.ndarray,
    *,
    discount: float,
    trace: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of tokens, both (S, T) float64, 0 outside the mask (Schulman et al. 2016).

    Args:
        rewards_ST: what each sampled token earned; a text's score belongs to its last sampled token.
        values_ST: predicted returns before each token.
        mask_ST: 1 for sampled tokens. Others (the output of tools) are stepped over without discount.
        after_S: the value behind the last token: 0 where the text ended by itself; where it was cut at the length limit, the
            critic's value there, because more would have come.
        discount, trace: gamma and lambda.
    """
    advantage, after = np.zeros(len(rewards_ST)), np.asarray(after_S, np.float64)
    advantages_ST = np.zeros(rewards_ST.shape)
    for t in reversed(range(rewards_ST.shape[1])):
        here = mask_ST[:, t] > 0
        error = rewards_ST[:, t] + discount * after - values_ST[:, t]
        advantage = np.where(here, error + discount * trace * advantage, advantage)
        after = np.where(here, values_ST[:, t], after)
        advantages_ST[:, t] = np.where(here, advantage, 0.0)
    return advantages_ST, np.where(mask_ST > 0, advantages_ST + values_ST, 0.0)


def token_rewards(scores_S: np.ndarray, kl_ST: np.ndarray, mask_ST: np.ndarray, *, kl_weight: float) -> np.ndarray:
    """Rewards of tokens (S, T) float64: -kl_weight * kl of each sampled token, and the text's score on its last one.

    `kl_ST` is log(old / reference) of the sampled token. In the reward it has the right gradient, which the same
    estimate as a term of the loss has not.
    """
    rewards_ST = np.where(mask_ST > 0, -kl_weight * np.asarray(kl_ST, np.float64), 0.0)
    last_S = mask_ST.shape[1] - 1 - np.argmax(mask_ST[:, ::-1] > 0, axis=1)
    scored_S = (mask_ST > 0).any(axis=1) & ~np.isnan(scores_S)
    rewards_ST[np.flatnonzero(scored_S), last_S[scored_S]] += np.asarray(scores_S, np.float64)[scored_S]
    return rewards_ST


def adapted_kl_weight(kl_weight: float, kl: float, *, target: float, horizon: float, texts: int) -> float:
    """The next KL weight, so that the mean KL of a text comes near `target` nats (Ziegler et al. 2019).

    Args:
        kl: the mean KL of the `texts` texts that were just sampled, in nats.
        horizon: texts over which the weight may change by a factor of about 1.2.
    """
    error = float(np.clip(kl / target - 1, -0.2, 0.2))
    return kl_weight * (1 + error * texts / horizon)
