"""Loss spikes: when one lasts, go back to a checkpoint from before it and skip the batches that led there.

PaLM (Chowdhery et al. 2022, section 5.1) restarted from about 100 steps before each spike and skipped 200 to 500
batches, which did not come back although the same batches did no harm elsewhere. Whether a step is in a spike depends
on the losses alone, and what was skipped is kept in the checkpoints, so that a run that is killed meanwhile comes to the
same end.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from llmjax.errors import UserError


@dataclass(frozen=True)
class Skip:
    """From step index `step` on (the first step is 0), batches are `batches` further in the data than they were."""

    step: int
    batches: int


def batch_number(step: int, skips: Sequence[Skip]) -> int:
    """The number of the batch that the step of this index takes (from 0 both)."""
    return step + sum(skip.batches for skip in skips if skip.step <= step)


class Spikes:
    """Watches the losses of a run, in their order.

    A loss is high when it is not finite or above `factor` times the median of the last `window` losses that were not
    high. `patience` high losses in a row are a spike. Until `window` losses were seen none is high.
    """

    def __init__(self, c: ConfigDict, state: dict[str, Any] | None = None) -> None:
        """`c`: the settings under `train.rewind`; `state`: of a checkpoint, to go on from."""
        self._c = c
        before = {"losses": (), "since": None, "skips": ()} | (state or {})
        self._losses: deque[float] = deque(before["losses"], maxlen=c.window)
        self._since: int | None = before["since"]
        self.skips = [Skip(*skip) for skip in before["skips"]]

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""
        skips = [[skip.step, skip.batches] for skip in self.skips]
        return {"losses": list(self._losses), "since": self._since, "skips": skips}

    def see(self, step: int, loss: float) -> int | None:
        """The number of the first step of the spike that lasts since then, once it is one; None otherwise.

        Args:
            step: how many steps have been taken, the one with this loss included.
        """
        if not self._c.factor:
            return None
        full = len(self._losses) == self._c.window
        if not full or (math.isfinite(loss) and loss <= self._c.factor * statistics.median(self._losses)):
            self._since = None
            if math.isfinite(loss):
                self._losses.append(loss)
            return None
        self._since = step if self._since is None else self._since
        return self._since if step - self._since + 1 >= self._c.patience else None

    def choose(self, saved: Sequence[int], *, since: int) -> int | None:
        """The checkpoint to go back to: the newest from `steps` steps before the spike, or the oldest from before it."""
        before = sorted(step for step in saved if step < since)
        early = [step for step in before if step < since - self._c.steps]
        return early[-1] if early else before[0] if before else None

    def skip(self, *, back_to: int, seen: int) -> Skip:
        """Note that training goes on from step `back_to`, past the batches up to step `seen` and `skip` more.

        Raises:
            UserError: when that was done `limit` times already.
        """
        if len(self.skips) >= self._c.limit:
            raise UserError(
                f"the loss is high again after going back {self._c.limit} times, up to step {seen:,}. Lower "
                "optimizer.learning_rate, look at the batches, or raise train.rewind.limit, and run again: it goes on "
                "from the last checkpoint"
            )
        self.skips.append(Skip(back_to, seen - back_to + self._c.skip))
        return self.skips[-1]

    def forget(self) -> None:
        """Take the level of the losses for the new normal, because there is nothing to go back to."""
        self._losses.clear()
        self._since = None
