"""Numbers about texts and predictions equal those of the libraries that everyone quotes, and statistics their formulas."""

import math

import numpy as np
import pytest

from llmjax.eval import metrics, statistics

HYPOTHESES = ["the cat sat on the mat", "a dog barks at night loudly", "hello", ""]
REFERENCES = ["the cat is on the mat", "the dog barks loudly at night", "hello there world", "something"]


def test_bleu_and_chrf_equal_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    assert metrics.bleu(HYPOTHESES, REFERENCES) == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert metrics.bleu(HYPOTHESES, REFERENCES) == sacrebleu.BLEU().corpus_score(HYPOTHESES, [REFERENCES]).score
    assert metrics.chrf(HYPOTHESES, REFERENCES) == sacrebleu.CHRF().corpus_score(HYPOTHESES, [REFERENCES]).score
    plus = sacrebleu.CHRF(word_order=2).corpus_score(HYPOTHESES, [REFERENCES]).score
    assert metrics.chrf(HYPOTHESES, REFERENCES, word_order=2) == plus
    both = [[a, b] for a, b in zip(REFERENCES, reversed(REFERENCES), strict=True)]
    theirs = sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES, REFERENCES[::-1]]).score
    assert metrics.bleu(HYPOTHESES, both) == theirs


def test_rouge_l_equals_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    theirs = [scorer.score(r, h)["rougeL"].fmeasure for h, r in zip(HYPOTHESES, REFERENCES, strict=True)]
    assert metrics.rouge_l(HYPOTHESES, REFERENCES) == pytest.approx(np.mean(theirs), abs=1e-15)
    assert metrics.rouge_l(["a b"], [["c", "a b"]]) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_classification_equals_scikit_learn(seed):
    theirs = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    labels, guesses = rng.integers(0, 4, 60), rng.integers(0, 5, 60)
    labels[labels == 2] = 3  # a class that is guessed but never right
    assert metrics.accuracy(labels, guesses) == theirs.accuracy_score(labels, guesses)
    np.testing.assert_array_equal(
        metrics.confusion_matrix(labels, guesses), theirs.confusion_matrix(labels, guesses, labels=range(5))
    )
    for average in ("macro", "micro", "weighted"):
        ours = metrics.f1(labels, guesses, average=average)
        assert ours == pytest.approx(theirs.f1_score(labels, guesses, average=average, zero_division=0), abs=1e-12)
    a, b = labels % 2, guesses % 2
    assert metrics.f1(a, b, average="binary") == pytest.approx(theirs.f1_score(a, b))


def test_calibration_of_predictions_that_know_themselves_is_zero_and_of_boasters_their_excess():
    assert metrics.calibration_error([0.8] * 10, [True] * 8 + [False] * 2) == pytest.approx(0.0)
    assert metrics.calibration_error([1.0] * 10, [True] * 6 + [False] * 4) == pytest.approx(0.4)
    two = metrics.calibration_error([0.95] * 5 + [0.05] * 5, [True] * 4 + [False] + [False] * 4 + [True])
    assert two == pytest.approx(0.5 * 0.15 + 0.5 * 0.15)


def test_mistaken_calls_are_said():
    with pytest.raises(ValueError, match="one for each"):
        metrics.bleu(["a"], [])
    with pytest.raises(ValueError, match="at least one"):
        metrics.accuracy([], [])
    with pytest.raises(ValueError, match="average="):
        metrics.f1([1], [1], average="mean")
    with pytest.raises(ValueError, match="from 0 to 1"):
        metrics.calibration_error([2.0], [True])
    with pytest.raises(ValueError, match="at least one item"):
        statistics.mean([])


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


def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        low, high = statistics.mean((rng.random(100) < 0.6).astype(float).tolist()).interval
        inside += low <= 0.6 <= high
    assert 0.92 < inside / 400 < 0.98
    sample = rng.normal(3, 1, 200)
    low, high = statistics.bootstrap(lambda i: float(sample[i].mean()), 200)
    assert low < sample.mean() < high and high - low == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.2)


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
