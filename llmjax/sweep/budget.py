"""From a budget to a run: parameters, tokens, loss, days and dollars, each with where it is from.

The best size and length follow from a law (laws.py), by default Chinchilla's points as this project fits them. Where a
model will also serve tokens, a smaller one that trains for longer costs less in all (Sardana et al. 2023). Days follow from
a share of the chips' peak that the training is assumed to reach, dollars from the list price.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmjax import storage
from llmjax.errors import UserError
from llmjax.parallel.chips import CHIPS
from llmjax.sweep.laws import Law
from llmjax.sweep.points import FLOPS_PER_PARAMETER

# Written by `llmjax laws chinchilla_epoch_svg.csv --parameters 'Model Size' --flops 'Training FLOP' --loss loss
# --drop-highest 5 --resamples 200 --out ...`, of Epoch's reading of Hoffmann et al.'s figure 4.
CHINCHILLA = Path(__file__).parent / "chinchilla.json"
MEASURED, FITTED, ASSUMED = "measured", "fitted", "assumed"
MFU = 0.4  # share of the peak
CHIP = "h100"
DAY, HOUR = 86_400.0, 3600.0
FLOPS_TO_SERVE = 2.0  # a parameter and token
CONSTANTS = ("E", "A", "B", "alpha", "beta")
SIZES = (1e6, 1e14)  # parameters between which the best size is looked for
LEAST, MOST = 1e4, 1e18  # parameters and tokens of a run that a law can tell anything of
INTERVAL = 0.9
FAR = 10.0  # times the largest fitted budget, from where a law's numbers are marked


@dataclass(frozen=True)
class Figure:
    """A number, its kind (measured, fitted or assumed), and where it is from."""

    value: float
    kind: str
    source: str
    low: float | None = None
    high: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Machine:
    """Chips, how well they are used, and what they cost."""

    chip: str
    count: int
    mfu: Figure
    price: Figure  # US dollars a chip-hour

    @property
    def flops_per_second(self) -> float:
        return CHIPS[self.chip].flops * self.count * self.mfu.value

    @property
    def flops_per_dollar(self) -> float:
        if not self.price.value:
            known = "0" if self.price.source == "given" else "not known"
            raise UserError(f"the price of {self.chip} is {known}: give --price USD, of a chip for an hour, above 0")
        return CHIPS[self.chip].flops * self.mfu.value * HOUR / self.price.value


@dataclass(frozen=True)
class Laws:
    """A law, and its resamples for intervals."""

    law: Law
    resamples: tuple[Law, ...]
    name: str
    largest_flops: float = math.inf  # of the runs that it was fitted to


def read_law(file: Path | None = None) -> Laws:
    """A law that `llmjax laws --out FILE` wrote; None: Chinchilla's. Raises UserError for another file."""
    path = file or CHINCHILLA
    if not path.is_file():
        raise UserError(f"there is no law {path}: write one with `llmjax laws RUN... --out FILE.json`")
    tree = storage.read_json(path, mend="write it again with `llmjax laws RUN... --out FILE.json`")
    try:
        law, *resamples = (
            Law(*map(float, one)) for one in ([tree[name] for name in CONSTANTS], *tree.get("resampled", ()))
        )
        largest = float(tree.get("largest_flops", math.inf))
        if (
            not all(value > 0 and math.isfinite(value) for value in (law.A, law.B, law.alpha, law.beta))
            or not 0 <= law.E < math.inf
        ):
            raise ValueError(f"its constants are {law}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no law ({error!r}): write one with `llmjax laws RUN... --out FILE.json`") from error
    name = str(file) if file else "Chinchilla's 240 points (Epoch's reading)"
    return Laws(law, tuple(resamples), name, largest)


# ------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class Size:
    """A model and its training."""

    parameters: float
    tokens: float

    @property
    def flops(self) -> float:
        return FLOPS_PER_PARAMETER * self.parameters * self.tokens


def of_flops(law: Law, flops: float, *, served: float = 0.0) -> Size:
    """The size with the lowest loss for this many FLOPs of training and serving together.

    Raises UserError if serving alone takes all FLOPs at every size.
    """
    if not served:
        return Size(law.best_size(flops), law.best_tokens(flops))

    def tokens(parameters: float) -> float:
        return (flops / parameters - FLOPS_TO_SERVE * served) / FLOPS_PER_PARAMETER

    most = min(SIZES[1], flops / (FLOPS_TO_SERVE * served) * 0.999)
    if most <= SIZES[0]:
        raise UserError(f"serving {served:.3g} tokens takes all of {flops:.3g} FLOPs: give a larger budget")
    best = _lowest(lambda n: float(law.loss(n, tokens(n))), SIZES[0], most)
    return Size(best, tokens(best))


def of_parameters(law: Law, parameters: float) -> Size:
    """The training length at which this size is the best one for its FLOPs."""
    low, high = 1e10, 1e40
    for _ in range(200):  # the best size grows with the FLOPs
        middle = math.sqrt(low * high)
        low, high = (middle, high) if law.best_size(middle) < parameters else (low, middle)
    return Size(parameters, low / FLOPS_PER_PARAMETER / parameters)


def of_loss(law: Law, loss: float, *, served: float = 0.0) -> Size:
    """The size that reaches a loss with the fewest FLOPs of training and serving (Sardana et al. 2023).

    Raises UserError for a loss that no size reaches.
    """
    if loss <= law.E:
        raise UserError(
            f"no model reaches a loss of {loss:.4g} under this law, whose lowest is E = {law.E:.4g}: give more"
        )

    def tokens(parameters: float) -> float:
        rest = loss - law.E - law.A * parameters**-law.alpha
        return (law.B / rest) ** (1 / law.beta) if rest > 0 else math.inf

    least = (law.A / (loss - law.E)) ** (1 / law.alpha)
    best = _lowest(
        lambda n: FLOPS_PER_PARAMETER * n * tokens(n) + FLOPS_TO_SERVE * n * served, least * (1 + 1e-9), least * 1e6
    )
    return Size(best, tokens(best))


def _lowest(of: Callable[[float], float], low: float, high: float) -> float:
    """The minimum of a function with one valley, by golden-section search in the logarithm."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = math.log(low), math.log(high)
    for _ in range(200):
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        if of(math.exp(c)) < of(math.exp(d)):
            b = d
        else:
            a = c
    return math.exp((a + b) / 2)


# ------------------------------------------------------------------ the whole


@dataclass(frozen=True)
class Asked:
    """What the user gives: one of FLOPs, days (of chips), dollars, parameters, a loss."""

    flops: float = 0.0
    days: float = 0.0
    dollars: float = 0.0
    parameters: float = 0.0
    loss: float = 0.0
    served: float = 0.0


def plan(asked: Asked, laws: Laws, machine: Machine) -> dict[str, Figure]:
    """The figures of a run: parameters, tokens, flops, loss, days, dollars, and with served tokens flops_to_serve."""
    given = "given"
    budget = asked.flops or asked.days * DAY * machine.flops_per_second
    if asked.dollars:
        budget = asked.dollars * machine.flops_per_dollar

    def size(law: Law) -> Size:
        if asked.parameters:
            return of_parameters(law, asked.parameters)
        if asked.loss:
            return of_loss(law, asked.loss, served=asked.served)
        return of_flops(law, budget, served=asked.served)

    chosen = size(laws.law)
    for what, value in (("parameters", chosen.parameters), ("tokens", chosen.tokens)):
        if not LEAST <= value <= MOST:
            raise UserError(
                f"this buys {chosen.parameters:.3g} parameters and {chosen.tokens:.3g} tokens, and no law tells of a run with "
                f"{'fewer' if value < LEAST else 'more'} than {LEAST if value < LEAST else MOST:.0e} {what}: give "
                f"{'more' if (value < LEAST) != bool(asked.loss) else 'less'}"
            )

    def interval(of: Callable[[Law], float]) -> dict[str, float | None]:
        found = []
        for one in laws.resamples:
            try:
                found.append(of(one))
            except UserError:  # a resampled law whose lowest loss is above the one asked for
                continue
        if not found:
            return {}
        low, high = np.percentile(found, [50 - 50 * INTERVAL, 50 + 50 * INTERVAL])
        return {"low": float(low), "high": float(high)}

    far = f", more than {FAR:g} times beyond its runs" if chosen.flops > FAR * laws.largest_flops else ""
    fitted = f"the law of {laws.name}{far}"
    seconds = chosen.flops / machine.flops_per_second
    hours = seconds / HOUR * machine.count
    weakest = ASSUMED if machine.mfu.kind == ASSUMED else FITTED
    figures = {
        "parameters": Figure(asked.parameters, ASSUMED, given)
        if asked.parameters
        else Figure(chosen.parameters, FITTED, fitted, **interval(lambda law: size(law).parameters)),
        "tokens": Figure(chosen.tokens, FITTED, fitted, **interval(lambda law: size(law).tokens)),
        "flops": Figure(chosen.flops, ASSUMED if asked.flops and not asked.served else FITTED, "6 x parameters x tokens"),
        "loss": Figure(
            float(laws.law.loss(chosen.parameters, chosen.tokens)), FITTED, f"{fitted}, nats a token of its text",
            **interval(lambda law: float(law.loss(chosen.parameters, chosen.tokens))),
        ),
        "days": Figure(
            seconds / DAY, weakest,
            f"{machine.count} x {machine.chip} at {machine.mfu.value:.0%} of the peak, {machine.mfu.source}",
        ),
        "dollars": Figure(
            hours * machine.price.value, ASSUMED,
            f"{hours:,.0f} chip-hours at {machine.price.value:.2f}, {machine.price.source}",
        ),
    }  # fmt: skip
    if asked.served:
        serving = FLOPS_TO_SERVE * chosen.parameters * asked.served
        figures["flops_to_serve"] = Figure(serving, FITTED, f"2 x parameters x {asked.served:.3g} tokens served")
    return figures


def enough(machine: Machine, figures: dict[str, Figure], *, days: float, least: int) -> Machine:
    """The machine with the smallest power of two of chips, at least `least`, that takes at most so many days."""
    wanted = figures["days"].value * machine.count / days
    return replace(machine, count=max(least, 2 ** math.ceil(math.log2(max(wanted, 1.0)))))


def measured_mfu(run: Path) -> Figure:
    """The share of the peak that a finished run reached. Raises UserError for a folder whose results lack it."""
    file = run / "results.json"
    if file.is_file():
        value = storage.read_json(file, mend="run its config again").get("train/mfu")
        if isinstance(value, float):
            return Figure(value, MEASURED, f"measured in {run}")
    raise UserError(f"{run} has no finished training with a known share of the peak: give --mfu instead")
