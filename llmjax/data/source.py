"""Where training batches come from: what the loop asks of a source, and the source of batches that need no state."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from llmjax.errors import UserError

Batch = dict[str, np.ndarray]
READ_THREADS = 1  # one thread delivers more than training takes, and cores are for training
READ_AHEAD = 8  # batches


class Source(Protocol):
    """Batches of this process: its rows of each global batch, in the order of the processes.

    The loop asks for batch k just before step k, when every step before it has been taken. A run that is killed and
    resumed ends in the same bits if batch k depends on the config, the seed, k, the parameters and the state alone.
    A row is what may not be torn apart: batches are cut into micro-batches and spread over devices by rows.
    """

    stateless: (
        bool  # state() is always {}: batch k depends on the config, the seed and k alone, and batches may be skipped
    )

    def batch(self, k: int, params: Any) -> Batch:
        """The rows of batch k (from 0) for a step from these parameters, whose arrays do not outlive the step."""

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps after the last batch that was made, beside its number.

        Numeric arrays under names, of the same shapes in every process; {}: nothing, such as between two rounds.
        """

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what `state` returned when the checkpoint was made."""

    def metrics(self) -> dict[str, float]:
        """Numbers about the last batch that was made, for its row of metrics.jsonl."""


class StatelessSource:
    """Batches that are a function of their number, read ahead in a thread while they are asked for in order."""

    stateless = True

    def __init__(self, make: Callable[[int], Batch], *, read_ahead: int = READ_AHEAD) -> None:
        """`make`: number -> batch; `read_ahead`: batches made before they are asked for."""
        self._make, self._read_ahead = make, read_ahead
        self._next = -1
        self._stream: Iterator[Batch] = iter(())

    def batch(self, k: int, params: Any = None) -> Batch:
        if not self._read_ahead:
            return self._make(k)
        if k != self._next:
            self._stream = self._read(k)
        self._next = k + 1
        return next(self._stream)

    def _read(self, first: int) -> Iterator[Batch]:
        import grain

        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=self._read_ahead)
        return iter(grain.MapDataset.range(first, 1 << 62).map(self._make).to_iter_dataset(options))

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        if state:
            raise UserError(
                f"the checkpoint keeps {', '.join(state)} of a source of batches that is not this run's: go on with the "
                "settings it was made with, or choose another --workdir"
            )

    def metrics(self) -> dict[str, float]:
        return {}
