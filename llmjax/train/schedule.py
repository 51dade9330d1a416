"""Learning rates over a run: a linear warm-up from zero, then one of seven shapes."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from llmjax.data.ramp import BatchSizes, Stage


def make_schedule(
    c: ConfigDict, *, total_steps: int, tokens_per_step: int = 1, sizes: BatchSizes | None = None
) -> optax.Schedule:
    """A function from the step (0 for the first update) to a factor of the peak learning rate, in [0, 1].

    Args:
        c: the settings under `schedule`; durations are resolved against the numbers that follow.
        sizes: how large batches are, where they are not all `tokens_per_step`.

    The first update already has a rate above zero, warm-up reaches 1 at its last step, and cosine, linear,
    exponential and wsd reach `final` at the last update of the run. With `c.by` = tokens all this is a function of the
    tokens seen (GPT-3's way), so that during a batch ramp the rate moves as slowly as the tokens come.
    """
    sizes = sizes or BatchSizes((Stage(0, 0, 1, 1),), tokens_per_step)
    knots = [*(stage.first_step for stage in sizes.stages if stage.first_step < total_steps), total_steps]

    def time(step: int) -> int:
        return sizes.first_row(step) if c.by == "tokens" else step

    def moment(value: str) -> int:
        return time(sizes.steps(value, total_steps=total_steps))

    warmup, last, drops = moment(c.warmup), time(total_steps - 1), [moment(value) for value in c.drop_at]
    decay_from = max(
        total_steps - sizes.period(c.decay, total_steps=total_steps), 0
    )  # at the end, where batches are full
    decay = max(time(total_steps) - time(decay_from), 1)

    def time_of(step: jax.Array) -> jax.Array:
        if c.by == "steps":
            return step
        return jnp.interp(step, jnp.array(knots, jnp.float32), jnp.array([time(k) for k in knots], jnp.float32))

    def shape(t: jax.Array) -> jax.Array:
        done = jnp.clip((t - warmup) / max(last - warmup, 1), 0.0, 1.0)
        if c.name == "cosine":  # Loshchilov & Hutter 2017
            return c.final + (1 - c.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        if c.name == "linear":
            return 1 - (1 - c.final) * done
        if c.name == "exponential":
            return jnp.power(c.final, done)
        if c.name == "inverse_sqrt":  # Vaswani et al. 2017, Raffel et al. 2020
            return jnp.sqrt(max(warmup, 1) / jnp.maximum(t, max(warmup, 1)))
        if c.name == "wsd":  # Hu et al. 2024, MiniCPM
            left = jnp.clip((last - t) / decay, 0.0, 1.0)
            return c.final + (1 - c.final) * left
        if c.name == "step":
            passed = sum((t >= drop).astype(jnp.float32) for drop in drops) if drops else jnp.float32(0)
            return jnp.power(c.drop_factor, passed)
        return jnp.ones_like(done)  # constant

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        t = time_of(step)
        rising = jnp.minimum(time_of(step + 1) / max(warmup, 1), 1.0)
        return jnp.where(t < warmup, rising, shape(t))

    return schedule
