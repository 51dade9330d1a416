"""Preference losses against closed forms; benchmarks/trl_golden.py compares whole models with TRL."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config
from ml_collections import ConfigDict

from llmjax.objectives import losses, preference, reward
from llmjax.objectives.log_probs import LogProbs
from llmjax.objectives.preference import LOSSES, Answers
from llmjax.post import batches, reference


def settings(**changes: float | str) -> ConfigDict:
    return ConfigDict(
        {"beta": 0.1, "label_smoothing": 0.0, "divergence": "reverse_kl", "alpha": 0.5, "temperature": 0.05,
         "margin": 0.0, "reward_shift": 0.0} | changes
    )  # fmt: skip


def pair(chosen: float, rejected: float, *, tokens: tuple[int, int] = (1, 1)) -> tuple[Answers, Answers]:
    """One pair with these log ratios, of a reference that gives each answer -5 nats."""
    return tuple(
        Answers(jnp.array([ratio - 5.0]), jnp.array([-5.0]), jnp.array([float(n)]))
        for ratio, n in zip((chosen, rejected), tokens, strict=True)
    )  # type: ignore[return-value]


def test_a_policy_that_is_its_reference_has_the_loss_ln_2_and_no_margin():
    for name in ("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"):
        smoothing = 0.1 if name == "robust" else 0.0
        found = LOSSES[name](*pair(0.0, 0.0), settings(label_smoothing=smoothing))
        np.testing.assert_allclose(found, math.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "loss", "slope"), [("sigmoid", 0.437488, -0.035434), ("hinge", 0.4, -0.1), ("ipo", 1.0, 2.0)]
)
def test_a_margin_of_6_at_beta_a_tenth_has_the_known_loss_and_slope(name, loss, slope):
    def of(margin: jax.Array) -> jax.Array:
        chosen, rejected = pair(0.0, 0.0)
        return LOSSES[name](chosen._replace(policy=chosen.policy + margin), rejected, settings())[0]

    value, gradient = jax.value_and_grad(of)(jnp.float32(6.0))
    assert (float(value), float(gradient)) == (pytest.approx(loss, rel=1e-5), pytest.approx(slope, rel=1e-4))


def test_losses_by_length_count_each_answers_own_tokens():
    chosen, rejected = pair(4.0, -9.0, tokens=(2, 9))
    assert float(LOSSES["ipo"](chosen, rejected, settings())[0]) == pytest.approx((2.0 + 1.0 - 5.0) ** 2)
    assert float(LOSSES["simpo"](chosen, rejected, settings(beta=2.0, margin=0.5))[0]) == pytest.approx(
        math.log1p(math.exp(-(2.0 * (-1.0 / 2 + 14.0 / 9) - 0.5))), rel=1e-5
    )


def test_smoothing_by_the_share_of_wrong_labels_makes_robust_dpo_right_on_average():
    """A label that is flipped with chance e: the expected robust loss is DPO's on the true label."""
    e, c = 0.2, settings(label_smoothing=0.2)
    right, wrong = LOSSES["robust"](*pair(3.0, 1.0), c), LOSSES["robust"](*pair(1.0, 3.0), c)
    np.testing.assert_allclose((1 - e) * right + e * wrong, LOSSES["sigmoid"](*pair(3.0, 1.0), settings()), rtol=1e-5)


def test_conservative_dpo_is_least_where_the_margin_says_the_share_of_right_labels():
    e, c = 0.1, settings(label_smoothing=0.1, beta=1.0)
    best = math.log((1 - e) / e)
    at = [float(LOSSES["sigmoid"](*pair(best + step, 0.0), c)[0]) for step in (-0.1, 0.0, 0.1)]
    assert at[1] < at[0] and at[1] < at[2]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_divergences_are_zero_at_equal_sides_and_grow_with_the_better_one(divergence):
    c = settings(divergence=divergence)
    same = preference.difference(*pair(0.3, 0.3), c)
    ahead = [float(preference.difference(*pair(0.3 + gap, 0.3), c)[0]) for gap in (0.1, 0.2)]
    assert float(same[0]) == 0.0 and 0 < ahead[0] < ahead[1]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_divergences_by_length_leave_a_policy_at_its_reference_without_a_margin_and_are_their_formulas(divergence):
    given, lengths = settings(divergence=divergence, beta=0.5), (2, 9)
    assert float(LOSSES["sigmoid_norm"](*pair(0.0, 0.0, tokens=lengths), given)[0]) == pytest.approx(math.log(2))
    assert float(LOSSES["ipo"](*pair(0.0, 0.0, tokens=lengths), given)[0]) == pytest.approx(1.0)
    score = {
        "reverse_kl": lambda x: x,
        "forward_kl": lambda x: 1 - math.exp(-x),
        "js": lambda x: math.log(2 / (1 + math.exp(-x))),
        "alpha": lambda x: (1 - math.exp(-0.5 * x)) / 0.5,
    }[divergence]
    margin = score(0.8) / 2 - score(-0.4) / 9
    found = LOSSES["ipo"](*pair(0.8, -0.4, tokens=lengths), given)
    assert float(found[0]) == pytest.approx((margin - 1.0) ** 2, rel=1e-5)


def test_alpha_goes_from_reverse_to_forward_kl():
    for alpha, name in ((1e-4, "reverse_kl"), (1.0, "forward_kl")):
        near = preference.difference(*pair(0.8, -0.4), settings(divergence="alpha", alpha=alpha))
        np.testing.assert_allclose(near, preference.difference(*pair(0.8, -0.4), settings(divergence=name)), rtol=1e-3)


def test_every_loss_is_its_papers_formula():
    """Of one pair: the policy gives -4.3 and -5.4 nats, the reference -5 to both, for answers of 2 and 3 tokens."""
    b, e, gamma, t, shift = 0.5, 0.1, 0.3, 0.05, 0.2
    better, worse, x = 0.7, -0.4, 0.5 * 1.1  # log ratios, and beta times their difference

    def nats(z: float) -> float:
        return math.log1p(math.exp(-z))

    def sigmoid(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    def smooth(z: float) -> float:
        return (1 - e) * nats(z) + e * nats(-z)

    def log_odds(mean: float) -> float:
        return mean - math.log(1 - math.exp(mean))

    share = sigmoid(x / t)
    wanted = {
        "sigmoid": smooth(x),
        "sigmoid_norm": smooth(b * (better / 2 - worse / 3)),
        "hinge": max(0.0, 1 - x),
        "ipo": (better / 2 - worse / 3 - 1 / (2 * b)) ** 2,
        "robust": ((1 - e) * nats(x) - e * nats(-x)) / (1 - 2 * e),
        "exo": sigmoid(x) * math.log(sigmoid(x) / (1 - e)) + sigmoid(-x) * math.log(sigmoid(-x) / e),
        "nca": nats(b * better) + 0.5 * nats(-b * better) + 0.5 * nats(-b * worse),
        "bco": nats(b * better - shift) + nats(shift - b * worse),
        "sppo": (better - 0.5 / b) ** 2 + (worse + 0.5 / b) ** 2,
        "apo_zero": 1 - sigmoid(b * better) + sigmoid(b * worse),
        "apo_down": sigmoid(b * better) + 1 - sigmoid(x),
        "discopop": (1 - share) * nats(x) + share * math.exp(-x),
        "aot": smooth(x),  # of a single pair
        "aot_unpaired": smooth(x),
        "simpo": smooth(b * (-4.3 / 2 + 5.4 / 3) - gamma),
        "cpo": smooth(b * (5.4 - 4.3)),
        "orpo": b * nats(log_odds(-4.3 / 2) - log_odds(-5.4 / 3)),
    }
    given = settings(beta=b, label_smoothing=e, margin=gamma, temperature=t, reward_shift=shift)
    chosen, rejected = pair(better, worse, tokens=(2, 3))
    found = jax.jit(lambda a, z: {name: loss(a, z, given)[0] for name, loss in LOSSES.items()})(chosen, rejected)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted, rel=1e-5)


def test_length_weights_move_what_is_compared_and_neither_lengths_nor_what_is_learnt_of_chosen_answers(monkeypatch):
    """TRL 1.16's way: chosen answers of 4 tokens, rejected ones of 2, whose common length counts alone."""
    nats = jnp.array([[-9.0, -1, -2, -3, -4, -9, -5, -6]])
    mask = np.array([[0, 1, 1, 1, 1, 0, 1, 1]], np.float32)
    row = {"weights": mask[0], "segments": np.array([1] * 5 + [2] * 3, np.int32)}
    batches.weigh_length(row, 2, 0.0)
    batch = {name: values[None] for name, values in row.items()}
    batch |= {"reference": np.float32([[-4, -10]]), "pair_weights": np.ones((1, 1)), "token_share": np.float32([0.25])}
    assert batch["weights"].tolist() == mask.tolist() and batch["length_weights"][0].tolist() == [
        1,
        1,
        1,
        0,
        0,
        1,
        1,
        1,
    ]
    assert preference.summed(nats, batch, answers=2).tolist() == [[-3, -11]]
    monkeypatch.setattr(preference, "log_probs", lambda *_, **__: LogProbs(nats, jnp.zeros_like(nats)))
    monkeypatch.setattr(losses, "predict", lambda *_: losses.Predictions(*[None] * 5))
    for loss, wanted in (("sft", 10 / 4), ("ipo", (1 / 4 - -1 / 2 - 1) ** 2)):
        c = ConfigDict({"preference": settings(beta=0.5, loss=loss), "loss_chunks": 1, "vocab_size": 0})
        sums = preference.preference_loss(None, None, batch, None, c)
        assert float(sums.objective / sums.weight) == pytest.approx(wanted), loss


def test_a_reference_is_computed_again_when_the_length_weight_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(reference.folders, "newest", lambda path: path)
    monkeypatch.setattr(reference.folders, "read_meta", lambda folder: {})
    keys = set()
    for weight in (1.0, 0.5, 0.25):
        c = tiny_config(
            data__format="conversations", objective__name="preference", objective__preference__length_weight=weight
        )
        keys.add(reference._reference_key(c, {}))
    assert len(keys) == 3


def test_aot_compares_distributions_whatever_the_order_of_the_pairs():
    def answers(policy: list[float]) -> Answers:
        return Answers(jnp.array(policy), jnp.zeros(3), jnp.ones(3))

    chosen, rejected = answers([3.0, 1.0, 2.0]), answers([0.0, 2.0, 1.0])
    given = settings(beta=1.0)
    unpaired = LOSSES["aot_unpaired"](chosen, rejected, given)
    np.testing.assert_allclose(unpaired, math.log1p(math.exp(-1.0)), rtol=1e-6)  # sorted: 1 - 0, 2 - 1, 3 - 2
    shuffled = LOSSES["aot_unpaired"](chosen, answers([1.0, 0.0, 2.0]), given)
    np.testing.assert_allclose(shuffled, unpaired)
    paired = LOSSES["aot"](chosen, rejected, given)  # margins 3, -1 and 1, against the reference's 0
    np.testing.assert_allclose(sorted(paired.tolist()), [math.log1p(math.exp(-m)) for m in (3.0, 1.0, -1.0)], rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_finite_with_its_gradient_far_from_the_reference_and_falls_with_a_better_margin(name):
    c = settings(label_smoothing=0.001 if name == "exo" else 0.0)

    def of(margin: jax.Array) -> jax.Array:
        # Both sides move, as a mean-zero step would move them.
        chosen, rejected = pair(0.0, 0.0, tokens=(3, 3))
        chosen = chosen._replace(policy=chosen.policy + margin / 2)
        return LOSSES[name](chosen, rejected._replace(policy=rejected.policy - margin / 2), c)[0]

    for margin in (-80.0, -1.0, 0.0, 1.0, 4.0):
        value, gradient = jax.value_and_grad(of)(jnp.float32(margin))
        assert np.isfinite(value) and np.isfinite(gradient), margin
    # DiscoPOP's loss is not monotonic near 0, as its paper shows.
    assert float(jax.grad(of)(jnp.float32(0.5))) < 0 or name == "discopop"


def rankings(monkeypatch: pytest.MonkeyPatch, scores_BA: np.ndarray, **batch: np.ndarray) -> dict[str, float]:
    """The loss and metrics of a reward model that gives these scores."""
    given = lambda module, params, batch, rng: (jnp.array(scores_BA), losses.Auxiliary())  # noqa: E731
    monkeypatch.setattr(reward, "scores", given)
    batch = {"exists": np.ones_like(scores_BA), "margins": np.zeros_like(scores_BA), **batch}
    sums = reward.reward_loss(None, None, batch, None, ConfigDict({"reward": {"centre": 0.01}}))
    return {"objective": float(sums.objective), "weight": float(sums.weight)} | {
        name: float(mean.total / mean.weight) for name, mean in sums.metrics.items()
    }


def test_answers_are_compared_with_those_to_their_own_prompt_however_rows_are_packed(monkeypatch):
    scores, ranks = np.array([[2.0, 1.0, -1.0], [0.5, 3.0, 0.0]]), np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
    exists, one = np.array([[1.0, 1, 1], [1, 1, 0]]), np.zeros((2, 3), np.int32)
    apart = rankings(monkeypatch, scores, ranks=ranks, groups=one, exists=exists)
    packed = rankings(
        monkeypatch, np.array([[2.0, 1, -1, 0.5, 3, 0]]), ranks=np.array([[0.0, 1, 2, 0, 1, 0]]),
        groups=np.array([[0, 0, 0, 1, 1, 0]], np.int32), exists=np.array([[1.0, 1, 1, 1, 1, 0]]),
    )  # fmt: skip
    assert packed == pytest.approx(apart, rel=1e-6)
    pairs = [(2.0, 1.0), (2.0, -1.0), (1.0, -1.0)]

    def of(better: float, worse: float) -> float:
        return math.log1p(math.exp(worse - better)) + 0.01 * (better + worse) ** 2

    assert apart["objective"] == pytest.approx(sum(of(*pair) for pair in pairs) / 3 + of(0.5, 3.0), rel=1e-5)
    assert apart["weight"] == 2.0 and apart["accuracy"] == pytest.approx(3 / 4)


def test_ties_are_no_pairs_and_a_margin_moves_the_pair_that_has_it(monkeypatch):
    tied = rankings(monkeypatch, np.array([[1.0, 2.0]]), ranks=np.zeros((1, 2)), groups=np.zeros((1, 2), np.int32))
    assert tied["objective"] == 0.0 and tied["weight"] == 0.0
    given = {"ranks": np.array([[0.0, 1.0]]), "groups": np.zeros((1, 2), np.int32), "margins": np.array([[0.7, 0.0]])}
    moved = rankings(monkeypatch, np.array([[1.0, -1.0]]), **given)
    assert moved["loss"] == pytest.approx(math.log1p(math.exp(-(2.0 - 0.7))), rel=1e-5)
