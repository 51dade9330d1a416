"""The calibration of a reward model: accuracy on held-out pairs by the margin that it gives them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llmjax.data.source import Batch
from llmjax.objectives import reward
from llmjax.post.tables import Beside, Table, write_tables

BINS = 5  # of equal numbers of pairs


class Bin(NamedTuple):
    """Pairs whose scores differ by about as much."""

    low: float
    high: float
    pairs: int
    accuracy: float  # the share that is ordered as it was labelled
    confidence: float  # the mean of sigmoid(margin), the share that the model says


def beside(workdir: Path, batches: Sequence[Batch]) -> Beside:
    """Measure calibration_error, and write a table of accuracy by margin for the report."""

    def outputs(network: Any, params: Any, batch: Any) -> jax.Array:
        return reward.scores(network, params, batch, None)[0]

    def measure(made: Sequence[np.ndarray]) -> dict[str, float]:
        gaps_P = np.concatenate([pair_gaps(scores_BA, rows) for scores_BA, rows in zip(made, batches, strict=True)])
        if not len(gaps_P):
            return {}
        found = by_margin(gaps_P)
        rows: list[list[str | int | float]] = [
            [f"{b.low:.3f} to {b.high:.3f}", b.pairs, b.accuracy, b.confidence] for b in found
        ]
        columns = ["margin of the scores", "pairs", "accuracy", "sigmoid of the margin"]
        write_tables(workdir, [Table("Held-out pairs by margin", columns, rows)])
        return {"calibration_error": calibration_error(found)}

    return Beside(outputs, measure)


def pair_gaps(scores_BA: np.ndarray, batch: Batch) -> np.ndarray:
    """The better answer's score minus the worse one's, (P,), for all pairs of a batch (see `reward_loss`)."""
    same_BAA = batch["groups"][:, :, None] == batch["groups"][:, None, :]
    there_BAA = (batch["exists"][:, :, None] > 0) & (batch["exists"][:, None, :] > 0)
    better_BAA = batch["ranks"][:, :, None] < batch["ranks"][:, None, :]
    gaps_P: np.ndarray = (scores_BA[:, :, None] - scores_BA[:, None, :])[same_BAA & there_BAA & better_BAA]
    return gaps_P


def by_margin(gaps_P: np.ndarray, *, bins: int = BINS) -> list[Bin]:
    """The pairs in bins of equal size, in rising order of the absolute margin."""
    gaps_P = gaps_P[np.argsort(np.abs(gaps_P), kind="stable")].astype(np.float64)
    found = []
    for part in np.array_split(gaps_P, min(bins, len(gaps_P))):
        margins = np.abs(part)
        sure = float(np.mean(1 / (1 + np.exp(-margins))))
        right = float(np.mean((part > 0) + 0.5 * (part == 0)))
        found.append(Bin(float(margins[0]), float(margins[-1]), len(part), right, sure))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error (Naeini et al. 2015): the mean over pairs of |accuracy - confidence| of their bin."""
    return sum(b.pairs * abs(b.accuracy - b.confidence) for b in bins) / sum(b.pairs for b in bins)
