"""Every sampler draws from exactly the distribution that it promises, each row by its own settings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llmjax.infer import speculative
from llmjax.infer.sample import first_largest, penalized, probabilities, sample, truncate
from llmjax.infer.sample import settings as sampling

DRAWS = 100_000
LOGITS = np.log(np.array([0.05, 0.4, 0.02, 0.3, 0.03, 0.2], np.float32))
SEEN = np.array([False, True, False, False, True, False])
COUNTS = np.array([0, 2, 0, 1, 0, 0], np.int32)


def normal(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def exact(**given: Any) -> np.ndarray:
    """The distribution by sorting, in float64, one step after another."""
    z = LOGITS.astype(np.float64) + given.get("bias", np.zeros(6))
    penalty = given.get("repetition_penalty", 1.0)
    z = np.where(SEEN | (COUNTS > 0), np.where(z > 0, z / penalty, z * penalty), z)
    z = z - given.get("frequency_penalty", 0.0) * COUNTS - given.get("presence_penalty", 0.0) * (COUNTS > 0)
    p = normal(np.exp(z / given.get("temperature", 1.0)))
    order = np.argsort(-p, kind="stable")
    if given.get("top_k"):
        p[order[given["top_k"] :]] = 0
        p = normal(p)
    if given.get("top_p", 1) < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= given["top_p"]]] = 0
        p = normal(p)
    p = normal(np.where(p >= given.get("min_p", 0) * p.max() * (1 - 1e-6), p, 0))
    if given.get("typical_p", 1) < 1:
        there = p > 0
        surprise = -np.log(np.where(there, p, 1))
        away = np.where(there, np.abs(surprise - np.sum(p * surprise)), np.inf)
        order = np.argsort(away, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= given["typical_p"]]] = 0
        p = normal(p)
    return p


def assert_drawn_from(tokens: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square against the exact distribution, at a level that one test in 10,000 would fail by chance."""
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any()
    there = expected > 0
    if there.sum() > 1:
        wanted = expected[there] * len(tokens)
        assert stats.chisquare(counts[there], wanted * counts[there].sum() / wanted.sum()).pvalue > 1e-4


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.75},
    "min-p": {"min_p": 0.11},
    "typical": {"typical_p": 0.6},
    "repetition": {"repetition_penalty": 1.7},
    "frequency": {"frequency_penalty": 0.5},
    "presence": {"presence_penalty": 0.9},
    "bias": {"bias": np.array([3.0, -1.0, 0.0, -np.inf, 0.0, 0.5])},
    "all": {"temperature": 1.4, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.95, "repetition_penalty": 1.2},
}


@jax.jit
def draw(logits_BV: jax.Array, keys_B: jax.Array, rows: Any) -> jax.Array:
    shape = logits_BV.shape
    seen_BV = jnp.broadcast_to(jnp.asarray(SEEN)[None], shape)
    counts_BV = jnp.broadcast_to(jnp.asarray(COUNTS)[None], shape)
    return sample(penalized(logits_BV, rows, seen_BV, counts_BV), keys_B, rows)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_hundred_thousand_draws_follow_the_exact_distribution(name):
    given = CASES[name]
    rows = sampling(DRAWS, **{key: value for key, value in given.items() if key != "bias"})
    logits_BV = jnp.tile(jnp.asarray(LOGITS + given.get("bias", np.zeros(6, np.float32)))[None], (DRAWS, 1))
    tokens = draw(logits_BV.astype(jnp.float32), jax.random.split(jax.random.key(0), DRAWS), rows)
    assert_drawn_from(np.asarray(tokens), exact(**given))


def test_rows_of_one_call_follow_their_own_settings():
    settings_of = [CASES["temperature"], CASES["typical"], {"temperature": 0.0}, CASES["presence"]]
    each, keys = DRAWS // 4, sorted({key for one in settings_of for key in one})
    default = {"temperature": 1.0, "typical_p": 1.0, "presence_penalty": 0.0}
    columns = {key: np.repeat([one.get(key, default[key]) for one in settings_of], each) for key in keys}
    logits_BV = jnp.tile(jnp.asarray(LOGITS)[None], (4 * each, 1))
    tokens = np.asarray(draw(logits_BV, jax.random.split(jax.random.key(1), 4 * each), sampling(4 * each, **columns)))
    for i, one in enumerate(settings_of):
        expected = exact(**one) if one.get("temperature") != 0.0 else np.eye(6)[1]
        assert_drawn_from(tokens[i * each : (i + 1) * each], expected)


def test_the_distribution_that_drafts_are_held_against_is_the_one_that_is_drawn_from():
    for case in (CASES["plain"], CASES["top-p"], CASES["typical"]):
        found = probabilities(jnp.asarray(LOGITS)[None], sampling(1, **case))[0]
        expected = exact(**case)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(
        probabilities(jnp.asarray(LOGITS)[None], sampling(1, temperature=0.0))[0], np.eye(6)[1]
    )


@pytest.mark.parametrize("certain", [False, True])
def test_what_speculation_accepts_follows_the_model_whatever_the_drafts_are(certain):
    """The first token, and the second given the first, for drafts that are quite different from what is wanted."""
    rng = np.random.default_rng(0)
    wanted = rng.dirichlet(np.ones(5), 3).astype(np.float32)
    drafted = None if certain else rng.dirichlet(np.ones(5), 2).astype(np.float32)
    drafts = np.stack(
        [rng.choice(5, DRAWS, p=np.eye(5)[i] if certain else normal(drafted[i].astype(float))) for i in (0, 1)]
    )
    keys = [jax.random.split(jax.random.key(i), DRAWS) for i in range(3)]
    wanted_LBV = jnp.broadcast_to(jnp.asarray(wanted)[:, None], (3, DRAWS, 5))
    drafted_LBV = None if drafted is None else jnp.broadcast_to(jnp.asarray(drafted)[:, None], (2, DRAWS, 5))
    tokens, count = jax.jit(speculative.accept)(wanted_LBV, jnp.asarray(drafts, jnp.int32), drafted_LBV, keys)
    tokens, count = np.asarray(tokens), np.asarray(count)
    assert set(count) == {1, 2, 3}
    for i in range(3):  # tokens beyond the first rejection are not part of the text
        assert_drawn_from(tokens[i, count > i], normal(wanted[i].astype(float)))


def test_lookup_drafts_what_followed_the_longest_match():
    history = jnp.array([[5, 6, 7, 9, 1, 6, 7, 8, 2, 5, 6, 7, 0, 0]])
    assert speculative.look_up(history, jnp.array([11]), ahead=3)[:, 0].tolist() == [9, 1, 6]
    nothing = jnp.arange(14)[None]
    assert speculative.look_up(nothing, jnp.array([11]), ahead=2).shape == (2, 1)


# Truncation


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 1}, {1}),
        ({"top_k": 4}, {0, 1, 3, 5}),
        ({"top_k": 99}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 5}),
        ({"min_p": 0.11}, {0, 1, 3, 5}),  # 0.05 / 0.4 = 0.125
        ({"min_p": 1.0}, {1}),
        ({"top_k": 2, "top_p": 0.6}, {1, 3}),  # top-p sees 4/7 and 3/7
        ({"top_k": 2, "top_p": 0.5}, {1}),
        ({"temperature": 2.0, "min_p": 0.3}, {0, 1, 3, 5}),  # min-p sees sqrt(0.05 / 0.4) = 0.35
    ],
)
def test_top_k_top_p_and_min_p_keep_exactly_what_they_promise(given, kept):
    out = truncate(jnp.array(LOGITS)[None], sampling(1, **given))[0]
    assert set(np.flatnonzero(np.isfinite(out))) == kept
    expected = np.exp(LOGITS.astype(np.float64) / given.get("temperature", 1.0))
    expected *= [i in kept for i in range(6)]
    np.testing.assert_allclose(jax.nn.softmax(out), expected / expected.sum(), rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0.05, 0.99), st.floats(0.1, 3.0))
def test_truncation_equals_sorting(seed, top_k, top_p, temperature):
    logits = np.random.default_rng(seed).normal(size=64).astype(np.float32) * 3
    scaled = np.sort((logits - logits.max()).astype(np.float64) / np.float32(temperature))[::-1][:top_k]
    probabilities = np.exp(scaled) / np.exp(scaled).sum()
    before = np.cumsum(probabilities) - probabilities
    if np.min(np.abs(before - np.float32(top_p))) < 1e-5:
        return  # rounding decides
    given = sampling(1, top_k=top_k, top_p=top_p, temperature=temperature)
    out = jax.jit(truncate)(jnp.array(logits)[None], given)[0]
    assert int(jnp.sum(jnp.isfinite(out))) == int(np.sum(before < np.float32(top_p)))


def test_the_first_largest_value_is_argmaxs_and_draws_are_categorical_ones():
    values = np.random.default_rng(0).integers(-3, 3, (64, 40)).astype(np.float32)  # ties in every row
    values[:, ::7], values[0] = -np.inf, -np.inf
    np.testing.assert_array_equal(first_largest(jnp.array(values)), np.argmax(values, axis=-1))
    keys, logits = jax.random.split(jax.random.key(0), 63), jnp.array(values[1:] / 2)
    drawn, _ = sample(logits, keys, sampling(63, temperature=1.0))
    np.testing.assert_array_equal(drawn, jax.vmap(jax.random.categorical)(keys, logits))
