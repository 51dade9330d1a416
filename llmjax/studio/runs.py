"""Runs as a page shows them: which there are, how they are, and what is known of each. Everything is plain data."""

import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmjax import storage
from llmjax.config import base, flatten
from llmjax.config.chains import CHAIN
from llmjax.errors import UserError
from llmjax.report import comparison, facts, marks
from llmjax.report.collect import Run, collect
from llmjax.report.curves import Curve, Curves
from llmjax.report.marks import Marks
from llmjax.serve.refusals import Refusal
from llmjax.studio.places import Places
from llmjax.studio.watch import last_rows, read_json
from llmjax.train import folders

ALIVE_SECONDS = 90.0  # a run of another machine whose files are newer is going on
MOST, DEEPEST = 2000, 6  # runs in the list, folders below each other
MARKS = ("config.json", "metrics.jsonl", "stages.json")  # a folder with one of them is a run
MAIN = ("heldout_bits_per_byte", "heldout_reward", "heldout_accuracy", "heldout_loss")
SHOWN_SAMPLES = 24  # of each end
LOOKED_BACK = 500  # rows of metrics, for the last evaluation


def scan(places: Places) -> Iterator[tuple[str, Path]]:
    """(kind, folder) of every run, chain and study below the folder of runs. Runs of a study belong to it."""
    todo = [(places.path(""), 0)]
    while todo:
        folder, depth = todo.pop()
        kind = kind_of(folder)
        if kind:
            yield kind, folder
        if kind == "study" or depth == DEEPEST:
            continue
        for name in _folders(folder):
            if kind == "run" and not name.startswith("before-"):
                continue
            try:
                todo.append((places.path(places.name(folder / name)), depth + 1))
            except Refusal:  # a link that leads out
                continue


def kind_of(folder: Path) -> str:
    """ "run", "chain" or "study"; "" for another folder."""
    if (folder / "study.json").is_file():
        return "study"
    if (folder / CHAIN).is_file():
        return "chain"
    return "run" if any((folder / name).is_file() for name in MARKS) else ""


def run_folder(places: Places, name: str) -> Path:
    """The folder of a run. Raises Refusal if there is none of this name."""
    folder = places.path(name)
    if kind_of(folder) != "run":
        raise Refusal(404, f"there is no run {name[:200]!r}", code="not_found", param="name")
    return folder


def marked_folder(places: Places, name: str) -> Path:
    """The folder of a run, a chain or a study. Raises Refusal if there is none of this name."""
    folder = places.path(name)
    if not kind_of(folder):
        raise Refusal(404, f"there is no run {name[:200]!r}", code="not_found", param="name")
    return folder


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as found:
            return sorted((e.name for e in found if not e.name.startswith(".") and e.is_dir()), reverse=True)
    except OSError:
        return []


def listed(places: Places) -> list[dict[str, Any]]:
    """A row for each run, chain and study, the most recently changed first."""
    rows = []
    for kind, folder in itertools.islice(scan(places), MOST):
        row = (
            overview(folder)
            if kind == "run"
            else {"state": "", "age": age(folder), "title": folder.name, **_marks(folder)}
        )
        rows.append({"name": places.name(folder), "kind": kind, **row})
    return sorted(rows, key=lambda row: float(row["age"]))


def overview(folder: Path) -> dict[str, Any]:
    """What the list shows of a run, from the ends of its files."""
    state, error = state_of(folder, read_json(folder / "config.json"))
    stamps = tuple(_stamp(folder / name) for name in ("config.json", "metrics.jsonl", "train/results.json", marks.FILE))
    return {**_numbers(folder, stamps), "state": state, "error": error, "age": age(folder)}


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file does; zeros for a missing one."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=2 * MOST)
def _numbers(folder: Path, _: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    rows = list(itertools.islice(last_rows(folder / "metrics.jsonl"), LOOKED_BACK))
    last = rows[0] if rows else {}
    trained = read_json(folder / "train" / "results.json")
    heldout = next((row for row in rows if any(name in row for name in MAIN)), {})
    measured = next((name for name in MAIN if heldout.get(name) is not None), "")
    duration = str(_of(config, "train", "duration", ""))
    words = duration.split()
    in_steps = len(words) == 2 and words[1].startswith("step") and words[0].replace(",", "").isdigit()
    return {
        "title": str(config.get("name", folder.name)),
        "step": last.get("step", trained.get("steps")),
        "steps": trained.get("steps") or (int(words[0].replace(",", "")) if in_steps else None),
        "duration": duration,
        "loss": last.get("loss", trained.get("loss")),
        "heldout": heldout.get(measured),
        "heldout_name": measured.removeprefix("heldout_").replace("_", " "),
        "tokens": last.get("tokens", trained.get("tokens")),
        "speed": last.get("tokens_per_second", trained.get("tokens_per_second")),
        "parameters": trained.get("parameters"),
        "changed": changed(config),
        **_marks(folder),
    }


def _marks(folder: Path) -> dict[str, Any]:
    found = Marks.parse(read_json(folder / marks.FILE))
    return {"tags": list(found.tags), "note": found.note}


def _of(config: dict[str, Any], group: str, key: str, otherwise: Any) -> Any:
    found = config.get(group)
    return found.get(key, otherwise) if isinstance(found, dict) else otherwise


def changed(config: dict[str, Any]) -> dict[str, str]:
    """The settings of a config that differ from the base, as text."""
    defaults = _defaults()
    return {
        key: facts.show_setting(v) for key, v in flatten(config).items() if key != "name" and defaults.get(key) != v
    }


@functools.cache
def _defaults() -> dict[str, Any]:
    return flatten(json.loads(json.dumps(base().to_dict())))


def age(folder: Path) -> float:
    """Seconds since something directly in a folder changed."""
    newest = 0.0
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name not in (".lock", "report", marks.FILE):
                    newest = max(newest, entry.stat().st_mtime)
    except OSError:  # a file that was replaced meanwhile
        pass
    return max(time.time() - newest, 0.0)


def state_of(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """("running", "finished", "failed" or "stopped", the error of a run that failed).

    A run of this machine is running while a process holds its lock, one of another while its files change.
    """
    if storage.is_locked(folder / ".lock"):
        return "running", ""
    entries = {name: e for name, e in read_json(folder / "stages.json").items() if isinstance(e, dict)}
    errors = [f"{name}: {entry['error']}" for name, entry in entries.items() if entry.get("error")]
    if errors:
        return "failed", errors[-1]
    if age(folder) < ALIVE_SECONDS and not _is_done(config, entries):
        return "running", ""
    trained = not entries and bool(folders.steps_in(folder / "checkpoints"))  # it was imported
    return ("finished" if trained or _is_done(config, entries) else "stopped"), ""


def _is_done(config: dict[str, Any], entries: dict[str, Any]) -> bool:
    wanted = [stage for stage in config.get("stages") or entries if stage != "report"]
    return bool(entries) and all(entries.get(str(stage), {}).get("done") for stage in wanted)


# ---------------------------------------------------------------------- one run


def detail(places: Places, folder: Path, curves: Curves) -> dict[str, Any]:
    """Everything about a run but its curves."""
    run = collect(folder, curves=curves)
    notes = list(run.notes)

    def part(name: str, make: Callable[[Run], Any], otherwise: Any) -> Any:
        try:
            return make(run)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a file that another program wrote
            notes.append(f"{name} cannot be shown: {error!r}")
            return otherwise

    stages = read_json(folder / "stages.json")
    shown = {
        "name": places.name(folder),
        **overview(folder),
        "sentence": part("the summary", facts.sentence, ""),
        "tiles": [vars(tile) for tile in part("the key numbers", facts.tiles, [])],
        "funnel": [vars(step) for step in part("the data funnel", facts.funnel, [])],
        "sources": part("the sources", facts.source_table, []),
        "tokenizer": part("the tokenizer", facts.tokenizer_facts, []),
        "evaluation": part("the evaluation", facts.evaluation, ([], [])),
        "results": {stage: {k: facts.show(k, v) for k, v in found.items()} for stage, found in run.stages.items()},
        "settings": [[s.key, s.value, s.default, s.changed] for s in part("the settings", facts.settings, [])],
        "command": facts.command(run),
        "stages": [
            [stage, "done" if entry.get("done") else "failed" if entry.get("error") else "begun"]
            for stage, entry in stages.items()
            if isinstance(entry, dict)
        ],
        "checkpoints": folders.steps_in(folder / "checkpoints"),
        "tables": run.tables,
        "samples": [vars(sample) for sample in run.samples],
        "rounds": rounds(folder),
        "data": _data(places, folder),
    }
    return {**shown, "notes": list(dict.fromkeys(notes))}


def _data(places: Places, folder: Path) -> list[str]:
    """The folders and files of a run whose rows can be looked at."""
    wanted = ("prepare/train", "prepare/heldout", "prepare/rejected", "tokenizer/tokens", "rows", "samples", "eval",
              "answers", "generate", "serve")  # fmt: skip
    return [places.name(folder / name) for name in wanted if (folder / name).is_dir()]


def rounds(folder: Path) -> list[int]:
    """The numbers of the rounds of samples that a policy's training has kept."""
    return sorted(int(path.stem) for path in (folder / "samples").glob("*.json") if path.stem.isdigit())


def rollouts(folder: Path, number: int) -> list[dict[str, Any]]:
    """The answers of a round with their rewards and advantages. Raises Refusal if there is no such round."""
    try:
        found = json.loads((folder / "samples" / f"{number:06d}.json").read_bytes())
    except (OSError, ValueError):
        raise Refusal(404, f"there is no round {number}", code="not_found", param="round", again=True) from None
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def samples(folder: Path) -> list[dict[str, Any]]:
    """Held-out questions with the scores of the answers, the best and the worst: a dict for each file and task.

    Of `answers/answers.jsonl` the reward counts, or else exact_match; of `eval/items.jsonl` the task's main metric.
    """
    scores = read_json(folder / "eval" / "tasks.json").get("tasks", {})
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in last_rows(folder / "answers" / "answers.jsonl", size=1 << 24):
        metric = "reward" if "reward" in row else "exact_match"
        groups.setdefault(("answers", metric), []).append(row)
    for row in last_rows(folder / "eval" / "items.jsonl", size=1 << 24):
        task = str(row.get("task", ""))
        entry = scores.get(task) if isinstance(scores, dict) else None
        if isinstance(entry, dict):
            groups.setdefault((task, str(entry.get("main", ""))), []).append(row)
    found = []
    for (title, metric), rows in groups.items():
        scored = [row for row in rows if isinstance(row.get(metric), (int, float))]
        scored.sort(key=lambda row: float(row[metric]))
        if scored:
            best, worst = scored[::-1][:SHOWN_SAMPLES], scored[:SHOWN_SAMPLES]
            found.append({"title": title, "metric": metric, "count": len(scored), "best": best, "worst": worst})
    return found


# ---------------------------------------------------------------------- several runs


def compared(runs: dict[str, Run]) -> dict[str, Any]:
    """The settings and the numbers in which runs differ. Raises Refusal for fewer than two."""
    if len(runs) < 2:
        raise Refusal(400, "choose two runs or more", param="name")
    found = list(runs.values())
    rows = comparison.number_rows(found)
    return {
        "runs": list(runs),
        "sentences": [facts.sentence(run) for run in found],
        "settings": comparison.setting_rows(found),
        "numbers": [[f"{row.stage} {row.name}", [vars(cell) for cell in row.cells]] for row in rows],
    }


def plain_curve(curve: Curve) -> dict[str, list[float]]:
    """A curve as lists: step, mean, and low and high where they differ from it."""
    lists = {"step": _short(curve.step), "mean": _short(curve.mean)}
    if (curve.low < curve.high).any():
        lists |= {"low": _short(curve.low), "high": _short(curve.high)}
    return lists


def _short(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def read_run(folder: Path, curves: Curves) -> Run:
    """A run for `compared`. Raises Refusal for a folder that was a run until just now."""
    try:
        return collect(folder, curves=curves)
    except UserError as error:
        raise Refusal(404, str(error), code="not_found", param="name", again=True) from None
