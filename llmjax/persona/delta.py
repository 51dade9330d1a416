"""Who wrote a text: Burrows' Delta (2002) and its cosine form (Smith and Aldridge 2011).

The rates of the commonest words of all known texts are standardised over these texts. The Delta of a text to an author is
the mean difference of its scores from those of the author, who is the mean of the author's texts. The cosine form is 1
minus the cosine of both scores.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmjax.errors import UserError
from llmjax.persona.style import words_of

WORDS = 150  # the commonest ones
KINDS = ("burrows", "cosine")


@dataclass(frozen=True)
class Attribution:
    """The standardised word rates of known authors."""

    words: tuple[str, ...]
    mean_W: np.ndarray  # rates of the words over all known texts
    deviation_W: np.ndarray
    authors: Mapping[str, np.ndarray]  # name -> scores (W)

    def distances(self, text: str, *, kind: str = "burrows") -> dict[str, float]:
        """The distance of a text to each author; the smaller, the likelier."""
        score_W = (rates(text, self.words) - self.mean_W) / self.deviation_W
        if kind == "burrows":
            return {name: float(np.abs(score_W - own_W).mean()) for name, own_W in self.authors.items()}
        return {name: _cosine(score_W, own_W) for name, own_W in self.authors.items()}

    def author(self, text: str, *, kind: str = "burrows") -> str:
        """The nearest author."""
        found = self.distances(text, kind=kind)
        return min(found, key=lambda name: (found[name], name))


def fit(texts: Mapping[str, Sequence[str]], *, words: int = WORDS) -> Attribution:
    """Known authors from their texts. Raises UserError for fewer than two authors, or a text without words."""
    if len(texts) < 2 or not all(texts.values()):
        raise UserError("Burrows' Delta compares at least two authors, each with at least one text")
    every = [one for own in texts.values() for one in own]
    counts = Counter(word for one in every for word in words_of(one))
    chosen = tuple(sorted(counts, key=lambda word: (-counts[word], word))[:words])
    rates_TW = np.stack([rates(one, chosen) for one in every])
    mean_W, deviation_W = rates_TW.mean(axis=0), rates_TW.std(axis=0)
    kept = deviation_W > 0  # a word that is as frequent everywhere tells nothing
    if not kept.any():
        raise UserError("the texts of all authors have the same words at the same rates")
    mean_W, deviation_W, rates_TW = mean_W[kept], deviation_W[kept], rates_TW[:, kept]
    scores_TW, authors, first = (rates_TW - mean_W) / deviation_W, dict[str, np.ndarray](), 0
    for name, own in texts.items():
        authors[name] = scores_TW[first : first + len(own)].mean(axis=0)
        first += len(own)
    return Attribution(tuple(np.array(chosen)[kept].tolist()), mean_W, deviation_W, authors)


def rates(text: str, words: Sequence[str]) -> np.ndarray:
    """The share of each of the W words among all words of the text, float64 (W,)."""
    found = Counter(words_of(text))
    total = sum(found.values())
    if not total:
        raise UserError("a text without words has no author")
    return np.array([found[word] / total for word in words])


def _cosine(a_W: np.ndarray, b_W: np.ndarray) -> float:
    size = float(np.linalg.norm(a_W) * np.linalg.norm(b_W))
    return 1.0 - float(a_W @ b_W) / size if size else 1.0


def blocks(texts: Sequence[str], *, words: int = 1000) -> list[str]:
    """The joined texts in blocks of that many words, without the incomplete last block."""
    every = [word for text in texts for word in text.split()]
    return [" ".join(every[i : i + words]) for i in range(0, len(every) - words + 1, words)]
