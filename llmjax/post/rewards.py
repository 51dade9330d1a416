"""Rewards of sampled answers: functions, and reward models.

`rollout.rewards` names them, each with "=weight" if that is not 1:

    exact_match=0.5          one of those here (`BUILT_IN`)
    my_module:my_function    a function (answer, row) -> number or None
    model:runs/reward        the reward model of a run, with its own tokenizer

`answer` is a text without special tokens, `row` the other columns of the prompt's row in its file, and the prompt itself
under "prompt". None says that the answer cannot be scored: it takes part in no baseline, and is counted. A function
with the mark `batched` gets the lists of all answers and rows at once.
"""

import ast
import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmjax.errors import UserError
from llmjax.infer import language_model
from llmjax.train import folders

Number = float | None
ScoreAll = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Sequence[Number]]
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
MODEL_BATCH = 32  # answers that a reward model scores at a time


class Reward(NamedTuple):
    """One of the rewards: (answers, rows) -> a number or None for each answer, and its weight in the sum."""

    score: ScoreAll
    weight: float


class Scored(NamedTuple):
    """Rewards of S answers: their weighted sum (S,), NaN where no reward gave a number, and each reward's own."""

    total: np.ndarray
    parts: dict[str, np.ndarray]


def batched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a reward that takes all answers and rows at once, (answers, rows) -> numbers, and is asked once a draw."""
    function.batched = True  # type: ignore[attr-defined]
    return function


def parse(given: Sequence[str]) -> dict[str, Reward]:
    """The rewards by name. A reward model is looked up here and read when it first scores.

    Raises UserError for an unknown reward, and for one that is named twice.
    """
    found: dict[str, Reward] = {}
    for text in given:
        where, _, weight = text.rpartition("=") if "=" in text else (text, "", "1")
        module, _, name = where.partition(":")
        try:
            reward = Reward(_model(name) if module == "model" else _function(module, name), float(weight))
            if not math.isfinite(reward.weight):
                raise ValueError(f"its weight is {weight}")
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"rollout.rewards: {text!r} is no reward ({error}): give module:function=weight, model:RUN=weight, or one of "
                f"{', '.join(BUILT_IN)}"
            ) from error
        short = Path(name or module).name
        short = where if short in found else short
        if short in found:
            raise UserError(f"rollout.rewards has {where} twice: give it once, with the weight that you want")
        found[short] = reward
    if not found:
        raise UserError(f"rollout.rewards is empty: name a function, such as {BUILT_IN[0]}")
    return found


def _function(module: str, name: str) -> ScoreAll:
    function = getattr(importlib.import_module(module if name else "llmjax.post.rewards"), name or module)
    if getattr(function, "batched", False):
        return function
    return lambda answers, rows: [function(answer, row) for answer, row in zip(answers, rows, strict=True)]


def _model(run: str) -> ScoreAll:
    """The scores of a reward model, which reads the prompt and the answer as texts, by its own tokenizer and template."""
    try:
        settings = folders.read_meta(folders.newest(Path(run)))["config"]
    except UserError as error:
        raise ValueError(f"{run} holds no trained model: train one with llmjax reward") from error
    if not settings["model"].get("value_head"):
        raise ValueError(f"{run} is a model without a value head, as llmjax reward trains it")
    read = functools.cache(lambda: language_model.load(run))

    def score_all(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        prompts = [row["prompt"] for row in rows]
        return read().reward(answers, prompts=prompts, batch_size=MODEL_BATCH).tolist()

    return score_all


def score(rewards: Mapping[str, Reward], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scored:
    """The rewards of answers, one result an answer and reward, always.

    An exception in a reward ends the run: the user must see the fault, and 0 would be a wrong score.

    Raises UserError for a reward that gives another number of results, or one that is not finite.
    """
    parts = {}
    for name, reward in rewards.items():
        made = reward.score(answers, rows)
        if len(made) != len(answers):
            raise UserError(
                f"the reward {name} gave {len(made)} numbers for {len(answers)} answers: return one for each"
            )
        parts[name] = np.array([np.nan if one is None else _finite(name, one) for one in made])
    weights = np.array([reward.weight for reward in rewards.values()])
    stacked = np.stack(list(parts.values()), axis=1)
    known = ~np.isnan(stacked)
    total = np.where(known.any(axis=1), np.where(known, stacked * weights, 0.0).sum(axis=1), np.nan)
    return Scored(total, parts)


def _finite(name: str, value: Any) -> float:
    if isinstance(value, str) or not math.isfinite(value):
        raise UserError(f"the reward {name} gave {value!r}: return a finite number, or None for what cannot be scored")
    return float(value)


def means(scored: Scored) -> dict[str, float]:
    """The mean of the answers that have a number: of the total under "", and of each reward under its name."""
    parts = {"": scored.total, **scored.parts}
    return {name: float(np.nanmean(values)) for name, values in parts.items() if not np.isnan(values).all()}


def exact_match(answer: str, row: Mapping[str, Any]) -> float | None:
    """1 when the answer equals `answer` of the row, without surrounding white space."""
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
