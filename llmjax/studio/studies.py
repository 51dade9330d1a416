"""Studies and chains as a page shows them, as plain data."""

from pathlib import Path
from typing import Any

from llmjax.config import flatten
from llmjax.config.chains import CHAIN
from llmjax.report import facts
from llmjax.serve.refusals import Refusal
from llmjax.studio import runs
from llmjax.studio.places import Places
from llmjax.studio.watch import read_json
from llmjax.sweep import comparison, study

CHAIN_RESULTS = ("exact_match", "reward", "heldout_loss", "accuracy", "bits_per_byte")


def detail(places: Places, folder: Path) -> dict[str, Any]:
    """A study: its arms as a table, and a row for each trial with its settings and its metric, for a plot.

    Raises Refusal if the folder is no study, and UserError if its study.json is damaged.
    """
    if not study.is_study(folder):
        raise Refusal(404, "there is no such study", code="not_found", param="name")
    found, rows = study.read(folder), study.rows(folder)
    arms = comparison.arms_of(found, rows)
    header, *cells = comparison.table(found, arms)
    metric = found.design.metric[0]
    trials = []
    for trial in found.trials:
        row = rows.get(trial.id, {})
        values = row.get("values")
        value = values.get(metric) if isinstance(values, dict) else None
        trials.append(
            {
                "run": places.name(found.run_folder(trial)) if found.run_folder(trial).is_dir() else "",
                "arm": trial.arm,
                "seed": trial.seed,
                "state": row.get("state", "open"),
                "value": value,
                "settings": found.design.arms.get(trial.arm, {}),
            }
        )
    return {
        "name": places.name(folder),
        "title": found.config.name,
        "metric": metric,
        "better": found.design.better[0],
        "control": found.design.control,
        "header": header,
        "cells": cells,
        "arms": [[arm.name, comparison.shown_settings(arm.settings)] for arm in arms],
        "errors": [[arm.name, error] for arm in arms for error in arm.errors],
        "trials": trials,
    }


def chain(places: Places, folder: Path) -> dict[str, Any]:
    """A chain: its links in order, what each starts from, its state and its main results.

    Raises Refusal if the folder is no chain.
    """
    links = read_json(folder / CHAIN).get("links")
    if not isinstance(links, dict):
        raise Refusal(404, "there is no such chain", code="not_found", param="name", again=True)
    results = read_json(folder / "results.json")
    rows = []
    for name, config in links.items():
        config = config if isinstance(config, dict) else {}
        run = folder / str(name)
        begun = runs.kind_of(run) == "run"
        rows.append(
            {
                "link": name,
                "run": places.name(run) if begun else "",
                "from": str(flatten(config).get("train.init_from", "")),
                "state": runs.state_of(run, config)[0] if begun else "not begun",
                "results": {key: facts.show(key, results.get(f"{name}/{key}", "")) for key in CHAIN_RESULTS},
            }
        )
    columns = [key for key in CHAIN_RESULTS if any(row["results"][key] for row in rows)]
    return {"name": places.name(folder), "title": folder.name, "columns": columns, "links": rows}
