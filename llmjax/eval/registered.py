"""Tasks of `llmjax eval --tasks` beside benchmarks of questions: a name, and the function that runs it.

A function takes (model, folders, limit) and returns a TaskScore. It is named, not imported, so that --help is quick. Rooms
above add theirs to `TASKS`, so that no import goes up.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmjax.eval.leaderboard import TaskScore
    from llmjax.infer.language_model import LanguageModel

TASKS: dict[str, str] = {
    "ifeval": "llmjax.eval.ifeval:evaluate",
    "needle": "llmjax.eval.needle:evaluate",
    "mt_bench_human": "llmjax.eval.mt_bench:human",
    "bbq": "llmjax.eval.social_bias:bbq",
    "crows_pairs": "llmjax.eval.social_bias:crows_pairs",
    "winobias": "llmjax.eval.social_bias:winobias",
}


def evaluate(name: str, model: "LanguageModel", folders: Sequence[str | Path], *, limit: int = 0) -> "TaskScore":
    """The score of a task of `TASKS`."""
    module, _, function = TASKS[name].partition(":")
    found: TaskScore = getattr(importlib.import_module(module), function)(model, folders, limit=limit)
    return found
