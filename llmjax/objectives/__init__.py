"""Training objectives: a transform of each row (host, NumPy) and a loss (device, JAX).

Losses are pure functions `(module, params, batch, rng, c) -> Sums`. Sums and weights are added up over devices and
micro-batches and divided once a step, so the loss does not depend on how the batch was cut. Transforms are pure functions
`(row, rng, c, special) -> row` of NumPy arrays, `c` the whole config. The random generator belongs to the row alone, so
batch k stays a function of the config, the seed and k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from llmjax.data.batches import Corruption
from llmjax.data.tokenizer import Tokenizer
from llmjax.objectives import losses
from llmjax.objectives.classify import classify_loss
from llmjax.objectives.distill import distill_loss
from llmjax.objectives.infill import infill
from llmjax.objectives.losses import Batch, Predictions, Sums
from llmjax.objectives.masking import masked, needs_pairs, translation, unilm
from llmjax.objectives.multi_token import multi_token
from llmjax.objectives.permutation import permutation
from llmjax.objectives.permutation import predict as predict_permuted
from llmjax.objectives.policy import policy_loss
from llmjax.objectives.preference import preference_loss
from llmjax.objectives.prefix import prefix
from llmjax.objectives.reward import reward_loss
from llmjax.objectives.rows import Row
from llmjax.objectives.span import row_sizes, span
from llmjax.objectives.special import Special, special_ids
from llmjax.objectives.unpaired import unpaired_loss


@dataclass(frozen=True)
class Objective:
    """How one objective is learnt and measured. Called, it is its loss."""

    transform: Callable[[Row, np.random.Generator, ConfigDict, Special], Row] | None = (
        None  # None: rows stay as they are
    )
    tokens: Callable[[ConfigDict], int] = lambda c: c.train.sequence_length  # of text that a row is made of
    # (config, the languages of each source) -> None; raises UserError for data that the objective cannot learn from.
    check: Callable[[ConfigDict, Sequence[Sequence[str]]], None] = lambda c, languages: None
    predict: Callable[..., Predictions] = losses.predict  # what the loss is of, and held-out text is measured by
    loss: Callable[..., Sums] | None = None  # None: the sums of what is predicted
    reads_left_to_right: bool = False  # the model can score and continue plain text
    needs_reference: bool = False  # the rows also have log-probabilities by the model that training starts from
    predicts_all: bool = False  # every token of the text is predicted once, so bits per byte mean something

    def __call__(self, module: Any, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict) -> Sums:
        """The sums of the loss over a batch; `c` are the settings under `objective`."""
        if self.loss is not None:
            return self.loss(module, params, batch, rng, c)
        return losses.add_up(self.predict(module, params, batch, rng, c), c)


OBJECTIVES: dict[str, Objective] = {
    "causal": Objective(reads_left_to_right=True, predicts_all=True),
    "multi_token": Objective(loss=multi_token, reads_left_to_right=True, predicts_all=True),
    "prefix": Objective(transform=prefix, reads_left_to_right=True),
    "infill": Objective(transform=infill, tokens=lambda c: c.train.sequence_length + 1, reads_left_to_right=True),
    "masked": Objective(transform=masked),
    "translation": Objective(transform=translation, check=needs_pairs),
    "unilm": Objective(transform=unilm),
    "permutation": Objective(transform=permutation, predict=predict_permuted),
    "preference": Objective(loss=preference_loss, needs_reference=True, reads_left_to_right=True),
    "unpaired": Objective(loss=unpaired_loss, needs_reference=True, reads_left_to_right=True),
    "reward": Objective(loss=reward_loss),
    "classify": Objective(loss=classify_loss),
    "distill": Objective(loss=distill_loss, reads_left_to_right=True),
    "policy": Objective(loss=policy_loss, reads_left_to_right=True),
    "span": Objective(transform=span, tokens=lambda c: row_sizes(c).raw),
}


def corruption(c: ConfigDict, tokenizer: Tokenizer) -> Corruption | None:
    """What the objective of a config makes of each row of text, for the pipeline of batches; None: nothing."""
    objective = OBJECTIVES[c.objective.name]
    transform = objective.transform
    if transform is None:
        return None
    special = special_ids(c.objective, tokenizer)
    return Corruption(objective.tokens(c), lambda row, rng: transform(row, rng, c, special))


__all__ = ["OBJECTIVES", "Objective", "Predictions", "Row", "Special", "Sums", "corruption", "special_ids"]
