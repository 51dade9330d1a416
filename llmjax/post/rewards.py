"""Rewards of sampled answers: functions, programs that are run, and reward models.

A reward is a function (answer, row) -> number or None. `answer` is a text without special tokens, `row` the other columns of
the prompt's row in its file. None says that the answer cannot be scored: it takes part in no baseline, and is counted.
`rollout.rewards` names functions by "module:function", each with "=weight" if that is not 1.
"""

import ast
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llmjax.errors import UserError

Reward = Callable[[str, Mapping[str, Any]], float | None]
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


class Scored(NamedTuple):
    """Rewards of S answers: their weighted sum (S,), NaN where no function gave a number, and each function's own."""

    total: np.ndarray
    parts: dict[str, np.ndarray]


def parse(given: Sequence[str]) -> dict[str, tuple[Reward, float]]:
    """Functions with their weights, by name. Raises UserError for one that is not there."""
    found = {}
    for text in given:
        where, _, weight = text.partition("=")
        module, _, name = where.partition(":")
        try:
            function = getattr(importlib.import_module(module if name else "llmjax.post.rewards"), name or module)
            found[name or module] = (function, float(weight or 1))
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"rollout.rewards: {text!r} is no reward ({error}): give module:function=weight, or one of "
                f"{', '.join(BUILT_IN)}"
            ) from error
    if not found:
        raise UserError(f"rollout.rewards is empty: name a function, such as {BUILT_IN[0]}")
    return found


def score(
    functions: Mapping[str, tuple[Reward, float]], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Scored:
    """The rewards of answers, one result an answer and function, always.

    A function that raises ends the run: a reward that fails is a fault to be seen, not a score of 0.
    """
    parts = {}
    for name, (function, _) in functions.items():
        made = [function(answer, row) for answer, row in zip(answers, rows, strict=True)]
        parts[name] = np.array([np.nan if one is None else float(one) for one in made])
    weights = np.array([weight for _, weight in functions.values()])
    stacked = np.stack(list(parts.values()), axis=1)
    known = ~np.isnan(stacked)
    total = np.where(known.any(axis=1), np.where(known, stacked * weights, 0.0).sum(axis=1), np.nan)
    return Scored(total, parts)


def means(scored: Scored) -> dict[str, float]:
    """The mean of the answers that have a number: of the total under "", and of each function under its name."""
    parts = {"": scored.total, **scored.parts}
    return {name: float(np.nanmean(values)) for name, values in parts.items() if not np.isnan(values).all()}


def exact_match(answer: str, row: Mapping[str, Any]) -> float | None:
    """1 when the answer is `answer` of the row, but for white space around it."""
    return None if row.get("answer") is None else float(answer.strip() == str(row["answer"]).strip())


def last_number(answer: str, row: Mapping[str, Any]) -> float | None:
    """1 when the last number in the answer equals the last one in `answer` of the row."""
    wanted, given = (NUMBER.findall(text) for text in (str(row.get("answer", "")), answer))
    if not wanted:
        return None
    return float(bool(given) and float(given[-1].replace(",", "")) == float(wanted[-1].replace(",", "")))


def parses(answer: str, row: Mapping[str, Any]) -> float:
    """1 when the prompt's `code` and the answer together are a Python program."""
    try:
        ast.parse(str(row.get("code", "")) + answer)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    return 1.0


def overlong(length: int, *, longest: int, buffer: int) -> float:
    """DAPO's soft penalty of long answers, in tokens: 0, then down to -1 over the last `buffer` of `longest`."""
    return -float(np.clip((length - (longest - buffer)) / buffer, 0, 1)) if buffer else 0.0


BUILT_IN = ("exact_match", "last_number", "parses")
