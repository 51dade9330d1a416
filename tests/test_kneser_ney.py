"""The Kneser-Ney baseline: probabilities sum to one, and equal those of a slow reference written from the paper."""

import math
from collections import Counter

import kneser_ney
import numpy as np
import pytest

BOS, EOS = 1, 2
VOCAB_SIZE = 12


def _documents(seed: int, *, count: int) -> list[list[int]]:
    """Random documents, one of them empty, whose tokens follow a skewed law so that all counts of counts occur."""
    generator = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, VOCAB_SIZE - 4) ** 1.5  # the last id never occurs
    lengths = [0, *generator.integers(1, 12, size=count - 1)]
    return [generator.choice(np.arange(4, VOCAB_SIZE - 1), size=n, p=weights / weights.sum()).tolist() for n in lengths]


def _stream(documents: list[list[int]]) -> np.ndarray:
    return np.array([token for document in documents for token in (BOS, *document, EOS)], np.uint16)


class Reference:
    """Interpolated modified Kneser-Ney in dictionaries, formula by formula (Chen and Goodman 1998, section 3)."""

    def __init__(self, documents: list[list[int]], *, order: int) -> None:
        sequences = [(BOS, *document, EOS) for document in documents]
        self.order = order
        self.counts: dict[int, Counter] = {}
        for n in range(1, order + 1):
            grams = Counter(s[i - n + 1 : i + 1] for s in sequences for i in range(1, len(s)) if i - n + 1 >= 0)
            if n < order:
                longer = {s[i - n : i + 1] for s in sequences for i in range(n, len(s))}
                preceding = Counter(gram[1:] for gram in longer)
                grams = Counter({g: c if g[0] == BOS else preceding[g] for g, c in grams.items()})
            self.counts[n] = grams
        self.discounts = {n: self._discounts(n) for n in self.counts}

    def _discounts(self, n: int) -> list[float]:
        n1, n2, n3, n4 = (sum(c == k for c in self.counts[n].values()) for k in (1, 2, 3, 4))
        if not (n1 and n2 and n3 and n4):
            return [0.0, 0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        estimate = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return estimate if all(0 < estimate[k] <= k for k in (1, 2, 3)) else [0.0, 0.5, 1.0, 1.5]

    def probability(self, token: int, history: tuple[int, ...]) -> float:
        history = history[max(0, len(history) - self.order + 1) :]
        n = len(history) + 1
        lower = self.probability(token, history[1:]) if history else 1.0 / VOCAB_SIZE
        followers = {g: c for g, c in self.counts[n].items() if g[:-1] == history}
        total = sum(followers.values())
        if total == 0:
            return lower
        discount = self.discounts[n]
        count = followers.get((*history, token), 0)
        mass = sum(discount[min(c, 3)] for c in followers.values())
        return (count - discount[min(count, 3)] + mass * lower) / total


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_scores_equal_a_slow_reference_written_from_the_paper(order: int) -> None:
    train, heldout = _documents(0, count=60), _documents(1, count=12)
    heldout.append([VOCAB_SIZE - 1, 4, VOCAB_SIZE - 1])  # a token never seen in training
    levels = list(kneser_ney.fit(_stream(train), order=order, vocab_size=VOCAB_SIZE))
    scores = kneser_ney.score(levels, _stream(heldout), vocab_size=VOCAB_SIZE)

    reference = Reference(train, order=order)
    expected = []
    for document in heldout:
        sequence = (BOS, *document, EOS)
        expected.append(0.0)  # <bos> is not scored
        expected += [math.log(reference.probability(sequence[i], sequence[:i])) for i in range(1, len(sequence))]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)
    if order >= 3:  # shorter n-grams over so few tokens are all frequent
        assert any(level.estimated for level in levels), "the corpus must be rich enough to estimate discounts from"


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("history", [(), (4,), (4, 4), (4, 5, 4, 6), (VOCAB_SIZE - 1,), (4, VOCAB_SIZE - 1, 5)])
def test_probabilities_over_the_whole_vocabulary_sum_to_one(order: int, history: tuple[int, ...]) -> None:
    levels = list(kneser_ney.fit(_stream(_documents(2, count=80)), order=order, vocab_size=VOCAB_SIZE))
    last = [
        kneser_ney.score(levels, np.array((BOS, *history, token)), vocab_size=VOCAB_SIZE)[-1]
        for token in range(VOCAB_SIZE)
        if token != BOS
    ]
    # A <bos> in a stream begins a document and is not scored. Its probability is that of <pad>, never seen either.
    total = np.exp(last).sum() + np.exp(last[0])
    assert total == pytest.approx(1.0, abs=1e-12)


def test_no_document_is_scored_with_the_text_of_the_one_before() -> None:
    levels = list(kneser_ney.fit(_stream(_documents(3, count=60)), order=4, vocab_size=VOCAB_SIZE))
    documents = _documents(4, count=8)
    together = kneser_ney.score(levels, _stream(documents), vocab_size=VOCAB_SIZE)
    apart = [kneser_ney.score(levels, _stream([document]), vocab_size=VOCAB_SIZE) for document in documents]
    np.testing.assert_array_equal(together, np.concatenate(apart))


def test_a_stream_that_is_no_stream_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="llmjax tokenizer"):
        kneser_ney.fit(np.array([4, 5, EOS]), order=2, vocab_size=VOCAB_SIZE)
    with pytest.raises(ValueError, match="disagree"):
        kneser_ney.fit(np.array([BOS, VOCAB_SIZE, EOS]), order=2, vocab_size=VOCAB_SIZE)
