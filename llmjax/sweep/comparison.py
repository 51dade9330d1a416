"""Arms against the control: differences paired by seed, their intervals, and the correction for many comparisons.

Runs with the same seed read the same batches from the same start where the arm allows it, so differences by seed vary
less than the runs do. Intervals are Student's, of 95 %. P-values are corrected for the number of arms by Holm's method
(1979). Both assume that differences are normal, which so few seeds cannot show.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from llmjax.sweep.study import ENDED, Row, Study

SHARE = 0.95  # of the intervals


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences; None where there are too few."""

    mean: float
    low: float | None
    high: float | None
    p: float | None


@dataclass(frozen=True)
class Arm:
    """An arm: the states and values of its trials, and its difference to the control."""

    name: str
    settings: dict[str, Any]
    states: dict[str, int]  # state -> how many trials: done, diverged, failed, running, open
    values: dict[int, float]  # seed -> the metric, of the trials that are done
    difference: Difference | None  # to the control; None: no seed is done in both
    pairs: dict[int, float]  # seed -> the difference
    seconds: float  # of all its trials
    flops: float
    errors: tuple[str, ...]
    holm: float | None = None  # the p-value, corrected for the number of arms

    @property
    def mean(self) -> float | None:
        return float(np.mean(list(self.values.values()))) if self.values else None


def arms_of(study: Study, rows: Mapping[str, Row]) -> list[Arm]:
    """The arms in the order of the design, with Holm's correction over all that have a p-value."""
    design = study.design
    values = {name: _values(study, rows, name) for name in design.arms}
    reference = values.get(design.control, {})
    found = []
    for name, settings in design.arms.items():
        trials = [trial for trial in study.trials if trial.arm == name]
        last = [rows.get(trial.id, {}) for trial in trials]
        states: dict[str, int] = {}
        for row in last:
            state = row.get("state", "open")
            states[state] = states.get(state, 0) + 1
        pairs = {seed: value - reference[seed] for seed, value in values[name].items() if seed in reference}
        found.append(
            Arm(
                name, dict(settings), states, values[name], difference(list(pairs.values())) if pairs else None, pairs,
                sum(row.get("seconds", 0.0) for row in last), sum(row.get("flops", 0.0) for row in last),
                tuple(dict.fromkeys(row["error"] for row in last if row.get("error"))),
            )
        )  # fmt: skip
    others = [arm for arm in found if arm.name != design.control]
    corrected = dict(zip((arm.name for arm in others), holm([_p(arm) for arm in others]), strict=True))
    return [Arm(**{**vars(arm), "holm": corrected.get(arm.name)}) for arm in found]


def _p(arm: Arm) -> float | None:
    return arm.difference.p if arm.difference else None


def _values(study: Study, rows: Mapping[str, Row], arm: str) -> dict[int, float]:
    metric = study.design.metric[0]
    found = {}
    for trial in study.trials:
        row = rows.get(trial.id, {})
        if trial.arm == arm and row.get("state") == "done" and row["values"].get(metric) is not None:
            found[trial.seed] = float(row["values"][metric])
    return found


def difference(pairs: Sequence[float]) -> Difference:
    """The mean of paired differences, its interval and its two-sided p-value, by Student's t."""
    mean, count = float(np.mean(pairs)), len(pairs)
    if count < 2:
        return Difference(mean, None, None, None)
    error = float(np.std(pairs, ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf(0.5 + SHARE / 2, count - 1)) * error
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    return Difference(mean, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, count - 1)))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for their number (Holm 1979); None stays None and does not count."""
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (value, place) in enumerate(known):
        least = max(least, min(1.0, value * (len(known) - rank)))
        corrected[place] = least
    return corrected


def results(study: Study, arms: Sequence[Arm]) -> dict[str, Any]:
    """The study's results.json: arms by name with mean, low and high of the difference to the control, and seeds."""
    made: dict[str, Any] = {
        "metric": study.design.metric[0],
        "better": study.design.better[0],
        "control": study.design.control,
        "interval": SHARE,
        "arms": {},
    }
    for arm in arms:
        there = arm.difference
        made["arms"][arm.name] = {
            "mean": there.mean if there else None,
            "low": there.low if there else None,
            "high": there.high if there else None,
            "seeds": len(arm.pairs) if study.design.control else len(arm.values),
            "p": there.p if there and arm.name != study.design.control else None,
            "p_holm": arm.holm,
            "value": arm.mean,
            "values": {str(seed): value for seed, value in arm.values.items()},
            "settings": arm.settings,
            "states": arm.states,
            "seconds": arm.seconds,
            "flops": arm.flops,
        }
    made["open"] = sum(count for arm in arms for state, count in arm.states.items() if state not in ENDED)
    return made


def verdict(study: Study, arm: Arm) -> str:
    """The verdict on an arm in a few words: better, worse or not shown."""
    if arm.name == study.design.control:
        return "the control"
    if arm.difference is None:
        return "not compared"
    if arm.difference.p is None:
        return "one seed"
    if arm.holm is None or arm.holm >= 1 - SHARE:
        return "no difference shown"
    return "better" if (arm.difference.mean < 0) == (study.design.better[0] == "lower") else "worse"


def told(arm: Arm) -> str:
    """The states of an arm's trials in words: "3 done", "2 done, 1 diverged"."""
    return ", ".join(f"{count} {state}" for state, count in sorted(arm.states.items()))


def table(study: Study, arms: Sequence[Arm]) -> list[tuple[str, ...]]:
    """The comparison as rows of text, with a header."""
    metric = study.design.metric[0]
    found: list[tuple[str, ...]] = [
        ("arm", metric, "difference", f"{SHARE:.0%} interval", "p (Holm)", "seeds", "", "trials")
    ]
    for arm in arms:
        there = None if arm.name == study.design.control else arm.difference
        between = f"{there.low:+.4f} to {there.high:+.4f}" if there and there.low is not None else ""
        found.append(
            (
                arm.name,
                "" if arm.mean is None else f"{arm.mean:.4f}",
                "" if there is None else f"{there.mean:+.4f}",
                between,
                "" if arm.holm is None else f"{arm.holm:.3f}",
                str(len(arm.pairs) if study.design.control else len(arm.values)),
                verdict(study, arm) if study.design.control else "",
                told(arm),
            )
        )
    return found


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def shown_settings(settings: Mapping[str, Any]) -> str:
    """Changed settings in a line."""
    return " ".join(f"{key}={value!r}" for key, value in settings.items()) or "nothing changed"
