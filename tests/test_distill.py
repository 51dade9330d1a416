"""Distillation by enumeration: divergences over small vocabularies, their gradients and where they are least."""

import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from llmjax.objectives import distill, losses
from llmjax.objectives.distill import at_ids, divergence, teacher_of

KINDS = ("forward", "reverse", "js")


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def enumerated(p: np.ndarray, q: np.ndarray, kind: str, mix: float) -> float:
    """The divergence, outcome by outcome."""

    def kl(a, b):
        return sum(x * np.log(x / y) for x, y in zip(a, b, strict=True))

    m = mix * p + (1 - mix) * q
    return {"forward": kl(p, q), "reverse": kl(q, p), "js": mix * kl(p, m) + (1 - mix) * kl(q, m)}[kind]


def test_a_divergence_is_what_adding_up_all_outcomes_gives():
    p, q = (log_softmax(normal(7, seed=s)) for s in (1, 2))
    found = jax.jit(lambda p, q: [divergence(p, q, kind=kind, mix=0.3) for kind in KINDS])(p, q)
    np.testing.assert_allclose(found, [enumerated(np.exp(p), np.exp(q), kind, 0.3) for kind in KINDS], rtol=1e-5)


def test_a_divergence_is_least_where_the_student_is_the_teacher():
    p = jax.nn.log_softmax(normal(7, seed=1))

    def of(x: jax.Array, kind: str) -> jax.Array:
        return divergence(p, jax.nn.log_softmax(x), kind=kind, mix=0.5)

    @jax.jit
    def all_of(start: jax.Array) -> list[tuple[jax.Array, ...]]:
        found = []
        for kind in KINDS:
            slope = jax.grad(of)
            learnt = jax.lax.fori_loop(0, 1500, lambda _, x, k=kind, slope=slope: x - 2.0 * slope(x, k), start)
            found.append((of(p, kind), slope(p, kind), of(start, kind), jax.nn.softmax(learnt)))
        return found

    for at, slope, elsewhere, learnt in all_of(jnp.asarray(normal(7, seed=3))):
        assert abs(float(at)) < 1e-6 and np.abs(slope).max() < 1e-6 and float(elsewhere) > 1e-3
        np.testing.assert_allclose(learnt, np.exp(p), atol=2e-3)


def test_forward_kls_gradient_by_the_logits_is_the_difference_of_the_distributions():
    p, x = log_softmax(normal(7, seed=1)), normal(7, seed=2)
    slope = jax.jit(jax.grad(lambda x: divergence(p, jax.nn.log_softmax(x), kind="forward", mix=0.5)))(x)
    np.testing.assert_allclose(slope, np.exp(log_softmax(x)) - np.exp(p), atol=1e-6)


def test_the_likeliest_ids_and_the_rest_together_are_a_coarser_distribution():
    p, q = normal(1, 1, 9, seed=1), normal(1, 1, 9, seed=2)

    @jax.jit
    def of(p: jax.Array, q: jax.Array) -> tuple[distill.Teacher, list[jax.Array], list[jax.Array]]:
        made, whole = (teacher_of(p, top=top, vocab_size=9, temperature=1.0) for top in (4, 0))
        log_q = jax.nn.log_softmax(q, axis=-1)
        coarse = [divergence(made.log_probs, at_ids(log_q, made.ids, rest=True), kind=kind, mix=0.5) for kind in KINDS]
        return made, coarse, [divergence(whole.log_probs, log_q, kind=kind, mix=0.5) for kind in KINDS]

    made, found, exact = of(p, q)
    assert made.ids.shape == (1, 1, 4) and made.log_probs.shape == (1, 1, 5)
    top = np.asarray(made.ids)[0, 0]
    shares = [np.exp(log_softmax(x))[0, 0] for x in (p, q)]
    parts = [np.append(x[top], 1 - x[top].sum()) for x in shares]
    np.testing.assert_allclose(np.exp(made.log_probs)[0, 0], parts[0], rtol=1e-5)
    for kind, coarse, whole in zip(KINDS, found, exact, strict=True):
        assert float(coarse[0, 0]) == pytest.approx(enumerated(*parts, kind, 0.5), rel=1e-4)
        assert float(whole[0, 0]) == pytest.approx(enumerated(*shares, kind, 0.5), rel=1e-4)
        assert 0 < float(coarse[0, 0]) <= float(whole[0, 0])


def settings(**changes: float | str) -> ConfigDict:
    given = {"divergence": "forward", "mix": 0.5, "temperature": 1.0, "data_weight": 0.0, **changes}
    return ConfigDict({"distill": given, "loss_chunks": 1, "vocab_size": 9})


def sums_of(monkeypatch: pytest.MonkeyPatch, c: ConfigDict, *, top: int) -> Callable[[jax.Array], losses.Sums]:
    """From a student's logits to the sums of the loss; rows 9 to 11 of its embedding are padding."""
    head = types.SimpleNamespace(apply=lambda params, hidden: hidden, c=ConfigDict({"dtype": "float32"}))
    weights, targets = jnp.array([[1.0, 1, 0], [0, 1, 0]]), jnp.array([[1, 2, 3], [4, 5, 6]])

    def of(x_BLV: jax.Array) -> losses.Sums:
        made = losses.Predictions(x_BLV, head, {}, targets, weights)
        monkeypatch.setattr(losses, "predict", lambda *given: made)
        teacher = teacher_of(
            jnp.asarray(normal(2, 3, 12, seed=1)), top=top, vocab_size=9, temperature=c.distill.temperature
        )
        batch = {"teacher_ids": teacher.ids, "teacher_log_probs": teacher.log_probs}
        return distill.distill_loss(None, {}, batch, None, c)

    return of


def test_only_learnt_tokens_count_and_rows_that_pad_the_embedding_have_no_probability(monkeypatch):
    x = normal(2, 3, 12, seed=2)
    padded = x.copy()
    padded[:, :, 9:] = 50.0
    of, mixed = (jax.jit(sums_of(monkeypatch, settings(data_weight=w), top=0)) for w in (0.0, 0.25))
    p, q = (np.exp(log_softmax(y[..., :9])) for y in (normal(2, 3, 12, seed=1), x))
    wanted = sum(enumerated(p[b, i], q[b, i], "forward", 0.5) for b, i in ((0, 0), (0, 1), (1, 1)))
    nats = -sum(np.log(q[b, i, t]) for b, i, t in ((0, 0, 1), (0, 1, 2), (1, 1, 5)))
    sums = of(x)
    assert float(sums.objective) == pytest.approx(wanted, rel=1e-5) and float(sums.weight) == 3
    assert float(sums.metrics["loss"].total) == pytest.approx(nats, rel=1e-5)
    assert float(of(padded).objective) == pytest.approx(wanted, rel=1e-5)
    assert float(mixed(x).objective) == pytest.approx(0.75 * wanted + 0.25 * nats, rel=1e-5)


@pytest.mark.parametrize("top", [0, 4])
def test_chunks_of_tokens_change_neither_loss_nor_gradient(monkeypatch, top):
    plain = settings(divergence="js", temperature=2.0)
    chunked = ConfigDict({**plain.to_dict(), "loss_chunks": 2})

    def of(c: ConfigDict) -> tuple[jax.Array, jax.Array]:
        made = sums_of(monkeypatch, c, top=top)
        return jax.jit(jax.value_and_grad(lambda x: made(x).objective))(normal(2, 3, 12, seed=2))

    (a, da), (b, db) = of(plain), of(chunked)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(da, db, atol=1e-7)
