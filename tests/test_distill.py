"""Distillation by enumeration: divergences over small vocabularies, their gradients and where they are least."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from llmjax.objectives import distill, losses
from llmjax.objectives.distill import at_ids, divergence, teacher_of

KINDS = ("forward", "reverse", "js")


def logits(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def enumerated(p: np.ndarray, q: np.ndarray, kind: str, mix: float) -> float:
    """The divergence, outcome by outcome."""

    def kl(a, b):
        return sum(x * np.log(x / y) for x, y in zip(a, b, strict=True))

    m = mix * p + (1 - mix) * q
    return {"forward": kl(p, q), "reverse": kl(q, p), "js": mix * kl(p, m) + (1 - mix) * kl(q, m)}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_what_adding_up_all_outcomes_gives(kind):
    p, q = (log_softmax(np.asarray(logits(7, seed=s), np.float64)) for s in (1, 2))
    found = divergence(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32), kind=kind, mix=0.3)
    assert float(found) == pytest.approx(enumerated(np.exp(p), np.exp(q), kind, 0.3), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_least_where_the_student_is_the_teacher(kind):
    p = jax.nn.log_softmax(logits(7, seed=1))

    def of(x):
        return divergence(p, jax.nn.log_softmax(x), kind=kind, mix=0.5)

    at, slope = jax.value_and_grad(of)(p)
    assert abs(float(at)) < 1e-6 and float(jnp.abs(slope).max()) < 1e-6
    assert all(float(of(p + 0.5 * logits(7, seed=s))) > 1e-3 for s in range(5))
    x = logits(7, seed=3)
    for _ in range(1500):
        x = x - 2.0 * jax.grad(of)(x)
    np.testing.assert_allclose(jax.nn.softmax(x), jnp.exp(p), atol=2e-3)


def test_forward_kls_gradient_by_the_logits_is_the_difference_of_the_distributions():
    p, x = jax.nn.log_softmax(logits(7, seed=1)), logits(7, seed=2)
    slope = jax.grad(lambda x: divergence(p, jax.nn.log_softmax(x), kind="forward", mix=0.5))(x)
    np.testing.assert_allclose(slope, jax.nn.softmax(x) - jnp.exp(p), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_ids_and_the_rest_together_are_a_coarser_distribution(kind):
    p, q = logits(1, 1, 9, seed=1), logits(1, 1, 9, seed=2)
    made = teacher_of(p, top=4, vocab_size=9, temperature=1.0)
    assert made.ids.shape == (1, 1, 4) and made.log_probs.shape == (1, 1, 5)
    np.testing.assert_allclose(jnp.exp(made.log_probs).sum(), 1, rtol=1e-6)
    coarse = [np.exp(log_softmax(np.asarray(x, np.float64)))[0, 0] for x in (p, q)]
    top = np.asarray(made.ids)[0, 0]
    coarse = [np.append(x[top], 1 - x[top].sum()) for x in coarse]
    log_q = at_ids(jax.nn.log_softmax(q, axis=-1), made.ids, rest=True)
    found = float(divergence(made.log_probs, log_q, kind=kind, mix=0.5)[0, 0])
    assert found == pytest.approx(enumerated(*coarse, kind, 0.5), rel=1e-4)
    whole = teacher_of(p, top=0, vocab_size=9, temperature=1.0)
    exact = float(divergence(whole.log_probs, jax.nn.log_softmax(q, axis=-1), kind=kind, mix=0.5)[0, 0])
    assert 0 < found <= exact


def settings(**changes: float | str) -> ConfigDict:
    given = {"divergence": "forward", "mix": 0.5, "temperature": 1.0, "data_weight": 0.0, **changes}
    return ConfigDict({"distill": given, "loss_chunks": 1, "vocab_size": 9})


def loss_of(monkeypatch: pytest.MonkeyPatch, x_BLV: jax.Array, c: ConfigDict, *, top: int) -> losses.Sums:
    """The loss of a student with these logits, whose padding rows of the embedding are likely."""
    head = types.SimpleNamespace(apply=lambda params, hidden: hidden, c=ConfigDict({"dtype": "float32"}))
    weights = jnp.array([[1.0, 1, 0], [0, 1, 0]])
    targets = jnp.array([[1, 2, 3], [4, 5, 6]])
    made = losses.Predictions(x_BLV, head, {}, targets, weights)
    monkeypatch.setattr(losses, "predict", lambda *given: made)
    teacher = teacher_of(logits(2, 3, 12, seed=1), top=top, vocab_size=9, temperature=c.distill.temperature)
    batch = {"teacher_ids": teacher.ids, "teacher_log_probs": teacher.log_probs}
    return distill.distill_loss(None, {}, batch, None, c)


def test_only_learnt_tokens_count_and_rows_that_pad_the_embedding_have_no_probability(monkeypatch):
    x = logits(2, 3, 12, seed=2)
    sums = loss_of(monkeypatch, x, settings(), top=0)
    p = np.exp(log_softmax(np.asarray(logits(2, 3, 12, seed=1), np.float64)[..., :9]))
    q = np.exp(log_softmax(np.asarray(x, np.float64)[..., :9]))
    wanted = sum(enumerated(p[b, i], q[b, i], "forward", 0.5) for b, i in ((0, 0), (0, 1), (1, 1)))
    assert float(sums.objective) == pytest.approx(wanted, rel=1e-5) and float(sums.weight) == 3
    nats = -sum(np.log(q[b, i, t]) for b, i, t in ((0, 0, 1), (0, 1, 2), (1, 1, 5)))
    assert float(sums.metrics["loss"].total) == pytest.approx(nats, rel=1e-5)
    mixed = loss_of(monkeypatch, x, settings(data_weight=0.25), top=0)
    assert float(mixed.objective) == pytest.approx(0.75 * wanted + 0.25 * nats, rel=1e-5)
    far = loss_of(monkeypatch, x.at[:, :, 9:].set(50.0), settings(), top=0)
    assert float(far.objective) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("top", [0, 4])
def test_chunks_of_tokens_change_neither_loss_nor_gradient(monkeypatch, top):
    c, x = settings(divergence="js", temperature=2.0), logits(2, 3, 12, seed=2)
    chunked = ConfigDict({**c.to_dict(), "loss_chunks": 2})

    def of(x: jax.Array, c: ConfigDict) -> jax.Array:
        return loss_of(monkeypatch, x, c, top=top).objective

    (a, da), (b, db) = (jax.value_and_grad(of)(x, one) for one in (c, chunked))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(da, db, atol=1e-7)
