"""Multi-token prediction (Gloeckle et al. 2024): each position predicts the next A tokens, each by its own block."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.objectives.losses import Batch, Sums, add_up, call, predictions_of, with_auxiliary


def ahead(batch: Batch, distance: int) -> tuple[jax.Array, jax.Array]:
    """targets_BL and weights_BL of the block that predicts `distance` tokens beyond the next one.

    A position counts if all the tokens between belong to its own document.
    """

    def shifted(values_BL: jax.Array) -> jax.Array:
        return jnp.pad(values_BL[:, distance:], ((0, 0), (0, distance)))

    same_BL = (shifted(batch["segments"]) == batch["segments"]) & (batch["segments"] > 0)
    return shifted(batch["targets"]), shifted(batch["weights"]) * same_BL


def multi_token(module: nn.Module, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict) -> Sums:
    """The mean of the losses of all A tokens; the metric `loss` is that of the next token, as in other objectives."""
    hidden_ABLD, auxiliary = call(module, params, batch, rng, output="hidden_ahead")
    heads = [
        add_up(predictions_of(module, params, hidden_BLD, *ahead(batch, distance)), c)
        for distance, hidden_BLD in enumerate(hidden_ABLD)
    ]
    objective = sum((head.objective for head in heads), start=jnp.zeros(())) / len(heads)
    return with_auxiliary(heads[0]._replace(objective=objective), auxiliary)
