"""Scaling laws fitted to runs: L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3).

The fit minimises the sum over runs of a Huber loss of ln L - ln L(N, D). Optimisers that stop at a tolerance stop too
early here: the losses are of the order of 1e-3, and their mean over runs is below the usual tolerances, which moved the
published exponents (Besiroglu et al. 2024). So the objective is a sum, scaled to 1 at the start, with its gradient; the
start comes from variable projection, where E, A and B are solved for exactly; and the end is polished and compared with
fits from other starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize

from llmjax.errors import UserError
from llmjax.sweep.points import FLOPS_PER_PARAMETER, Points

HUBER = 1e-3  # of ln L, from where residuals count linearly
PARAMETERS = 5
INTERVAL = 0.9  # share that an interval holds
COSTLIEST = 0.25  # share of the runs on which a law of the others is tried
STARTS = 24  # other starts, whose share of equal ends is reported
SAME = 1e-6  # relative difference of two objectives that are one optimum
TOLERANCE = {"gtol": 1e-10, "maxiter": 2000}
SIMPLEX = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
SIZE, LENGTH = 1e8, 1e10  # parameters and tokens in these units make the linear problem well conditioned


@dataclass(frozen=True)
class Law:
    """E + A / N^alpha + B / D^beta, losses in the points' own unit."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float = 0.0  # the sum of Huber losses

    def loss(self, parameters: Any, tokens: Any) -> Any:
        return (
            self.E
            + self.A * np.asarray(parameters, float) ** -self.alpha
            + self.B * np.asarray(tokens, float) ** -self.beta
        )

    @property
    def exponent(self) -> float:
        """a of N ~ C^a, the best size for a number of FLOPs."""
        return self.beta / (self.alpha + self.beta)

    def best_size(self, flops: float) -> float:
        """The parameters that give the lowest loss for these FLOPs of training."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        return ratio ** (1 / (self.alpha + self.beta)) * (flops / FLOPS_PER_PARAMETER) ** self.exponent

    def best_tokens(self, flops: float) -> float:
        return flops / FLOPS_PER_PARAMETER / self.best_size(flops)


@dataclass(frozen=True)
class Prediction:
    """The predicted loss of a run that has not been made, and the interval of that run."""

    parameters: float
    tokens: float
    loss: float
    low: float
    high: float

    @property
    def flops(self) -> float:
        return FLOPS_PER_PARAMETER * self.parameters * self.tokens


@dataclass(frozen=True)
class Fit:
    """A fitted law and its diagnostics."""

    law: Law
    points: Points
    dropped: tuple[str, ...]  # points that were left out
    agree: float  # share of other starts that end at the same objective
    resamples: tuple[Law, ...]  # fits of points drawn with replacement
    beyond: tuple[float, ...] = ()  # ln L - ln L(N, D) of the costliest quarter of the runs, by a law of the others

    @property
    def error(self) -> float:
        """The root mean square of ln L - ln L(N, D)."""
        predicted = self.law.loss(self.points.parameters, self.points.tokens)
        return float(np.sqrt(np.mean(np.square(np.log(self.points.loss / predicted)))))

    def interval(self, of: Callable[[Law], float], *, share: float = INTERVAL) -> tuple[float, float]:
        """The interval that holds the share `share` of the resampled values of `of`."""
        values = [of(law) for law in self.resamples]
        low, high = np.percentile(values, [50 - 50 * share, 50 + 50 * share])
        return float(low), float(high)

    def predict(self, parameters: float, tokens: float, *, share: float = INTERVAL) -> Prediction:
        """The loss of one more run, with an interval for that single run, not for the mean.

        The interval holds that share of all sums of ln L by a resampled law and a residual of the fit. Residuals are
        scaled for the constants that were fitted to them. The interval does not cover an error of the law's form far
        beyond the fitted runs.

        Raises:
            UserError: for a fit without resamples.
        """
        if not self.resamples:
            raise UserError("a prediction needs its interval: give --resamples 100 or more")
        points, runs = self.points, len(self.points)
        residuals = np.log(points.loss / self.law.loss(points.parameters, points.tokens))
        residuals *= np.sqrt(runs / (runs - PARAMETERS))
        laws = np.log([float(law.loss(parameters, tokens)) for law in self.resamples])
        low, high = np.exp(np.percentile(laws[:, None] + residuals, [50 - 50 * share, 50 + 50 * share]))
        return Prediction(
            float(parameters), float(tokens), float(self.law.loss(parameters, tokens)), float(low), float(high)
        )


def fit(points: Points, *, drop_highest: int = 0, resamples: int = 1000, seed: int = 42, delta: float = HUBER) -> Fit:
    """Fit the law to runs.

    Args:
        drop_highest: leave out this many of the highest losses, and every loss equal to the lowest of them; 0: none.
        resamples: of the bootstrap over runs; 0: no intervals, and no trial on the costliest runs.

    Raises:
        UserError: with fewer runs than there are constants to fit, when they have too few sizes or lengths, or when their
            losses do not fall with both.
    """
    keep = np.ones(len(points), bool)
    if drop_highest:
        if drop_highest >= len(points):
            raise UserError(f"--drop-highest {drop_highest} leaves none of the {len(points)} runs")
        keep = points.loss < np.sort(points.loss)[-drop_highest]
    dropped = tuple(name for name, kept in zip(points.names, keep, strict=True) if not kept)
    points = points.taken(keep)
    found, same = _optimum(points, seed, delta)
    n, d, y = np.log(points.parameters), np.log(points.tokens), np.log(points.loss)
    draws = np.random.RandomState(seed)
    drawn = []
    for _ in range(resamples):
        i = draws.choice(len(y), size=len(y), replace=True)
        drawn.append(_law(*_minimised(found[0], n[i], d[i], y[i], delta)))
    beyond = _beyond(points, seed, delta) if resamples else ()
    return Fit(_law(*found), points, dropped, same, tuple(drawn), beyond)


def _optimum(points: Points, seed: int, delta: float) -> tuple[tuple[np.ndarray, float], float]:
    """The best constants with their objective, and the share of other starts that end there. Raises UserError as `fit` does."""
    if len(points) <= PARAMETERS:
        raise UserError(f"{len(points)} runs cannot hold {PARAMETERS} constants: give {4 * PARAMETERS} or more")
    for name, values in (("sizes", points.parameters), ("numbers of tokens", points.tokens)):
        if len(np.unique(values)) < 3:
            raise UserError(f"the runs have {len(np.unique(values))} {name}: an exponent needs 3 or more")
    n, d, y = np.log(points.parameters), np.log(points.tokens), np.log(points.loss)
    best = _minimised(_projected(points), n, d, y, delta)
    others = [_minimised(start, n, d, y, delta) for start in _starts(seed)]
    found = _minimised(min([best, *others], key=lambda one: one[1])[0], n, d, y, delta, polish=True)
    same = np.mean([value - found[1] < SAME * max(found[1], 1e-9) for _, value in others])
    if min(found[0][3:]) <= 0:
        raise UserError(
            f"the best exponents are alpha={found[0][3]:.3g} and beta={found[0][4]:.3g}, which are no law: the losses do not fall "
            "with size and with tokens; check the columns, or add runs"
        )
    return found, float(same)


def _beyond(points: Points, seed: int, delta: float) -> tuple[float, ...]:
    """ln L - ln L(N, D) of the costliest quarter of the runs, by a law fitted to the others; () if no law fits the
    others."""
    costliest = points.flops > np.quantile(points.flops, 1 - COSTLIEST)
    try:
        (x, value), _ = _optimum(points.taken(~costliest), seed, delta)
    except UserError:
        return ()
    rest = points.taken(costliest)
    return tuple(np.log(rest.loss / _law(x, value).loss(rest.parameters, rest.tokens)).tolist())


def objective(x: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
    """The sum of Huber losses at x = (ln A, ln B, ln E, alpha, beta), and its gradient; n, d, y are ln N, ln D, ln L."""
    terms = np.stack([x[0] - x[3] * n, x[1] - x[4] * d, np.full_like(n, x[2])])
    highest = terms.max(axis=0)
    powers = np.exp(terms - highest)
    total = powers.sum(axis=0)
    residual = y - highest - np.log(total)
    inside = np.abs(residual) <= delta
    value = np.where(inside, 0.5 * residual**2, delta * (np.abs(residual) - 0.5 * delta)).sum()
    slope = -np.where(inside, residual, delta * np.sign(residual)) * powers / total
    return float(value), np.array([slope[0].sum(), slope[1].sum(), slope[2].sum(), -slope[0] @ n, -slope[1] @ d])


def _minimised(
    start: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, delta: float, *, polish: bool = False
) -> tuple[np.ndarray, float]:
    """The minimum near a start, by BFGS on an objective scaled to 1, twice; `polish` goes on with a simplex."""
    x = np.asarray(start, float)
    with np.errstate(over="ignore", invalid="ignore"):
        for simplex in (False, False, True)[: 2 + polish]:
            scale = max(objective(x, n, d, y, delta)[0], 1e-12)

            def scaled(x: np.ndarray, scale: float = scale) -> tuple[float, np.ndarray]:
                value, gradient = objective(x, n, d, y, delta)
                return value / scale, gradient / scale

            if simplex:
                x = optimize.minimize(lambda x: scaled(x)[0], x, method="Nelder-Mead", options=SIMPLEX).x
            else:
                x = optimize.minimize(scaled, x, jac=True, method="BFGS", options=TOLERANCE).x
    return x, objective(x, n, d, y, delta)[0]


def _projected(points: Points) -> np.ndarray:
    """A start: for given exponents E, A and B are a non-negative least squares problem, so only two numbers are searched."""
    n, d = points.parameters / SIZE, points.tokens / LENGTH

    def solved(exponents: np.ndarray) -> tuple[np.ndarray, float]:
        alpha, beta = exponents
        return optimize.nnls(np.stack([np.ones_like(n), n**-alpha, d**-beta], axis=1), points.loss)

    grid = [(a, b) for a in np.linspace(0.1, 0.8, 8) for b in np.linspace(0.1, 0.8, 8)]
    begin = min(grid, key=lambda exponents: solved(np.array(exponents))[1])
    alpha, beta = optimize.minimize(lambda x: solved(x)[1], begin, method="Nelder-Mead").x
    (E, A, B), _ = solved(np.array([alpha, beta]))
    least = 1e-6 * float(points.loss.min())
    return np.array(
        [np.log(max(A, least) * SIZE**alpha), np.log(max(B, least) * LENGTH**beta), np.log(max(E, least)), alpha, beta]
    )


def _starts(seed: int) -> np.ndarray:
    """Other starts, spread over the usual constants of language models."""
    draws = np.random.default_rng(seed).random((STARTS, PARAMETERS))
    low, high = np.array([0.0, 0.0, -1.0, 0.1, 0.1]), np.array([15.0, 15.0, 1.0, 0.8, 0.8])
    return low + draws * (high - low)


def _law(x: np.ndarray, value: float) -> Law:
    A, B, E = (float(v) for v in np.exp(x[:3]))
    return Law(E, A, B, float(x[3]), float(x[4]), value)
