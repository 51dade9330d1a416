"""The best size for each budget, and how it grows with the budget: Hoffmann et al. 2022, approach 2.

For each number of FLOPs a parabola of the loss over ln N has its lowest point at the best size; a line through those
points in logarithms gives N ~ C^a. In place of the parabola, Akima's curve goes through all points (Porian et al. 2024): it
follows any shape, and any noise. Parabolas are biased where the sizes lie to one side of the best one, so budgets whose
lowest point is outside of their sizes are left out, and named.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from llmjax.errors import UserError
from llmjax.sweep.points import FLOPS_PER_PARAMETER, Points

DENSE = 25  # points between two sizes on Akima's curve


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


def fit(points: Points, budgets: np.ndarray, *, curve: str = "parabola") -> Growth:
    """Fit to runs that are grouped by their nominal budgets (P,) of FLOPs.

    Args:
        curve: parabola, of the loss over ln N; or akima, of ln L over ln N.

    Raises UserError with fewer than 3 budgets that have a lowest point.
    """
    kept, sizes, dropped = [], [], []
    for budget in np.unique(budgets):
        here = points.taken(budgets == budget)
        if len(np.unique(here.parameters)) < 3:
            dropped.append(float(budget))
            continue
        lowest = CURVES[curve](np.log(here.parameters), here.loss)
        if lowest is None:
            dropped.append(float(budget))
            continue
        kept.append(float(budget))
        sizes.append(math.exp(lowest))
    if len(kept) < 3:
        raise UserError(
            f"{len(kept)} of {len(np.unique(budgets))} budgets have their lowest loss among their sizes, and 3 are needed: add "
            "smaller and larger models to the others"
        )
    return growth(np.array(kept), np.array(sizes), dropped=tuple(dropped))


def growth(budgets: np.ndarray, sizes: np.ndarray, *, dropped: tuple[float, ...] = ()) -> Growth:
    """The line through the best sizes (K,) for budgets of FLOPs (K,), in logarithms."""
    exponent, intercept = np.polyfit(np.log(budgets), np.log(sizes), 1)
    return Growth(float(exponent), float(np.exp(intercept)), budgets, sizes, dropped)


def _parabola(x: np.ndarray, loss: np.ndarray) -> float | None:
    """The x at which the parabola of losses is lowest; None if it lies outside the sizes."""
    middle = float(x.mean())
    curve, slope, _ = np.polyfit(x - middle, loss, 2)
    lowest = middle - slope / (2 * curve) if curve > 0 else math.inf
    return float(lowest) if x.min() <= lowest <= x.max() else None


def _akima(x: np.ndarray, loss: np.ndarray) -> float | None:
    """The x at which Akima's curve of ln L is lowest, in 25 steps between neighbours; None if it lies at an end."""
    from scipy.interpolate import Akima1DInterpolator

    places = np.unique(x)
    mean = np.array([np.log(loss[x == place]).mean() for place in places])
    parts = [np.linspace(a, b, DENSE, endpoint=False) for a, b in itertools.pairwise(places)]
    fine = np.concatenate([*parts, places[-1:]])
    lowest = int(np.argmin(Akima1DInterpolator(places, mean)(fine)))
    return float(fine[lowest]) if 0 < lowest < len(fine) - 1 else None


CURVES = {"parabola": _parabola, "akima": _akima}
