"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1): keys and values of one small vector.

The part of a key that is rotated does not come of that vector. It is made of the input and shared by all heads. Here it
is the first part of a head, as in other models with partly rotated heads; in the paper it is the last.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax import config
from llmjax.model.layers import Linear, Norm


def queries(module: nn.Module, x_BLD: jax.Array) -> jax.Array:
    """q_BLHK, not rotated yet; its parameters are the calling module's."""
    c: ConfigDict = module.c
    if c.latent.query_rank:
        x_BLD = Linear(c, (c.latent.query_rank,), "inward", name="query_down")(x_BLD)
        x_BLD = Norm(c, "rms", name="query_norm")(x_BLD)
    return Linear(c, (c.heads, config.head_size(c)), "inward", name="query")(x_BLD)


def keys_and_values(module: nn.Module, x_BMD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k_BMHK, not rotated yet, and v_BMHK, whose dimensions after `value_size` are zero."""
    c: ConfigDict = module.c
    size, own = config.head_size(c), c.latent
    rotary_BMR = Linear(c, (own.rotary_size,), "inward", name="rotary_key")(x_BMD)
    latent_BMD = Norm(c, "rms", name="latent_norm")(Linear(c, (own.kv_rank,), "inward", name="latent_down")(x_BMD))
    k_BMHK = Linear(c, (c.heads, size - own.rotary_size), "inward", name="key")(latent_BMD)
    v_BMHK = Linear(c, (c.heads, own.value_size), "inward", name="value")(latent_BMD)
    shared = jnp.broadcast_to(rotary_BMR[:, :, None], (*k_BMHK.shape[:3], own.rotary_size))
    k_BMHK = jnp.concatenate([shared, k_BMHK], axis=-1)
    return k_BMHK, jnp.pad(v_BMHK, ((0, 0), (0, 0), (0, 0), (0, size - own.value_size)))
