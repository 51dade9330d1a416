"""Standard errors and intervals of scores, and paired tests of two models on the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmjax.errors import UserError

NORMAL_95 = 1.959963984540054  # 95 % of a normal distribution is within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` items with its standard error, which is nan for a single item."""

    value: float
    error: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval by the normal approximation."""
        return self.value - NORMAL_95 * self.error, self.value + NORMAL_95 * self.error


def mean(items: Sequence[float]) -> Estimate:
    """The mean of a sample of items: error = standard deviation (with n - 1) / sqrt(n)."""
    if not items:
        raise UserError("a score needs at least one item")
    value = sum(items) / len(items)
    if len(items) == 1:
        return Estimate(value, math.nan, 1)
    spread = math.sqrt(sum([(x - value) ** 2 for x in items]) / (len(items) - 1))
    return Estimate(value, spread / math.sqrt(len(items)), len(items))


def mean_of_means(parts: Sequence[Estimate]) -> Estimate:
    """The mean in which every part has equal weight: error = sqrt(sum of squared errors) / k."""
    error = math.sqrt(sum([p.error**2 for p in parts])) / len(parts)
    return Estimate(sum([p.value for p in parts]) / len(parts), error, sum(p.count for p in parts))


def mean_by_size(parts: Sequence[Estimate]) -> Estimate:
    """The mean in which every item has equal weight, with the error of the pooled variance as in lm-evaluation-harness."""
    count = sum(p.count for p in parts)
    value = sum([p.value * p.count for p in parts]) / count
    if count == len(parts):
        return Estimate(value, math.nan, count)
    pooled = sum([(p.count - 1) * p.error**2 * p.count for p in parts]) / (count - len(parts))
    return Estimate(value, math.sqrt(pooled / count), count)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items: the mean difference b - a, its 95 % interval, and p-values of two tests.

    `mcnemar` is nan if items are not simply right or wrong.
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
    """Compare the scores of two models on the same items in the same order.

    The bootstrap resamples items with both their scores (Koehn 2004). Its p-value is two-sided, for differences shifted to
    a mean of zero. McNemar's test (1947) is exact: by the null hypothesis, an item that only one model has right is
    equally likely to be of either model.

    Raises UserError if the numbers of items differ, or are 0.
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
    """The two-sided binomial probability of a split at least as uneven as this one, if each item is a fair coin."""
    total, least = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(total, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**total)
