"""`train.duration='5 minutes'`: a budget of training time, which becomes a number of steps.

A few steps of the compiled program are timed on a state that is thrown away. The mean gives the number of steps.
Compiling, evaluating and saving do not count, as in `train_seconds`. The run and its checkpoints keep the number, and it
is never measured again: a resumed run is the same run, and learning rates, mixtures and percentages follow from the
number as from any other. The program is compiled before the number is known, so the milestones of the schedule are
arguments of the program.
"""

import operator
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from llmjax import config, human, storage
from llmjax.parallel import processes
from llmjax.train import folders

FILE = "train/budget.json"  # in the run's folder
MEASURE_SECONDS, MEASURE_SHARE = 5.0, 0.05  # at most, and of the budget


@dataclass(frozen=True)
class Budget:
    """A duration in time, and its number of steps."""

    duration: str
    steps: int
    seconds_per_step: float


def is_time(c: ConfigDict) -> bool:
    """Whether `train.duration` is a time."""
    return config.parse_duration(c.train.duration)[1] == "second"


def kept(c: ConfigDict, workdir: Path) -> Budget | None:
    """The budget of a run whose pace was measured before; None: it was not.

    A duration that changed since then is converted at the same pace.
    """
    path, found = workdir / FILE, None
    if path.exists():
        found = storage.read_json(path, mend="delete it, and the length of a step is measured again")
    else:
        for step in folders.steps_in(workdir / "checkpoints")[:1]:
            found = folders.read_meta(workdir / "checkpoints" / str(step)).get("budget")
    if found is None:
        return None
    before = Budget(**found)
    return before if before.duration == c.train.duration else _of(c, before.seconds_per_step)


def known(c: ConfigDict, workdir: Path) -> Budget | None:
    """`kept` of the first process, in all processes."""
    found = processes.broadcast_from_first(lambda: (budget := kept(c, workdir)) and asdict(budget))
    return Budget(**found) if found else None


def _of(c: ConfigDict, seconds_per_step: float) -> Budget:
    seconds, _ = config.parse_duration(c.train.duration)
    return Budget(c.train.duration, max(round(seconds / seconds_per_step), 1), seconds_per_step)


def measure_steps(c: ConfigDict, workdir: Path, pace: Callable[[float], float]) -> Budget:
    """Measure the pace, and keep the number of steps in the run.

    Args:
        pace: (about how many seconds to measure) -> seconds a step.
    """
    budget, _ = config.parse_duration(c.train.duration)
    mine = pace(min(MEASURE_SECONDS, MEASURE_SHARE * budget))
    made = _of(c, processes.broadcast_from_first(lambda: mine))
    processes.broadcast_from_first(lambda: storage.write_json(workdir / FILE, asdict(made)))
    processes.say(
        f"train.duration={c.train.duration!r}: a step takes {human.duration(made.seconds_per_step)}, so "
        f"{made.steps:,} steps"
    )
    return made


def seconds_per_step(run: Callable[[Any, int], tuple[Any, Any]], state: Any, *, seconds: float) -> float:
    """The mean time of a step in seconds, input included.

    Args:
        run: (state, number of the batch) -> (state, values); the state is used up.
        seconds: about how long to measure; the first step does not count.
    """
    state, values = run(state, 0)
    jax.block_until_ready(values)
    began, count = time.perf_counter(), 0
    while True:
        state, values = run(state, count + 1)
        jax.block_until_ready(values)
        count += 1
        passed = time.perf_counter() - began
        # All processes must take the same number of steps, so the clock of the first one decides.
        if processes.broadcast_from_first(partial(operator.gt, passed, seconds)):
            return passed / count
