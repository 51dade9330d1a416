"""Loss spikes: when one lasts, go back to an earlier checkpoint and skip the batches that led to it.

PaLM (Chowdhery et al. 2022, section 5.1) restarted from about 100 steps before each spike and skipped 200 to 500
batches. The spikes did not come back, although the same batches did no harm elsewhere. Whether a step is in a spike
depends on the losses alone.

Going back is a stop, followed by a resumption as after a kill: the loop raises `Spike`. The stage calls `go_back`, which
deletes the later checkpoints and notes the skipped batches, and starts the loop again. Checkpoints keep the note too, so
a run that is killed meanwhile comes to the same end.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import storage
from llmjax.errors import UserError
from llmjax.train import checkpoint, folders

FILE = "train/skips.json"  # in the run's folder


@dataclass(frozen=True)
class Skip:
    """From step index `step` on (the first is 0), batches are `batches` further in the data."""

    step: int
    batches: int


class Spike(Exception):  # noqa: N818
    """The loss is high since step `since`, up to step `seen`; the checkpoint of step `back_to` is from before."""

    def __init__(self, since: int, seen: int, back_to: int, skips: Sequence[Skip]) -> None:
        super().__init__(f"the loss is high since step {since:,}")
        self.since, self.seen, self.back_to, self.skips = since, seen, back_to, list(skips)


def batch_number(step: int, skips: Sequence[Skip]) -> int:
    """The number of the batch for the step of this index, both from 0."""
    return step + sum(skip.batches for skip in skips if skip.step <= step)


class Spikes:
    """Watches the losses of a run in order.

    A loss is high if it is not finite or above `factor` times the median of the last `window` losses that were not high.
    `patience` high losses in a row are a spike. No loss is high before the first `window` losses.
    """

    def __init__(self, c: ConfigDict, state: dict[str, Any] | None = None, *, skips: Sequence[Skip] = ()) -> None:
        """`c`: the settings under `train.rewind`; `state`: from a checkpoint; `skips`: those so far."""
        self._c, self._skips = c, skips
        before = {"losses": (), "since": None} | (state or {})
        self._losses: deque[float] = deque(before["losses"], maxlen=c.window)
        self._since: int | None = before["since"]

    @property
    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, for JSON."""
        skips = [[skip.step, skip.batches] for skip in self._skips]
        return {"losses": list(self._losses), "since": self._since, "skips": skips}

    def see(self, step: int, loss: float) -> int | None:
        """The first step of the spike that lasts until now; None: there is none.

        Args:
            step: the number of steps so far, the one with this loss included.
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
        """The checkpoint to go back to: the newest at least `steps` steps before the spike, else the oldest before it."""
        before = sorted(step for step in saved if step < since)
        early = [step for step in before if step < since - self._c.steps]
        return early[-1] if early else before[0] if before else None

    def forget(self) -> None:
        """Take the level of the losses as normal, because there is no checkpoint to go back to."""
        self._losses.clear()
        self._since = None


def skips_of(workdir: Path, meta: dict[str, Any]) -> list[Skip]:
    """The skips of a run: from the file of `go_back`, or from the checkpoint if there is no file."""
    path = workdir / FILE
    if path.exists():
        return [Skip(*skip) for skip in storage.read_json(path, mend="restore it, or delete the run's checkpoints")]
    return [Skip(*skip) for skip in meta.get("spikes", {}).get("skips", ())]


def go_back(workdir: Path, c: ConfigDict, spike: Spike) -> None:
    """Turn the run into one that was stopped at step `spike.back_to` and will skip the batches up to the spike and more.

    A run that is killed during this either meets the same spike again or has gone back.

    Args:
        c: the settings under `train.rewind`.

    Raises:
        UserError: when the run has gone back `limit` times already; the checkpoints then stay as they are.
    """
    if len(spike.skips) >= c.limit:
        raise UserError(
            f"the loss is high again after going back {c.limit} times, up to step {spike.seen:,}. Lower "
            "optimizer.learning_rate, look at the batches, or raise train.rewind.limit, and run again: it goes on "
            "from the last checkpoint"
        )
    skip = Skip(spike.back_to, spike.seen - spike.back_to + c.skip)
    print(
        f"WARNING: {spike}: going back to step {skip.step:,} and skipping {skip.batches:,} batches (time "
        f"{len(spike.skips) + 1} of {c.limit})"
    )
    for step in folders.steps_in(workdir / "checkpoints"):  # the newest first: what remains is always a run
        if step > spike.back_to:
            checkpoint.delete(workdir / "checkpoints" / str(step))
    storage.write_json(workdir / FILE, [[one.step, one.batches] for one in (*spike.skips, skip)])
