"""Classes and numbers of whole texts, read at a text's first token (encoders) or its last one (models from left to right)."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llmjax.model import head
from llmjax.objectives import losses
from llmjax.objectives.losses import Batch, Mean, Sums


def outputs(module: Any, params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, losses.Auxiliary]:
    """(B, A, classes) float32 of a batch of texts, of which `place` (B, A) says where each is read in its row."""
    hidden_BLD, auxiliary = losses.call(module, params, batch, rng, output="hidden")
    at_BAD = jnp.take_along_axis(hidden_BLD, batch["place"][:, :, None], axis=1)
    return head.classes(module, params, at_BAD), auxiliary


def text_losses(outputs_BAC: jax.Array, labels_BA: jax.Array, c: ConfigDict) -> jax.Array:
    """The loss of each text, (B, A): nats of its class, or the squared error of its number.

    Args:
        c: the settings under `objective`: `classify.target` is class or number.
    """
    if c.classify.target == "number":
        return jnp.square(outputs_BAC[:, :, 0] - labels_BA)
    nats_BA, _ = losses.cross_entropy(outputs_BAC, labels_BA.astype(jnp.int32))
    return nats_BA


def classify_loss(module: Any, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict) -> Sums:
    """The mean over texts of `text_losses`.

    Args:
        batch: rows of texts, each a segment; place (B, A) int32; labels (B, A) float32, numbers of classes or numbers to
            predict; exists (B, A), 1 or 0.

    Metrics, means over texts: loss; of classes also accuracy.
    """
    outputs_BAC, auxiliary = outputs(module, params, batch, rng)
    exists_BA = batch["exists"]
    loss = jnp.sum(text_losses(outputs_BAC, batch["labels"], c) * exists_BA)
    texts = jnp.sum(exists_BA)
    metrics = {"loss": Mean(loss, texts)}
    if c.classify.target == "class":
        right_BA = jnp.argmax(outputs_BAC, axis=-1) == batch["labels"].astype(jnp.int32)
        metrics["accuracy"] = Mean(jnp.sum(right_BA * exists_BA), texts)
    return losses.with_auxiliary(Sums(loss, texts, jax.lax.stop_gradient(metrics)), auxiliary)
