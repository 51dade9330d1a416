"""Evaluation on held-out text during training: loss, accuracy and bits per byte of fixed batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llmjax.data import replay
from llmjax.model.transformer import Transformer
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import compiler_options, placement
from llmjax.train.score import Score, total_score
from llmjax.train.step import batch_shardings, make_heldout_step

Evaluate = Callable[[Any], dict[str, float]]


def make_heldout(
    c: ConfigDict,
    module: Transformer,
    heldout: Mapping[str, Sequence[dict[str, np.ndarray]]],
    piece_sizes: np.ndarray,
    mesh: Mesh,
    params: Any,
) -> Evaluate:
    """parameters -> named numbers of fixed held-out batches, in total, by source and by group (`data/replay.py`).

    The program is compiled before this returns.

    heldout_loss (nats a predicted token), heldout_accuracy (share of predictions whose likeliest token is right) and,
    where the objective predicts every token of the text, heldout_bits_per_byte. Where weights are shares, all of them
    are weighted means.

    Args:
        heldout: global batches by source, each of a micro-batch's rows, as the objective changed them; each process puts
            its rows of them on its devices.
        piece_sizes: UTF-8 bytes of each id.
        params: the model's parameters, or their abstract form (ShapeDtypeStructs with shardings).
    """
    in_bytes = OBJECTIVES[c.objective.name].predicts_all
    first = next(batch for batches in heldout.values() for batch in batches)
    options = compiler_options.choose(c.parallel.compiler, mesh.devices.flat[0])
    sums_of = compiled(lambda like: lower_heldout_step(c, module, params, like, mesh=mesh), first, mesh, options)

    def evaluate(params: Any) -> dict[str, float]:
        scores, correct = {}, {}
        for source, batches in heldout.items():
            sums = [sums_of(params, batch) for batch in batches]
            nats, correct[source], tokens = (math.fsum(s[name] for s in sums) for name in ("nats", "correct", "tokens"))
            size = sum(float((piece_sizes[b["targets"]] * b["weights"]).sum()) for b in batches) if in_bytes else 0
            scores[source] = Score(nats=nats, tokens=tokens, bytes=size)

        def numbers(score: Score, right: float, end: str = "") -> dict[str, float]:
            accuracy = right / score.tokens if score.tokens else 0.0
            row = {f"heldout_loss{end}": score.loss, f"heldout_accuracy{end}": accuracy}
            return row | ({f"heldout_bits_per_byte{end}": score.bits_per_byte} if in_bytes else {})

        rows = numbers(total_score(scores.values()), sum(correct.values()))
        for source, score in scores.items():
            rows |= numbers(score, correct[source], f"/{source}")
        for group, names in replay.groups(c, scores).items():
            rows |= numbers(total_score(scores[n] for n in names), sum(correct[n] for n in names), f"/{group}")
        return rows

    return evaluate


def compiled(
    lower: Callable[[dict[str, Any]], jax.stages.Lowered],
    batch: Mapping[str, np.ndarray],
    mesh: Mesh,
    options: compiler_options.Options,
) -> Callable[[Any, Mapping[str, np.ndarray]], Any]:
    """(parameters, host batch) -> the scalars of a step as floats, for batches of the shapes of `batch`.

    Args:
        lower: from the abstract batch to the step, traced.
        options: of the compiler.
    """
    sharding = batch_shardings(mesh)
    like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding) for k, v in batch.items()}
    step = compiler_options.compile_with(lower(like), options)

    def run(params: Any, batch: Mapping[str, np.ndarray]) -> Any:
        on_mesh = {k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in batch.items()}
        return jax.tree.map(float, step(params, on_mesh))

    return run


def lower_heldout_step(
    c: ConfigDict, module: Transformer, params: Any, batch: dict[str, Any], *, mesh: Mesh
) -> jax.stages.Lowered:
    """The measurement of one batch traced for a mesh, to be compiled. Arrays may be abstract."""
    with placement.active(mesh, c):
        step = make_heldout_step(module, OBJECTIVES[c.objective.name], c)
        return jax.jit(step).lower(params, batch)
