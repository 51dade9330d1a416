"""Mixtures: which source, and which of its examples, training example number n is.

Time is cut into stages, each with its own weights, and a stage into blocks of BLOCK examples. In every block each
source gets its share rounded down or up, and over PERIOD blocks exactly its share, in units of one example in
BLOCK * PERIOD; within a block the order is a seeded permutation. So the answer is a pure function of n, a source with
a tiny weight still gets its turn, and nothing grows with the length of training.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmjax.data.generators import generator
from llmjax.errors import UserError

BLOCK = 256
PERIOD = 4096
STRIDE = 2531  # odd, near PERIOD times the golden ratio: neighbouring blocks round in different places


def parse_mixture(
    mixture: Sequence[str], *, sources: Sequence[str], steps: Callable[[str], int]
) -> list[tuple[int, dict[str, float]]]:
    """Stages (first step, weight by source) of strings like "80%: notes=1 stdlib=2"; sources not named weigh 0.

    Args:
        steps: from a duration as text to steps.

    Raises:
        UserError: for a string that cannot be read, an unknown source, a negative weight, a stage without a positive
            weight, a first stage that does not start at 0, or stages out of order.
    """
    stages: list[tuple[int, dict[str, float]]] = []
    for text in mixture:
        when, colon, shares = text.partition(":")
        if not colon:
            raise UserError(
                f"data.mixture: {text!r} is not understood: write START: SOURCE=WEIGHT ..., "
                f"such as '80%: {sources[0]}=1'"
            )
        try:
            start = steps(when)
        except UserError as error:
            raise UserError(f"data.mixture: {text!r}: {error}") from error
        weights = _parse_weights(text, shares, sources)
        if not stages and start != 0:
            raise UserError(
                f"data.mixture: the first stage must start at 0, not at {when.strip()}: begin with '0%: ...'"
            )
        if stages and start <= stages[-1][0]:
            raise UserError(
                f"data.mixture: {text!r} starts at step {start}, not after the stage before it, which starts at step "
                f"{stages[-1][0]}: put the stages in order and apart"
            )
        stages.append((start, weights))
    return stages


def _parse_weights(text: str, shares: str, sources: Sequence[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for share in shares.split():
        name, equals, number = share.rpartition("=")
        if not equals or not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?", number):
            raise UserError(
                f"data.mixture: {share!r} in {text!r} is not understood: write SOURCE=WEIGHT, such as {sources[0]}=1"
            )
        if name not in sources:
            raise UserError(
                f"data.mixture: there is no source {name!r} in {text!r}; the sources are {', '.join(sources)}"
            )
        if name in weights:
            raise UserError(f"data.mixture: {text!r} gives {name} twice: keep one of them")
        weights[name] = float(number)
        if weights[name] < 0:
            raise UserError(f"data.mixture: {share!r} in {text!r} is negative: weights are 0 or more")
    if not any(weights.values()):
        raise UserError(
            f"data.mixture: no source has a positive weight in {text!r}: give at least one, such as {sources[0]}=1"
        )
    return weights


def tempered(sizes: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Weights size ** temperature: 1 is by size, 0 all alike, 0.3 to 0.7 lifts small sources (Conneau and Lample 2019)."""
    return {name: float(size**temperature) if size else 0.0 for name, size in sizes.items()}


def capped(
    stages: Sequence[tuple[int, Mapping[str, float]]], *, examples: int, sizes: Mapping[str, int], max_epochs: float
) -> list[tuple[int, dict[str, float]]]:
    """The stages with weights lowered so that no source is seen more than `max_epochs` times over the whole training.

    What a source may not give, the others of its stage give, in proportion to their weights.

    Args:
        stages: number of the first example, and weight by source.
        examples: of the whole training.
        sizes: examples in one pass over each source.

    Raises:
        UserError: if the sources that a stage draws on have too few examples left between them.
    """
    left = {name: max_epochs * size for name, size in sizes.items()}
    result = []
    ends = [start for start, _ in stages[1:]] + [examples]
    for (start, weights), end in zip(stages, ends, strict=True):
        need = float(max(end - start, 0))
        free = {name: weight for name, weight in weights.items() if weight > 0}
        share: dict[str, float] = {}
        if need > sum(left[name] for name in free) * (1 + 1e-9):
            raise UserError(
                f"data.max_epochs={max_epochs:g}: {', '.join(free)} have {sum(left[n] for n in free):,.0f} examples left "
                f"under it, and {need:,.0f} are wanted from them: raise data.max_epochs, shorten train.duration, or add text"
            )
        while free:
            rate = (need - sum(share.values())) / sum(free.values())
            full = [name for name, weight in free.items() if weight * rate > left[name]]
            if not full:
                share |= {name: weight * rate for name, weight in free.items()}
                break
            share |= {name: left[name] for name in full}
            free = {name: weight for name, weight in free.items() if name not in full}
        left = {name: amount - share.get(name, 0.0) for name, amount in left.items()}
        result.append((start, share if need else dict(weights)))
    return result


def apportion(weights: Sequence[float], seats: int) -> np.ndarray:
    """Seats by largest remainder, at least one for every positive weight; int64, sums to `seats`."""
    share = np.asarray(weights, np.float64) / np.sum(weights) * seats
    counts = np.floor(share).astype(np.int64)
    order = np.argsort(counts - share, kind="stable")
    counts[order[: seats - counts.sum()]] += 1
    for source in np.flatnonzero((share > 0) & (counts == 0)):
        counts[np.argmax(counts)] -= 1
        counts[source] = 1
    return counts


class Mixture:
    """Example number -> (source, index within the source)."""

    def __init__(self, stages: Sequence[tuple[int, Mapping[str, float]]], *, sources: Sequence[str], seed: int) -> None:
        """`stages`: number of the first example, and weight by source."""
        self.sources = tuple(sources)
        self._seed = seed
        self._starts = np.array([example for example, _ in stages], np.int64)
        self._tables = [_Table([weights.get(name, 0.0) for name in sources]) for _, weights in stages]
        self._block = functools.lru_cache(maxsize=64)(self._make_block)
        # What each source has given before each stage begins.
        self._used = [np.zeros(len(sources), np.int64)]
        for stage in range(len(stages) - 1):
            length = int(self._starts[stage + 1] - self._starts[stage])
            block, rest = divmod(length, BLOCK)
            begun, _ = self._block(stage, block)
            self._used.append(
                self._tables[stage].before(block)
                + self._used[stage]
                + np.bincount(begun[:rest], minlength=len(sources))
            )

    def locate(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source numbers and the indices within their sources (int64) of example numbers (any shape, int64)."""
        flat = np.asarray(examples, np.int64).ravel()
        stages = np.searchsorted(self._starts, flat, side="right") - 1
        within = flat - self._starts[stages]
        sources, indices = np.empty_like(flat), np.empty_like(flat)
        keys = np.stack([stages, within // BLOCK], axis=1)
        for stage, block in np.unique(keys, axis=0).tolist():
            chosen = (keys == (stage, block)).all(axis=1)
            block_sources, block_indices = self._block(stage, block)
            sources[chosen] = block_sources[within[chosen] % BLOCK]
            indices[chosen] = block_indices[within[chosen] % BLOCK]
        return sources.reshape(np.shape(examples)), indices.reshape(np.shape(examples))

    def counts(self, examples: int) -> dict[str, int]:
        """How many of the first `examples` examples are of each source."""
        stage = int(np.searchsorted(self._starts, examples, side="right")) - 1
        block, rest = divmod(examples - int(self._starts[stage]), BLOCK)
        begun, _ = self._block(stage, block)
        seen = self._tables[stage].before(block) + self._used[stage]
        seen = seen + np.bincount(begun[:rest], minlength=len(self.sources))
        return dict(zip(self.sources, seen.tolist(), strict=True))

    def _make_block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        table = self._tables[stage]
        counts = table.counts[block % PERIOD]
        ordered = np.repeat(np.arange(len(counts)), counts)
        sources = generator("mixture", self._seed, stage, block).permutation(ordered)
        # The examples of one source keep their order: the permutation only interleaves the sources.
        indices = np.empty(BLOCK, np.int64)
        first = table.before(block) + self._used[stage]
        for source in np.unique(sources):
            indices[sources == source] = first[source] + np.arange(counts[source])
        return sources, indices


class _Table:
    """How many examples of each source the blocks of one stage hold."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.per_period = apportion(weights, BLOCK * PERIOD)
        whole, part = np.divmod(self.per_period, PERIOD)
        # Systematic rounding: a source gets one more where its interval of the summed remainders holds a multiple of
        # PERIOD, and over the PERIOD different offsets this happens `part` times exactly.
        edges = np.concatenate([[0], np.cumsum(part)])
        offsets = np.arange(PERIOD) * STRIDE % PERIOD
        self.counts = whole + np.diff((offsets[:, None] + edges) // PERIOD, axis=1)
        self._before = np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(self.counts, axis=0)])

    def before(self, block: int) -> np.ndarray:
        """Examples of each source before this block of the stage, int64."""
        periods, rest = divmod(block, PERIOD)
        return periods * self.per_period + self._before[rest]
