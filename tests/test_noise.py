"""The gradient noise scale is that of a known noise, is logged, and survives a kill; a run knows its dollars."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rows_of, stopping_at, tiny_config, train

from llmjax import config
from llmjax.objectives.losses import Mean, Sums
from llmjax.train import noise
from llmjax.train.optimizer import make_optimizer
from llmjax.train.step import State, make_train_step

ROWS, PARTS, SIZE = 32, 4, 16


def test_the_estimates_invert_the_expected_norms_of_a_known_noise():
    signal, spread = 3.0, 40.0  # |G|^2 and tr(Sigma)
    small, large = signal + spread / (ROWS / PARTS), signal + spread / ROWS
    assert noise.estimates(small, large, rows=ROWS, parts=PARTS) == pytest.approx((signal, spread))


def test_the_step_measures_the_noise_of_gradients_whose_covariance_is_known():
    """A loss that is linear in the parameters: a row is its own gradient, G plus noise of deviation 2 in each number."""
    c = tiny_config(train__noise_scale=True, train__micro_batches=PARTS, train__batch_size=ROWS)

    def linear(module, params, batch, key, settings):
        total, weight = jnp.sum(batch["rows"] @ params["kernel"]), jnp.float32(batch["rows"].shape[0])
        return Sums(total, weight, {"loss": Mean(total, weight)})

    optimizer = make_optimizer(c.optimizer, lambda step: jnp.float32(1.0))
    params, zero = {"kernel": jnp.zeros((SIZE, 1))}, jnp.zeros((), jnp.int32)
    state = State(zero, params, {}, optimizer.init(params), None, zero, zero)
    step = jax.jit(make_train_step(None, linear, optimizer, lambda step: jnp.float32(1.0), c))
    rng = np.random.default_rng(0)
    true = rng.normal(size=SIZE).astype(np.float32)
    found = []
    for _ in range(300):
        rows = true + 2 * rng.normal(size=(ROWS, SIZE)).astype(np.float32)
        _, metrics = step(state, {"rows": rows}, jax.random.key(0))
        found.append((float(metrics["gradient_signal"]), float(metrics["gradient_noise"])))
    parts = rows.reshape(-1, PARTS, SIZE).mean(axis=0)  # part t has the rows t, t + T, ...
    small, large = np.square(parts).sum(axis=1).mean(), np.square(rows.mean(axis=0)).sum()
    assert found[-1] == pytest.approx(noise.estimates(small, large, rows=ROWS, parts=PARTS), rel=1e-4)
    signal, spread = np.mean(found, axis=0)
    assert spread == pytest.approx(4 * SIZE, rel=0.05)
    assert signal == pytest.approx(np.square(true).sum(), rel=0.05)


def test_the_scale_is_the_ratio_of_running_means_and_steps_that_are_not_finite_do_not_count():
    scale = noise.NoiseScale()
    assert scale.last == "unknown"
    assert math.isnan(scale.see(-1.0, 5.0))
    for _ in range(500):
        now = scale.see(2.0, 60.0)
    assert now == pytest.approx(30.0, rel=0.02)
    assert scale.see(math.nan, math.inf) == now == scale.last == noise.NoiseScale(scale.state).last


def test_the_noise_scale_needs_micro_batches():
    c = tiny_config()
    c.train.noise_scale = True
    with pytest.raises(ValueError, match=r"set train\.micro_batches to at least 2"):
        config.check(c)


@pytest.mark.usefixtures("one_device")
def test_a_run_logs_noise_scale_and_dollars_and_goes_on_with_them_after_a_kill(tmp_path):
    c = tiny_config(train__noise_scale=True, train__micro_batches=2, train__device_price=36.0)
    whole = train(c, tmp_path / "whole")
    with pytest.raises(KeyError):
        train(c, tmp_path / "killed", batch=stopping_at(c, 6))
    again = train(c, tmp_path / "killed")
    first, second = rows_of(tmp_path / "whole"), rows_of(tmp_path / "killed")
    for name in ("gradient_signal", "gradient_noise", "noise_scale"):
        assert [row[name] for row in first] == [row[name] for row in second], name
    assert whole["noise_scale"] == again["noise_scale"] == (first[-1]["noise_scale"] or "unknown")
    for row in first:
        assert row["dollars"] == pytest.approx(row["train_seconds"] * 36 / 3600)
    assert whole["dollars"] == pytest.approx(whole["train_seconds"] / 100)
