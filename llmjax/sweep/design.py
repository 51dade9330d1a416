"""The design of a study: named arms, each a set of changed settings, times seeds.

A config file describes it by `get_sweep(arg)` beside `get_config(arg)`:

    def get_sweep(arg=""):
        return {
            "arms": {"control": {}, "alibi": {"model.position": "alibi"}},
            "seeds": 3,
        }

`grid` takes the place of `arms`, or adds to them: {"train.batch_size": (8, 16)} makes an arm of every combination. The
other keys are `metric` (a number of the runs' results.json, or several), `better` (lower or higher) and `control` (the
name of an arm; the first by default, "" for none).
"""

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmjax import config, recipe
from llmjax.errors import UserError

Settings = dict[str, Any]  # dotted key -> value
METRIC = "bits_per_byte"
BETTER = ("lower", "higher")
NOT_COMPARED = ("generate", "report")  # stages that a trial leaves out: they add nothing to the comparison


@dataclass(frozen=True)
class Design:
    """Arms by name, in order, and how they are compared."""

    arms: dict[str, Settings]
    seeds: tuple[int, ...] = (0,)
    metric: tuple[str, ...] = (METRIC,)  # the first decides; more than one: several objectives
    better: tuple[str, ...] = ("lower",)  # for each metric
    control: str = ""  # "": arms are ranked, not compared

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """A run of the study: an arm with a seed. Arms with the same settings share their trials."""

    id: str  # a hash of every setting that the result depends on
    run: str  # the name of its folder
    arm: str
    seed: int
    settings: Settings


def read_design(tree: Any) -> Design:
    """The design that `get_sweep` returned. Raises UserError for what is missing, unknown or contradictory."""
    if not isinstance(tree, Mapping):
        raise UserError(f"get_sweep returns {type(tree).__name__}: return a dict with arms or grid, and seeds")
    known = ("arms", "grid", "seeds", "metric", "better", "control")
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UserError(f"get_sweep returns the key {key!r}, which is not known; the closest is {near!r}")
    arms = {str(name): dict(settings) for name, settings in tree.get("arms", {}).items()} | grid(tree.get("grid", {}))
    if not arms:
        raise UserError("get_sweep names no arms: give arms, {name: {key: value}}, or grid, {key: (value, value)}")
    for name, settings in arms.items():
        if "seed" in settings:
            raise UserError(f"arm {name!r} sets seed: give seeds beside the arms, by which runs are paired")
    control = tree.get("control", next(iter(arms)))
    if control and control not in arms:
        raise UserError(f"get_sweep has the control {control!r}, which is no arm; arms are {', '.join(arms)}")
    metrics, better = _words(tree.get("metric", METRIC)), _words(tree.get("better", "lower"))
    better = better * len(metrics) if len(better) == 1 else better
    if len(better) != len(metrics) or set(better) - set(BETTER):
        raise UserError(f"better is {better}: write lower or higher, one for each of {', '.join(metrics)}")
    return Design(arms, read_seeds(tree.get("seeds", 1)), metrics, better, control)


def read_seeds(given: Any) -> tuple[int, ...]:
    """Seeds from their number (3 gives 0, 1 and 2) or from a list. Raises UserError for anything else."""
    seeds = tuple(range(given)) if isinstance(given, int) else tuple(given)
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"seeds are {given!r}: give how many, such as 3, or different whole numbers, such as (0, 1, 2)")
    return seeds


def grid(values: Mapping[str, Any]) -> dict[str, Settings]:
    """Every combination of the values as an arm, named by its settings."""
    if not values:
        return {}
    combinations = itertools.product(*values.values())
    settings = [dict(zip(values, combination, strict=True)) for combination in combinations]
    return {name_of(one): one for one in settings}


def name_of(settings: Settings) -> str:
    """A name that says the settings: the last part of each key, or all of it where two keys end alike."""
    ends = [key.rpartition(".")[2] for key in settings]
    short = {key: end if ends.count(end) == 1 else key for key, end in zip(settings, ends, strict=True)}
    return " ".join(f"{short[key]}={_shown(value)}" for key, value in settings.items()) or "unchanged"


def config_of(c: config.ConfigDict, trial: Trial) -> config.ConfigDict:
    """The config of a trial. Raises UserError for a key or value that the config refuses, with the arm's name."""
    made = c.copy_and_resolve_references()
    made.unlock()
    made.name = f"{trial.arm}, seed {trial.seed}"
    try:
        for key, value in trial.settings.items():
            config.set_key(made, key, value)
        config.set_key(made, "seed", trial.seed)
        config.set_key(made, "stages", [stage for stage in c.stages if stage not in NOT_COMPARED])
        config.check(made)
    except UserError as error:
        raise UserError(f"arm {trial.arm!r}: {error}") from error
    return made.lock()


def trials(c: config.ConfigDict, design: Design, *, one_run_a: str = "") -> list[Trial]:
    """All trials, in the order in which they start: every arm with the first seed, then with the next.

    Args:
        one_run_a: a setting that may differ between trials of one run, which goes on with it (train.duration).

    Raises UserError for an arm that the config refuses.
    """
    return list(_trials(c, design, one_run_a))


def _trials(c: config.ConfigDict, design: Design, one_run_a: str) -> Iterator[Trial]:
    made = {arm: config_of(c, Trial("", "", arm, 0, settings)) for arm, settings in design.arms.items()}
    identities = {arm: recipe.identity(one, one.stages) for arm, one in made.items()}
    seen = set()
    for seed, (arm, settings) in itertools.product(design.seeds, design.arms.items()):
        found = {key: seed if key == "seed" else value for key, value in identities[arm].items()}
        name = hash_of(found)
        run = hash_of({key: value for key, value in found.items() if key != one_run_a})
        if (name, arm) not in seen:
            seen.add((name, arm))
            yield Trial(name, run, arm, seed, settings)


def hash_of(value: Any) -> str:
    """A short name for a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=5).hexdigest()


def _words(given: Any) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
