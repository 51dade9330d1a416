"""A study as a page: arms against the control, curves, cost, what failed. It reads only files of the study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax import human, storage
from llmjax.report import page
from llmjax.report.curves import Curve, read_curves
from llmjax.report.plots import SERIES, Line, draw
from llmjax.sweep import comparison, cost, search, study
from llmjax.sweep.comparison import Arm
from llmjax.sweep.study import Row, Study

CURVES = (
    ("heldout_bits_per_byte", "Held-out bits per byte", "bits per byte"),
    ("loss", "Training loss", "nats per token"),
)


def write_results(folder: Path) -> dict[str, Any]:
    """Write FOLDER/results.json, and return what a search says in it. Raises UserError if the folder is no study."""
    found, rows = study.read(folder), study.rows(folder)
    arms = comparison.arms_of(found, rows)
    summary = search.summary(found, arms, rows)
    storage.write_json(folder / "results.json", comparison.results(found, arms) | summary, shared=True)
    return summary


def write(folder: Path) -> Path:
    """Write FOLDER/results.json, report/index.html and report/report.md, and return the HTML page.

    Raises UserError if the folder is no study.
    """
    summary = write_results(folder)
    found, rows = study.read(folder), study.rows(folder)
    arms = comparison.arms_of(found, rows)
    header, *cells = comparison.table(found, arms)
    story: dict[str, Any] = {
        "name": found.config.name,
        "folder": folder,
        "metric": found.design.metric[0],
        "better": found.design.better[0],
        "control": found.design.control,
        "interval": f"{comparison.SHARE:.0%}",
        "header": header,
        "cells": cells,
        "settings": [(arm.name, comparison.shown_settings(arm.settings)) for arm in arms],
        "search": search.described(summary),
        "errors": [(arm.name, error) for arm in arms for error in arm.errors],
        "cost": _cost(found, arms, rows),
        "plots": _plots(found, arms),
    }
    with storage.locked(folder / ".report.lock"):  # two workers may end at the same time
        return page.write(folder / "report", template="study", story=story)[0]


def _cost(found: Study, arms: Sequence[Arm], rows: Mapping[str, Row]) -> list[str]:
    seconds, flops = sum(arm.seconds for arm in arms), sum(arm.flops for arm in arms)
    lines = [f"Spent by trials that have ended: {human.duration(seconds)} of a worker, {flops:.3g} FLOPs of training."]
    left = cost.estimate(found, rows)
    return [*lines, f"Left: {cost.described(left, workers=1)}."] if left.trials else lines


def _plots(found: Study, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """The curves of the control and of the arms that differ most from it, each with its first seed."""
    shown = _drawn(found, arms)
    drawn = []
    for name, title, y_label in CURVES:
        lines = []
        for number, arm in enumerate(shown):
            curve = _curve(found, arm, name)
            if curve is not None:
                lines.append(Line(arm.name, curve, number, points=name.startswith("heldout")))
        if lines:
            svg = draw(name, lines, y_label=y_label, robust=True, wide=True)
            drawn.append({"title": f"{title}, first seed", "svg": svg, "wide": True})
    return drawn


def _drawn(found: Study, arms: Sequence[Arm]) -> list[Arm]:
    ready = [arm for arm in arms if arm.values]
    if not found.design.control:
        best = sorted(ready, key=lambda arm: (arm.mean or 0.0) * (1 if found.design.better[0] == "lower" else -1))
        return best[: len(SERIES)]
    control = [arm for arm in ready if arm.name == found.design.control]
    others = [arm for arm in ready if arm.name != found.design.control]
    others.sort(key=lambda arm: -abs(arm.difference.mean) if arm.difference else 0.0)
    return [*control, *others][: len(SERIES)]


def _curve(found: Study, arm: Arm, name: str) -> Curve | None:
    seed = min(arm.values)
    trial = next(one for one in found.trials if one.arm == arm.name and one.seed == seed)
    curves = read_curves(found.run_folder(trial) / "metrics.jsonl")
    return curves.by_name.get(name) if curves else None
