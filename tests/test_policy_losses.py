"""Policy losses against TRL's numbers, closed forms and enumerated expectations."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from llmjax.objectives import policy
from llmjax.objectives.answers import per_answer, per_token

GOLDEN = Path("../shared/data/posttrain/golden_trl")
AGGREGATE = {"grpo": "sequence", "sapo": "sequence", "bnpo": "token", "dapo": "token", "cispo": "token",
             "dr_grpo": "constant", "luspo": "sequence_sum"}  # fmt: skip


def settings(**changes: Any) -> ConfigDict:
    return ConfigDict(
        {"clip": 0.2, "clip_high": 0.0, "dual_clip": 0.0, "ratio_cap": 5.0, "gate_positive": 1.0, "gate_negative": 1.05,
             "correction": "", "correction_low": 0.5, "correction_high": 2.0} | changes
    )  # fmt: skip


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs TRL's golden values")
def test_every_loss_aggregation_level_and_kl_of_grpo_is_trls_number():
    batch = json.loads((GOLDEN / "batch.json").read_text())["grpo"]
    names = ("policy_log_probs", "old_log_probs", "reference_log_probs", "completion_mask")
    new, old, reference, mask = (np.array(batch[name], np.float32) for name in names)
    advantages = np.repeat(np.array(batch["advantages"], np.float32)[:, None], 8, axis=1)
    segments, exists = np.ones((4, 8), np.int32), np.ones((4, 1), np.float32)
    golden = json.loads((GOLDEN / "golden.json").read_text())["grpo"]
    assert golden
    for name, wanted in golden.items():
        kind, level, beta, corrected = name.split(", ")
        r = policy.ratio(new, old, mask, segments, level=level, answers=1)
        loss = policy.LOSSES[kind if kind in policy.LOSSES else "clip"](r, advantages, new, settings())
        k3 = policy.kl(new, reference, estimator="k3")
        loss += float(beta.split()[1]) * (k3 * r if corrected == "corrected True" else k3)
        total, weight = policy.aggregate(loss, mask, segments, exists, how=AGGREGATE[kind], length=8)
        assert float(total / weight) == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-6), name


def random_policy(seed: int, size: int = 7) -> tuple[np.ndarray, np.ndarray]:
    logits = np.random.default_rng(seed).normal(size=(2, size))
    return logits[0], logits[1]


def kl_gradient(logits: np.ndarray, reference: np.ndarray, estimator: str, with_ratio: bool) -> np.ndarray:
    """The expected gradient of an estimate as a term of the loss, over the tokens that the policy samples."""

    def expected(x: jax.Array) -> jax.Array:
        new, fixed = jax.nn.log_softmax(x), jax.nn.log_softmax(jnp.array(reference))
        sampled = jax.lax.stop_gradient(new)
        estimate = policy.kl(new[None], fixed[None], estimator=estimator)[0]
        return jnp.sum(jnp.exp(sampled) * estimate * (jnp.exp(new - sampled) if with_ratio else 1.0))

    return np.array(jax.grad(expected)(jnp.array(logits)))


def kl_of(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(jax.nn.log_softmax(a)) * (jax.nn.log_softmax(a) - jax.nn.log_softmax(b)))


def test_kl_estimators_as_terms_of_a_loss_have_the_gradients_that_their_docstring_says():
    logits, reference = random_policy(0)
    forward = np.array(jax.grad(lambda x: kl_of(x, jnp.array(reference)))(jnp.array(logits)))
    backward = np.array(jax.grad(lambda x: kl_of(jnp.array(reference), x))(jnp.array(logits)))
    np.testing.assert_allclose(kl_gradient(logits, reference, "k1", False), 0.0, atol=1e-6)
    np.testing.assert_allclose(kl_gradient(logits, reference, "k2", False), forward, atol=1e-6)
    np.testing.assert_allclose(kl_gradient(logits, reference, "k3", False), backward, atol=1e-6)
    np.testing.assert_allclose(kl_gradient(logits, reference, "k3", True), forward, atol=1e-6)
    assert np.linalg.norm(forward - backward) > 0.1


def test_kl_estimators_have_the_means_that_their_docstring_says():
    logits, reference = (jax.nn.log_softmax(jnp.array(x)) for x in random_policy(0))
    wanted = float(jnp.sum(jnp.exp(logits) * (logits - reference)))
    means = {
        name: float(jnp.sum(jnp.exp(logits) * policy.kl(logits[None], reference[None], estimator=name)[0]))
        for name in ("k1", "k2", "k3")
    }
    assert means["k1"] == pytest.approx(wanted, rel=1e-5) and means["k3"] == pytest.approx(wanted, rel=1e-5)
    assert abs(means["k2"] - wanted) > 0.01


def test_a_loss_stays_finite_and_its_kl_metric_raw_when_a_log_ratio_is_100():
    new, reference = jnp.full((1, 1), -1.0), jnp.full((1, 1), 99.0)
    assert np.isfinite(policy.kl(new, reference, estimator="k3")).all()
    assert float(policy.kl(new, reference, estimator="k1")[0, 0]) == -100.0
    one = jnp.ones((1, 1))
    for name, loss in policy.LOSSES.items():
        for advantage in (-1.0, 0.0, 1.0):

            def of(new: jax.Array) -> jax.Array:
                r = policy.ratio(new, reference - 199, one, one.astype(int), level="token", answers=1)
                return loss(r, advantage * one, new, settings())[0, 0]  # noqa: B023

            value, gradient = jax.value_and_grad(of)(jnp.zeros((1, 1)))
            assert np.isfinite(value) and np.isfinite(gradient).all(), (name, advantage)


# Sequences over 3 tokens, of which 2 ends a text, of at most 4 tokens: all are listed, so expectations are sums.
TOKENS, LONGEST, END = 3, 4, 2


def all_texts(begun: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if begun and (begun[-1] == END or len(begun) == LONGEST):
        return [begun]
    return [text for token in range(TOKENS) for text in all_texts((*begun, token))]


TEXTS = all_texts()
CONTEXTS = sorted({text[:t] for text in TEXTS for t in range(len(text))})


PLACE = {context: i for i, context in enumerate(CONTEXTS)}
SHAPE = (len(TEXTS), LONGEST)
MASK = np.array([[t < len(text) for t in range(LONGEST)] for text in TEXTS], np.float32)
LENGTHS, SEGMENTS = MASK.sum(1), MASK.astype(np.int32)
CELLS = np.zeros((*SHAPE, 2), np.int32)  # of each token: its context and itself
for _s, _text in enumerate(TEXTS):
    CELLS[_s, : len(_text)] = [(PLACE[_text[:t]], token) for t, token in enumerate(_text)]
POLICIES = 20


def nats(logits: jax.Array) -> jax.Array:
    """Log-probabilities of every text's tokens, (S, T), by a table of logits for every context."""
    return jnp.where(MASK > 0, jax.nn.log_softmax(logits)[CELLS[:, :, 0], CELLS[:, :, 1]], 0.0)


def chances(logits: jax.Array) -> jax.Array:
    return jnp.exp(jnp.sum(nats(logits), axis=1))


def true_gradient(logits: jax.Array, rewards_S: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sum(chances(x) * rewards_S))(logits)


def world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a policy, rewards of 0 and 1, and the noise of its sampler."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(CONTEXTS), TOKENS))
    rewards_S = np.array([float(rng.random() < 0.4) for _ in TEXTS])
    return logits, rewards_S, rng.normal(size=logits.shape)


def errors(noise: float, **changes: Any) -> np.ndarray:
    """Relative errors of the expected direction of a policy loss with a correction, for groups of infinite size."""
    c = settings(**changes)

    def of_world(logits: jax.Array, rewards_S: jax.Array, difference: jax.Array) -> jax.Array:
        sampler = logits + noise * difference
        sampled_S, sampler_ST = chances(sampler), nats(sampler)
        advantages_ST = jnp.repeat((rewards_S - sampled_S @ rewards_S)[:, None], LONGEST, axis=1)

        def loss(logits: jax.Array) -> jax.Array:
            new_ST = nats(logits)
            old_ST = jax.lax.stop_gradient(new_ST)
            ratio_ST = policy.ratio(new_ST, old_ST, MASK, SEGMENTS, level="token", answers=1)
            loss_ST = policy.clipped(ratio_ST, advantages_ST, new_ST, c)
            weight_ST = policy.correction(old_ST, sampler_ST, MASK, SEGMENTS, c, answers=1)
            return -jnp.sum(sampled_S * jnp.sum(loss_ST * weight_ST * MASK, axis=1))

        true = true_gradient(logits, rewards_S)
        return jnp.linalg.norm(jax.grad(loss)(logits) - true) / jnp.linalg.norm(true)

    worlds = [np.stack(parts).astype(np.float32) for parts in zip(*map(world, range(POLICIES)), strict=True)]
    return np.array(jax.jit(jax.vmap(of_world))(*worlds))


# The mean relative error of the expected gradient over 20 policies, for a sampler with noise of .3 and 1.
BIAS = {
    "": (0.23, 0.74),
    "token_truncate": (0.18, 0.58),
    "token_mask": (0.18, 0.76),
    "sequence_truncate": (0.002, 0.25),
}


@pytest.mark.parametrize("kind", BIAS)
def test_each_correction_has_the_bias_that_enumeration_gives(kind):
    high = 3.0 if kind == "sequence_truncate" else 2.0
    for noise, wanted in zip((0.3, 1.0), BIAS[kind], strict=True):
        assert errors(noise, correction=kind, correction_high=high).mean() == pytest.approx(wanted, abs=0.006), noise


def test_no_correction_is_biased_when_sampler_and_trainer_agree_and_the_uncut_product_never_is():
    for kind in BIAS:
        assert errors(0.0, correction=kind).max() < 1e-5
    assert errors(1.0, correction="sequence_truncate", correction_high=1e9).max() < 1e-3


def directions(how: str) -> np.ndarray:
    """Cosines of a loss's direction with the true gradient, of policies whose right answers are mostly long."""

    def of_world(logits: jax.Array, rewards_S: jax.Array) -> jax.Array:
        sampled_S = chances(logits)
        weights_S1 = ((rewards_S - sampled_S @ rewards_S) * sampled_S)[:, None]

        def loss(logits: jax.Array) -> jax.Array:
            exists_SA = jnp.ones((len(TEXTS), 1))
            values_ST = nats(logits) * weights_S1
            total, weight = policy.aggregate(values_ST, MASK, SEGMENTS, exists_SA, how=how, length=LONGEST)
            return total / weight

        made, true = jax.grad(loss)(logits), true_gradient(logits, rewards_S)
        return jnp.sum(made * true) / jnp.linalg.norm(made) / jnp.linalg.norm(true)

    worlds = [world(seed)[0] for seed in range(POLICIES)]
    likely = np.where(LENGTHS >= 3, 0.8, 0.2)
    rewards = [(np.random.default_rng(seed).random(len(TEXTS)) < likely).astype(float) for seed in range(POLICIES)]
    return np.array(jax.jit(jax.vmap(of_world))(np.float32(worlds), np.float32(rewards)))


def test_only_the_mean_of_means_turns_the_gradient_of_one_prompt_by_length():
    for how in ("constant", "token", "sequence_sum"):
        np.testing.assert_allclose(directions(how), 1.0, atol=1e-5)
    assert directions("sequence").min() < 0.99


def test_padding_and_repetition_leave_the_constant_aggregation_alone():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(3, 5)).astype(np.float32), np.tri(3, 5, 1, dtype=np.float32)
    segments, exists = np.ones((3, 5), np.int32), np.ones((3, 1), np.float32)

    def mean(values: np.ndarray, mask: np.ndarray, segments: np.ndarray, exists: np.ndarray) -> float:
        total, weight = policy.aggregate(values, mask, segments, exists, how="constant", length=8)
        return float(total / weight)

    wanted = mean(values, mask, segments, exists)
    wide = [np.pad(x, ((0, 0), (0, 59))) for x in (values, mask, segments)]
    assert mean(*wide, exists) == pytest.approx(wanted, rel=1e-6)
    twice = [np.concatenate([x, x]) for x in (values, mask, segments, exists)]
    assert mean(*twice) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("how", ["constant", "token", "sequence", "sequence_sum"])
def test_texts_packed_into_one_row_are_aggregated_as_if_they_had_rows_of_their_own(how):
    rng = np.random.default_rng(1)
    lengths = (3, 1, 4)
    apart = [rng.normal(size=n).astype(np.float32) for n in lengths]
    values, mask, segments = (np.zeros((3, 8), np.float32), np.zeros((3, 8), np.float32), np.zeros((3, 8), np.int32))
    for i, text in enumerate(apart):
        values[i, : len(text)], mask[i, : len(text)], segments[i, : len(text)] = text, 1, 1
    one = np.concatenate(apart)[None], np.ones((1, 8), np.float32), np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    padded = policy.aggregate(values, mask, segments, np.ones((3, 1), np.float32), how=how, length=8)
    packed = policy.aggregate(*one, np.ones((1, 3), np.float32), how=how, length=8)
    np.testing.assert_allclose(np.array(padded), np.array(packed), rtol=1e-6)


def test_values_go_from_tokens_to_answers_and_back_and_padding_has_none():
    segments = np.array([[1, 1, 2, 0]], np.int32)
    summed = per_answer(jnp.array([[1.0, 2.0, 4.0, 8.0]]), segments, 3)
    np.testing.assert_array_equal(summed, [[3.0, 4.0, 0.0]])
    np.testing.assert_array_equal(per_token(summed, segments), [[3.0, 3.0, 4.0, 0.0]])


def test_clips_stop_the_gradient_on_the_side_that_would_go_further():
    c = settings(clip_high=0.28, dual_clip=3.0)

    def slope(ratio: float, advantage: float) -> float:
        return float(
            jax.grad(lambda r: policy.clipped(r, jnp.float32(advantage), jnp.float32(0), c))(jnp.float32(ratio))
        )

    assert slope(1.27, 1.0) == -1.0 and slope(1.29, 1.0) == 0.0  # the upper limit is the higher one
    assert slope(0.79, -1.0) == 0.0 and slope(0.81, -1.0) == 1.0
    assert slope(2.9, -1.0) == 1.0 and slope(3.1, -1.0) == 0.0  # the dual clip
