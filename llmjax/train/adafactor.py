"""Adafactor (Shazeer & Stern 2018) for stacks of matrices: each matrix of a stack is treated on its own.

optax's Adafactor takes each array for one matrix. Arrays here hold a matrix of every layer, or of every expert. The
state has optax's layout. For an array that is no stack both compute the same (tests/test_optimizer.py).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Stacks = Callable[[Any], Any]  # parameters -> of each the dimensions that number separate matrices or vectors

# The paper's constants (section 8); the shortest side that is factored is that of T5X and optax.
DECAY_EXPONENT = 0.8
SQUARE_FLOOR = 1e-30
LARGEST_RMS = 1.0
SMALLEST_SCALE = 1e-3
FACTORED_SIDE = 128


def scale_by_factored_rms(stacks: Stacks) -> optax.GradientTransformation:
    """Gradients divided by the root of a running mean of their squares (algorithm 4); float32 throughout.

    If the two largest dimensions of a matrix are at least FACTORED_SIDE, the state keeps only the means over columns and
    over rows, and the running mean is their outer product.
    """

    def init(params: Any) -> optax.FactoredState:
        def zeros(p: jax.Array, stack: tuple[int, ...]) -> tuple[jax.Array, ...]:
            pair = _sides(p.shape, stack)
            if pair is None:
                return jnp.zeros(1), jnp.zeros(1), jnp.zeros(p.shape)
            small, large = (tuple(np.delete(p.shape, side)) for side in pair)
            return jnp.zeros(large), jnp.zeros(small), jnp.zeros(1)

        made = jax.tree.map(zeros, params, stacks(params))
        return optax.FactoredState(jnp.zeros((), jnp.int32), *_columns(made, params, count=3))

    def update(grads: Any, state: optax.FactoredState, params: Any = None) -> tuple[Any, optax.FactoredState]:
        decay = 1 - (jnp.float32(state.count) + 1) ** -DECAY_EXPONENT

        def divide(
            g: jax.Array, row: jax.Array, column: jax.Array, v: jax.Array, stack: tuple[int, ...]
        ) -> tuple[jax.Array, ...]:
            square, pair = jnp.square(g) + SQUARE_FLOOR, _sides(g.shape, stack)
            if pair is None:
                v = decay * v + (1 - decay) * square
                return g * jax.lax.rsqrt(v), row, column, v
            small, large = pair
            row = decay * row + (1 - decay) * jnp.mean(square, axis=large)
            column = decay * column + (1 - decay) * jnp.mean(square, axis=small)
            mean = jnp.mean(row, axis=small - (small > large), keepdims=True)
            by_row, by_column = jax.lax.rsqrt(row / mean), jax.lax.rsqrt(column)
            return g * jnp.expand_dims(by_row, large) * jnp.expand_dims(by_column, small), row, column, v

        made = jax.tree.map(divide, grads, state.v_row, state.v_col, state.v, stacks(grads))
        updates, *kept = _columns(made, grads, count=4)
        return updates, optax.FactoredState(optax.safe_increment(state.count), *kept)

    return optax.GradientTransformation(init, update)


def scale_by_parameter(stacks: Stacks) -> optax.GradientTransformation:
    """Clip each matrix's update to an RMS of 1 and multiply it by the RMS of the matrix (sections 6 and 8).

    The learning rate is therefore relative to the parameter.
    """

    def scale(u: jax.Array, p: jax.Array, stack: tuple[int, ...]) -> jax.Array:
        own = tuple(i for i in range(u.ndim) if i not in stack)
        size, of_parameter = (jnp.sqrt(jnp.mean(jnp.square(x), axis=own, keepdims=True)) for x in (u, p))
        return u / jnp.maximum(1.0, size / LARGEST_RMS) * jnp.maximum(of_parameter, SMALLEST_SCALE)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params, stacks(updates)))


def _sides(shape: tuple[int, ...], stack: tuple[int, ...]) -> tuple[int, int] | None:
    """The second largest and the largest dimension of a matrix in a stack; None: too small to be factored."""
    own = np.array([0 if i in stack else size for i, size in enumerate(shape)])
    *_, small, large = (-1, -1, *np.argsort(own, kind="stable"))
    return (int(small), int(large)) if small >= 0 and own[small] >= FACTORED_SIDE else None


def _columns(made: Any, like: Any, *, count: int) -> Any:
    """A tree of tuples as a tuple of trees."""
    return jax.tree.transpose(jax.tree.structure(like), jax.tree.structure((0,) * count), made)
