"""A search: a sampler proposes arms, all at once or by the results so far. Their results give the importance of
settings.

study.json keeps the space, the sampler and the arms proposed so far. New arms follow from that and from trials.jsonl, so
any worker may propose them, under a lock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmjax import config, storage
from llmjax.sweep import halving, samplers, study
from llmjax.sweep.comparison import Arm, shown_settings
from llmjax.sweep.design import Design, Settings, name_of
from llmjax.sweep.importance import importances
from llmjax.sweep.space import Dimension, as_json, from_json
from llmjax.sweep.study import ENDED, Row, Study

DURATION = "train.duration"


@dataclass(frozen=True)
class Search:
    """The space of a search, and its sampler."""

    space: tuple[Dimension, ...]
    sampler: str  # of SAMPLERS, or halving
    count: int  # points to try
    seed: int
    rungs: tuple[int, ...] = ()  # halving: steps

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "space": as_json(self.space)}


def make(c: config.ConfigDict, space: tuple[Dimension, ...], *, sampler: str, count: int, seed: int) -> Search:
    """A search of a config. Raises UserError for one that halving cannot compare, and for a sampler that is missing."""
    if sampler == "halving":
        return Search(space, sampler, count, seed, tuple(halving.rungs(halving.check(c), count=count)))
    if sampler == "tpe":
        samplers.tpe(space, 0, seed, ())  # it is installed
    return Search(space, sampler, count, seed)


def read(found: Study) -> Search:
    tree = found.search
    return Search(from_json(tree["space"]), tree["sampler"], tree["count"], tree["seed"], tuple(tree["rungs"]))


def first(folder: Path, c: config.ConfigDict, search: Search, design: Design) -> Study:
    """The study of a search with its first arms. Arms of an earlier command with the same space stay."""
    one_run_a = DURATION if search.rungs else ""
    empty = study.plan(folder, c, design, search=search.as_json(), one_run_a=one_run_a)
    before = study.read(folder) if study.is_study(folder) else empty
    if (
        before.search
        and before.search["space"] == empty.search["space"]
        and before.search["rungs"] == list(search.rungs)
    ):
        empty = _with(empty, before.design.arms)
    return extended(empty, study.rows(folder))


def extended(found: Study, rows: Mapping[str, Row]) -> Study:
    """The study with the arms that are to be tried next."""
    search = read(found)
    arms = dict(found.design.arms)
    if search.rungs:
        new = _rung(found, search, rows)
    elif search.sampler == "tpe":
        new = {} if _waiting(found, rows) else _proposed(found, search, rows, upto=len(arms) + 1)
    else:
        new = _proposed(found, search, rows, upto=search.count)
    return _with(found, arms | new) if new.keys() - arms.keys() else found


def propose(folder: Path) -> Study:
    """The study of a folder, with the new arms that the sampler proposes now."""
    with storage.locked(folder / ".search.lock"):
        before = study.read(folder)
        if not before.search:
            return before
        found = extended(before, study.rows(folder))
        if found is not before:
            study.write(found)
        return found


def _with(found: Study, arms: dict[str, Settings]) -> Study:
    design = replace(found.design, arms=arms)
    return study.plan(found.folder, found.config, design, search=found.search, one_run_a=found.one_run_a)


def _waiting(found: Study, rows: Mapping[str, Row]) -> bool:
    """Whether a trial is free to be taken."""
    return any(rows.get(trial.id, {}).get("state", "") in ("", "open") for trial in found.trials)


def _proposed(found: Study, search: Search, rows: Mapping[str, Row], *, upto: int) -> dict[str, Settings]:
    known = _known(found, search, rows) if search.sampler == "tpe" else []
    new: dict[str, Settings] = {}
    number = len(found.design.arms)
    while number < min(upto, search.count):
        settings = samplers.SAMPLERS[search.sampler](search.space, number, search.seed, known)
        name = f"{number}: {name_of(settings)}"
        new[name] = settings
        number += 1
    return new


def _known(found: Study, search: Search, rows: Mapping[str, Row]) -> list[samplers.Known]:
    """The arms whose seeds have all ended, with the means of their metrics; signs are such that lower is better."""
    signs = [1.0 if better == "lower" else -1.0 for better in found.design.better]
    known = []
    for name, settings in found.design.arms.items():
        last = [rows.get(trial.id, {}) for trial in found.trials if trial.arm == name]
        if any(row.get("state") not in ENDED for row in last):
            continue
        done = [row["values"] for row in last if row["state"] == "done"]
        values = None
        if len(done) == len(last):
            means = [float(np.mean([one[metric] for one in done])) for metric in found.design.metric]
            values = tuple(sign * mean for sign, mean in zip(signs, means, strict=True))
        known.append(samplers.Known({one.key: settings[one.key] for one in search.space}, values))
    return known


def _rung(found: Study, search: Search, rows: Mapping[str, Row]) -> dict[str, Settings]:
    """The arms of the first rung, or those that go on once a rung has ended."""
    if not found.design.arms:
        points = (samplers.quasi_random(search.space, i, search.seed, ()) for i in range(search.count))
        return _at(list(points), search.rungs[0])
    latest = max(_steps(settings) for settings in found.design.arms.values())
    arms = {name: one for name, one in found.design.arms.items() if _steps(one) == latest}
    known = dict(zip(arms, _means(found, arms, rows), strict=True))
    if latest == search.rungs[-1] or any(value == "open" for value in known.values()):
        return {}
    values = {name: None if isinstance(value, str) else value for name, value in known.items()}
    names = halving.survivors(values, better=found.design.better[0])
    following = search.rungs[search.rungs.index(latest) + 1]
    return _at([arms[name] for name in names], following)


def _at(points: Sequence[Settings], steps: int) -> dict[str, Settings]:
    made = [{**point, DURATION: f"{steps} steps"} for point in points]
    return {name_of(settings): settings for settings in made}


def _steps(settings: Settings) -> int:
    return int(config.parse_duration(settings[DURATION])[0])


def _means(found: Study, arms: Mapping[str, Settings], rows: Mapping[str, Row]) -> list[float | str]:
    """The mean metric of each arm; "open" while a trial has not ended, "failed" if one has no value."""
    means: list[float | str] = []
    for name in arms:
        last = [rows.get(trial.id, {}) for trial in found.trials if trial.arm == name]
        if any(row.get("state") not in ENDED for row in last):
            means.append("open")
        elif any(row["state"] != "done" for row in last):
            means.append("failed")
        else:
            means.append(float(np.mean([row["values"][found.design.metric[0]] for row in last])))
    return means


def summary(found: Study, arms: Sequence[Arm], rows: Mapping[str, Row]) -> dict[str, Any]:
    """The search's results for results.json: the best arm, the importance of each setting, the trade-offs."""
    if not found.search:
        return {}
    search = read(found)
    ready = [arm for arm in arms if arm.mean is not None]
    if search.rungs and ready:  # only arms of the same length can be compared
        longest = max(_steps(arm.settings) for arm in ready)
        ready = [arm for arm in ready if _steps(arm.settings) == longest]
    if not ready:
        return {"best": None, "importance": {}}
    sign = 1.0 if found.design.better[0] == "lower" else -1.0
    best = min(ready, key=lambda arm: sign * (arm.mean or 0.0))
    measured = ready
    if search.rungs:  # the first rung has all points
        measured = [arm for arm in arms if arm.mean is not None and _steps(arm.settings) == search.rungs[0]]
    points = [{one.key: arm.settings[one.key] for one in search.space} for arm in measured]
    found_importance = importances(search.space, points, [arm.mean or 0.0 for arm in measured])
    made: dict[str, Any] = {
        "best": {"arm": best.name, "settings": best.settings, "value": best.mean},
        "importance": {one.key: {"mean": one.mean, "low": one.low, "high": one.high} for one in found_importance},
        "importance_explains": found_importance[0].explained if found_importance else None,
    }
    if len(found.design.metric) > 1:
        made["trade_offs"] = _front(found, search, rows)
    return made


def _front(found: Study, search: Search, rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """The points that no other point beats in every metric."""
    signs = [1.0 if better == "lower" else -1.0 for better in found.design.better]
    known = [one for one in _known(found, search, rows) if one.values is not None]

    def beaten(one: samplers.Known) -> bool:
        mine = one.values or ()
        return any(
            all(a <= b for a, b in zip(other.values or (), mine, strict=True)) and other.values != mine
            for other in known
        )

    kept = [one for one in known if not beaten(one)]
    return [
        {
            "settings": one.settings,
            **{m: s * v for m, s, v in zip(found.design.metric, signs, one.values or (), strict=True)},
        }
        for one in kept
    ]


def described(tree: Mapping[str, Any]) -> list[str]:
    """The summary in sentences."""
    if not tree.get("best"):
        return []
    best = tree["best"]
    lines = [f"The best so far: {shown_settings(best['settings'])}, {best['value']:.4f}."]
    for key, one in sorted(tree["importance"].items(), key=lambda item: -item[1]["mean"]):
        lines.append(f"Importance of {key}: {one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f}).")
    if tree["importance"]:
        lines.append(
            f"Importance is the loss of explained variance when a setting is shuffled in a quadratic fit, which explains "
            f"{tree['importance_explains']:.0%} of the variance; intervals hold 90 % of resamples."
        )
    lines += [f"No other point is better in all: {one}." for one in tree.get("trade_offs", ())]
    return lines


def best_config(found: Study, tree: Mapping[str, Any]) -> str:
    """The best config as a Python file, with where it comes from. The duration is that of the study's config."""
    best = tree["best"]
    settings = {key: value for key, value in best["settings"].items() if key != found.one_run_a}
    changed = {key: now for key, (_, now) in config.differences(config.base(), found.config).items()} | settings
    lines = [f"    config.set_key(c, {key!r}, {value!r})" for key, value in changed.items()]
    return "\n".join(
        [
            f'"""The best of {len(found.design.arms)} arms of the study {found.folder.name}: {found.design.metric[0]} '
            f"{best['value']:.6g}.",
            "",
            f"Arm: {best['arm']}. Searched: {', '.join(one['key'] for one in found.search['space'])}, by "
            f"{found.search['sampler']}. Written by `llmjax sweep`.",
            '"""',
            "",
            "from llmjax import config",
            "",
            "",
            'def get_config(arg: str = "") -> config.ConfigDict:',
            "    c = config.base()",
            *lines,
            "    return c",
            "",
        ]
    )
