"""Samplers choose the next point of a space: at random, quasi-randomly, or by the results so far (TPE).

A sampler is a function of the space, the number of the point, a seed and the points that are known, so a study can be
continued, and benchmarks can use it without runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.sweep.design import Settings
from llmjax.sweep.space import Dimension


@dataclass(frozen=True)
class Known:
    """A point that was tried; `values` are to be minimised, or None if it failed or diverged."""

    settings: Settings
    values: tuple[float, ...] | None


Sampler = Callable[[Sequence[Dimension], int, int, Sequence[Known]], Settings]


def random(space: Sequence[Dimension], number: int, seed: int, known: Sequence[Known]) -> Settings:
    """Independent and uniform in every dimension."""
    places = np.random.default_rng((seed, number)).random(len(space))
    return {one.key: one.value(float(place)) for one, place in zip(space, places, strict=True)}


def quasi_random(space: Sequence[Dimension], number: int, seed: int, known: Sequence[Known]) -> Settings:
    """Sobol's sequence, scrambled (Owen 1998): its first points cover the space more evenly than random ones do."""
    from scipy.stats import qmc

    count = max(number + 1, 2)
    places = qmc.Sobol(len(space), scramble=True, seed=seed).random_base2(math.ceil(math.log2(count)))[number]
    return {one.key: one.value(float(place)) for one, place in zip(space, places, strict=True)}


def tpe(space: Sequence[Dimension], number: int, seed: int, known: Sequence[Known]) -> Settings:
    """Tree-structured Parzen estimators (Bergstra et al. 2011), for one objective or several, by Optuna."""
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    objectives = next((len(one.values) for one in known if one.values is not None), 1)
    sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + number, n_startup_trials=min(10, 2 * len(space) + 2))
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    distributions = {one.key: _distribution(optuna, one) for one in space}
    states = optuna.trial.TrialState
    for one in known:
        params = {dim.key: _given(dim, one.settings[dim.key]) for dim in space}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=distributions, values=None if one.values is None else list(one.values),
                state=states.FAIL if one.values is None else states.COMPLETE,
            )
        )  # fmt: skip
    asked = study.ask(distributions)
    return {one.key: _taken(one, asked.params[one.key]) for one in space}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "--sampler tpe needs Optuna: pip install 'llmjax[search]', or take --sampler quasi-random, which needs nothing"
        ) from error
    return optuna


def _distribution(optuna: Any, one: Dimension) -> Any:
    distributions = optuna.distributions
    if one.kind == "choice":  # by number, so that ordered values keep their order
        if one.ordered:
            return distributions.IntDistribution(0, len(one.choices) - 1)
        return distributions.CategoricalDistribution(list(range(len(one.choices))))
    if one.kind == "integer":
        return distributions.IntDistribution(int(one.low), int(one.high))
    return distributions.FloatDistribution(one.low, one.high, log=one.kind == "log")


def _given(one: Dimension, value: Any) -> Any:
    return one.choices.index(value) if one.kind == "choice" else value


def _taken(one: Dimension, value: Any) -> Any:
    if one.kind == "choice":
        return one.choices[value]
    return value if one.kind == "integer" else float(f"{value:.4g}")


SAMPLERS: dict[str, Sampler] = {"random": random, "quasi-random": quasi_random, "tpe": tpe}
