"""Task scores of several runs side by side, each compared with the first run question by question."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmjax import storage
from llmjax.errors import UserError
from llmjax.eval.local_data import read
from llmjax.eval.statistics import Comparison, compare_paired
from llmjax.eval.tasks import ITEMS, SCORES


def read_scores(run: Path) -> dict[str, Any]:
    """RUN/eval/tasks.json, or {} if no tasks were run. Raises UserError for a damaged file."""
    path = run / "eval" / SCORES
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(storage.read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run `llmjax eval --tasks NAME` again") from error
    return found


def read_items(run: Path) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """Task -> (part, id) -> item, of RUN/eval/items.jsonl."""
    path = run / "eval" / ITEMS
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in read(path) if path.is_file() else ():
        found.setdefault(row["task"], {})[str(row.get("part", row["task"])), str(row["id"])] = row
    return found


def compare_runs(first: Path, second: Path, *, draws: int = 10_000, seed: int = 0) -> dict[str, Comparison]:
    """Task -> the comparison of the second run with the first, by the main metric over the same questions.

    Tasks with other questions, shots or main metric are left out, because not only the models differ.
    """
    scores = read_scores(first), read_scores(second)
    items = read_items(first), read_items(second)
    found = {}
    for task, entry in scores[0].get("tasks", {}).items():
        other = scores[1].get("tasks", {}).get(task)
        if other is None or (entry["main"], entry["shots"]) != (other["main"], other["shots"]):
            continue
        a, b, metric = items[0].get(task, {}), items[1].get(task, {}), entry["main"]
        if not a or a.keys() != b.keys() or any(metric not in row for row in (*a.values(), *b.values())):
            continue
        keys = sorted(a)
        found[task] = compare_paired([a[k][metric] for k in keys], [b[k][metric] for k in keys], draws=draws, seed=seed)
    return found


def comparison_table(runs: Sequence[Path]) -> str:
    """Scores of runs as a Markdown table: score ± standard error, and the difference from the first run with its 95 %
    interval and the p-values of the paired bootstrap and of McNemar's test.

    Raises UserError if no run has task scores.
    """
    scores = [read_scores(run) for run in runs]
    tasks = list(dict.fromkeys(task for found in scores for task in found.get("tasks", {})))
    if not tasks:
        raise UserError("none of the runs has task scores: run `llmjax eval --workdir RUN --tasks NAME` on them first")
    pairs = [compare_runs(runs[0], run) for run in runs[1:]]
    lines = ["| task | metric | " + " | ".join(run.name for run in runs) + " |", "|---|---|" + "---:|" * len(runs)]
    for task in tasks:
        metric = next(found["tasks"][task]["main"] for found in scores if task in found.get("tasks", {}))
        cells = []
        for number, found in enumerate(scores):
            entry = found.get("tasks", {}).get(task)
            if entry is None:
                cells.append("")
                continue
            numbers = entry["metrics"][entry["main"]]
            error = numbers["error"]
            cell = f"{numbers['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")
            if number and task in pairs[number - 1]:
                cell += f" ({_difference(pairs[number - 1][task])})"
            cells.append(cell)
        lines.append(f"| {task} | {metric} | " + " | ".join(cells) + " |")
    names = list(dict.fromkeys(name for found in scores for name in found.get("aggregates", {})))
    for name in names:
        means = [found.get("aggregates", {}).get(name) for found in scores]
        lines.append(f"| {name} | mean | " + " | ".join("" if x is None else f"{x['value']:.4f}" for x in means) + " |")
    return "\n".join(lines) + "\n"


def _difference(found: Comparison) -> str:
    low, high = found.interval
    text = f"{found.difference:+.4f} [{low:+.4f}, {high:+.4f}], p={found.bootstrap:.3f}"
    return text if math.isnan(found.mcnemar) else f"{text}, McNemar p={found.mcnemar:.3f}"
