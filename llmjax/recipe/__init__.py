"""A recipe runs stages in order, skips those that are done, and says why.

A stage is a function `(config, workdir) -> results`. It depends on some of the config's keys and on earlier stages.
config/changes.py says what a changed setting means: a training goes on, or is another one. A recipe that is refused
changes nothing: everything that can be checked is checked before the first stage begins, and each stage again before it
moves, deletes or notes anything. Only `again` sets a training aside.

`stages` has the table, `record` reads what a run's folder says, `decide` decides from both, and `chain` runs several
recipes that start from each other.

The first of several processes (parallel/processes.py) decides which stages run, and writes all of this. Stages that do
not train run in the first process alone, on its own devices, while the others wait.
"""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import config, human, storage
from llmjax.config import changes
from llmjax.errors import Stopped, UserError
from llmjax.parallel import processes
from llmjax.recipe import named, record, stages
from llmjax.recipe.decide import Decision, Task, decide
from llmjax.recipe.record import adopt, is_finished
from llmjax.recipe.stages import FILES, READING, dependencies, function, identity, stage_of

__all__ = ["Results", "adopt", "check", "claim", "identity", "is_finished", "run", "stage_of"]

Results = dict[str, float | int | str]
ERROR_CHARACTERS = 500  # of an error's first line, which stages.json keeps


def run(c: ConfigDict, workdir: Path, names: Sequence[str], *, start: str = "", again: bool = False) -> Results:
    """Run the stages in order, skipping those that are done; the merged results are written to WORKDIR/results.json.

    Args:
        start: a digest of the training of `train.init_from`, with which the stages that start from it change; "": as it
            was when they ran, and for new ones its path alone counts.
        again: changed settings may replace a training, which is moved to WORKDIR/before-N; a single stage runs again
            even if nothing changed.

    Raises:
        UserError: for an unknown stage, a stage whose predecessors have not run with this config, settings that a stage
            refuses, and settings that would make another training of the one in WORKDIR.
    """
    with ExitStack() as held:
        task = check(c, workdir, names, start=start, again=again)
        if task.stages != ("report",):  # it reads only, so that a run can be looked at while it trains
            processes.broadcast_from_first(lambda: claim(workdir, held))
        for name in task.stages:
            decision, stage = _decided(task, name), stage_of(c, name)
            if decision.skip:
                processes.say(f"{name}: done already, skipped ({workdir / name})")
                processes.broadcast_from_first(partial(_note_models, c, workdir, name))
                if len(task.stages) == 1 and stage.show and processes.is_first():
                    function(stage.show)(workdir)
                continue
            _check_stage(c, workdir, name, fresh=decision.aside)
            processes.broadcast_from_first(partial(_begin, c, workdir, name, decision))
            began = time.perf_counter()
            given = {argument: function(where)(c) for argument, where in stage.given}
            made = partial(function(stage.function), **given)
            try:
                results = (
                    made(c, workdir) if stage.everywhere else processes.broadcast_from_first(partial(made, c, workdir))
                )
            except Exception as error:
                if processes.is_first() and not isinstance(error, Stopped):
                    _fail(workdir, name, error)
                raise
            processes.broadcast_from_first(partial(_end, workdir, name, results))
            processes.say(f"== {name} took {human.duration(time.perf_counter() - began)}")
        if task.stages != ("report",):  # settings that no stage depends on
            processes.broadcast_from_first(partial(storage.write_text, workdir / "config.json", config.to_json(c)))
    return processes.broadcast_from_first(lambda: _merge(workdir))


def check(
    c: ConfigDict,
    workdir: Path,
    names: Sequence[str],
    *,
    start: str = "",
    again: bool = False,
    stand_in: str | None = None,
) -> Task:
    """Raise UserError for what `run` would refuse, as far as it is known before the first stage begins.

    Changes nothing. Returns what `run` goes by.

    Args:
        stand_in: the run that stages are checked against in place of `train.init_from`, which is yet to be trained: one
            of the same model and tokenizer; "": there is none, and stages that read it are not checked.
    """
    for stage in names:
        stage_of(c, stage)
    live = bool(set(READING) & set(names))
    only_report = tuple(names) == ("report",)
    files = None if only_report else processes.broadcast_from_first(lambda: _files(c, workdir, live=live))
    start = start or processes.broadcast_from_first(lambda: record.start(workdir))
    task = Task(c, workdir, tuple(names), files, start, again)
    checked = c if stand_in is None else _with_start(c, stand_in)
    due: list[str] = []
    for number, stage in enumerate(() if only_report else names):
        decision = _decided(task, stage, earlier=names[:number])
        if not decision.skip:
            due.append(stage)
            ready = not set(stage_of(c, stage).needs) & set(due)
            if checked.train.init_from or not c.train.init_from or not stage_of(c, stage).reads_start:
                _check_stage(checked, workdir if ready else None, stage, fresh=decision.aside)
    return task


def _with_start(c: ConfigDict, run: str) -> ConfigDict:
    changed = c.copy_and_resolve_references()
    with changed.unlocked():
        changed.train.init_from = run
    return changed


def claim(workdir: Path, held: ExitStack) -> None:
    """Lock a folder for this process. The lock ends with `held`, or with the process, however that ends."""
    busy = f"another process is working on {workdir}: wait for it, or choose another --workdir"
    held.enter_context(storage.locked(workdir / ".lock", otherwise=busy))


def _decided(task: Task, stage: str, *, earlier: Sequence[str] = ()) -> Decision:
    """The decision of the first process."""
    return Decision(**processes.broadcast_from_first(lambda: dict(vars(decide(task, stage, earlier=earlier)))))


def _check_stage(c: ConfigDict, workdir: Path | None, name: str, *, fresh: bool) -> None:
    stage = stage_of(c, name)
    if not stage.check:
        return
    check = partial(function(stage.check), c, workdir, fresh=fresh)
    if stage.everywhere:
        check()
    else:
        processes.broadcast_from_first(check)


def _files(c: ConfigDict, workdir: Path, *, live: bool) -> str | None:
    """A digest of the source files: as they are (`live`, or by another path), or as they were when they were prepared.

    Missing source files count as unchanged if they have been prepared: a run stays usable without them.
    """
    is_text = c.data.format == "text"
    stage = "prepare" if is_text else "rows"
    before = record.read(workdir).get(stage, {"done": False, "settings": {}})
    given = list(c.data.sources)
    same = given == before["settings"].get("data.sources") or (before["done"] and given == record.sources(workdir))
    if not live and (same or not before["settings"]):
        return before["settings"].get(FILES)
    try:
        if not is_text:
            from llmjax.post import rows  # imports JAX, which preparing text does without

            if (noted := before.get("files")) and rows.fingerprint(c, folders=False) == noted:
                return before["settings"][FILES]
            return rows.fingerprint(c)
        from llmjax.prepare.sources import sources_fingerprint

        return sources_fingerprint(c.data.sources)
    except UserError:
        if not before["done"] or not same:
            raise
        return before["settings"][FILES]


def _begin(c: ConfigDict, workdir: Path, stage: str, decision: Decision) -> None:
    """Print and note that a stage begins, and with which config."""
    step = record.trained_steps(workdir)
    goes_on = stage == "train" and step is not None and not decision.aside
    if decision.changed:
        how = f"goes on from step {step:,}, although" if goes_on else "runs again, because"
        print(f"{stage}: {how} {changes.described(decision.changed)}")
    if decision.aside:
        record.set_aside(workdir)
    print(f"\n== {stage}: {stage_of(c, stage).about}", flush=True)
    if stage == "report":
        return
    storage.write_text(workdir / "config.json", config.to_json(c))
    known, asked = record.models(workdir), dependencies(c, stage)
    entry: dict[str, Any] = {"done": False, "settings": decision.settings}
    now = {path: told for path in named.paths(asked) if not goes_on and (told := named.fingerprint(path))}
    entry["models"] = named.fingerprints(decision.settings, known | now) | named.fingerprints(asked, known | now)
    if stage == "rows":
        from llmjax.post import rows

        entry["files"] = rows.fingerprint(c, folders=False)
    if goes_on:  # keep a note of every change
        entry["changes"] = list(record.read(workdir).get(stage, {}).get("changes", ()))
        if decision.changed:
            entry["changes"].append({"step": step, "settings": decision.changed})
    record.note(workdir, stage, entry)


def _note_models(c: ConfigDict, workdir: Path, stage: str) -> None:
    """Note the models of a stage that is done, by the paths that they have now."""
    known = record.models(workdir)
    found = named.fingerprints(dependencies(c, stage), known)
    if new := {path: told for path, told in found.items() if told and path not in known}:
        entry = record.read(workdir)[stage]
        record.note(workdir, stage, entry | {"models": entry.get("models", {}) | new})


def _end(workdir: Path, stage: str, results: Results) -> None:
    """Write the results of a stage and note that it is done."""
    storage.write_json(workdir / stage / "results.json", results)
    if stage != "report":
        record.note(workdir, stage, record.read(workdir)[stage] | {"done": True})


def _fail(workdir: Path, stage: str, error: Exception) -> None:
    """Note why a stage ended, for those who look at the run. The next start of the stage replaces the note."""
    said = f"{error.__class__.__name__}: {error}".partition("\n")[0][:ERROR_CHARACTERS]
    with suppress(OSError):  # a full disk may be the error
        record.note(workdir, stage, record.read(workdir)[stage] | {"error": said})


def _merge(workdir: Path) -> Results:
    """Write WORKDIR/results.json, merged from those of the stages, and return it."""
    merged: Results = {}
    main = {stage.name for stage in stages.STAGES if stage.main}
    for name in stages.all_names():
        path = workdir / name / "results.json"
        if path.exists():
            for key, value in json.loads(path.read_text()).items():
                merged[f"{name}/{key}"] = value
                if name in main:
                    merged[key] = value
    storage.write_json(workdir / "results.json", merged)
    return merged
