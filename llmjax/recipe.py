"""A recipe runs stages in order, skips what is done, and says why it does either.

A stage is a function `(config, workdir) -> results`. It depends on some of the config's keys and on earlier stages;
a hash of both is its fingerprint. WORKDIR/stages.json remembers the fingerprint with which each stage was started
and whether it was finished, so that an interrupted training goes on and a changed one starts anew.

Of several processes (parallel/processes.py) the first decides which stages run and writes all of this. Stages that do
not train run in the first alone, on its own devices, while the others wait.
"""

import fcntl
import hashlib
import importlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import config, human
from llmjax.errors import UserError
from llmjax.parallel import processes

Results = dict[str, float | int | str]


@dataclass(frozen=True)
class Stage:
    """A stage: where its function is (imported only when it runs), what it reads, what it needs, what it is for."""

    function: str
    keys: tuple[str, ...]  # prefixes of config keys that it depends on
    needs: tuple[str, ...]
    about: str
    everywhere: bool = False  # all processes of a job run it together


STAGES: dict[str, Stage] = {
    "prepare": Stage(
        "llmjax.prepare.run:run",
        ("prepare", "data.sources", "data.text_field", "data.min_bytes", "data.holdout", "data.shard_bytes"), (),
        "read the sources into clean, deduplicated shards of documents",
    ),
    "tokenizer": Stage(
        "llmjax.data.tokens:run", ("tokenizer", "data.record_tokens"), ("prepare",),
        "train the tokenizer and write token shards",
    ),
    "train": Stage(
        "llmjax.stages.train:run",
        ("seed", "data.mixture", "data.max_epochs", "model", "objective", "optimizer", "schedule", "train"), ("tokenizer",),
        "train the model, or go on from its last checkpoint",
        everywhere=True,
    ),
    "eval": Stage(
        "llmjax.stages.eval:run", ("eval",), ("train",),
        "measure perplexity and bits per byte on held-out text",
    ),
    "generate": Stage(
        "llmjax.stages.generate:run", ("generate", "seed"), ("train",),
        "continue the prompts of the config",
    ),
    "report": Stage(
        "llmjax.report:run", ("name",), (),
        "write the run's story as HTML and Markdown",
    ),
}  # fmt: skip

FILES = "the files of data.sources"
# Keys that say how a stage runs, not what comes out of it.
IRRELEVANT = (
    "train.log_every",
    "train.tensorboard",
    "train.eval_every",
    "train.eval_batches",
    "train.max_bad_steps",
    "train.hunt_nan",
    "train.executable",
    "model.attention",
    "model.scan_unroll",
    "model.remat",
    "prepare.engine",
    "prepare.spark_master",
    "prepare.workers",
    "prepare.memory_bytes",
    "prepare.keep_work",
)


def dependencies(c: ConfigDict, stage: str, workdir: Path) -> dict[str, Any]:
    """The settings that a stage depends on, its predecessors' included, and the state of the source files.

    Source files that are gone count as unchanged when they have been prepared: a run stays usable without them.
    """
    flat = config.flatten(c.to_dict())
    keys: dict[str, Any] = {}
    for need in STAGES[stage].needs:
        keys |= dependencies(c, need, workdir)
    for key, value in flat.items():
        if key.startswith(STAGES[stage].keys) and key not in IRRELEVANT:
            keys[key] = value
    if stage == "prepare":
        from llmjax.prepare.sources import sources_fingerprint

        try:
            keys[FILES] = sources_fingerprint(c.data.sources)
        except UserError:
            before = _read_stages(workdir).get("prepare", {"done": False})
            if not before["done"] or before["settings"]["data.sources"] != list(c.data.sources):
                raise
            keys[FILES] = before["settings"][FILES]
    return json.loads(json.dumps(keys))


def run(c: ConfigDict, workdir: Path, stages: Sequence[str]) -> Results:
    """Run the stages in order, skipping those that are done; the merged results are written to WORKDIR/results.json.

    Raises:
        UserError: for an unknown stage, or a stage whose predecessors have not been run with this config.
    """
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"there is no stage {stage!r}; stages are {', '.join(STAGES)}")
    if processes.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
    if tuple(stages) == ("report",):  # reads only, so that a run can be looked at while it trains
        _run_stage(c, workdir, "report")
    else:
        with ExitStack() as held:
            processes.from_first(lambda: _claim(c, workdir, held))
            for stage in stages:
                _run_stage(c, workdir, stage)
    return processes.from_first(lambda: _merge(workdir))


def _claim(c: ConfigDict, workdir: Path, held: ExitStack) -> None:
    """Take the run for this process and note its config."""
    held.enter_context(_lock(workdir))
    write_atomic(workdir / "config.json", config.to_json(c))


def _merge(workdir: Path) -> Results:
    """Write WORKDIR/results.json from those of the stages, and return it."""
    merged: Results = {}
    for stage in STAGES:
        path = workdir / stage / "results.json"
        if path.exists():
            for key, value in json.loads(path.read_text()).items():
                merged[f"{stage}/{key}"] = value
                if stage == "eval":
                    merged[key] = value
    write_atomic(workdir / "results.json", json.dumps(merged, indent=1) + "\n")
    return merged


def _run_stage(c: ConfigDict, workdir: Path, stage: str) -> None:
    wanted = processes.from_first(lambda: _begin(c, workdir, stage))
    if wanted is None:
        return
    began = time.perf_counter()

    def call() -> Results:
        module, _, name = STAGES[stage].function.partition(":")
        return getattr(importlib.import_module(module), name)(c, workdir)

    results = call() if STAGES[stage].everywhere else processes.from_first(call)
    if processes.is_first():
        (workdir / stage).mkdir(exist_ok=True)
        write_atomic(workdir / stage / "results.json", json.dumps(results, indent=1) + "\n")
        _write_stage(workdir, stage, wanted, done=True)
    print(f"== {stage} took {human.duration(time.perf_counter() - began)}", flush=True)


def _begin(c: ConfigDict, workdir: Path, stage: str) -> dict[str, Any] | None:
    """Note that a stage is started, and return the settings it depends on; None when it is done already."""
    wanted = dependencies(c, stage, workdir)
    for need in STAGES[stage].needs:
        if not is_done(workdir, need, dependencies(c, need, workdir)):
            raise UserError(
                f"{stage} needs {need}, which has not been run with these settings in {workdir}: "
                f"run `llmjax {need}` first, or `llmjax run` for everything"
            )
    if stage != "report" and is_done(workdir, stage, wanted):
        print(f"{stage}: done already, skipped ({workdir / stage})")
        return None
    before = _read_stages(workdir).get(stage)
    if before is not None and before["fingerprint"] != fingerprint(wanted):
        print(f"{stage}: runs again, because {_what_changed(before['settings'], wanted)}")
        if stage == "train":
            _set_aside(workdir)
    print(f"\n== {stage}: {STAGES[stage].about}", flush=True)
    _write_stage(workdir, stage, wanted, done=False)
    return wanted


def is_done(workdir: Path, stage: str, settings: dict[str, Any]) -> bool:
    """Whether the stage was finished with these settings and its results are there."""
    entry = _read_stages(workdir).get(stage)
    return bool(
        entry
        and entry["done"]
        and entry["fingerprint"] == fingerprint(settings)
        and (workdir / stage / "results.json").exists()
    )


def fingerprint(settings: dict[str, Any]) -> str:
    """A hash of settings."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Replace a file by `text`, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _read_stages(workdir: Path) -> dict[str, Any]:
    path = workdir / "stages.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the stages run again") from error


def _write_stage(workdir: Path, stage: str, settings: dict[str, Any], *, done: bool) -> None:
    entries = _read_stages(workdir)
    entries[stage] = {"done": done, "fingerprint": fingerprint(settings), "settings": settings}
    write_atomic(workdir / "stages.json", json.dumps(entries, indent=1) + "\n")


def _what_changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    changed = [key for key in sorted(set(before) | set(after)) if before.get(key) != after.get(key)]
    described = [
        f"{key} changed" if key == FILES else f"{key} changed from {before.get(key)!r} to {after.get(key)!r}"
        for key in changed
    ]
    more = f" and {len(described) - 3} more settings" if len(described) > 3 else ""
    return ", ".join(described[:3]) + more


def _set_aside(workdir: Path) -> None:
    """Move an earlier training's checkpoints and metrics out of the way: they took long to make, so none is deleted."""
    things = [workdir / name for name in ("checkpoints", "metrics.jsonl", "train") if (workdir / name).exists()]
    if not things:
        return
    number = 1
    while (workdir / f"before-{number}").exists():
        number += 1
    (workdir / f"before-{number}").mkdir()
    for thing in things:
        thing.rename(workdir / f"before-{number}" / thing.name)
    print(f"the training so far was moved to {workdir / f'before-{number}'}; delete it when you do not need it")


@contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    """Keep a second process out of a run. The lock goes with the process, however it ends."""
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is working on {workdir}: wait for it, or choose another --workdir"
            ) from None
        yield
