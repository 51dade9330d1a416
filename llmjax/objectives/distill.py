"""Distillation: a model learns the distribution of its teacher over the next token, not the token alone (Hinton et al. 2015).

Of the teacher's distribution the batch has the likeliest ids, and the share of all others as one more outcome. With all ids
the divergences are exact; else they are those of the coarser distributions, which are never larger.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llmjax.objectives import chunks, losses
from llmjax.objectives.losses import Batch, Mean, Sums


class Teacher(NamedTuple):
    """A distribution a token: ids (B, L, K) int32, and log-probabilities (B, L, K) float32 in nats, or (B, L, K + 1): the
    last is that of all other ids together."""

    ids: jax.Array
    log_probs: jax.Array


def teacher_of(logits_BLV: jax.Array, *, top: int, vocab_size: int, temperature: float) -> Teacher:
    """The distribution of a teacher's logits / temperature over the ids below `vocab_size`.

    Args:
        top: likeliest ids that are kept; 0: all.
    """
    log_p_BLV = jax.nn.log_softmax(logits_BLV[:, :, :vocab_size] / temperature, axis=-1)
    if not top or top >= vocab_size:
        ids = jnp.broadcast_to(jnp.arange(vocab_size, dtype=jnp.int32), log_p_BLV.shape)
        return Teacher(ids, log_p_BLV)
    _, ids_BLK = jax.lax.top_k(log_p_BLV, top)
    return Teacher(ids_BLK, at_ids(log_p_BLV, ids_BLK, rest=True))


def at_ids(log_p_BLV: jax.Array, ids_BLK: jax.Array, *, rest: bool) -> jax.Array:
    """Log-probabilities at the ids (B, L, K); with `rest` also of all others together, (B, L, K + 1)."""
    at_BLK = jnp.take_along_axis(log_p_BLV, ids_BLK, axis=-1)
    if not rest:
        return at_BLK
    others_BLV = jnp.put_along_axis(log_p_BLV, ids_BLK, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([at_BLK, jax.nn.logsumexp(others_BLV, axis=-1, keepdims=True)], axis=-1)


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last dimension, in nats."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def divergence(log_p: jax.Array, log_q: jax.Array, *, kind: str, mix: float) -> jax.Array:
    """From the teacher's p to the student's q, over the last dimension.

    Args:
        kind: "forward", KL(p || q), which covers all that the teacher would write; "reverse", KL(q || p), which keeps to what
            it most likely writes; "js", mix KL(p || m) + (1 - mix) KL(q || m) with m = mix p + (1 - mix) q
            (Agarwal et al. 2023, GKD).
    """
    if kind == "forward":
        return kl(log_p, log_q)
    if kind == "reverse":
        return kl(log_q, log_p)
    log_m = jnp.logaddexp(log_p + jnp.log(mix), log_q + jnp.log1p(-mix))
    return mix * kl(log_p, log_m) + (1 - mix) * kl(log_q, log_m)


def distill_loss(module: Any, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict) -> Sums:
    """The mean over learnt tokens of the divergence from teacher to student.

    Args:
        batch: rows of text as of the causal objective; teacher_ids, teacher_log_probs: see `Teacher`.
        c: the settings under `objective`: those under `distill`; the divergence is multiplied by the square of the
            temperature, so that its gradient does not shrink with it, and `data_weight` is that of the text's own nats.

    Metrics, means over learnt tokens: loss (the text's own nats), divergence, agreement (both have the same likeliest id).
    """
    d = c.distill
    made = losses.predict(module, params, batch, rng)
    teacher = Teacher(batch["teacher_ids"], batch["teacher_log_probs"])

    def of(logits_BLV: jax.Array, targets: tuple[jax.Array, Teacher]) -> tuple[jax.Array, jax.Array, jax.Array]:
        targets_BL, (ids_BLK, log_p) = targets
        used_BLV = logits_BLV[:, :, : c.vocab_size or logits_BLV.shape[-1]]
        log_q_BLV = jax.nn.log_softmax(used_BLV / d.temperature, axis=-1)
        log_q = at_ids(log_q_BLV, ids_BLK, rest=log_p.shape[-1] > ids_BLK.shape[-1])
        likeliest_BL = jnp.take_along_axis(
            ids_BLK, jnp.argmax(log_p[:, :, : ids_BLK.shape[-1]], axis=-1)[:, :, None], axis=-1
        )
        agree_BL = jnp.argmax(used_BLV, axis=-1) == likeliest_BL[:, :, 0]
        nats_BL, _ = losses.cross_entropy(used_BLV, targets_BL)
        return divergence(log_p, log_q, kind=d.divergence, mix=d.mix), nats_BL, agree_BL.astype(jnp.float32)

    both = made._replace(targets=(made.targets, teacher))  # type: ignore[arg-type]
    divergence_BL, nats_BL, agree_BL = chunks.token_values(of, both, c.loss_chunks)
    weights_BL = made.weights
    loss_BL = (1 - d.data_weight) * d.temperature**2 * divergence_BL + d.data_weight * nats_BL
    total = jnp.sum(weights_BL)
    named = {"loss": nats_BL, "divergence": divergence_BL, "agreement": agree_BL}
    metrics = {name: Mean(jnp.sum(values_BL * weights_BL), total) for name, values_BL in named.items()}
    return losses.with_auxiliary(
        Sums(jnp.sum(loss_BL * weights_BL), total, jax.lax.stop_gradient(metrics)), made.auxiliary
    )
