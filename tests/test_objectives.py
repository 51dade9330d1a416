"""The loss is the formula of the paper, and does not depend on how the batch was cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_batch, mesh_of, prepare_steps, tiny_config
from ml_collections import ConfigDict

from llmjax.objectives import OBJECTIVES
from llmjax.objectives.causal import cross_entropy
from llmjax.train.step import penalty


class Fixed:
    """A module whose logits are given: what the objective makes of them can be computed by hand."""

    def __init__(self, logits_BLV):
        self.logits_BLV = logits_BLV

    def apply(self, variables, tokens_BL, **kwargs):
        return self.logits_BLV


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


def by_hand(logits_BLV, batch, *, z_loss=0.0, label_smoothing=0.0):
    """The sums token by token in float64, straight from the definitions."""
    total = nats = 0.0
    for row, column in np.ndindex(batch["targets"].shape):
        logits = logits_BLV[row, column].astype(np.float64)
        log_z = np.log(np.sum(np.exp(logits)))
        log_p = logits - log_z
        target = np.full(len(logits), label_smoothing / len(logits))
        target[batch["targets"][row, column]] += 1 - label_smoothing
        weight = batch["weights"][row, column]
        total += weight * (-np.sum(target * log_p) + z_loss * log_z**2)
        nats += weight * -log_p[batch["targets"][row, column]]
    return total, nats, batch["weights"].sum()


@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.1)])
def test_causal_is_weighted_cross_entropy_with_z_loss_and_smoothing_as_defined(z_loss, label_smoothing):
    logits_BLV, batch = random_case()
    settings = ConfigDict({"z_loss": z_loss, "label_smoothing": label_smoothing})
    sums = OBJECTIVES["causal"](Fixed(jnp.asarray(logits_BLV)), {}, batch, None, settings)
    total, nats, weight = by_hand(logits_BLV, batch, z_loss=z_loss, label_smoothing=label_smoothing)
    np.testing.assert_allclose(sums.objective, total, rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["loss"], nats, rtol=1e-6)  # the reported loss is plain nats
    assert sums.weight == weight


def test_cross_entropy_holds_for_huge_logits():
    logits_BLV = jnp.array([[[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]]])
    nats_BL, log_z_BL = cross_entropy(logits_BLV, jnp.array([[0, 1]]))
    np.testing.assert_allclose(nats_BL, [[0.0, np.log(3)]], rtol=1e-3, atol=1e-3)
    assert np.isfinite(log_z_BL).all()


def test_targets_of_weight_zero_have_no_gradient():
    logits_BLV, batch = random_case(1)
    settings = ConfigDict({"z_loss": 1e-2, "label_smoothing": 0.1})
    grad_BLV = jax.grad(lambda x: OBJECTIVES["causal"](Fixed(x), {}, batch, None, settings).objective)(logits_BLV)
    np.testing.assert_array_equal(np.any(grad_BLV != 0, axis=-1), batch["weights"] > 0)


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


@pytest.mark.parametrize(("mesh", "parts"), [("data=1", 2), ("data=2", 4), ("fsdp=2 tensor=2", 2)])
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
