"""Execution accuracy: a statement is right if its rows are those of the reference statement."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

TOLERANCE = 1e-6


def same_rows(found: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]], *, ordered: bool) -> bool:
    """Whether two results are equal: columns by position, rows as a multiset or in order, floats to 1e-6."""
    if len(found) != len(wanted):
        return False
    if ordered:
        return all(map(_same_row, found, wanted))
    if Counter(map(_key, found)) == Counter(map(_key, wanted)):
        return True
    left = list(wanted)  # floats near a rounding border have other keys
    for row in found:
        match = next((i for i, other in enumerate(left) if _same_row(row, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _same_row(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(a == b)


def _key(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(round(value, 6) if isinstance(value, float) else value for value in row)
