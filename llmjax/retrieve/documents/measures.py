"""Measures of rankings."""

import math
from collections.abc import Collection, Mapping, Sequence


def ndcg(found: Sequence[str], relevant: Mapping[str, float], *, k: int = 10) -> float:
    """Normalised discounted cumulative gain of the first k items (Jaervelin and Kekaelaeinen 2002), with linear gains."""
    gain = sum(relevant.get(item, 0.0) / math.log2(rank + 2) for rank, item in enumerate(found[:k]))
    ideal = sum(g / math.log2(rank + 2) for rank, g in enumerate(sorted(relevant.values(), reverse=True)[:k]))
    return gain / ideal if ideal else 0.0


def recall(found: Sequence[str], relevant: Collection[str], *, k: int) -> float:
    """The share of the relevant items that are among the first k."""
    return len(set(found[:k]) & set(relevant)) / len(relevant) if relevant else 0.0
