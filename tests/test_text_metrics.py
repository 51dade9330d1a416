"""How near texts are to references, against the libraries that people cite."""

import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.eval import text_metrics

TEXTS = ["The cat sat on the mat.", "a b c d", "", "It's 12 o'clock - the same clock!", "b a c a"]
REFERENCES = ["On the mat sat the cat", "a b c d", "words", "The clock says: it's 12", "a b a c a"]


def test_rouge_is_that_of_the_reference_library():
    theirs = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        wanted = np.mean([theirs.score(b, a)[name].fmeasure for a, b in zip(TEXTS, REFERENCES, strict=True)])
        assert text_metrics.METRICS[name](TEXTS, REFERENCES) == pytest.approx(wanted)


def test_the_longest_common_subsequence_is_that_of_the_table():
    def table(a, b):
        row = [0] * (len(b) + 1)
        for x in a:
            new = [0]
            for j, y in enumerate(b):
                new.append(row[j] + 1 if x == y else max(row[j + 1], new[-1]))
            row = new
        return row[-1]

    random = np.random.default_rng(0)
    for _ in range(100):
        a, b = (random.choice(list("abcd"), size=random.integers(0, 9)).tolist() for _ in range(2))
        assert text_metrics.longest_common(a, b) == table(a, b)


def test_equal_texts_have_the_best_score_and_bleu_and_chrf_are_sacrebleus():
    pytest.importorskip("sacrebleu")
    best = {name: function(REFERENCES[:1], REFERENCES[:1]) for name, function in text_metrics.METRICS.items()}
    assert best == pytest.approx(dict.fromkeys(best, 1.0) | {"bleu": 100.0, "chrf": 100.0})
    found = text_metrics.bleu(
        ["a b c d e"], ["a b c d f"]
    )  # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples
    assert found == pytest.approx(100 * 0.2**0.25)
    with pytest.raises(UserError, match="'blue' is not known"):
        text_metrics.check(["blue"])


def test_prompts_that_repeat_each_other_are_less_diverse():
    same = text_metrics.diversity([f"Write a poem about number {i}" for i in range(9)])
    other = text_metrics.diversity(["Write a poem", "Sum up this page", "Why is the sky blue?", "Translate: good day"])
    assert (same.first_words, other.first_words) == (1, 4)
    assert same.alike == 1.0 and other.alike == 0.0 and same.distinct_pairs < other.distinct_pairs == 1.0
    assert "9 prompts begin with 1 different words (most often write 9)" in str(same)
