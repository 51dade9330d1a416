"""The gradient noise scale (McCandlish et al. 2018, An Empirical Model of Large-Batch Training, appendix A.1).

The gradient of a batch of B rows is the true gradient G and noise of covariance Sigma / B. Rows beyond the scale
B_simple = tr(Sigma) / |G|^2 make the gradient hardly better. The squared norms of the gradients of a whole batch and of its
micro-batches give unbiased estimates of both; each of one step says little, so the scale is the ratio of running means.
"""

import math
from collections.abc import Sequence
from typing import Any

MEMORY = 100  # steps of the running means


def estimates(small: Any, large: Any, *, rows: int, parts: int) -> tuple[Any, Any]:
    """Unbiased estimates of |G|^2 and tr(Sigma), numbers or arrays, of one step.

    Args:
        small: the mean over micro-batches of the squared norms of their mean gradients.
        large: the squared norm of the whole batch's mean gradient.
        rows: of the whole batch.
        parts: equal micro-batches that it is cut into, at least 2.
    """
    of_part = rows / parts
    signal = (rows * large - of_part * small) / (rows - of_part)
    noise = (small - large) / (1 / of_part - 1 / rows)
    return signal, noise


class NoiseScale:
    """The noise scale over a run, from the estimates of its steps in order."""

    def __init__(self, state: Sequence[float] = ()) -> None:
        """`state`: from a checkpoint."""
        self._signal, self._noise = state or (0.0, 0.0)

    @property
    def state(self) -> list[float]:
        """The state for a checkpoint, for JSON."""
        return [self._signal, self._noise]

    @property
    def last(self) -> float | str:
        """B_simple in rows after the steps so far; "unknown" while the mean of |G|^2 is not above 0."""
        return self._noise / self._signal if self._signal > 0 else "unknown"

    def see(self, signal: float, noise: float) -> float:
        """The same after one more step with these estimates; NaN where it is not known."""
        if math.isfinite(signal) and math.isfinite(noise):
            # Both start at 0 and are short by the same factor, which cancels out of the ratio.
            self._signal += (signal - self._signal) / MEMORY
            self._noise += (noise - self._noise) / MEMORY
        return self.last if isinstance(self.last, float) else math.nan
