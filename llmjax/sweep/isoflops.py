"""The best size for each budget, and how both grow: Hoffmann et al. 2022, approach 2.

For each number of FLOPs a parabola of the loss over ln N has its lowest point at the best size; a line through those
points in logarithms gives N ~ C^a. Parabolas are biased where the sizes lie to one side of the best one, so budgets whose
lowest point is outside of their sizes are left out, and named.
"""

from dataclasses import dataclass

import numpy as np

from llmjax.errors import UserError
from llmjax.sweep.points import FLOPS_PER_PARAMETER, Points


@dataclass(frozen=True)
class Growth:
    """N = scale * C^exponent, the best sizes for budgets of FLOPs."""

    exponent: float
    scale: float
    budgets: np.ndarray  # FLOPs (K,)
    sizes: np.ndarray  # the best parameters for each (K,)
    dropped: tuple[float, ...]  # budgets without a lowest point among their sizes

    def best_size(self, flops: float) -> float:
        return self.scale * flops**self.exponent

    def best_tokens(self, flops: float) -> float:
        return flops / FLOPS_PER_PARAMETER / self.best_size(flops)


def fit(points: Points, budgets: np.ndarray) -> Growth:
    """Fit to runs that are grouped by their nominal budgets (P,) of FLOPs.

    Raises UserError with fewer than 3 budgets that have a lowest point.
    """
    kept, sizes, dropped = [], [], []
    for budget in np.unique(budgets):
        here = points.taken(budgets == budget)
        if len(np.unique(here.parameters)) < 3:
            dropped.append(float(budget))
            continue
        x = np.log(here.parameters)
        middle = x.mean()
        curve, slope, _ = np.polyfit(x - middle, here.loss, 2)
        lowest = middle - slope / (2 * curve) if curve > 0 else np.inf
        if not x.min() <= lowest <= x.max():
            dropped.append(float(budget))
            continue
        kept.append(float(budget))
        sizes.append(float(np.exp(lowest)))
    if len(kept) < 3:
        raise UserError(
            f"{len(kept)} of {len(np.unique(budgets))} budgets have their lowest loss among their sizes, and 3 are needed: add "
            "smaller and larger models to the others"
        )
    exponent, intercept = np.polyfit(np.log(kept), np.log(sizes), 1)
    return Growth(float(exponent), float(np.exp(intercept)), np.array(kept), np.array(sizes), tuple(dropped))
