"""Benchmarks by name: the runner of each, the printed table, and the files in a run's folder.

RUN/eval/tasks.json has the scores with their standard errors. RUN/eval/items.jsonl has the score of every question, for
paired comparisons of runs (`report/scores.py`).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import storage
from llmjax.errors import UserError
from llmjax.eval import code, contamination, harness, mt_bench, native, registered
from llmjax.eval.contamination import Contamination
from llmjax.eval.leaderboard import TaskScore, aggregates, expand
from llmjax.eval.statistics import Estimate
from llmjax.infer.language_model import LanguageModel
from llmjax.progress import counter

SCORES, ITEMS = "tasks.json", "items.jsonl"
RUNNERS = ("auto", "harness")


def run(c: ConfigDict, model: LanguageModel, workdir: Path, *, allow_code_execution: bool = False) -> dict[str, float]:
    """Run `c.eval.tasks` and write the scores to WORKDIR/eval: "TASK/METRIC" -> score, "TASK/METRIC_error" -> error.

    Raises:
        UserError: for unknown tasks and settings, missing data, or code that may not be run.
    """
    names, folders = expand(c.eval.tasks), tuple(c.eval.data)
    scores = evaluate(c, model, names, folders, allow_code_execution=allow_code_execution)
    seen = {}
    if c.eval.contamination:
        seen = contamination.check([name for name in names if not _generic(name)], folders, workdir)
    print("\n".join(table(scores, seen, folders)))
    write(workdir / "eval", c, model, scores, seen)
    found: dict[str, float] = {}
    for name, estimate in [(f"{task}/{m}", e) for task, s in scores.items() for m, e in s.metrics.items()]:
        found |= {name: estimate.value} | ({} if math.isnan(estimate.error) else {f"{name}_error": estimate.error})
    return found | {name: estimate.value for name, estimate in aggregates(scores).items()}


def check(
    c: ConfigDict, names: Sequence[str] | None = None, *, allow_code_execution: bool
) -> tuple[list[str], list[str], list[str]]:
    """The names for each runner: (programs, native, harness); all others are of `registered.TASKS`.

    `names`: in place of `c.eval.tasks`.

    Raises:
        UserError: for an unknown name or runner, programs that may not be run, and a harness that is not installed.
    """
    names = expand(c.eval.tasks) if names is None else names
    if c.eval.runner not in RUNNERS:
        raise UserError(f"eval.runner={c.eval.runner!r} is not known: give {' or '.join(RUNNERS)}")
    programs = [name for name in names if name in code.TASKS]
    if programs and not allow_code_execution:
        raise UserError(f"{programs[0]}: {code.REFUSAL}")
    ours = [n for n in names if native.can_run(n) and n not in programs and c.eval.runner == "auto" and not c.eval.chat]
    own = (*registered.TASKS, mt_bench.TASK) if c.eval.runner == "auto" else ()
    theirs = [n for n in names if n not in (*programs, *ours, *own)]
    if theirs:
        harness.require()
    return programs, ours, theirs


def evaluate(
    c: ConfigDict,
    model: LanguageModel,
    names: Sequence[str],
    folders: Sequence[str | Path],
    *,
    allow_code_execution: bool = False,
) -> dict[str, TaskScore]:
    """Task -> scores, in the order of the names."""
    programs, ours, theirs = check(c, names, allow_code_execution=allow_code_execution)
    scores: dict[str, TaskScore] = {}
    settings: dict[str, Any] = {"limit": c.eval.limit}
    if ours:
        more = {**settings, "max_length": c.eval.context_length, "on_scored": counter("scoring choices")}
        scores |= native.evaluate(model, ours, folders, **more)
    if theirs:
        adapter = harness.make_model(model, max_length=c.eval.context_length, on_scored=counter("scoring requests"))
        scores |= harness.evaluate(adapter, theirs, folders, chat=c.eval.chat, **settings)
    for name in programs:
        scores[name] = code.evaluate(
            model, name, folders, allow_code_execution=allow_code_execution, samples=c.eval.samples, ks=c.eval.pass_at,
            temperature=c.eval.temperature, seed=c.seed, on_written=counter("writing programs"), **settings,
        )  # fmt: skip
    for name in [name for name in names if name not in (*programs, *ours, *theirs)]:
        if name == mt_bench.TASK:
            judged = {"where": c.eval.judge, "against": c.eval.judge_against}
            scores[name] = mt_bench.evaluate(model, folders, limit=c.eval.limit, **judged)
        else:
            scores[name] = registered.evaluate(name, model, folders, limit=c.eval.limit)
    return {name: scores[name] for name in names}


def table(
    scores: dict[str, TaskScore], seen: dict[str, Contamination], folders: Sequence[str | Path] = ()
) -> list[str]:
    """The lines to print: scores with standard errors and 95 % intervals, then notes and contamination."""
    lines = [f"{'task':<18} {'shots':>5} {'metric':<22} {'score':>7} {'error':>6}  95 % interval    questions"]
    for name, score in scores.items():
        ordered = sorted(score.metrics.items(), key=lambda item: item[0] != score.main)
        for i, (metric, e) in enumerate(ordered):
            first = f"{name:<18} {score.shots:>5}" if not i else " " * 24
            lines.append(f"{first} {metric:<22} {_numbers(e)} {e.count:>9}")
    for name, e in aggregates(scores).items():
        lines.append(f"{name:<18} {'':>5} {'mean of the tasks':<22} {_numbers(e)} {e.count:>9}")
    lines += [f"note: {note}" for note in dict.fromkeys(note for score in scores.values() for note in score.notes)]
    for name, found in seen.items():
        clean = contamination.clean_score(scores[name], found, folders)
        lines.append(f"contamination: {name}: {found}" + (f"; on the others {clean.value:.4f}" if clean else ""))
    return lines


def _numbers(e: Estimate) -> str:
    if math.isnan(e.error):
        return f"{e.value:>7.4f} {'?':>6}  {'':<16}"
    low, high = e.interval
    return f"{e.value:>7.4f} {e.error:>6.4f}  {f'[{low:.4f}, {high:.4f}]':<16}"


def write(
    folder: Path, c: ConfigDict, model: LanguageModel, scores: dict[str, TaskScore], seen: dict[str, Contamination]
) -> None:
    """Write the scores and the items."""
    kept = {
        "checkpoint_step": model.step,
        "settings": {name: c.eval[name] for name in ("limit", "runner", "chat", "context_length")},
        "aggregates": {name: asdict(e) for name, e in aggregates(scores).items()},
        "tasks": {
            name: {
                "shots": score.shots,
                "main": score.main,
                "metrics": {metric: asdict(e) for metric, e in score.metrics.items()},
                "notes": list(score.notes),
                "seen_in_training": sorted(seen[name].seen) if name in seen else None,
            }
            for name, score in scores.items()
        },
    }
    rows = [{"task": name, **item} for name, score in scores.items() for item in _parts(score)]
    storage.write_text(folder / ITEMS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    storage.write_json(folder / SCORES, _plain(kept))


def _plain(value: Any) -> Any:
    """The value with None in place of nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _parts(score: TaskScore) -> list[dict[str, Any]]:
    """The items, with "part" (a subject of MMLU) in place of their own "task"."""
    return [
        {"part": item.get("task", score.task), **{k: v for k, v in item.items() if k != "task"}} for item in score.items
    ]


def _generic(task: str) -> bool:
    """Whether only the harness has the task, so that its files may have any format."""
    return not (native.can_run(task) or task in (*code.TASKS, "gsm8k"))
