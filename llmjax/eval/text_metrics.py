"""How near written texts are to references: exact match, BLEU, chrF, ROUGE; and how much prompts differ from each other."""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llmjax.errors import UserError

WORD = re.compile(r"[a-z0-9]+|[^\W_]")  # ROUGE's words of ASCII; of other scripts every character


def exact_match(texts: Sequence[str], references: Sequence[str]) -> float:
    """The share of texts that are their reference, but for white space around them."""
    return float(np.mean([a.strip() == b.strip() for a, b in zip(texts, references, strict=True)]))


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all texts together (Papineni et al. 2002), 0 to 100, as sacrebleu computes it by default (Post 2018)."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(texts), [list(references)]).score)


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """chrF of all texts together (Popovic 2015), 0 to 100, as sacrebleu computes it by default."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(texts), [list(references)]).score)


def rouge_n(text: str, reference: str, n: int) -> float:
    """ROUGE-N (Lin 2004): the harmonic mean of precision and recall of runs of n words, 0 to 1."""
    ours, theirs = (_runs(words(one), n) for one in (text, reference))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): the same of the longest common subsequence of words."""
    return _rouge_l(words(text), words(reference))


def words(text: str) -> list[str]:
    """The words of a text as ROUGE compares them."""
    return WORD.findall(text.lower())


def _rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    return _f1(longest_common(a, b), len(a), len(b))


def _runs(found: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))


def _f1(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs) if shared else 0.0


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, by the bits of a number for each word of `b` (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    whole = (1 << len(a)) - 1
    left = whole
    for word in b:
        found = left & places.get(word, 0)
        left = ((left + found) | (left - found)) & whole
    return len(a) - left.bit_count()


def _mean_of(score: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[str]], float]:
    return lambda texts, references: float(np.mean([score(a, b) for a, b in zip(texts, references, strict=True)]))


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "chrf": chrf,
    "rouge1": _mean_of(lambda a, b: rouge_n(a, b, 1)),
    "rouge2": _mean_of(lambda a, b: rouge_n(a, b, 2)),
    "rougeL": _mean_of(rouge_l),
}


def check(names: Sequence[str]) -> None:
    """Raise UserError for a name that is no metric, or whose library is missing."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"eval.texts: {name!r} is not known: give {', '.join(METRICS)}")
        if name in ("bleu", "chrf") and importlib.util.find_spec("sacrebleu") is None:
            raise UserError(f"eval.texts: {name} needs sacrebleu: pip install llmjax[eval]")


class Diversity(NamedTuple):
    """How much prompts differ from each other."""

    prompts: int
    first_words: int  # different ones: of instructions mostly verbs
    commonest: list[tuple[str, int]]
    distinct_pairs: float  # share of pairs of neighbouring words that are different
    nearest: float  # the median over prompts of the largest ROUGE-L to another one
    alike: float  # the share of prompts for which that is above 0.7, Self-Instruct's limit (Wang et al. 2022)

    def __str__(self) -> str:
        said = ", ".join(f"{word} {count}" for word, count in self.commonest)
        return (
            f"{self.prompts:,} prompts begin with {self.first_words:,} different words (most often {said}); {self.distinct_pairs:.0%} of "
            f"their pairs of words are different; ROUGE-L to the nearest other prompt: median {self.nearest:.2f}, above 0.7 for "
            f"{self.alike:.0%}"
        )


def diversity(prompts: Sequence[str], *, most: int = 500, seed: int = 0) -> Diversity:
    """Measure prompts; the nearest ones are looked for among at most `most` of them, drawn at random.

    Raises ValueError for fewer than two prompts.
    """
    found = [words(prompt) for prompt in prompts if prompt.strip()]
    if len(found) < 2:
        raise ValueError("diversity is of two prompts or more")
    first = Counter(one[0] for one in found if one)
    pairs = sum((_runs(one, 2) for one in found), Counter[tuple[str, ...]]())
    chosen = np.random.default_rng(seed).permutation(len(found))[:most]
    some = [found[i] for i in chosen]
    nearest = [max(_rouge_l(a, b) for j, b in enumerate(some) if j != i) for i, a in enumerate(some)]
    return Diversity(
        len(found), len(first), first.most_common(5), len(pairs) / max(pairs.total(), 1), float(np.median(nearest)),
        float(np.mean(np.array(nearest) > 0.7)),
    )  # fmt: skip
