"""Several runs side by side: curves in one plot, final numbers in columns, differences between configs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax.config import differences, flatten
from llmjax.errors import UserError
from llmjax.report import facts, page
from llmjax.report.collect import Run
from llmjax.report.curves import ALONG, against
from llmjax.report.plots import SERIES, Line, draw

LOWER_IS_BETTER = ("bits_per_byte", "perplexity", "loss", "seconds", "skipped")
HIGHER_IS_BETTER = ("tokens_per_second", "tokens_per_second_per_device", "mfu", "exact_match", "reward")


@dataclass(frozen=True)
class Cell:
    """A number of one run."""

    text: str
    change: str = ""  # relative to the first run
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A number of all runs."""

    stage: str
    name: str
    cells: list[Cell]


def write_comparison(runs: Sequence[Run], out: Path) -> Path:
    """Write out/index.html and out/report.md and return the path of the HTML page.

    Raises:
        UserError: for fewer than two different runs.
    """
    folders = [run.workdir.resolve() for run in runs]
    if len(runs) < 2 or len(set(folders)) < len(runs):
        raise UserError(
            f"a comparison needs two or more different runs, got {', '.join(map(str, folders)) or 'none'}: "
            "give each run's folder once, as in llmjax report runs/a runs/b"
        )
    labels = _labels(runs)
    rows = number_rows(runs)
    story: dict[str, Any] = {
        "labels": labels,
        "runs": list(runs),
        "sentences": [facts.sentence(run) for run in runs],
        "rows": [row for row in rows if _better(row.name)],
        "other_rows": [row for row in rows if not _better(row.name)],
        "plots": _plots(runs, labels),
        "settings": setting_rows(runs),
        "without_config": [label for label, run in zip(labels, runs, strict=True) if run.config is None],
        "colors": [f"var(--series-{i % len(SERIES) + 1})" for i in range(len(runs))],
    }
    return page.write(out, template="compare", story=story)[0]


def _labels(runs: Sequence[Run]) -> list[str]:
    """The names of the runs, or their folders if names repeat."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    folders = [run.workdir.resolve().name for run in runs]
    return folders if len(set(folders)) == len(folders) else [str(run.workdir) for run in runs]


def _better(name: str) -> str:
    """The better direction: "lower", "higher", or "" for neither."""
    stem = name.partition("/")[0]
    if stem in HIGHER_IS_BETTER:
        return "higher"
    # The number of xz measures the text, not the run.
    if stem.startswith("xz_") or not stem.endswith(LOWER_IS_BETTER):
        return ""
    return "lower"


def number_rows(runs: Sequence[Run]) -> list[Row]:
    """The numbers of the stages that differ, or have a better direction, with changes relative to the first run."""
    rows = []
    order = ("answers", "eval", "train")
    stages = list(dict.fromkeys([*order, *(stage for run in runs for stage in run.stages)]))
    for stage in stages:
        for name in dict.fromkeys(name for run in runs for name in run.stages.get(stage, {})):
            values = [run.stages.get(stage, {}).get(name) for run in runs]
            if len(set(map(str, values))) > 1 or _better(name):
                rows.append(Row(stage, name, _cells(name, values)))
    return rows


def _cells(name: str, values: Sequence[Any]) -> list[Cell]:
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    best = None
    if len(set(numbers)) > 1 and (better := _better(name)):
        best = min(numbers) if better == "lower" else max(numbers)
    cells = []
    for i, value in enumerate(values):
        change = ""
        comparable = value in numbers and values[0] in numbers
        if i and comparable and values[0] and value != values[0]:
            change = f"{(value - values[0]) / abs(values[0]):+.1%}"
        text = "" if value is None else facts.show(name, value)
        cells.append(Cell(text, change, best is not None and value == best))
    return cells


def _plots(runs: Sequence[Run], labels: Sequence[str]) -> list[dict[str, Any]]:
    drawn = []
    heldout, loss = "heldout_bits_per_byte", "Held-out bits per byte"
    wanted: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
        ("loss", "step", "Training loss", "nats per token", {"robust": True, "wide": True}),
        (heldout, "step", loss, "bits per byte", {}),
        *((heldout, x, f"{loss}, by {unit}", "bits per byte", {"x_label": x_label}) for x, unit, x_label in ALONG),
        ("learning_rate", "step", "Learning rate", "learning rate", {"from_zero": True}),
        ("grad_norm", "step", "Gradient norm", "global L2 norm", {"log_y": True}),
        ("tokens_per_second", "step", "Throughput", "tokens per second", {"from_zero": True}),
    )
    for name, x, title, y_label, options in wanted:
        lines = [
            Line(label, curve, i, points=name.startswith("heldout"))
            for i, (label, run) in enumerate(zip(labels, runs, strict=True))
            if run.curves and (curve := against(run.curves, name, x)) is not None
        ]
        if lines:
            svg = draw(name if x == "step" else f"{name}-{x}", lines, y_label=y_label, **options)
            drawn.append({"title": title, "svg": svg, "wide": "wide" in options})
    return drawn


def setting_rows(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The keys with a difference: (key, [(value of a run, whether it differs from the first run's)])."""
    known = [run.config for run in runs if run.config is not None]
    if not known:
        return []
    first = known[0]
    keys = {key for config in known for key in differences(first, config)}
    rows = []
    for key in flatten(first.to_dict()):
        if key in keys:
            values = [None if run.config is None else flatten(run.config.to_dict())[key] for run in runs]
            reference = flatten(first.to_dict())[key]
            rows.append((key, [("not known" if v is None else facts.show_setting(v), v != reference) for v in values]))
    return rows
