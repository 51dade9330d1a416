"""XLNet's permutation language model (Yang et al. 2019): tokens are predicted in a random order of factorisation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from llmjax.model.two_stream import init_memory
from llmjax.objectives.losses import Auxiliary, Batch, Predictions, call, predictions_of
from llmjax.objectives.rows import Row
from llmjax.objectives.special import Special


def permutation(row: Row, rng: np.random.Generator, c: ConfigDict, special: Special) -> Row:
    """A row with a random order, the last `predict_share` of which is to be predicted by the query stream.

    It adds `orders` (L): 0 for the tokens that are context (they see each other, as in the authors' implementation, which
    orders the targets only), 1, 2, ... for the predicted ones. For the Q predictions it adds `query_places` (indices in
    their part of the row), `query_orders` and `query_segments`; `targets` and `weights` have length Q too. Special tokens
    are always context. The row is cut in `recurrence` equal parts, each with its own order and Q / recurrence of the
    predictions.
    """
    parts = c.objective.recurrence
    cut = {name: values.reshape(parts, -1) for name, values in row.items()}
    done = [_part({name: values[i] for name, values in cut.items()}, rng, c, special) for i in range(parts)]
    return {name: np.concatenate([part[name] for part in done]) for name in done[0]}


def _part(row: Row, rng: np.random.Generator, c: ConfigDict, special: Special) -> Row:
    tokens_L, segments_L = row["tokens"], row["segments"]
    queries = max(1, round(c.objective.predict_share * len(tokens_L)))
    places = np.flatnonzero(special.is_text[tokens_L] & (segments_L > 0))
    ranked = rng.permutation(places)
    # In a document without special tokens the first prediction would see nothing, so its last token stays context.
    bare = np.setdiff1d(segments_L[places], segments_L[~special.is_text[tokens_L]])
    last = [places[segments_L[places] == segment][-1] for segment in bare]
    ranked = ranked[~np.isin(ranked, last)] if last else ranked
    wanted = round(c.objective.predict_share * len(places))
    chosen = ranked[len(ranked) - min(wanted, len(ranked)) :]
    orders_L = np.zeros(len(tokens_L), np.int32)
    orders_L[chosen] = np.arange(1, len(chosen) + 1)
    fill = queries - len(chosen)

    def of(values: np.ndarray, dtype: Any = np.int32) -> np.ndarray:
        return np.pad(values, (0, fill)).astype(dtype)

    return {
        **row,
        "orders": orders_L,
        "targets": of(tokens_L[chosen]),
        "weights": of(np.ones(len(chosen)), np.float32),
        "query_places": of(chosen),
        "query_orders": of(orders_L[chosen]),
        "query_segments": of(segments_L[chosen]),
    }


def predict(module: Any, params: Any, batch: Batch, rng: jax.Array | None, c: ConfigDict) -> Predictions:
    """Predictions of the queries, part after part of the row, each with the memory of those before it.

    No gradient flows into the memory (Dai et al. 2019).
    """
    parts = c.recurrence
    context = {name: values for name, values in batch.items() if name not in ("targets", "weights")}
    rows, length = batch["tokens"].shape
    memory = init_memory(module.c, batch=rows, length=length - length // parts) if parts > 1 else None
    hidden, extras = [], []
    for i in range(parts):
        part = {name: jnp.split(values, parts, axis=1)[i] for name, values in context.items()}
        queries = {
            "positions": part.pop("query_places"),
            "orders": part.pop("query_orders"),
            "segments": part.pop("query_segments"),
        }
        key = None if rng is None else jax.random.fold_in(rng, i)
        settings = {} if memory is None else {"memory": memory}
        output, extra = call(module, params, part, key, queries=queries, output="hidden", **settings)
        if memory is not None:
            output, memory = output
            memory = jax.lax.stop_gradient(memory)
        hidden.append(output)
        extras.append(Auxiliary(None if extra.loss is None else extra.loss / parts, extra.usage))
    auxiliary = jax.tree.map(lambda *values: sum(values, start=jnp.zeros(())), *extras)
    hidden_BLD = jnp.concatenate(hidden, axis=1)
    return predictions_of(module, params, hidden_BLD, batch["targets"], batch["weights"], auxiliary)
