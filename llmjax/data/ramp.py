"""How many sequences each step takes: always the same number, or few at first, growing over a ramp.

Gradients are less noisy than they need to be early in training, so small batches are enough there (McCandlish et al.
2018); GPT-3 grew its batches linearly over the first billions of tokens (Brown et al. 2020). Here the size doubles
whenever that line reaches the next size, so that a ramp is a handful of stages, each with one compiled program. A small
batch is cut into fewer micro-batches, and where a part of a micro-batch is enough, into smaller ones.
"""

import bisect
import math
from dataclasses import dataclass

from ml_collections import ConfigDict

from llmjax import config
from llmjax.errors import UserError


@dataclass(frozen=True)
class Stage:
    """Steps from `first_step` on, until the next stage, with `rows` sequences each."""

    first_step: int
    first_row: int  # sequences taken by all steps before
    rows: int
    micro_batches: int


@dataclass(frozen=True)
class BatchSizes:
    """The stages of a run, the first at step 0, and what counts in steps and tokens by them."""

    stages: tuple[Stage, ...]
    length: int  # tokens of a sequence
    tokens_per_epoch: int = 0

    def at(self, step: int) -> Stage:
        """The stage of a step (0 is the first)."""
        return self.stages[bisect.bisect_right([stage.first_step for stage in self.stages], step) - 1]

    def first_row(self, step: int) -> int:
        """How many sequences all steps before this one take."""
        stage = self.at(step)
        return stage.first_row + (step - stage.first_step) * stage.rows

    def tokens(self, step: int) -> int:
        """How many tokens all steps before this one take."""
        return self.first_row(step) * self.length

    def describe(self) -> str:
        """In words: tokens a step, and from which step."""
        first, *later = (f"{stage.rows * self.length:,}" for stage in self.stages)
        steps = (f", {tokens} from step {s.first_step:,}" for tokens, s in zip(later, self.stages[1:], strict=True))
        return f"{first} a step{''.join(steps)}"

    def period(self, value: str | int, *, total_steps: int = 0) -> int:
        """A duration that recurs or lies at the end, in steps of the full size."""
        tokens_per_step = self.stages[-1].rows * self.length
        return config.duration(
            value, tokens_per_step=tokens_per_step, tokens_per_epoch=self.tokens_per_epoch, total_steps=total_steps
        )

    def steps(self, value: str | int, *, total_steps: int = 0) -> int:
        """A duration from the start of training in steps, rounded to the nearest; percentages are of `total_steps`.

        Raises UserError as `config.duration` does.
        """
        amount, unit = config.parse_duration(value)
        if unit not in ("token", "epoch") or (unit == "epoch" and not self.tokens_per_epoch):
            return config.duration(value, tokens_per_step=1, total_steps=total_steps)
        tokens = amount * (1 if unit == "token" else self.tokens_per_epoch)
        stage = next(s for s in reversed(self.stages) if s.first_row * self.length <= tokens)
        return stage.first_step + round((tokens - stage.first_row * self.length) / (stage.rows * self.length))


def sizes(c: ConfigDict) -> list[int]:
    """The sizes of batches under the settings of `train`, in their order: batch_start doubled until batch_size."""
    if not config.parse_duration(c.batch_ramp)[0]:
        return [c.batch_size]
    found = [c.batch_start]
    while found[-1] < c.batch_size:
        found.append(min(2 * found[-1], c.batch_size))
    return found


def micro_batches(c: ConfigDict, size: int) -> int:
    """Into how few equal parts a batch of this size can be cut, none larger than a micro-batch of the full size."""
    largest = c.batch_size // c.micro_batches
    return next(parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= largest)


def batch_sizes(c: ConfigDict, *, tokens_per_epoch: int = 0) -> BatchSizes:
    """The stages under the settings of `train`.

    The line from batch_start to batch_size is linear in what batch_ramp counts, steps or tokens; a percentage counts
    as train.duration does. Batches are never above the line.

    Raises:
        UserError: for durations in epochs when `tokens_per_epoch` is 0.
    """
    amount, unit = config.parse_duration(c.batch_ramp)
    if unit == "%":
        share = amount / 100
        amount, unit = config.parse_duration(c.duration)
        amount *= share
    first, *later = sizes(c)
    if unit == "epoch" and later:
        if not tokens_per_epoch:
            raise UserError(f"train.batch_ramp={c.batch_ramp!r}: epochs are not known here; give steps or tokens")
        amount, unit = amount * tokens_per_epoch, "token"
    stages = [Stage(0, 0, first, micro_batches(c, first))]
    for size in later:
        reached = amount * (size - first) / (c.batch_size - first)  # steps or tokens
        last = stages[-1]
        if unit == "step":
            steps = max(round(reached) - last.first_step, 0)
        else:
            steps = max(math.ceil((reached / c.sequence_length - last.first_row) / last.rows), 0)
        new = Stage(last.first_step + steps, last.first_row + steps * last.rows, size, micro_batches(c, size))
        stages = [*stages, new] if steps else [*stages[:-1], new]
    return BatchSizes(tuple(stages), c.sequence_length, tokens_per_epoch)
