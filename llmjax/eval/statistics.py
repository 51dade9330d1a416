"""How sure a score is, and whether two models differ: standard errors, intervals and paired tests of per-item scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmjax.errors import UserError

NORMAL_95 = 1.959963984540054  # of a normal distribution, 95 % lies within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` items with its standard error; nan where a single item says nothing about the spread."""

    value: float
    error: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval by the normal approximation."""
        return self.value - NORMAL_95 * self.error, self.value + NORMAL_95 * self.error


def mean(items: Sequence[float]) -> Estimate:
    """The mean of items that are a sample of a task's questions: error = standard deviation (n - 1) / sqrt(n)."""
    if not items:
        raise UserError("a score needs at least one item")
    value = sum(items) / len(items)
    if len(items) == 1:
        return Estimate(value, math.nan, 1)
    spread = math.sqrt(sum([(x - value) ** 2 for x in items]) / (len(items) - 1))
    return Estimate(value, spread / math.sqrt(len(items)), len(items))


def mean_of_means(parts: Sequence[Estimate]) -> Estimate:
    """Every part counts the same: value = mean, error = sqrt(sum of squared errors) / k."""
    error = math.sqrt(sum([p.error**2 for p in parts])) / len(parts)
    return Estimate(sum([p.value for p in parts]) / len(parts), error, sum(p.count for p in parts))


def mean_by_size(parts: Sequence[Estimate]) -> Estimate:
    """Every item counts the same: weighted by count, error by the pooled variance, as lm-evaluation-harness does."""
    count = sum(p.count for p in parts)
    value = sum([p.value * p.count for p in parts]) / count
    if count == len(parts):
        return Estimate(value, math.nan, count)
    pooled = sum([(p.count - 1) * p.error**2 * p.count for p in parts]) / (count - len(parts))
    return Estimate(value, math.sqrt(pooled / count), count)


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, *, draws: int = 1000, seed: int = 0, share: float = 0.95
) -> tuple[float, float]:
    """The percentile interval of `statistic(indices)` over resamples of `count` items with replacement (Efron 1979).

    Resamples for which the statistic is nan are left out.
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, count, count)) for _ in range(draws)])
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items: the mean difference b - a, its 95 % interval, and probabilities of as much by chance.

    `mcnemar` is nan where the items are not right or wrong.
    """

    difference: float
    error: float
    interval: tuple[float, float]
    bootstrap: float
    mcnemar: float
    only_a: int
    only_b: int
    count: int


def compare_paired(a: Sequence[float], b: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> Comparison:
    """Compare per-item scores of two models, which must be of the same items in the same order.

    The bootstrap resamples items with both their scores (Koehn 2004); its probability is two-sided, of the differences
    moved to a mean of zero. McNemar's test (1947) is the exact one: among the items that one model alone has right,
    each is as likely to be the better under the null hypothesis.

    Raises UserError when the numbers of items differ or there is none.
    """
    if len(a) != len(b) or not len(a):
        raise UserError(f"{len(a)} and {len(b)} items cannot be paired: score both models on the same items")
    differences = np.asarray(b, float) - np.asarray(a, float)
    count = len(differences)
    observed = float(differences.mean())
    rng = np.random.default_rng(seed)
    means = np.array([differences[rng.integers(0, count, count)].mean() for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975])
    extreme = int((np.abs(means - observed) >= abs(observed) - 1e-12).sum())
    binary = set(np.unique([*a, *b])) <= {0.0, 1.0}
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    return Comparison(
        difference=observed,
        error=float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
        interval=(float(low), float(high)),
        bootstrap=(extreme + 1) / (draws + 1),
        mcnemar=exact_mcnemar(only_a, only_b) if binary else math.nan,
        only_a=only_a,
        only_b=only_b,
        count=count,
    )


def exact_mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided binomial probability of a split at least as uneven as this one, each item a fair coin."""
    total, least = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(total, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**total)
