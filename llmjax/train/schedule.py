"""Learning rates over a run: a linear warm-up from zero, then one of six shapes."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from llmjax import config


def make_schedule(c: ConfigDict, *, total_steps: int, tokens_per_step: int) -> optax.Schedule:
    """A function from the step (0 for the first update) to a factor of the peak learning rate, in [0, 1].

    Args:
        c: the settings under `schedule`; durations are resolved against the two numbers that follow.

    The first update already has a rate above zero, warm-up reaches 1 at its last step, and cosine, linear,
    exponential and wsd reach `final` at the last update of the run.
    """

    def steps(value: str) -> int:
        return config.duration(value, tokens_per_step=tokens_per_step, total_steps=total_steps)

    warmup = steps(c.warmup)
    span = max(total_steps - 1 - warmup, 1)  # updates after the peak
    decay = max(steps(c.decay), 1)
    drops = [steps(value) for value in c.drop_at]

    def shape(step: jax.Array) -> jax.Array:
        done = jnp.clip((step - warmup) / span, 0.0, 1.0)
        if c.name == "cosine":  # Loshchilov & Hutter 2017
            return c.final + (1 - c.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        if c.name == "linear":
            return 1 - (1 - c.final) * done
        if c.name == "exponential":
            return jnp.power(c.final, done)
        if c.name == "wsd":  # Hu et al. 2024, MiniCPM
            left = jnp.clip((total_steps - 1 - step) / decay, 0.0, 1.0)
            return c.final + (1 - c.final) * left
        if c.name == "step":
            passed = sum((step >= drop).astype(jnp.float32) for drop in drops) if drops else jnp.float32(0)
            return jnp.power(c.drop_factor, passed)
        return jnp.ones_like(done)  # constant

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        return jnp.where(step < warmup, rising, shape(step))

    return schedule
