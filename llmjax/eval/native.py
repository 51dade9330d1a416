"""Multiple-choice tasks with the prompts and scores of lm-evaluation-harness, but without it: fast enough for training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.eval import local_data, prompts
from llmjax.eval.encoding import encode_pairs
from llmjax.eval.leaderboard import SETTINGS, Setting, TaskScore, expand, mmlu
from llmjax.eval.likelihood import Likelihood, score_requests
from llmjax.eval.local_data import MMLU, TaskData
from llmjax.eval.prompts import Question
from llmjax.eval.statistics import mean
from llmjax.infer.language_model import LanguageModel


def can_run(task: str) -> bool:
    """Whether the native runner has the task."""
    return prompts.maker(task) is not None


def evaluate(
    model: LanguageModel,
    tasks: Sequence[str],
    folders: Sequence[str | Path],
    *,
    limit: int = 0,
    max_length: int = 0,
    batch_tokens: int = 0,
    on_scored: Callable[[int, int], None] | None = None,
) -> dict[str, TaskScore]:
    """Score a model on multiple-choice tasks: task -> scores. "mmlu" is all its subjects together.

    The rows of all tasks share batches and programs.

    Args:
        tasks: names such as "arc_challenge", "mmlu", "mmlu_anatomy" or "openllm_v1_4".
        folders: the folders with the questions, see `local_data`.
        limit: the most questions of each task (of each subject of MMLU); 0: all.
        max_length, batch_tokens: see `likelihood.score_requests`.
        on_scored: called with the numbers of choices that are scored and of all.

    Raises:
        UserError: for tasks that the native runner does not have, missing or damaged data, and models that cannot be
            scored.
    """
    names = expand(tasks)
    for name in names:
        if not can_run(name):
            raise UserError(f"{name} is not a task of the native runner, which has {', '.join(prompts.MAKERS)}")
    parts = {name: with_subjects(name, folders) for name in names}
    asked: dict[str, tuple[list[tuple[Question, list[tuple[str, str]]]], TaskData]] = {}
    for part in dict.fromkeys(part for group in parts.values() for part in group):
        chosen = setting_of(part)
        data = local_data.find(part, folders, shots_from=chosen.shots_from)
        asked[part] = prompts.prompts(part, data, chosen, limit=limit), data
    pairs = [pair for rows, _ in asked.values() for _, ways in rows for pair in ways]
    requests = encode_pairs(model.tokenizer, pairs)
    tell = None if on_scored is None else (lambda done: on_scored(done, len(requests)))
    found = iter(score_requests(model, requests, max_length=max_length, batch_tokens=batch_tokens, on_scored=tell))
    scores = {}
    for part, (rows, data) in asked.items():
        items = [item(question, [next(found) for _ in ways]) for question, ways in rows]
        scores[part] = task_score(part, items, data)
    return {name: mmlu([scores[p] for p in group]) if name == MMLU else scores[name] for name, group in parts.items()}


def with_subjects(task: str, folders: Sequence[str | Path]) -> list[str]:
    """The parts of a task: for "mmlu" a task for each subject, else the task alone."""
    return [f"{MMLU}_{subject}" for subject in local_data.subjects(folders)] if task == MMLU else [task]


def setting_of(task: str) -> Setting:
    """The leaderboard's setting of a task of the native runner."""
    return SETTINGS[MMLU if task.startswith(f"{MMLU}_") else task]


def item(question: Question, found: Sequence[Likelihood]) -> dict[str, Any]:
    """The metrics of a question as the harness defines them: acc and acc_norm (per character), or the mass of mc2."""
    sums = np.array([likelihood.sum for likelihood in found])
    made: dict[str, Any] = {"log_likelihoods": sums.tolist()}
    if question.labels:
        weights = np.exp(sums)
        if not weights.sum():  # long answers underflow; the harness gives nan
            weights = np.exp(sums - sums.max())
        # A NumPy number, as in the harness: Python 3.12 and later sum plain floats differently.
        return made | {"acc": np.sum((weights / weights.sum())[np.array(question.labels) == 1])}
    sizes = np.array([float(len(choice)) for choice in question.choices])
    right = float(np.argmax(sums) == question.gold)
    return made | {"acc": right, "acc_norm": float(np.argmax(sums / sizes) == question.gold)}


def task_score(task: str, items: Sequence[dict[str, Any]], data: TaskData) -> TaskScore:
    """The score of a task from the metrics of its questions."""
    chosen = setting_of(task)
    names = (
        ["acc"] if task in ("truthfulqa_mc1", "truthfulqa_mc2", "winogrande") or MMLU in task else ["acc", "acc_norm"]
    )
    metrics = {name: mean([x[name] for x in items]) for name in names}
    rows = [{"id": number, **x} for number, x in enumerate(items)]
    return TaskScore(task, chosen.shots, chosen.metric, metrics, rows, notes(task, chosen, data))


def notes(task: str, chosen: Setting, data: TaskData) -> tuple[str, ...]:
    """Differences from the leaderboard in the examples."""
    if not chosen.shots or not data.leave_one_out:
        return ()
    name = MMLU if task.startswith(f"{MMLU}_") else task
    return (
        f"{name}: the data has no {chosen.shots_from} split, so the {chosen.shots} examples of each question are other "
        f"questions of the {data.asked} split",
    )


def numbers(c: ConfigDict, model: LanguageModel) -> dict[str, float]:
    """ "TASK/METRIC" -> score by `c.eval.tasks`, `data` and `limit`, as training logs it."""
    if not c.eval.tasks:
        return {}
    scores = evaluate(model, c.eval.tasks, c.eval.data, limit=c.eval.limit, max_length=c.eval.context_length)
    return {f"{name}/{metric}": e.value for name, score in scores.items() for metric, e in score.metrics.items()}
