"""Positions: rotary angles and their stretched forms, sinusoids, ALiBi's slopes, T5's buckets, XLNet's relative terms.

Rotary positions turn queries and keys; the relative ones become a bias on the attention scores, a function of
`distance`, the query's position minus the key's; learned and sinusoidal ones are added to the embeddings.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from llmjax import config

Rotary = tuple[jax.Array, jax.Array]


def rotary_size(c: ConfigDict) -> int:
    """How many dimensions of a head are rotated, an even number."""
    return c.latent.rotary_size if c.latent.kv_rank else int(config.head_size(c) * c.rotary_fraction) // 2 * 2


def rotary_frequencies(c: ConfigDict, *, local: bool = False) -> tuple[np.ndarray, float]:
    """Angles per token (R/2,) float64 of the rotated pairs, and the factor on cosines and sines (YaRN's temperature).

    linear: positions divided by the factor (Chen et al. 2023). ntk: the base raised so that the slowest pair is
    stretched by the factor and the fastest hardly ("NTK-aware" scaling). yarn: pairs with few turns over the original
    length are divided, those with many kept, a ramp between in the index of the pair, and scores scaled by
    (0.1 ln factor + 1)^2 (Peng et al. 2023 and its code). llama3: the same idea with the ramp in the number of turns.
    longrope: each pair is divided by a factor of its own (Ding et al. 2024). There are two sets, for texts up to the
    original length and for longer ones. `max_length` chooses, so that all positions of a text have the same. That is what
    transformers computes of a whole text. While it writes it starts with the short set, and reads the text again with the
    long one when it passes the border.
    """
    size = rotary_size(c)
    base = c.rotary_local_base if local and c.rotary_local_base else c.rotary_base
    pairs = np.arange(0, size, 2, dtype=np.float64)
    frequencies = base ** (-pairs / size)
    if c.rotary_scaling == "none" or (local and c.rotary_local_base):
        return frequencies, 1.0
    factor = c.rotary_factor
    if c.rotary_scaling == "linear":
        return frequencies / factor, 1.0
    if c.rotary_scaling == "ntk":
        return (base * factor ** (size / (size - 2))) ** (-pairs / size), 1.0
    length = c.rotary_original_length
    if c.rotary_scaling == "llama3":
        turns = length * frequencies / (2 * math.pi)
        kept = np.clip((turns - c.rotary_slow) / (c.rotary_fast - c.rotary_slow), 0, 1)
        return frequencies * (kept + (1 - kept) / factor), 1.0
    if c.rotary_scaling == "longrope":
        factors = c.rotary_long_factors if c.max_length > length else c.rotary_short_factors
        stretch = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
        return frequencies / np.asarray(factors), c.rotary_attention_factor or stretch
    assert c.rotary_scaling == "yarn", c.rotary_scaling

    def pair_with(turns: float) -> float:  # the pair that turns so often over the original length
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(c.rotary_fast), pair_with(c.rotary_slow)
    if c.rotary_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    divided = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    temperature = c.rotary_attention_factor or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return frequencies * (1 - divided + divided / factor), temperature


def rotary_table(positions_BL: jax.Array, c: ConfigDict, *, local: bool = False) -> Rotary:
    """Cosines and sines, each (B, L, 1, R/2) float32, of the angles of rotary positions (Su et al. 2021)."""
    frequencies, factor = rotary_frequencies(c, local=local)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies.astype(np.float32).reshape(1, 1, 1, -1)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BLHK: jax.Array, table: Rotary) -> jax.Array:
    """Rotate the pairs (k, k + R/2) of the first R dimensions of every head by their position's angles.

    The layout of Llama in Hugging Face; that of adjacent pairs is a permutation of the rows of two kernels.
    """
    cos, sin = table
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x_BLHK[..., :size].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHK.dtype)
    return rotated if size == x_BLHK.shape[-1] else jnp.concatenate([rotated, x_BLHK[..., size:]], axis=-1)


def sinusoids(positions: jax.Array, width: int, *, interleaved: bool = True) -> jax.Array:
    """(...) positions -> (..., D) float32: sines and cosines of wavelengths from 2 pi to 10,000 x 2 pi (Vaswani et al. 2017).

    interleaved: sine and cosine of a wavelength side by side, as in the paper; otherwise all sines come first, as in
    Transformer-XL and XLNet.
    """
    frequencies = jnp.asarray(10_000.0 ** (-np.arange(0, width, 2) / width), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies.reshape(*(1,) * positions.ndim, -1)
    if interleaved:
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions.shape, -1)[..., :width]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)[..., :width]


def alibi_slopes(heads: int) -> np.ndarray:
    """(H,) float64: 2^(-8 h / H); where H is no power of two, those of the lower power and every other of the next (Press et al. 2022)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    more = 2.0 ** (-4 * np.arange(1, 2 * (heads - power), 2) / power)
    return np.concatenate([slopes, more])


def alibi_bias(distance_BLM: jax.Array, c: ConfigDict, *, keys_BM: jax.Array) -> jax.Array:
    """(B, H, L, M) float32: minus the slope times how far the key is away.

    Rounded (`c.alibi_rounded`) it depends on the key's position alone, (B, H, 1, M): the slope times keys_BM, which for
    keys before the query is the same up to a constant that a softmax does not see, but for the rounding to bfloat16.
    """
    if c.alibi_rounded:

        def rounded(x: jax.Array) -> jax.Array:  # not a cast and back, which compilers may leave out
            return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

        slopes_H = rounded(jnp.asarray(alibi_slopes(c.heads), jnp.float32))
        places_BM = rounded(keys_BM.astype(jnp.float32))
        return rounded(slopes_H.reshape(1, -1, 1, 1) * places_BM[:, None, None]) * c.alibi_scale
    slopes_H = jnp.asarray(alibi_slopes(c.heads) * c.alibi_scale, jnp.float32)
    return -slopes_H.reshape(1, -1, 1, 1) * jnp.abs(distance_BLM)[:, None].astype(jnp.float32)


def t5_buckets(distance_BLM: jax.Array, c: ConfigDict, *, bidirectional: bool) -> jax.Array:
    """The bucket of each distance, int32: near ones have their own, far ones share them logarithmically (Raffel et al. 2020).

    With `bidirectional` half of the buckets are for keys that come later; otherwise those fall in the first bucket.
    """
    buckets = c.relative_buckets
    offset = jnp.zeros_like(distance_BLM)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance_BLM < 0, buckets, 0)
        away = jnp.abs(distance_BLM)
    else:
        away = jnp.maximum(distance_BLM, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(away, 1).astype(jnp.float32) / exact) / math.log(c.relative_max_distance / exact)
    # Boundaries fall on whole distances: 1e-5 keeps rounding from putting those a bucket too low.
    far = jnp.minimum(exact + (ratio * (buckets - exact) + 1e-5).astype(jnp.int32), buckets - 1)
    return offset + jnp.where(away < exact, away, far)


def by_distance(scores_BHLR: jax.Array, distance_BLM: jax.Array) -> jax.Array:
    """(B, H, L, M): each pair's score, from the scores of all R = 2 M - 1 distances -(M - 1) to M - 1."""
    keys = distance_BLM.shape[-1]
    index_BLM = jnp.broadcast_to(distance_BLM + keys - 1, (scores_BHLR.shape[0], *distance_BLM.shape[1:]))
    return jnp.take_along_axis(scores_BHLR, index_BLM[:, None], axis=-1)
