"""Read the folder of a run into one dataclass. Any stages may be missing."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax.config import base, from_json
from llmjax.config.changes import described
from llmjax.errors import UserError
from llmjax.report import marks, rollouts
from llmjax.report.curves import Curves, read_curves
from llmjax.report.marks import Marks

MAX_SAMPLES = 24  # samples on the page; the file has all of them


@dataclass(frozen=True)
class Sample:
    """A continuation of the generate stage."""

    prompt: str
    text: str
    finish: str


@dataclass(frozen=True)
class Run:
    """The content of a run's folder; None or empty where a stage has not run."""

    name: str
    workdir: Path
    config: ConfigDict | None
    stages: dict[str, dict[str, Any]]  # stage -> its results.json, in the order in which stages run
    curves: Curves | None
    manifest: dict[str, Any]
    token_index: dict[str, Any]
    samples: list[Sample]
    samples_left_out: int
    tables: list[dict[str, Any]]  # of the last evaluation in training, and of samples: title, columns, rows
    missing: list[str]  # stages without results
    notes: list[str] = field(default_factory=list)
    marks: Marks = field(default_factory=Marks)  # by a person


def collect(workdir: Path, *, config: ConfigDict | None = None, curves: Curves | None = None) -> Run:
    """Read the run in `workdir`, which may be going on.

    Args:
        config: used only if there is no WORKDIR/config.json.
        curves: of its metrics.jsonl, if they are read already.

    Raises:
        UserError: if the folder is not there or is not a run.
    """
    notes: list[str] = []
    default_stages = [stage for stage in base().stages if stage != "report"]
    if not workdir.is_dir():
        raise UserError(f"there is no folder {workdir}. {_WHAT_A_RUN_IS}")
    if not any((workdir / name).exists() for name in ("config.json", "metrics.jsonl", *default_stages)):
        raise UserError(f"{workdir} is not a run. {_WHAT_A_RUN_IS}")
    config = _read_config(workdir / "config.json", notes) or config
    names = [*(config.stages if config else default_stages)]
    names += [stage for stage in default_stages if stage not in names]
    stages = {name: _read_json(workdir / name / "results.json", notes) for name in names if name != "report"}
    for change in _read_json(workdir / "stages.json", notes).get("train", {}).get("changes", ()):
        notes.append(f"Training went on from step {change['step']:,} although {described(change['settings'])}.")
    curves = read_curves(workdir / "metrics.jsonl") if curves is None else curves
    wanted = list(config.stages) if config else default_stages
    samples, left_out = _read_samples(workdir / "generate" / "samples.jsonl", notes)
    indexes = [workdir / "tokenizer" / "tokens" / "index.json", workdir / "tokens" / "index.json"]
    return Run(
        name=config.name if config else workdir.resolve().name,
        workdir=workdir,
        config=config,
        stages={name: results for name, results in stages.items() if results},
        curves=curves,
        manifest=_read_json(workdir / "prepare" / "manifest.json", notes),
        token_index=next((_read_json(path, notes) for path in indexes if path.is_file()), {}),
        samples=samples,
        samples_left_out=left_out,
        tables=_read_tables(workdir / "train" / "heldout.json", notes) + rollouts.tables(workdir, notes),
        missing=[name for name, results in stages.items() if name in wanted and not results],
        marks=Marks.parse(_read_json(workdir / marks.FILE, notes)),
        notes=notes + (curves.notes if curves else []),
    )


_WHAT_A_RUN_IS = (
    "A run is a folder with config.json, metrics.jsonl and a folder for each stage (prepare, tokenizer, train, ...); "
    "make one with: llmjax run --config configs/quickstart.py --workdir runs/quickstart"
)


def _read_config(path: Path, notes: list[str]) -> ConfigDict | None:
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        notes.append("The run has no config.json: its settings are not known exactly.")
        return None
    except (OSError, ValueError) as error:  # a run of another version still has curves
        notes.append(f"config.json cannot be read by this version of llmjax: {error}")
        return None


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.parent.name}/{path.name} cannot be read ({error}) and is left out.")
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_tables(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        return [
            {"title": str(one["title"]), "columns": list(one["columns"]), "rows": [list(row) for row in one["rows"]]}
            for one in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"train/heldout.json cannot be read ({error!r}) and is left out.")
        return []


def _read_samples(path: Path, notes: list[str]) -> tuple[list[Sample], int]:
    """(the first samples, how many more there are)."""
    samples: list[Sample] = []
    left_out = damaged = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if len(samples) >= MAX_SAMPLES:
                    left_out += 1
                    continue
                try:
                    row = json.loads(line)
                    samples.append(Sample(row["prompt"], row["text"], row.get("finish", "")))
                except (ValueError, KeyError, TypeError):
                    damaged += 1
    except (FileNotFoundError, NotADirectoryError):
        return [], 0
    if damaged:
        notes.append(f"{damaged:,} lines of generate/samples.jsonl could not be read and are left out.")
    return samples, left_out
