"""Measures of rankings, and of short answers as SQuAD counts them."""

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence


def ndcg(found: Sequence[str], relevant: Mapping[str, float], *, k: int = 10) -> float:
    """Normalised discounted cumulative gain of the first k items (Jaervelin and Kekaelaeinen 2002), with linear gains."""
    gain = sum(relevant.get(item, 0.0) / math.log2(rank + 2) for rank, item in enumerate(found[:k]))
    ideal = sum(g / math.log2(rank + 2) for rank, g in enumerate(sorted(relevant.values(), reverse=True)[:k]))
    return gain / ideal if ideal else 0.0


def recall(found: Sequence[str], relevant: Collection[str], *, k: int) -> float:
    """The share of the relevant items that are among the first k."""
    return len(set(found[:k]) & set(relevant)) / len(relevant) if relevant else 0.0


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is a reference, after SQuAD's normalisation."""
    return float(any(_normal(answer) == _normal(reference) for reference in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """The largest overlap of the words of the answer with those of a reference, as SQuAD counts it."""

    def one(reference: str) -> float:
        a, b = _normal(answer).split(), _normal(reference).split()
        same = sum((Counter(a) & Counter(b)).values())
        return 2 * same / (len(a) + len(b)) if same else float(a == b)

    return max(map(one, references), default=0.0)


def _normal(text: str) -> str:
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
