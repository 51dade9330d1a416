"""Rounds of samples in a report: curves of rewards, ratios, divergences, entropy, drift and lengths, and answers."""

import json
from pathlib import Path
from typing import Any

from llmjax.report.curves import Curve
from llmjax.report.plots import Line, draw

SHOWN = 8  # answers of a round
WIDEST = 300  # characters of a text in the table
COLUMNS = ("prompt", "answer", "finish", "reward", "advantage")
# Name, title, curves with their labels, and how they are drawn.
PLOTS: tuple[tuple[str, str, dict[str, str], dict[str, Any]], ...] = (
    ("ratio", "Ratio of new to old probabilities", {"ratio": "mean"}, {"y_label": "ratio"}),
    ("clipped", "Clipped tokens", {"clipped": "share"}, {"y_label": "share", "percent": True, "from_zero": True}),
    ("kl", "Divergence from the reference by three estimators",
     {"k1": "k1", "k2": "k2", "k3": "k3"}, {"y_label": "nats a token"}),
    ("entropy", "Entropy", {"entropy": "mean"}, {"y_label": "nats a token", "from_zero": True}),
    ("drift", "Drift between trainer and sampler",
     {"rollout/drift_max": "largest", "rollout/drift": "mean"}, {"y_label": "nats a token", "from_zero": True}),
    ("groups", "Groups that teach nothing, answers without a score",
     {"rollout/equal_groups": "equal rewards", "rollout/unscored": "no score"},
     {"y_label": "share", "percent": True, "from_zero": True}),
    ("lengths", "Lengths of answers",
     {"rollout/length": "mean", "rollout/longest": "longest"}, {"y_label": "tokens", "from_zero": True}),
    ("cut", "Answers that were cut", {"rollout/cut": "cut"}, {"y_label": "share", "percent": True, "from_zero": True}),
)  # fmt: skip


def plots(curves: dict[str, Curve], *, prefix: str = "") -> list[dict[str, Any]]:
    """The curves of a run with rounds of samples: dicts with title, svg and wide; none for other runs."""
    if "rollout/reward" not in curves:
        return []
    rewards = {"rollout/reward": "sampled", "heldout_reward": "held out, greedy"}
    rewards |= {name: name.rpartition("/")[2] for name in sorted(curves) if name.startswith("rollout/reward/")}
    wanted = (("reward", "Reward", rewards, {"y_label": "reward", "wide": True}), *PLOTS)
    drawn = []
    for name, title, named, options in wanted:
        lines = [Line(label, curves[key], i) for i, (key, label) in enumerate(named.items()) if key in curves]
        if lines:
            svg = draw(f"{prefix}rollout-{name}", lines, **options)
            drawn.append({"title": title, "svg": svg, "wide": options.get("wide", False)})
    return drawn


def tables(workdir: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Answers of the first and of the last round, with their rewards and advantages: title, columns, rows."""
    files = sorted((workdir / "samples").glob("*.json"))
    found = []
    for file in dict.fromkeys(files[:1] + files[-1:]):
        try:
            rows = [[_short(one[name]) for name in COLUMNS] for one in json.loads(file.read_text("utf-8"))[:SHOWN]]
            found.append({"title": f"Answers of round {int(file.stem):,}", "columns": list(COLUMNS), "rows": rows})
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"samples/{file.name} cannot be read ({error}) and is left out.")
    return found


def _short(value: Any) -> Any:
    if value is None:
        return "none"
    return f"{value[:WIDEST]}..." if isinstance(value, str) and len(value) > WIDEST else value
