"""Sampling: from logits to tokens. Each row has its own settings and its own random key, all rows share one program.

The settings apply in this order, each to the result of the one before: logit bias; repetition, frequency and presence
penalties; temperature; top-k; top-p; min-p; typical. Hugging Face transformers has the same order. vLLM applies min-p
before top-k, which gives the same tokens unless min-p and top-p are used together.

Nothing is sorted. Top-k, top-p and min-p keep the tokens whose logit is at most some distance below the largest. Typical
sampling keeps those whose surprise is at most some distance from the entropy. A bisection over the bits of a float32
finds that distance exactly: for a vocabulary of 4,096 it takes 0.03 ms on a CPU core, and sorting takes 0.5 ms. Tokens as
likely as the last kept one are kept too, so the order of the vocabulary has no effect. A setting that no row uses is not
computed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


@struct.dataclass
class Sampling:
    """The settings of each row, arrays of shape (B,). `OFF` has the values that turn them off."""

    temperature: Array  # float32, at least 0 (greedy)
    top_k: Array  # int32, at least 0
    top_p: Array  # float32, above 0 and at most 1; Holtzman et al. 2020
    min_p: Array  # float32, from 0 to 1; Nguyen et al. 2024
    typical_p: Array  # float32, above 0 and at most 1; Meister et al. 2022
    repetition_penalty: Array  # float32, above 0; for tokens of the prompt and the text; Keskar et al. 2019
    frequency_penalty: Array  # float32, for each time that the token is in the text, as in OpenAI's interface
    presence_penalty: Array  # float32, once for each token of the text


OFF: dict[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


def settings(rows: int, **given: Any) -> Sampling:
    """The settings of `rows` rows: one value for all, or one for each. Others are off."""
    values = {**OFF, **given}
    types = {name: np.int32 if name == "top_k" else np.float32 for name in values}
    return Sampling(**{name: np.broadcast_to(np.asarray(v, types[name]), (rows,)) for name, v in values.items()})


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """One token for each row, int32 (B,), and its log-probability in the distribution it was drawn from, float32 (B,), nats.

    Args:
        logits_BV: float32, -inf for tokens that must not be chosen. A row without any other gets NaN nats.
        keys_B: a random key for each row. The token of a row depends only on its own logits, key and settings.
        sampling: the settings of each row. `penalized` applies the penalties.
    """
    greedy_B = first_largest(logits_BV)
    certain_B = jnp.where(jnp.isfinite(jnp.max(logits_BV, axis=-1)), 0.0, jnp.nan)

    def draw() -> tuple[jax.Array, jax.Array]:
        kept_BV = truncate(logits_BV, sampling)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, kept_BV.shape[1:], kept_BV.dtype))(keys_B)
        random_B = first_largest(noise_BV + kept_BV)  # jax.random.categorical
        nats_B = chosen(kept_BV, random_B) - jnp.log(jnp.sum(jnp.exp(kept_BV), axis=-1))  # the largest logit is 0
        drawn_B = sampling.temperature > 0
        return jnp.where(drawn_B, random_B, greedy_B), jnp.where(drawn_B, nats_B, certain_B)

    token_B, nats_B = jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: (greedy_B, certain_B))
    return token_B.astype(jnp.int32), nats_B


def first_largest(values_BV: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last dimension, for values without NaN.

    XLA on CPU takes 2.5 times as long for its reduction of pairs as for these two of numbers (8 rows of 4,096).
    """
    size = values_BV.shape[-1]
    is_largest_BV = values_BV == jnp.max(values_BV, axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(is_largest_BV, jnp.arange(size), size), axis=-1), size - 1)


def chosen(values_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """The value of each row's token, (B,)."""
    return jnp.take_along_axis(values_BV, token_B[:, None], axis=-1)[:, 0]


def penalized(logits_BV: jax.Array, sampling: Sampling, seen_BV: jax.Array, counts_BV: jax.Array) -> jax.Array:
    """The logits after the penalties.

    Args:
        seen_BV: bool, the tokens of the prompt.
        counts_BV: int32, how often each token is in the text.
    """
    repetition, frequency, presence = (
        value[:, None] for value in (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    )

    def penalize() -> jax.Array:
        written_BV = counts_BV > 0
        weaker_BV = jnp.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition)
        out_BV = jnp.where(seen_BV | written_BV, weaker_BV, logits_BV)
        return out_BV - frequency * counts_BV - presence * written_BV

    asked = jnp.any((repetition != 1) | (frequency != 0) | (presence != 0))
    return jax.lax.cond(asked, penalize, lambda: logits_BV)


def truncate(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits to sample from: divided by the temperature, -inf for tokens that the truncations leave out."""
    temperature_B1 = jnp.maximum(sampling.temperature, 1e-6)[:, None]  # greedy rows do not use the result
    distance_BV = (jnp.max(logits_BV, axis=-1, keepdims=True) - logits_BV) / temperature_B1
    everything_B = jnp.full(distance_BV.shape[:1], jnp.inf)

    def limit_where(asked_B: Array, find: Callable[[], jax.Array]) -> jax.Array:
        """The limits of `find()` in rows that ask; not computed when no row does."""
        return jax.lax.cond(jnp.any(asked_B), lambda: jnp.where(asked_B, find(), jnp.inf), lambda: everything_B)

    def share(limit_B: jax.Array, of: jax.Array) -> jax.Array:
        """exp(-distance) where `of` is within the limit, else 0."""
        return jnp.where(of <= limit_B[:, None], jnp.exp(-distance_BV), 0.0)

    top_k = sampling.top_k.astype(jnp.float32)
    limit_B = limit_where(
        sampling.top_k > 0, lambda: smallest_limit(distance_BV, jnp.ones_like(distance_BV), top_k)
    )  # fmt: skip

    def nucleus() -> jax.Array:
        weight_BV = share(limit_B, distance_BV)
        return smallest_limit(distance_BV, weight_BV, sampling.top_p * jnp.sum(weight_BV, axis=-1))

    limit_B = jnp.minimum(limit_B, limit_where(sampling.top_p < 1, nucleus))
    limit_B = jnp.minimum(limit_B, -jnp.log(sampling.min_p))
    kept_BV = distance_BV <= limit_B[:, None]

    def typical() -> jax.Array:
        weight_BV = share(limit_B, distance_BV)
        total_B1 = jnp.sum(weight_BV, axis=-1, keepdims=True)
        surprise_BV = jnp.where(kept_BV, distance_BV, 0.0) + jnp.log(total_B1)
        entropy_B1 = jnp.sum(weight_BV * surprise_BV, axis=-1, keepdims=True) / total_B1
        away_BV = jnp.where(kept_BV, jnp.abs(surprise_BV - entropy_B1), jnp.inf)
        away_limit_B = smallest_limit(away_BV, weight_BV, sampling.typical_p * total_B1[:, 0])
        return kept_BV & ((away_BV <= away_limit_B[:, None]) | (sampling.typical_p >= 1)[:, None])

    kept_BV = jax.lax.cond(jnp.any(sampling.typical_p < 1), typical, lambda: kept_BV)
    return jnp.where(kept_BV, -distance_BV, -jnp.inf)


def probabilities(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The distribution that `sample` draws from, (B, V). At temperature 0 all of it is on the likeliest token."""
    greedy_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1])

    def truncated() -> jax.Array:
        random_BV = jax.nn.softmax(truncate(logits_BV, sampling), axis=-1)
        return jnp.where((sampling.temperature > 0)[:, None], random_BV, greedy_BV)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), truncated, lambda: greedy_BV)


def smallest_limit(distance_BV: jax.Array, weight_BV: jax.Array, target_B: Array) -> jax.Array:
    """(B,): the smallest limit at which the weights of the entries with `distance <= limit` add up to the target.

    The result is exact: there is a step for each bit of a float32 without its sign. It is inf where no limit is enough.
    """
    bits_BV = jax.lax.bitcast_convert_type(
        distance_BV, jnp.int32
    )  # of the same order as the floats, because no distance is negative

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        reached_B = jnp.sum(jnp.where(bits_BV <= middle_B[:, None], weight_BV, 0.0), axis=-1) >= target_B
        return jnp.where(reached_B, low_B, middle_B + 1), jnp.where(reached_B, middle_B, high_B)

    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    bounds = (jnp.zeros_like(target_B, jnp.int32), jnp.full_like(target_B, infinity, jnp.int32))
    _, high_B = jax.lax.fori_loop(0, 31, halve, bounds)
    return jax.lax.bitcast_convert_type(high_B, jnp.float32)
