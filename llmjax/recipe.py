"""A recipe runs stages in order, skips those that are done, and says why.

A stage is a function `(config, workdir) -> results`. It depends on some of the config's keys and on earlier stages.
WORKDIR/stages.json keeps the settings with which each stage was started, and whether it was finished. config/changes.py
says what a changed setting means: a training goes on, or is another one. A recipe that is refused changes nothing:
everything that can be checked is checked before the first stage begins, and each stage again before it moves, deletes or
notes anything. Only `again` sets a training aside.

The first of several processes (parallel/processes.py) decides which stages run, and writes all of this. Stages that do
not train run in the first process alone, on its own devices, while the others wait.
"""

import importlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import config, human, storage
from llmjax.config import changes
from llmjax.errors import UserError
from llmjax.parallel import processes

Results = dict[str, float | int | str]


@dataclass(frozen=True)
class Stage:
    """A stage: its functions (imported only when they run), the settings and stages it depends on, its help."""

    function: str
    keys: tuple[str, ...]  # the settings, or groups of settings, that it depends on
    needs: tuple[str, ...]
    about: str
    # (config, workdir | None, fresh) raises UserError for what the stage would refuse, and changes nothing. Without a
    # workdir the stages before it are yet to run; fresh: its results so far will be moved away.
    check: str = ""
    given: tuple[tuple[str, str], ...] = ()  # arguments that rooms above make from the config
    show: str = ""  # (workdir) prints the results, if the stage is asked for alone and is done already
    leaves: tuple[str, ...] = ()  # patterns of files and folders of a finished stage, at least one of each
    everywhere: bool = False  # all processes of a job run it


STAGES: dict[str, Stage] = {
    "prepare": Stage(
        "llmjax.prepare.run:run",
        ("prepare", "data.sources", "data.text_field", "data.min_bytes", "data.holdout_percent",
         "data.holdout_max_bytes", "data.holdout_tail_percent", "data.shard_bytes"), (),
        "read the sources into clean, deduplicated shards of documents",
        check="llmjax.prepare.run:check",
        leaves=("prepare/train/*",),
    ),
    "tokenizer": Stage(
        "llmjax.data.tokens:run", ("tokenizer", "data.record_tokens", "data.replay", "train.init_from"), ("prepare",),
        "train the tokenizer and write token shards",
        check="llmjax.data.tokens:check",
        leaves=("tokenizer/tokens/index.json",),
    ),
    "train": Stage(
        "llmjax.train.pretrain:run",
        ("seed", "data.mixture", "data.mixture_temperature", "data.max_epochs", "data.replay", "data.replay_percent", "model",
         "objective", "optimizer", "schedule", "train"), ("tokenizer",),
        "train the model, or go on from its last checkpoint",
        check="llmjax.eval.during_training:check",
        given=(("make_benchmarks", "llmjax.eval.during_training:make"),),
        leaves=("checkpoints/[0-9]*",), everywhere=True,
    ),
    "eval": Stage(
        "llmjax.eval.stage:run", ("eval",), ("train",),
        "measure perplexity and bits per byte on held-out text",
        check="llmjax.eval.stage:check", show="llmjax.eval.stage:show",
    ),
    "generate": Stage(
        "llmjax.infer.stage:run", ("generate", "seed"), ("train",),
        "continue the prompts of the config",
        check="llmjax.infer.stage:check", show="llmjax.infer.stage:show",
    ),
    "report": Stage(
        "llmjax.report:run", ("name",), (),
        "write the run's story as HTML and Markdown",
    ),
}  # fmt: skip

# What differs where `data.format` is conversations: rows take the place of documents, and a trained model goes on.
CONVERSATIONS: dict[str, Stage] = {
    "rows": Stage(
        "llmjax.post.rows:run",
        ("data.sources", "data.format", "data.turns", "data.chat_template", "data.rejected_percent",
         "data.holdout_percent", "objective.name", "rollout.tools", "tokenizer.path", "train.init_from",
         "train.sequence_length"), (),
        "read conversations, preferences or prompts into rows of ids",
        leaves=("rows/index.json",),
    ),
    "train": Stage(
        "llmjax.post.train:run",
        ("seed", "data.pack", "model", "objective", "optimizer", "rollout", "schedule", "train"), ("rows",),
        "train a model further on them, or go on from the last checkpoint",
        check="llmjax.post.train:check",
        leaves=("checkpoints/[0-9]*",), everywhere=True,
    ),
}  # fmt: skip


def stage_of(c: ConfigDict, name: str) -> Stage:
    """A stage as this config has it. Raises UserError for a name that no stage has."""
    table = STAGES if c.data.format == "text" else STAGES | CONVERSATIONS
    if name not in table:
        raise UserError(f"there is no stage {name!r}; stages are {', '.join(table)}")
    return table[name]


FILES = "the files of data.sources"
READING = ("prepare", "rows")  # the stages that read the files of data.sources
TRAINED = ("prepare", "tokenizer", "rows", "train")  # the stages on which a training stands


def dependencies(c: ConfigDict, stage: str, *, files: str | None = None) -> dict[str, Any]:
    """The settings that a stage and its predecessors depend on, and the state of the source files.

    Args:
        files: a digest of the files of `data.sources`; None: not known.
    """
    keys: dict[str, Any] = {}
    for need in stage_of(c, stage).needs:
        keys |= dependencies(c, need, files=files)
    for key, value in config.flatten(c.to_dict()).items():
        if any(f"{key}.".startswith(f"{group}.") for group in stage_of(c, stage).keys):
            keys[key] = value
    if stage in READING and files is not None:
        keys[FILES] = files
    return json.loads(json.dumps(keys))


def identity(c: ConfigDict, stages: Sequence[str]) -> dict[str, Any]:
    """The settings that the results of stages depend on. How fast and where they run is not among them."""
    found: dict[str, Any] = {}
    for stage in stages:
        found |= dependencies(c, stage)
    return {key: value for key, value in sorted(found.items()) if changes.class_of(key) != changes.IRRELEVANT}


def is_finished(c: ConfigDict, workdir: Path, stage: str) -> bool:
    """Whether a run has finished a stage, with whatever settings, and its results still exist."""
    return _read_stages(workdir).get(stage, {"done": False})["done"] and _is_there(c, workdir, stage)


def adopt(workdir: Path, source: Path, stage: str) -> None:
    """Let the run in `workdir` use a stage that was finished in the run `source`, by a link."""
    entry = _read_stages(source)[stage]
    storage.write_json(workdir / "stages.json", _read_stages(workdir) | {stage: entry})
    storage.link(source / stage, workdir / stage)  # last: a run with the link has the entry too


def run(c: ConfigDict, workdir: Path, stages: Sequence[str], *, again: bool = False) -> Results:
    """Run the stages in order, skipping those that are done; the merged results are written to WORKDIR/results.json.

    Args:
        again: changed settings may replace a training, which is moved to WORKDIR/before-N; a single stage runs again
            even if nothing changed.

    Raises:
        UserError: for an unknown stage, a stage whose predecessors have not run with this config, settings that a stage
            refuses, and settings that would make another training of the one in WORKDIR.
    """
    for stage in stages:
        stage_of(c, stage)
    with ExitStack() as held:
        files = None
        if tuple(stages) != ("report",):  # reads only, so that a run can be looked at while it trains
            files = processes.broadcast_from_first(lambda: _files(c, workdir, live=bool(set(READING) & set(stages))))
            _check_all(c, workdir, stages, files, again=again)
            processes.broadcast_from_first(lambda: _claim(workdir, held))
        for stage in stages:
            decision = processes.broadcast_from_first(partial(_decide, c, workdir, stage, stages, files, again=again))
            if decision["skip"]:
                processes.say(f"{stage}: done already, skipped ({workdir / stage})")
                if len(stages) == 1 and stage_of(c, stage).show and processes.is_first():
                    _function(stage_of(c, stage).show)(workdir)
                continue
            _check(c, workdir, stage, fresh=decision["aside"])
            processes.broadcast_from_first(partial(_begin, c, workdir, stage, decision))
            began = time.perf_counter()
            given = {name: _function(where)(c) for name, where in stage_of(c, stage).given}
            function = partial(_function(stage_of(c, stage).function), **given)
            everywhere = stage_of(c, stage).everywhere
            results = (
                function(c, workdir) if everywhere else processes.broadcast_from_first(partial(function, c, workdir))
            )
            processes.broadcast_from_first(partial(_end, workdir, stage, results))
            processes.say(f"== {stage} took {human.duration(time.perf_counter() - began)}")
        if tuple(stages) != ("report",):  # settings that no stage depends on
            processes.broadcast_from_first(partial(storage.write_text, workdir / "config.json", config.to_json(c)))
    return processes.broadcast_from_first(lambda: _merge(workdir))


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _check_all(c: ConfigDict, workdir: Path, stages: Sequence[str], files: str | None, *, again: bool) -> None:
    """Raise UserError for what a stage would refuse, as far as it is known before the first stage begins."""
    due: list[str] = []
    for number, stage in enumerate(stages):
        decide = partial(_decide, c, workdir, stage, stages, files, again=again, earlier=stages[:number])
        decision = processes.broadcast_from_first(decide)
        if decision["skip"]:
            continue
        due.append(stage)
        _check(c, None if set(stage_of(c, stage).needs) & set(due) else workdir, stage, fresh=decision["aside"])


def _check(c: ConfigDict, workdir: Path | None, stage: str, *, fresh: bool) -> None:
    if not stage_of(c, stage).check:
        return
    check = partial(_function(stage_of(c, stage).check), c, workdir, fresh=fresh)
    if stage_of(c, stage).everywhere:
        check()
    else:
        processes.broadcast_from_first(check)


def _files(c: ConfigDict, workdir: Path, *, live: bool) -> str | None:
    """A digest of the source files: as they are (`live`), or as they were when they were prepared.

    Missing source files count as unchanged if they have been prepared: a run stays usable without them.
    """
    from llmjax.post import rows
    from llmjax.prepare.sources import sources_fingerprint

    is_text = c.data.format == "text"
    stage = "prepare" if is_text else "rows"
    before = _read_stages(workdir).get(stage, {"done": False, "settings": {}})
    if not live:
        return before["settings"].get(FILES)
    try:
        return sources_fingerprint(c.data.sources) if is_text else rows.fingerprint(c)
    except UserError:
        if not before["done"] or before["settings"]["data.sources"] != list(c.data.sources):
            raise
        return before["settings"][FILES]


def _claim(workdir: Path, held: ExitStack) -> None:
    """Lock the run for this process. The lock ends with the process, however that ends."""
    busy = f"another process is working on {workdir}: wait for it, or choose another --workdir"
    held.enter_context(storage.locked(workdir / ".lock", otherwise=busy))


def _merge(workdir: Path) -> Results:
    """Write WORKDIR/results.json, merged from those of the stages, and return it."""
    merged: Results = {}
    for stage in dict.fromkeys((*STAGES, *CONVERSATIONS)):
        path = workdir / stage / "results.json"
        if path.exists():
            for key, value in json.loads(path.read_text()).items():
                merged[f"{stage}/{key}"] = value
                if stage == "eval":
                    merged[key] = value
    storage.write_json(workdir / "results.json", merged)
    return merged


def _decide(
    c: ConfigDict,
    workdir: Path,
    stage: str,
    stages: Sequence[str],
    files: str | None,
    *,
    again: bool,
    earlier: Sequence[str] = (),
) -> dict[str, Any]:
    """Decide what to do for a stage, without doing it.

    Args:
        stages: all that were asked for.
        earlier: those that will have run before.

    Returns:
        skip: the stage is done; settings: those that it depends on; changed: key -> (before, now); aside: the training
        so far will be moved away.

    Raises:
        UserError: if a stage that this one needs is not done, or it would replace a training without `again`.
    """
    for need in stage_of(c, stage).needs:
        if need not in earlier:
            _check_done(c, workdir, need, files, what=stage)
    wanted = dependencies(c, stage, files=files)
    before = _before(workdir, stage, wanted)
    differences = changes.changed(before["settings"], wanted) if before is not None else {}
    repeated = again and tuple(stages) == (stage,)
    decision = {"skip": False, "settings": wanted, "changed": differences, "aside": False}
    if stage == "report":
        return decision
    if before is not None and before["done"] and not differences and not repeated and _is_there(c, workdir, stage):
        return {**decision, "skip": True}
    step = _trained_steps(workdir)
    if stage not in TRAINED or step is None:
        return decision
    if before is None and _is_imported(workdir):
        raise UserError(
            f"{workdir} holds an imported model, which {stage} would replace: fine-tune it in a run of its own, with "
            f"--config.train.init_from={workdir} and another --workdir"
        )
    another = changes.makes_another(differences, wanted) if stage == "train" else list(differences)
    if (another or repeated) and again:
        return {**decision, "aside": True}
    if another:
        raise UserError(
            f"{workdir} holds a training of {step:,} steps, and {changes.described({k: differences[k] for k in another})}, "
            f"which makes it another one. Give another --workdir, or --again, which moves that training to "
            f"{_next_aside(workdir)} and starts anew"
        )
    if differences and before is not None and before["done"] and "train.duration" not in differences:
        raise UserError(
            f"the training in {workdir} is finished after {step:,} steps, so nothing follows from what changed: "
            f"{changes.described(differences)}. Give a longer train.duration, with which it goes on from there; another "
            f"--workdir; or --again, which moves that training to {_next_aside(workdir)} and starts anew"
        )
    return decision


def _begin(c: ConfigDict, workdir: Path, stage: str, decision: Mapping[str, Any]) -> None:
    """Print and note that a stage begins, and with which config."""
    step = _trained_steps(workdir)
    if decision["changed"]:
        goes_on = stage == "train" and step is not None and not decision["aside"]
        how = f"goes on from step {step:,}, although" if goes_on else "runs again, because"
        print(f"{stage}: {how} {changes.described(decision['changed'])}")
    if decision["aside"]:
        _set_aside(workdir)
    print(f"\n== {stage}: {stage_of(c, stage).about}", flush=True)
    if stage != "report":
        storage.write_text(workdir / "config.json", config.to_json(c))
        entries = _read_stages(workdir)
        entry: dict[str, Any] = {"done": False, "settings": decision["settings"]}
        if stage == "train" and step is not None and not decision["aside"]:  # keep a note of every change
            entry["changes"] = list(entries.get(stage, {}).get("changes", ()))
            if decision["changed"]:
                entry["changes"].append({"step": step, "settings": decision["changed"]})
        storage.write_json(workdir / "stages.json", entries | {stage: entry})


def _end(workdir: Path, stage: str, results: Results) -> None:
    """Write the results of a stage and note that it is done."""
    storage.write_json(workdir / stage / "results.json", results)
    entries = _read_stages(workdir)
    if stage != "report":
        storage.write_json(workdir / "stages.json", entries | {stage: entries[stage] | {"done": True}})


def _check_done(c: ConfigDict, workdir: Path, need: str, files: str | None, *, what: str) -> None:
    """Raise UserError unless the stage `need`, which `what` needs, was finished with these settings."""
    wanted = dependencies(c, need, files=files)
    before = _before(workdir, need, wanted)
    differences = changes.changed(before["settings"], wanted) if before is not None else {}
    if before is not None and before["done"] and not differences and _is_there(c, workdir, need):
        return
    if before is None and need == "train" and _is_imported(workdir):
        return
    mend = f"run `llmjax {need}` first, or `llmjax run` for everything"
    if differences:
        raise UserError(
            f"{what} needs {need}, which has not been run with these settings in {workdir}: "
            f"{changes.described(differences)}. Leave that as it was, or {mend}"
        )
    raise UserError(f"{what} needs {need}, which has not been run to its end in {workdir}: {mend}")


def _before(workdir: Path, stage: str, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of the last start of a stage, and whether it was finished; None: it never was started.

    For a setting that the stage did not depend on in an earlier version, the value is that of other stages. If
    stages.json is lost, a checkpoint still has the settings of its training.
    """
    entries = _read_stages(workdir)
    if stage in entries:
        told = {key: value for entry in entries.values() for key, value in entry["settings"].items() if key in wanted}
        return {"done": entries[stage]["done"], "settings": told | entries[stage]["settings"]}
    if stage not in TRAINED or _trained_steps(workdir) is None:
        return None
    meta = _newest_meta(workdir)
    if "imported" in meta:
        return None
    known = config.flatten(meta["config"])
    known |= {key: wanted.get(key, 0) for key in ("model.vocab_size", "objective.vocab_size")}  # 0 was resolved
    return {"done": False, "settings": {**wanted, **{key: known[key] for key in wanted if key in known}}}


def _is_there(c: ConfigDict, workdir: Path, stage: str) -> bool:
    """Whether the results of a stage still exist."""
    left = (f"{stage}/results.json", *stage_of(c, stage).leaves)
    return all(any(workdir.glob(pattern)) for pattern in left)


def _trained_steps(workdir: Path) -> int | None:
    """The step of the newest checkpoint of the run; None without one."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=None)


def _newest_meta(workdir: Path) -> dict[str, Any]:
    from llmjax.train import folders

    return folders.read_meta(folders.newest(workdir))


def _is_imported(workdir: Path) -> bool:
    return _trained_steps(workdir) is not None and "imported" in _newest_meta(workdir)


def _read_stages(workdir: Path) -> dict[str, Any]:
    path, mend = workdir / "stages.json", "delete it, and the stages run again"
    entries = storage.read_json(path, mend=mend) if path.exists() else {}
    try:
        return {
            stage: {**entry, "done": bool(entry["done"]), "settings": dict(entry["settings"])}
            for stage, entry in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {mend}") from error


def _next_aside(workdir: Path) -> Path:
    return next(path for n in itertools.count(1) if not (path := workdir / f"before-{n}").exists())


def _set_aside(workdir: Path) -> None:
    """Move a training, with everything needed to load it, to a folder of its own, rather than delete it."""
    aside = _next_aside(workdir)
    for name in ("config.json", "tokenizer"):
        if (workdir / name).exists():
            storage.copy(workdir / name, aside / name, without=("tokens",))
    for name in ("checkpoints", "metrics.jsonl", "train"):
        if (workdir / name).exists():
            storage.rename(workdir / name, aside / name)
    print(f"the training so far was moved to {aside}; delete it when you do not need it")
