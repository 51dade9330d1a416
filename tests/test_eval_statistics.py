"""Statistics of scores equal their formulas, and their intervals hold the truth as often as they say."""

import math

import numpy as np
import pytest

from llmjax.eval import statistics


def test_standard_errors_and_their_sums():
    items = [1.0] * 30 + [0.0] * 10
    found = statistics.mean(items)
    assert found.value == 0.75
    assert found.error == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    low, high = found.interval
    assert low == pytest.approx(0.75 - 1.96 * found.error, abs=1e-4) and high > 0.75
    together = statistics.mean_by_size([statistics.mean(items[:20]), statistics.mean(items[20:])])
    assert together.value == 0.75 and together.count == 40
    assert statistics.mean_of_means([found, found]).error == pytest.approx(found.error / math.sqrt(2))
    assert math.isnan(statistics.mean([1.0]).error)
    with pytest.raises(ValueError, match="at least one item"):
        statistics.mean([])


def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        low, high = statistics.mean((rng.random(100) < 0.6).astype(float).tolist()).interval
        inside += low <= 0.6 <= high
    assert 0.92 < inside / 400 < 0.98


def test_the_paired_tests_find_what_is_there_and_nothing_else():
    rng = np.random.default_rng(1)
    hard = rng.random(300)
    a = (hard < 0.5).astype(float)
    b = np.where(rng.random(300) < 0.12, 1.0, a)  # like a, and some more
    better = statistics.compare_paired(a, b, draws=2000)
    assert better.difference > 0 and better.interval[0] > 0
    assert better.bootstrap < 0.01 and better.mcnemar < 0.01 and better.only_a == 0
    same = statistics.compare_paired(a, rng.permutation(a), draws=2000)
    assert same.mcnemar > 0.05 and same.bootstrap > 0.05
    graded = statistics.compare_paired(rng.random(10), rng.random(10), draws=100)
    assert math.isnan(graded.mcnemar)
    with pytest.raises(ValueError, match="cannot be paired"):
        statistics.compare_paired([1.0], [])


def test_mcnemar_is_the_binomial_test():
    scipy = pytest.importorskip("scipy.stats")
    for a, b in ((0, 5), (3, 9), (7, 7), (0, 0), (12, 2)):
        theirs = scipy.binomtest(a, a + b).pvalue if a + b else 1.0
        assert statistics.exact_mcnemar(a, b) == pytest.approx(theirs)
