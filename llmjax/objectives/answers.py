"""Rows that hold several answers: values of tokens added up by answer, and values of answers given to tokens.

Preferences, rewards and policies are about whole answers. A row packs A of them, each behind its own prompt as one
segment: answer a has the segment a + 1, and segment 0 is padding. What belongs together (a pair, a ranking) is never
torn apart: it lies in one row. Where answers share a prompt (`data.packing.packed_trees`), the tree is the segment, and
the batch's "answers" number the tokens: a + 1 in answer a, and 0 in prompts and padding.
"""

import jax
import jax.numpy as jnp

from llmjax.objectives.losses import Batch


def numbers_of(batch: Batch) -> jax.Array:
    """The number of each token's answer, from 1, (B, L) int32: the `segments_BL` of this module's functions."""
    return batch.get("answers", batch["segments"])


def _is_of(segments_BL: jax.Array, answers: int) -> jax.Array:
    return segments_BL[:, :, None] == jnp.arange(1, answers + 1)[None, None, :]


def per_answer(values_BL: jax.Array, segments_BL: jax.Array, answers: int) -> jax.Array:
    """The sum over each answer's tokens, (B, A). Masked sums, not a matrix product: TPUs would round its factors."""
    return jnp.sum(jnp.where(_is_of(segments_BL, answers), values_BL[:, :, None], 0), axis=1)


def per_token(values_BA: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """Each token's answer's value, (B, L); 0 for padding."""
    return jnp.sum(jnp.where(_is_of(segments_BL, values_BA.shape[1]), values_BA[:, None, :], 0), axis=2)
