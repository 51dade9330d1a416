"""The measures on held-out rows during post-training: the objective's loss and metrics, and tables."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llmjax.data.source import Batch
from llmjax.model.transformer import Transformer
from llmjax.objectives import Objective, losses
from llmjax.objectives.log_probs import log_probs
from llmjax.objectives.preference import summed
from llmjax.parallel import placement
from llmjax.post.batches import Rows, row, stacked
from llmjax.post.tables import Beside
from llmjax.train.heldout import Evaluate
from llmjax.train.step import batch_shardings


def make_heldout(
    c: ConfigDict,
    module: Transformer,
    objective: Objective,
    batches: Sequence[Batch],
    mesh: Mesh,
    params: Any,
    *,
    beside: Beside | None = None,
) -> Evaluate:
    """parameters -> heldout_NAME for each metric of the objective over fixed batches; compiled before this returns.

    Every metric is its sum over all batches divided by its weight over all batches. A metric without weight is left out.

    Args:
        batches: of one shape, each of a micro-batch's rows; each process puts its rows on its devices.
        params: the model's parameters, or their abstract form.
        beside: further numbers, by the same program.
    """
    network, sharding = placement.on_mesh(module, mesh, c), batch_shardings(mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())  # whole in every process

    def step(params: Any, batch: Any) -> tuple[dict[str, tuple[jax.Array, jax.Array]], jax.Array | None]:
        metrics = objective(network, params, batch, None, c.objective).metrics
        sums = {name: (mean.total, mean.weight) for name, mean in metrics.items()}
        return sums, None if beside is None else beside.outputs(network, params, batch)

    like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding) for k, v in batches[0].items()}
    with placement.active(mesh, c):
        run = jax.jit(step, out_shardings=everywhere).lower(params, like).compile()

    def evaluate(params: Any) -> dict[str, float]:
        sums: dict[str, list[tuple[float, float]]] = {}
        outputs = []
        for rows in batches:
            batch = {k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in rows.items()}
            means, made = run(params, batch)
            for name, mean in means.items():
                sums.setdefault(name, []).append((float(mean[0]), float(mean[1])))
            outputs.append(np.asarray(made))
        totals = {name: tuple(map(math.fsum, zip(*found, strict=True))) for name, found in sums.items()}
        numbers = {name: total / weight for name, (total, weight) in totals.items() if weight}
        numbers |= {} if beside is None else beside.measure(outputs)
        return {f"heldout_{name}": number for name, number in numbers.items()}

    return evaluate


def figures(file: Path) -> dict[str, float]:
    """The numbers of the last evaluation in a file of metrics, by their names: accuracy, reward, exact_match, ...

    The loss is called heldout_loss, because a training has a loss too. A single reward's mean has the reward's name.
    """
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines() if '"heldout_' in line]
    found = {name: value for name, value in (rows[-1] if rows else {}).items() if name.startswith("heldout_")}
    names = {name: name.removeprefix("heldout_").removeprefix("reward/") for name in found if name != "heldout_loss"}
    return {names.get(name, name): value for name, value in found.items() if value is not None}


def reference_log_probs(c: ConfigDict, module: Transformer, params: Any, made: Rows, mesh: Mesh) -> np.ndarray:
    """Summed log-probabilities of every example of a split, (E,) float32, in the order of its store.

    The rows have the layout of the training, so a policy before its first step has exactly the same numbers.
    """
    sharding, network = batch_shardings(mesh), placement.on_mesh(module, mesh, c)

    def step(params: Any, batch: Any) -> jax.Array:
        predictions = losses.predict(network, params, batch, None)
        found = log_probs(predictions, loss_chunks=c.objective.loss_chunks, vocab_size=c.objective.vocab_size)
        return summed(found.targets, batch, answers=made.answers)

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
