"""The folder of a study: its design, the states of its trials, and the workers' leases.

    study.json      the config, the arms and seeds, and the trials that follow from them
    trials.jsonl    a line for each change of a trial's state; the last line of a trial counts
    leases/         who works on which trial
    shared/         stages that many trials have in common, each run once
    runs/           a run a trial, as `llmjax run` makes them
    cache/          compiled programs, which trials of the same shapes share
    results.json    arms against the control, written again whenever a trial ends
    report/         the same as a page

Any number of processes may work on a study, on any number of machines that see the folder. A trial belongs to the
process that has its lease (llmjax/storage.py).
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmjax import config, storage
from llmjax.errors import UserError
from llmjax.sweep.design import Design, Trial, config_of, trials

ENDED = ("done", "diverged", "failed")
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study as its study.json says."""

    folder: Path
    config: config.ConfigDict
    design: Design
    trials: tuple[Trial, ...]
    search: dict[str, Any]  # the space and the sampler of a search; {}: arms are given
    one_run_a: str = ""

    def run_folder(self, trial: Trial) -> Path:
        return self.folder / "runs" / trial.run

    def config_of(self, trial: Trial) -> config.ConfigDict:
        return config_of(self.config, trial)

    def lease(self, trial: Trial) -> Path:
        return self.folder / "leases" / f"{trial.run}.json"


def default_folder(c: config.ConfigDict) -> Path:
    """The folder of a study without --workdir."""
    return Path("runs") / f"{c.name}-study"


def is_study(folder: Path) -> bool:
    return (folder / "study.json").is_file()


def plan(
    folder: Path, c: config.ConfigDict, design: Design, *, search: dict[str, Any] | None = None, one_run_a: str = ""
) -> Study:
    """The study that a folder will hold. This function writes nothing. Raises UserError for an arm that the config refuses.

    Trials that are in the folder's study.json keep the names that they have there: an earlier version made them of the
    settings that it had.
    """
    made, names = trials(c, design, one_run_a=one_run_a), _names_before(folder)
    kept = (replace(one, id=names.get(one.id, one.id), run=names.get(one.run, one.run)) for one in made)
    return Study(folder, c, design, tuple(kept), search or {}, one_run_a)


def _names_before(folder: Path) -> dict[str, str]:
    """The name that this version makes -> the name in study.json, of trials and runs; {} without a study.json to read."""
    try:
        before = read(folder)
        now = {(one.arm, one.seed): one for one in trials(before.config, before.design, one_run_a=before.one_run_a)}
    except UserError:
        return {}
    pairs = [(now[old.arm, old.seed], old) for old in before.trials if (old.arm, old.seed) in now]
    return {made.id: old.id for made, old in pairs} | {made.run: old.run for made, old in pairs}


def write(study: Study) -> None:
    """Write study.json. Trials of an earlier study.json that are no longer wanted keep their runs and lines."""
    tree = {
        "config": study.config.to_dict(),
        "design": study.design.as_json(),
        "search": study.search,
        "one_run_a": study.one_run_a,
        "trials": [asdict(trial) for trial in study.trials],
    }
    storage.write_json(study.folder / "study.json", tree, shared=True)


def read(folder: Path) -> Study:
    """The study of a folder. Raises UserError if there is none, or its study.json is damaged."""
    path, mend = folder / "study.json", "run the sweep again with its --config, which writes it anew"
    if not path.is_file():
        raise UserError(f"{folder} is no study: give --config with a file that has get_sweep, or --sweep")
    tree = storage.read_json(path, mend=mend)
    try:
        c = config.from_json(json.dumps(tree["config"]))
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in tree["design"].items()
        }
        found = tuple(Trial(**trial) for trial in tree["trials"])
        return Study(folder, c.lock(), Design(**fields), found, tree["search"], tree["one_run_a"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): {mend}") from error


def rows(folder: Path) -> dict[str, Row]:
    """The last line of every trial of trials.jsonl, by id. The reader skips a line that a killed process left
    unfinished."""
    found: dict[str, Row] = {}
    path = folder / "trials.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            found[row["trial"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return found


def note(study: Study, trial: Trial, state: str, **more: Any) -> None:
    """Append a change of a trial's state to trials.jsonl. The caller has the trial's lease."""
    row = {
        "trial": trial.id,
        "arm": trial.arm,
        "seed": trial.seed,
        "state": state,
        "time": round(time.time(), 3),
        **more,
    }
    storage.append_line(study.folder / "trials.jsonl", json.dumps(row))


def open_trials(study: Study, known: dict[str, Row]) -> list[Trial]:
    """The trials that have not ended, in order, each once."""
    found: dict[str, Trial] = {}
    for trial in study.trials:
        if known.get(trial.id, {}).get("state") not in ENDED:
            found.setdefault(trial.id, trial)
    return list(found.values())
