"""PPO, RLOO, GRPO and DPO reach the closed form of the optimum under a KL penalty on a problem that can be written down.

Texts have two tokens of three kinds, so there are nine of them. The policy that maximises the expected reward less beta
times its KL to the reference is reference * exp(reward / beta), made to add up to 1 (Rafailov et al. 2023, equation 4).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few
from ml_collections import ConfigDict
from test_policy_losses import settings

from llmjax.objectives import policy
from llmjax.objectives.preference import LOSSES, Answers
from llmjax.post.advantages import Rewards, generalised_advantages, group_advantages, token_rewards, whiten

KINDS, BETA, SAMPLES, ROUNDS = 3, 0.5, 1024, 240
TEXTS = [(a, b) for a in range(KINDS) for b in range(KINDS)]
CELLS = np.array(
    [[(0, a), (1 + a, b)] for a, b in TEXTS]
)  # of each token: its context (none, or the first one) and itself
RNG = np.random.default_rng(0)
REFERENCE, REWARDS = RNG.normal(size=(1 + KINDS, KINDS)), RNG.normal(size=len(TEXTS))
ONES = np.ones((SAMPLES, 2), np.float32)
ONE_TEXT = {"mask_BL": ONES, "segments_BL": ONES.astype(np.int32)}
ALL = np.arange(len(TEXTS))


def nats(logits: Any, texts: Any = ALL) -> jax.Array:
    """Log-probabilities of the tokens of texts, (S, 2)."""
    cells = jnp.asarray(CELLS)[texts]
    return jax.nn.log_softmax(logits)[cells[:, :, 0], cells[:, :, 1]]


def chances(logits: Any) -> np.ndarray:
    return np.array(jnp.exp(nats(logits).sum(axis=1)), np.float64)


def best() -> np.ndarray:
    made = chances(jnp.asarray(REFERENCE)) * np.exp(REWARDS / BETA)
    return made / made.sum()


def distance(logits: Any) -> float:
    """Total variation from the optimum."""
    return float(np.abs(chances(logits) - best()).sum() / 2)


def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array], c: ConfigDict, in_loss: float) -> jax.Array:
    """The loss of the trainer, of log-probabilities by a table."""
    new = nats(params["logits"], batch["texts"])
    ratio = policy.ratio(new, batch["old"], **ONE_TEXT, level="token", answers=1)
    made = policy.clipped(ratio, batch["advantages"], new, c)
    if in_loss:
        made += in_loss * policy.kl(new, batch["reference"], estimator="k3") * ratio
    if "returns" in batch:
        values = _values(params, batch)
        made += policy.value_loss(values, batch["old_values"], batch["returns"], clip=0.0)
    total, weight = policy.aggregate(made, **ONE_TEXT, exists_BA=ONES[:, :1], how="sequence_sum", length=2)
    return total / weight


def _values(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    return params["values"][jnp.asarray(CELLS)[batch["texts"]][:, :, 0]]


def critic(batch: dict[str, np.ndarray], values_ST: np.ndarray) -> None:
    kl = batch["old"] - batch["reference"]
    rewards = token_rewards(REWARDS[batch["texts"]], kl, ONES, kl_weight=BETA)
    found, returns = generalised_advantages(rewards, values_ST, ONES, np.zeros(SAMPLES), discount=1.0, trace=0.95)
    batch |= {"returns": returns, "old_values": values_ST, "advantages": whiten(found, ONES)}


def group(batch: dict[str, np.ndarray], *, baseline: str, in_reward: float) -> None:
    scores = REWARDS[batch["texts"]] - in_reward * (batch["old"] - batch["reference"]).sum(axis=1)
    made = group_advantages(Rewards(scores, np.zeros(SAMPLES, int)), baseline=baseline, scale="none")
    batch["advantages"] = np.repeat(made.values[:, None], 2, axis=1)


def trained(advise: Callable[..., None], *, updates: int, rate: float, in_loss: float = 0.0) -> float:
    """The distance from the optimum after rounds of samples, each with so many updates, at a rate that falls."""
    params = {"logits": jnp.asarray(REFERENCE, jnp.float32), "values": jnp.zeros(1 + KINDS)}
    step = jax.jit(jax.grad(lambda params, batch: loss(params, batch, settings(), in_loss)))
    rng = np.random.default_rng(1)
    for k in range(ROUNDS):
        p = chances(params["logits"])
        texts = rng.choice(len(TEXTS), SAMPLES, p=p / p.sum())
        batch = {"texts": texts, "old": np.array(nats(params["logits"]))[texts]}
        batch["reference"] = np.array(nats(jnp.asarray(REFERENCE, jnp.float32)))[texts]
        advise(batch, np.array(_values(params, batch)))
        batch = {name: jnp.asarray(x, jnp.int32 if name == "texts" else jnp.float32) for name, x in batch.items()}
        for _ in range(updates):
            scale = rate * (1 - k / ROUNDS)
            params = jax.tree.map(lambda x, g, scale=scale: x - scale * g, params, step(params, batch))
    return distance(params["logits"])


@pytest.mark.parametrize("name", few(["grpo", "ppo", "rloo"]))
def test_policies_reach_the_closed_form_of_the_optimum(name):
    assert distance(jnp.asarray(REFERENCE)) > 0.3
    if name == "ppo":
        found = trained(critic, updates=2, rate=0.3)
    elif name == "rloo":
        found = trained(lambda batch, _: group(batch, baseline="leave_one_out", in_reward=BETA), updates=1, rate=2.0)
    else:
        found = trained(
            lambda batch, _: group(batch, baseline="mean", in_reward=0.0), updates=1, rate=2.0, in_loss=BETA
        )
    assert found < 0.03


def test_preferences_of_the_reward_lead_to_the_same_optimum():
    a, b = (x.ravel() for x in np.meshgrid(np.arange(9), np.arange(9)))
    better = 1 / (1 + np.exp(REWARDS[b] - REWARDS[a]))  # how often a is preferred to b (Bradley and Terry)
    c = ConfigDict({"beta": BETA, "label_smoothing": 0.0, "divergence": "reverse_kl"})
    reference = nats(jnp.asarray(REFERENCE)).sum(axis=1)

    def of(logits: jax.Array) -> jax.Array:
        texts = nats(logits).sum(axis=1)
        chosen, rejected = (Answers(texts[x], reference[x], jnp.ones(len(x))) for x in (a, b))
        return jnp.mean(better * LOSSES["sigmoid"](chosen, rejected, c))

    step = jax.jit(lambda logits: logits - 20.0 * jax.grad(of)(logits))
    logits = jnp.asarray(REFERENCE, jnp.float32)
    for _ in range(1500):
        logits = step(logits)
    assert distance(logits) < 0.01
