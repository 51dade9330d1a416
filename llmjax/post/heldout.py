"""What is measured on held-out rows while a model is trained further: the objective's own loss and metrics."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llmjax.data.source import Batch
from llmjax.model.transformer import Transformer
from llmjax.objectives import Objective, losses
from llmjax.objectives.answers import per_answer
from llmjax.objectives.log_probs import log_probs
from llmjax.parallel import placement
from llmjax.post.batches import Rows, row, stacked
from llmjax.train.heldout import Evaluate, compiled
from llmjax.train.step import batch_shardings


def make_heldout(
    c: ConfigDict, module: Transformer, objective: Objective, batches: Sequence[Batch], mesh: Mesh, params: Any
) -> Evaluate:
    """parameters -> heldout_NAME for each metric of the objective over fixed batches; compiled before this returns.

    Every metric is its sum over all batches divided by its weight over all batches. A metric without weight is left out.

    Args:
        batches: of one shape, each of a micro-batch's rows; each process puts its rows on its devices.
        params: the model's parameters, or their abstract form.
    """
    network = placement.on_mesh(module, mesh, c)

    def step(params: Any, batch: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        metrics = objective(network, params, batch, None, c.objective).metrics
        return {name: (mean.total, mean.weight) for name, mean in metrics.items()}

    def lower(batch: Any) -> jax.stages.Lowered:
        with placement.active(mesh, c):
            return jax.jit(step).lower(params, batch)

    run = compiled(lower, batches[0], mesh)

    def evaluate(params: Any) -> dict[str, float]:
        sums: dict[str, list[tuple[float, float]]] = {}
        for batch in batches:
            for name, mean in run(params, batch).items():
                sums.setdefault(name, []).append(mean)
        totals = {name: tuple(map(math.fsum, zip(*found, strict=True))) for name, found in sums.items()}
        return {f"heldout_{name}": total / weight for name, (total, weight) in totals.items() if weight}

    return evaluate


def reference_log_probs(c: ConfigDict, module: Transformer, params: Any, made: Rows, mesh: Mesh) -> np.ndarray:
    """Summed log-probabilities of every example of a split, (E,) float32, in the order of its store.

    Rows are computed as they are trained, so that a policy that has not moved yet has the same numbers.
    """
    sharding, network = batch_shardings(mesh), placement.on_mesh(module, mesh, c)

    def step(params: Any, batch: Any) -> jax.Array:
        predictions = losses.predict(network, params, batch, None)
        found = log_probs(predictions, loss_chunks=c.objective.loss_chunks, vocab_size=c.objective.vocab_size)
        return per_answer(found.targets * batch["weights"], batch["segments"], made.answers)

    size, values = c.train.batch_size // c.train.micro_batches, np.zeros(len(made.store.sizes), np.float32)
    with placement.active(mesh, c):
        run = jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))  # whole in every process
        for first in range(0, len(made.groups), size):
            numbers = range(first, first + size)
            rows = stacked([row(made, i, c) for i in numbers])
            batch = {k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in rows.items()}
            sums_BA = np.asarray(run(params, batch))
            for sums_A, i in zip(sums_BA, numbers, strict=True):
                examples = made.examples(i)
                values[examples] = sums_A[: len(examples)]
    return values
