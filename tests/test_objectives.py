"""The loss is the formula of the paper, and does not depend on how the batch was cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import few, make_batch, mesh_of, prepare_steps, tiny_config
from ml_collections import ConfigDict

from llmjax.config import base
from llmjax.objectives import OBJECTIVES
from llmjax.objectives.losses import cross_entropy
from llmjax.train.heldout import make_heldout
from llmjax.train.step import make_heldout_step, penalty


class Fixed:
    """A module whose logits are given: what the objective makes of them can be computed by hand."""

    def __init__(self, logits_BLV):
        self.logits_BLV = logits_BLV

    def apply(self, variables, tokens_BL, **kwargs):
        return self.logits_BLV

    def output_head(self):
        return Identity()


class Identity:
    """A head for hidden states that are logits."""

    def apply(self, variables, hidden_BLD):
        return hidden_BLD


def random_case(seed=0, shape=(3, 5), vocab=7):
    rng = np.random.default_rng(seed)
    logits_BLV = rng.normal(size=(*shape, vocab)).astype(np.float32) * 3
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "targets": rng.integers(0, vocab, shape).astype(np.int32),
        "positions": np.zeros(shape, np.int32),
        "segments": np.ones(shape, np.int32),
        "weights": rng.integers(0, 2, shape).astype(np.float32),
    }
    return logits_BLV, batch


SETTINGS = {"z_loss": 0.0, "label_smoothing": 0.0, "focal": 0.0, "loss_chunks": 1, "vocab_size": 0}


def by_hand(logits_BLV, batch, *, z_loss=0.0, label_smoothing=0.0, focal=0.0, vocab_size=0):
    """The sums token by token in float64, straight from the definitions."""
    total = nats = 0.0
    for row, column in np.ndindex(batch["targets"].shape):
        logits = logits_BLV[row, column].astype(np.float64)
        log_z = np.log(np.sum(np.exp(logits)))
        log_p = logits - log_z
        size = vocab_size or len(logits)
        target = np.where(np.arange(len(logits)) < size, label_smoothing / size, 0.0)
        target[batch["targets"][row, column]] += 1 - label_smoothing
        weight = batch["weights"][row, column]
        miss = 1 - np.exp(log_p[batch["targets"][row, column]])
        total += weight * (miss**focal * -np.sum(target * log_p) + z_loss * log_z**2)
        nats += weight * -log_p[batch["targets"][row, column]]
    return total, nats, batch["weights"].sum()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"z_loss": 1e-2},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "vocab_size": 5},  # the other rows are padding
        {"focal": 2.0},
        {"z_loss": 1e-2, "label_smoothing": 0.1, "focal": 0.5},
    ],
)
def test_the_loss_is_weighted_cross_entropy_with_what_is_added_to_it_as_defined(changes):
    logits_BLV, batch = random_case()
    settings = ConfigDict(SETTINGS | changes)
    sums = OBJECTIVES["causal"](Fixed(jnp.asarray(logits_BLV)), {}, batch, None, settings)
    total, nats, weight = by_hand(logits_BLV, batch, **changes)
    np.testing.assert_allclose(sums.objective, total, rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["loss"].total, nats, rtol=1e-6)  # the reported loss is plain nats
    assert sums.weight == weight


@pytest.mark.parametrize("focal", [0.5, 1.0, 2.0])
def test_focal_loss_has_a_finite_gradient_where_the_target_is_certain(focal):
    batch = {"tokens": jnp.zeros((1, 2), int), "targets": jnp.array([[0, 1]]), "weights": jnp.ones((1, 2))}
    settings = ConfigDict(SETTINGS | {"focal": focal})
    logits_BLV = jnp.array([[[200.0, 0.0], [200.0, 0.0]]])
    grad = jax.grad(lambda x: OBJECTIVES["causal"](Fixed(x), {}, batch, None, settings).objective)(logits_BLV)
    assert np.isfinite(grad).all() and grad[0, 0, 0] == 0 and grad[0, 1, 0] != 0


def test_multi_token_averages_its_heads_each_within_its_document():
    logits_BLV, batch = random_case(2, shape=(2, 6))
    batch["segments"] = np.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 0]], np.int32)
    batch["weights"] = np.array([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], np.float32)
    logits_ABLV = np.stack([logits_BLV, -logits_BLV, 2 * logits_BLV])
    sums = OBJECTIVES["multi_token"](Fixed(jnp.asarray(logits_ABLV)), {}, batch, None, ConfigDict(SETTINGS))
    totals = []
    for ahead in range(3):
        moved = {name: np.zeros_like(batch[name]) for name in ("targets", "weights")}
        for row, column in np.ndindex(2, 6 - ahead):
            if batch["segments"][row, column] == batch["segments"][row, column + ahead]:
                for name, values in moved.items():
                    values[row, column] = batch[name][row, column + ahead]
        totals.append(by_hand(logits_ABLV[ahead], moved))
    np.testing.assert_allclose(sums.objective, sum(total for total, _, _ in totals) / 3, rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["loss"].total, totals[0][1], rtol=1e-6)  # of the next token
    assert sums.weight == batch["weights"].sum()
    assert [weight for _, _, weight in totals] == [9, 6, 3]


class Sowing(nn.Module):
    """Sows two losses, of which the layers have given the weights already."""

    @nn.compact
    def __call__(self, tokens_BL, *, deterministic=True, **inputs):
        if not deterministic:
            self.sow("losses", "a", jnp.array(0.25))
            self.sow("losses", "b", jnp.array([0.5, 1.0]))
        return jnp.zeros((*tokens_BL.shape, 7))

    def output_head(self):
        return Identity()


def test_losses_that_layers_sow_are_added_once_for_each_unit_of_weight_and_only_in_training():
    _, batch = random_case()
    settings, weight = ConfigDict(SETTINGS), batch["weights"].sum()
    training = OBJECTIVES["causal"](Sowing(), {}, batch, jax.random.key(0), settings)
    np.testing.assert_allclose(training.objective, weight * (np.log(7) + 1.75), rtol=1e-6)
    np.testing.assert_allclose(training.metrics["auxiliary_loss"].total, weight * 1.75, rtol=1e-6)
    np.testing.assert_allclose(training.metrics["loss"].total, weight * np.log(7), rtol=1e-6)
    evaluation = OBJECTIVES["causal"](Sowing(), {}, batch, None, settings)
    np.testing.assert_allclose(evaluation.objective, weight * np.log(7), rtol=1e-6)


def test_cross_entropy_holds_for_huge_logits():
    logits_BLV = jnp.array([[[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]]])
    nats_BL, log_z_BL = cross_entropy(logits_BLV, jnp.array([[0, 1]]))
    np.testing.assert_allclose(nats_BL, [[0.0, np.log(3)]], rtol=1e-3, atol=1e-3)
    assert np.isfinite(log_z_BL).all()


def test_targets_of_weight_zero_have_no_gradient():
    logits_BLV, batch = random_case(1)
    settings = ConfigDict(SETTINGS | {"z_loss": 1e-2, "label_smoothing": 0.1})
    grad_BLV = jax.grad(lambda x: OBJECTIVES["causal"](Fixed(x), {}, batch, None, settings).objective)(logits_BLV)
    np.testing.assert_array_equal(np.any(grad_BLV != 0, axis=-1), batch["weights"] > 0)


def test_held_out_numbers_count_what_is_predicted_and_where_the_likeliest_token_is_right():
    logits_BLV, batch = random_case(4)
    sums = make_heldout_step(Fixed(jnp.asarray(logits_BLV)), OBJECTIVES["causal"], base())({}, batch)
    asked = batch["weights"] > 0
    np.testing.assert_allclose(sums["nats"], by_hand(logits_BLV, batch)[1], rtol=1e-6)
    assert sums["tokens"] == asked.sum()
    assert sums["correct"] == (logits_BLV.argmax(-1) == batch["targets"])[asked].sum()


def test_held_out_numbers_are_means_by_weight_also_where_weights_are_shares():
    logits_BLV, batch = random_case(5, shape=(8, 5))
    batch["weights"] = (0.01 * np.random.default_rng(0).random((8, 5))).astype(np.float32)
    sizes = np.arange(1, 8)
    module, batches = Fixed(jnp.asarray(logits_BLV)), {"a": [batch], "b": [batch]}
    measure = make_heldout(tiny_config(), module, batches, sizes, mesh_of("data=1"), {})
    found, (_, nats, weight) = measure({}), by_hand(logits_BLV, batch)
    right = (logits_BLV.argmax(-1) == batch["targets"]) * batch["weights"]
    for end in ("", "/a", "/b"):
        np.testing.assert_allclose(found[f"heldout_loss{end}"], nats / weight, rtol=1e-5)
        np.testing.assert_allclose(found[f"heldout_accuracy{end}"], right.sum() / weight, rtol=1e-5)
        size = (sizes[batch["targets"]] * batch["weights"]).sum()
        np.testing.assert_allclose(found[f"heldout_bits_per_byte{end}"], nats / np.log(2) / size, rtol=1e-5)


def test_gradient_of_l1_and_l2_is_sign_and_value_of_matrices_only():
    params = {
        "layers": {"mlp": {"up": {"kernel": jnp.array([[[1.5, -2.0]]]), "bias": jnp.array([[3.0, 3.0]])}}},
        "final_norm": {"scale": jnp.array([4.0])},
    }
    grads = jax.grad(penalty)(params, ConfigDict({"l1": 0.1, "l2": 0.01}))
    np.testing.assert_allclose(grads["layers"]["mlp"]["up"]["kernel"], [[[0.1 + 0.015, -0.1 - 0.02]]], rtol=1e-6)
    assert not grads["layers"]["mlp"]["up"]["bias"].any()
    assert not grads["final_norm"]["scale"].any()


def one_step(mesh, **changes):
    c = tiny_config(optimizer__name="sgd", optimizer__beta1=0.0, optimizer__weight_decay=0.0, optimizer__clip_norm=0.0,
                    schedule__name="constant", schedule__warmup="0 steps", optimizer__learning_rate=1.0, **changes)  # fmt: skip
    state, _, run = prepare_steps(c, mesh_of(mesh))
    batch = make_batch(c, 0)
    assert len(set(batch["weights"].sum(1))) > 2, "rows of unequal weight, or a mean of means would pass too"
    after, values = run(state, batch)
    gradient = jax.tree.map(
        lambda a, b: np.asarray(a) - np.asarray(b), jax.device_get(state.params), jax.device_get(after.params)
    )
    return jax.device_get(values), gradient


# test_acceptance.py cuts rows of unequal weight into micro-batches and over devices.
@pytest.mark.parametrize(("mesh", "parts"), few([("fsdp=2 tensor=2", 2), ("data=1", 2), ("data=2", 4)], 0, 2))
def test_micro_batches_change_neither_loss_nor_gradient(mesh, parts):
    values, gradient = one_step("data=1")
    here_values, here = one_step(mesh, train__micro_batches=parts)
    for name in ("loss", "objective", "grad_norm"):
        np.testing.assert_allclose(here_values[name], values[name], rtol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), here, gradient)


def test_the_loss_does_not_depend_on_the_order_of_the_rows():
    c = tiny_config()
    state, _, run = prepare_steps(c, mesh_of("data=1"))
    batch = make_batch(c, 0)
    order = np.random.default_rng(0).permutation(c.train.batch_size)
    loss = [run(state, b)[1]["loss"] for b in (batch, {k: v[order] for k, v in batch.items()})]
    np.testing.assert_allclose(*map(float, loss), rtol=1e-6)
