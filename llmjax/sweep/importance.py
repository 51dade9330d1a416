"""The importance of each setting of a search: permutation importance (Breiman 2001) on a small surrogate.

The surrogate is a ridge regression of the metric on each setting's place and its square, with a column for each value of
a setting without an order. It has no interactions. A forest would find more of them with many more trials than a search
of language models has. Rank correlations would miss a setting whose best value lies in the middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmjax.sweep.design import Settings
from llmjax.sweep.space import Dimension

ENOUGH = 3  # points for each column of the surrogate
RIDGE = 1e-3
RESAMPLES, SHUFFLES = 100, 8


@dataclass(frozen=True)
class Importance:
    """The share of explained variance that is lost when a setting is shuffled, with 90 % of resamples."""

    key: str
    mean: float
    low: float
    high: float
    explained: float  # by the whole surrogate


def importances(space: Sequence[Dimension], points: Sequence[Settings], values: Sequence[float]) -> list[Importance]:
    """The importance of every setting; [] with too few points, or where all values are the same."""
    columns = [_columns(one, [point[one.key] for point in points]) for one in space]
    width = sum(block.shape[1] for block in columns)
    y = np.asarray(values, float)
    if len(points) < ENOUGH * width or np.ptp(y) == 0:
        return []
    rng = np.random.default_rng(0)
    found = [_once(columns, y, rng)]
    for _ in range(RESAMPLES):
        i = rng.integers(0, len(y), len(y))
        if np.ptp(y[i]) > 0:
            found.append(_once([block[i] for block in columns], y[i], rng))
    explained, *lost = np.array(found).T
    return [
        Importance(
            one.key, float(values[0]), float(np.percentile(values, 5)), float(np.percentile(values, 95)),
            float(explained[0]),
        )
        for one, values in zip(space, lost, strict=True)
    ]  # fmt: skip


def _columns(one: Dimension, values: Sequence[object]) -> np.ndarray:
    if not one.ordered:
        return np.array([[float(value == choice) for choice in one.choices[1:]] for value in values])
    place = np.array([one.place(value) for value in values])
    return np.stack([place - 0.5, (place - 0.5) ** 2], axis=1)


def _once(columns: Sequence[np.ndarray], y: np.ndarray, rng: np.random.Generator) -> list[float]:
    """[the share of variance explained, then for each setting the share that is lost when its values are shuffled]."""
    x = np.concatenate([np.ones((len(y), 1)), *columns], axis=1)
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)
    total = float(np.square(y - y.mean()).sum())

    def explained(blocks: Sequence[np.ndarray]) -> float:
        predicted = np.concatenate([np.ones((len(y), 1)), *blocks], axis=1) @ weights
        return 1 - float(np.square(y - predicted).sum()) / total

    whole = explained(columns)
    lost = []
    for place, block in enumerate(columns):
        shuffled = [
            explained([*columns[:place], block[rng.permutation(len(y))], *columns[place + 1 :]])
            for _ in range(SHUFFLES)
        ]
        lost.append(max(whole - float(np.mean(shuffled)), 0.0))
    return [whole, *lost]
