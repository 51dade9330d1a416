"""Decisions of a recipe: whether a stage is skipped, runs, goes on, or is refused. Nothing here changes a run."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax.config import changes
from llmjax.errors import UserError
from llmjax.recipe import named, record
from llmjax.recipe.stages import FILES, START, TRAINED, dependencies, stage_of


@dataclass(frozen=True)
class Task:
    """What a recipe is asked for."""

    c: ConfigDict
    workdir: Path
    stages: tuple[str, ...]  # all that were asked for
    files: str | None  # a digest of the files of `data.sources`; None: not known
    start: str = ""  # a digest of the training of `train.init_from`; "": its path alone counts
    again: bool = False  # changed settings may replace a training; a single stage runs again even if nothing changed

    def wanted(self, stage: str) -> dict[str, Any]:
        """What a stage depends on. Paths stay as they were where they lead to the same training, weights or files."""
        found = dependencies(self.c, stage, files=self.files, start=self.start)
        before = record.read(self.workdir).get(stage, {}).get("settings", {})
        if self.start and before.get(START) == self.start and "train.init_from" in before:
            found["train.init_from"] = before["train.init_from"]
        if self.files is not None and before.get(FILES) == self.files:
            found["data.sources"] = before["data.sources"]
        return named.as_before(found, before, record.models(self.workdir), named.fingerprint)


@dataclass(frozen=True)
class Decision:
    """What to do for a stage."""

    settings: dict[str, Any]  # those that it depends on
    changed: dict[str, tuple[Any, Any]]  # key -> (before, now)
    skip: bool = False  # the stage is done
    aside: bool = False  # the training so far will be moved away


def decide(task: Task, stage: str, *, earlier: Sequence[str] = ()) -> Decision:
    """Decide what to do for a stage, without doing it.

    Args:
        earlier: the stages that will have run before.

    Raises:
        UserError: if a stage that this one needs is not done, or it would replace a training without `again`.
    """
    workdir = task.workdir
    for need in stage_of(task.c, stage).needs:
        if need not in earlier:
            _check_done(task, need, what=stage)
    wanted = task.wanted(stage)
    before = record.before(workdir, stage, wanted)
    differences = changes.changed(before["settings"], wanted) if before is not None else {}
    repeated = task.again and task.stages == (stage,)
    if stage == "report":
        return Decision(wanted, differences)
    done = before is not None and before["done"]
    if done and not differences and not repeated and record.is_there(task.c, workdir, stage):
        return Decision(wanted, differences, skip=True)
    step = record.trained_steps(workdir)
    if stage not in TRAINED or step is None:
        return Decision(wanted, differences)
    if before is None and record.is_imported(workdir):
        raise UserError(
            f"{workdir} holds an imported model, which {stage} would replace: fine-tune it in a run of its own, with "
            f"--config.train.init_from={shlex.quote(str(workdir))} and another --workdir"
        )
    another = changes.makes_another(differences, wanted) if stage == "train" else list(differences)
    if (another or repeated) and task.again:
        return Decision(wanted, differences, aside=True)
    if another:
        raise UserError(
            f"{workdir} holds a training of {step:,} steps, and {changes.described({k: differences[k] for k in another})}, "
            f"which makes it another one. Give another --workdir, or --again, which moves that training to "
            f"{record.next_aside(workdir)} and starts anew"
        )
    if differences and done and "train.duration" not in differences:
        raise UserError(
            f"the training in {workdir} is finished after {step:,} steps, so nothing follows from what changed: "
            f"{changes.described(differences)}. Give a longer train.duration, with which it goes on from there; another "
            f"--workdir; or --again, which moves that training to {record.next_aside(workdir)} and starts anew"
        )
    return Decision(wanted, differences)


def _check_done(task: Task, need: str, *, what: str) -> None:
    """Raise UserError unless the stage `need`, which `what` needs, was finished with these settings."""
    workdir, wanted = task.workdir, task.wanted(need)
    before = record.before(workdir, need, wanted)
    differences = changes.changed(before["settings"], wanted) if before is not None else {}
    if before is not None and before["done"] and not differences and record.is_there(task.c, workdir, need):
        return
    if before is None and need == "train" and record.is_imported(workdir):
        return
    mend = f"run `llmjax {need}` first, or `llmjax run` for everything"
    if differences:
        raise UserError(
            f"{what} needs {need}, which has not been run with these settings in {workdir}: "
            f"{changes.described(differences)}. Leave that as it was, or {mend}"
        )
    raise UserError(f"{what} needs {need}, which has not been run to its end in {workdir}: {mend}")
