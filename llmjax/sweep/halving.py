"""Successive halving (Jamieson and Talwalkar 2016): many arms for a short time, the best of them for longer.

All arms train up to the first rung. The best 1 / eta of them go on to the next, which is eta times as long, and so on. An
arm goes on from its own checkpoint, so the rates before a rung must not depend on where it ends: schedules that decay
make losses at rungs misleading, and are refused.
"""

from collections.abc import Mapping, Sequence

from llmjax import config
from llmjax.errors import UserError

ETA = 3
STEADY = ("constant", "inverse_sqrt")  # schedules whose rates do not depend on the duration


def rungs(total: int, *, count: int, eta: int = ETA) -> list[int]:
    """The steps at which arms are compared, the last being all of them, such that one arm is left at the end.

    >>> rungs(900, count=9)
    [100, 300, 900]
    """
    found, left = [total], count
    while left > 1 and found[0] >= eta:
        left = -(-left // eta)
        found.insert(0, found[0] // eta)
    return found


def survivors(values: Mapping[str, float | None], *, eta: int = ETA, better: str = "lower") -> list[str]:
    """The best 1 / eta of the arms, rounded up, in the order of their values. Arms without a value never go on."""
    ranked = sorted(
        (value if better == "lower" else -value, place, name)
        for place, (name, value) in enumerate(values.items())
        if value is not None
    )
    return [name for *_, name in ranked[: max(1, -(-len(values) // eta))]]


def chosen(losses: Sequence[Sequence[float]], levels: Sequence[int], *, eta: int = ETA) -> tuple[int, list[int]]:
    """Halving on known curves: (the chosen arm, the level that each arm reached).

    Args:
        losses: of each arm at each level (arms, levels).
        levels: the indices of levels that are rungs, rising.
    """
    alive = [str(arm) for arm in range(len(losses))]
    reached = [levels[0]] * len(losses)
    for level in levels:
        for name in alive:
            reached[int(name)] = level
        alive = survivors({name: losses[int(name)][level] for name in alive}, eta=eta)
    return int(alive[0]), reached


def check(c: config.ConfigDict) -> int:
    """The steps of the full duration. Raises UserError for a config whose arms cannot be compared at rungs."""
    _, unit = config.parse_duration(c.train.duration)
    if unit != "step":
        raise UserError(
            f"--sampler halving compares arms after so many steps: give train.duration in steps, not {unit}s"
        )
    if c.schedule.name not in STEADY:
        raise UserError(
            f"--sampler halving compares arms in the middle of their training, where schedule.name={c.schedule.name} misleads: "
            f"give --config.schedule.name=constant (or {STEADY[1]})"
        )
    if config.parse_duration(c.schedule.warmup)[1] == "%":
        raise UserError(
            f"--sampler halving: schedule.warmup={c.schedule.warmup} would grow with every rung: give it in steps, such as "
            "--config.schedule.warmup='20 steps'"
        )
    return config.duration(c.train.duration, tokens_per_step=1)
