"""What is learnt. An objective is what it makes of a row of text, on the host, and a loss, on the device.

Losses are pure functions `(module, params, batch, rng, c) -> Sums`. Sums and weights are added up over devices and
micro-batches and divided once a step, so the loss does not depend on how the batch was cut. Corruptions are pure
functions `(row, rng, c, special) -> row` of NumPy arrays; the random generator belongs to the row alone, so batch k
stays a function of the config, the seed and k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from llmjax.data.batches import Corruption
from llmjax.data.tokenizer import Tokenizer
from llmjax.objectives import losses
from llmjax.objectives.infill import infill
from llmjax.objectives.losses import Batch, Predictions, Sums
from llmjax.objectives.masking import masked, translation, unilm
from llmjax.objectives.multi_token import multi_token
from llmjax.objectives.permutation import permutation
from llmjax.objectives.permutation import predict as predict_permuted
from llmjax.objectives.prefix import prefix
from llmjax.objectives.rows import Row
from llmjax.objectives.span import sizes as span_sizes
from llmjax.objectives.span import span
from llmjax.objectives.special import Special, special_ids


@dataclass(frozen=True)
class Objective:
    """How one objective is learnt and measured. Called, it is its loss."""

    corrupt: Callable[..., Row] | None = None  # None: rows stay as they are
    predict: Callable[..., Predictions] = losses.predict  # what the loss is of, and held-out text is measured by
    loss: Callable[..., Sums] | None = None  # None: the sums of what is predicted
    reads_left_to_right: bool = False  # the model can score and continue plain text
    predicts_all: bool = False  # every token of the text is predicted once, so bits per byte mean something

    def __call__(self, module: Any, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict) -> Sums:
        """The sums of the loss over a batch; `c` are the settings under `objective`."""
        if self.loss is not None:
            return self.loss(module, params, batch, rng, c)
        return losses.add_up(self.predict(module, params, batch, rng, c), c)


OBJECTIVES: dict[str, Objective] = {
    "causal": Objective(reads_left_to_right=True, predicts_all=True),
    "multi_token": Objective(loss=multi_token, reads_left_to_right=True, predicts_all=True),
    "prefix": Objective(corrupt=prefix, reads_left_to_right=True),
    "infill": Objective(corrupt=infill, reads_left_to_right=True),
    "masked": Objective(corrupt=masked),
    "translation": Objective(corrupt=translation),
    "unilm": Objective(corrupt=unilm),
    "permutation": Objective(corrupt=permutation, predict=predict_permuted),
    "span": Objective(corrupt=span),
}


def corruption(c: ConfigDict, tokenizer: Tokenizer) -> Corruption | None:
    """What the objective of a config does to each row of text, for the pipeline of batches; None: nothing."""
    corrupt = OBJECTIVES[c.objective.name].corrupt
    if corrupt is None:
        return None
    special, length = special_ids(c.objective, tokenizer), c.train.sequence_length
    tokens, more = length, {}
    if c.objective.name == "infill":
        tokens = length + 1
    elif c.objective.name == "span":
        more = {"length": length, "encoder": bool(c.model.encoder_layers)}
        tokens = span_sizes(c.objective, **more).raw

    def change(row: Row, rng: np.random.Generator) -> Row:
        return corrupt(row, rng, c.objective, special, **more)

    return Corruption(tokens, change)


__all__ = ["OBJECTIVES", "Objective", "Predictions", "Row", "Special", "Sums", "corruption", "special_ids"]
