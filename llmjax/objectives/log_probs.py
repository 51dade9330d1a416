"""Log-probabilities of given tokens, differentiable, made by chunks of tokens as the loss is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.objectives import chunks
from llmjax.objectives.losses import Predictions


class LogProbs(NamedTuple):
    """(B, L) float32 each: log-probabilities of the targets in nats, and entropies of the whole distributions.

    Both are 0 at places that are not predicted.
    """

    targets: jax.Array
    entropy: jax.Array


def log_probs(
    predictions: Predictions,
    *,
    loss_chunks: int,
    vocab_size: int = 0,
    never: tuple[int, ...] = (),
    temperature: float = 1.0,
) -> LogProbs:
    """Log-probabilities of `predictions.targets` under the softmax of logits / temperature, in float32.

    Args:
        vocab_size: ids from here on only pad the embedding and have no probability; 0: there are none.
        never: ids that are never sampled, and have no probability either (`Tokenizer.unsampled_ids`).

    The entropy has no gradient unless it is used in a loss. Chunks are made again in the backward pass, so the logits of
    all tokens never exist at once.
    """

    def of(logits_BLV: jax.Array, targets_BL: jax.Array) -> LogProbs:
        scaled_BLV = logits_BLV / temperature
        ids_V = jnp.arange(scaled_BLV.shape[-1])
        allowed_V = ids_V < (vocab_size or len(ids_V))
        for i in never:
            allowed_V &= ids_V != i
        scaled_BLV = jnp.where(allowed_V, scaled_BLV, -jnp.inf)
        log_z_BL = jax.nn.logsumexp(scaled_BLV, axis=-1)
        is_target = ids_V[None, None, :] == targets_BL[:, :, None]
        target_BL = jnp.sum(jnp.where(is_target, scaled_BLV, 0.0), axis=-1)
        p_BLV = jnp.exp(scaled_BLV - log_z_BL[:, :, None])
        entropy_BL = log_z_BL - jnp.sum(jnp.where(p_BLV > 0, p_BLV * scaled_BLV, 0.0), axis=-1)
        return LogProbs(target_BL - log_z_BL, entropy_BL)

    found: LogProbs = chunks.token_values(of, predictions, loss_chunks)
    return LogProbs(*map(predictions.spread, found))
