"""Learning rates over a run: a linear warm-up from zero, then one of seven shapes.

A schedule is a shape and the milestones at which the rate changes. The milestones follow from the number of steps. They are
constants of the compiled step, or arguments of it where the step itself measures the number of steps (budget.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from llmjax.data.ramp import BatchSizes, Stage


class Milestones(NamedTuple):
    """When the rate changes, in steps, or in sequences for rates by tokens. Numbers, or arrays of one number."""

    warmup: Any
    rise: Any  # warmup, at least 1
    last: Any  # the last update of the run
    span: Any  # from warmup to last, at least 1
    decay: Any  # length of the decay at the end
    drops: tuple[Any, ...]
    knots: tuple[Any, ...]  # steps, between which time passes evenly
    times: tuple[Any, ...]  # the time at each knot


def make_schedule(
    c: ConfigDict, *, total_steps: int, tokens_per_step: int = 1, sizes: BatchSizes | None = None
) -> optax.Schedule:
    """A function from the step (0 for the first update) to a factor of the peak learning rate, in [0, 1].

    Args:
        c: the settings under `schedule`; the other arguments resolve its durations.
        sizes: the sizes of batches, if they differ.

    The first update has a rate above zero. Warm-up reaches 1 at its last step. Cosine, linear, exponential and wsd reach
    `final` at the last update of the run. With `c.by` = tokens the rate is a function of the tokens seen (as GPT-3's), so
    it moves more slowly during a batch ramp.
    """
    return schedule_of(c, milestones(c, total_steps=total_steps, tokens_per_step=tokens_per_step, sizes=sizes))


def milestones(
    c: ConfigDict, *, total_steps: int, tokens_per_step: int = 1, sizes: BatchSizes | None = None
) -> Milestones:
    """The milestones of a schedule; arguments as `make_schedule`'s."""
    sizes = sizes or BatchSizes((Stage(0, 0, 1, 1),), tokens_per_step)
    knots = [*(stage.first_step for stage in sizes.stages if stage.first_step < total_steps), total_steps]

    def time(step: int) -> int:
        return sizes.first_row(step) if c.by == "tokens" else step

    def milestone(value: str) -> int:
        return time(sizes.steps(value, total_steps=total_steps))

    warmup, last, drops = milestone(c.warmup), time(total_steps - 1), [milestone(value) for value in c.drop_at]
    decay_from = max(
        total_steps - sizes.period(c.decay, total_steps=total_steps), 0
    )  # at the end, where batches are full
    return Milestones(
        warmup=warmup,
        rise=max(warmup, 1),
        last=last,
        span=max(last - warmup, 1),
        decay=max(time(total_steps) - time(decay_from), 1),
        drops=tuple(drops),
        knots=tuple(knots),
        times=tuple(time(k) for k in knots),
    )


def schedule_of(c: ConfigDict, at: Milestones) -> optax.Schedule:
    """The schedule with the shape of the settings `c` and these milestones."""

    def time_of(step: jax.Array) -> jax.Array:
        if c.by == "steps":
            return step
        return jnp.interp(step, jnp.array(at.knots, jnp.float32), jnp.array(at.times, jnp.float32))

    def shape(t: jax.Array) -> jax.Array:
        done = jnp.clip((t - at.warmup) / at.span, 0.0, 1.0)
        if c.name == "cosine":  # Loshchilov & Hutter 2017
            return c.final + (1 - c.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        if c.name == "linear":
            return 1 - (1 - c.final) * done
        if c.name == "exponential":
            return jnp.power(c.final, done)
        if c.name == "inverse_sqrt":  # Vaswani et al. 2017, Raffel et al. 2020
            return jnp.sqrt(at.rise / jnp.maximum(t, at.rise))
        if c.name == "wsd":  # Hu et al. 2024, MiniCPM
            left = jnp.clip((at.last - t) / at.decay, 0.0, 1.0)
            return c.final + (1 - c.final) * left
        if c.name == "step":
            passed = sum((t >= drop).astype(jnp.float32) for drop in at.drops) if at.drops else jnp.float32(0)
            return jnp.power(c.drop_factor, passed)
        return jnp.ones_like(done)  # constant

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        t = time_of(step)
        rising = jnp.minimum(time_of(step + 1) / at.rise, 1.0)
        return jnp.where(t < at.warmup, rising, shape(t))

    return schedule
