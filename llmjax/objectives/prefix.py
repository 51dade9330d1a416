"""The prefix language model: the beginning of each document sees itself whole, and what follows is predicted."""

import numpy as np
from ml_collections import ConfigDict

from llmjax.objectives.rows import Row, documents
from llmjax.objectives.special import Special


def prefix(row: Row, rng: np.random.Generator, c: ConfigDict, special: Special) -> Row:
    """A row with each document's prefix of a random length (Liu et al. 2018, Raffel et al. 2020).

    It adds `orders` (L): 0 for the prefix, then 1, 2, ... `weights` are 0 where the target is in the prefix. The length is
    uniform from 0 (an ordinary causal document) to all of the document but its last token.
    """
    orders_L = np.zeros(len(row["tokens"]), np.int32)
    weights_L = row["weights"].copy()
    for places in documents(row["segments"]):
        length = int(rng.integers(len(places)))
        orders_L[places] = np.maximum(np.arange(len(places)) + 1 - length, 0)
        weights_L[places[: max(length - 1, 0)]] = 0.0
    return {**row, "orders": orders_L, "weights": weights_L}
