"""Trees of token sequences: a row holds many sequences, and their common beginnings once.

The choices of a question share its prompt, and the questions of a subject share their examples. After sorting, sequences
with a common beginning are neighbours. A row has them one after the other, each without its common beginning with the one
before. This is a tree in depth-first order: a token sees those before it whose subtree has not ended (`until` of
`Transformer`). A sequence joins the row of its neighbour if that costs less than a row of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Cost = Callable[[int, int], float]  # (tokens before in the row, new tokens) -> cost of the new ones


@dataclass(frozen=True)
class Row:
    """A tree of sequences: int32 arrays with an entry for each token.

    Attributes:
        until: the place in the row at which the subtree of a token ends.
        paths: for each sequence its number, and the places of its tokens in the row.
    """

    tokens: np.ndarray
    positions: np.ndarray
    until: np.ndarray
    paths: tuple[tuple[int, np.ndarray], ...]


def build_rows(sequences: Sequence[Sequence[int]], *, cost: Cost, longest: int, branches: bool = True) -> list[Row]:
    """Rows that hold every sequence once.

    Args:
        sequences: token ids, at least one each.
        cost: decides which sequences share a row.
        longest: the most tokens of a row. A longer sequence has its own row.
        branches: False for models that cannot read trees: a row then holds a sequence and beginnings of it.
    """
    arrays = [np.asarray(s, np.int32) for s in sequences]
    # Big-endian bytes sort as the numbers do, and a beginning sorts before what continues it.
    order = sorted(range(len(arrays)), key=lambda i: arrays[i].astype(">u4").tobytes())
    rows: list[Row] = []
    tree: _Tree | None = None
    for number in order:
        sequence = arrays[number]
        if tree is not None:
            shared = common_beginning(tree.last, sequence)
            new = len(sequence) - shared
            fits = tree.count + new <= longest and (branches or shared == len(tree.last))
            if fits and (new == 0 or cost(tree.count, new) < cost(0, len(sequence))):
                tree.add(number, sequence, shared)
                continue
            rows.append(tree.row())
        tree = _Tree(number, sequence)
    return [*rows, tree.row()] if tree is not None else rows


def common_beginning(a: np.ndarray, b: np.ndarray) -> int:
    """How many of the first elements of two sequences are equal."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


class _Tree:
    """A row while it grows. `last` is the sequence added last, `path` has the places of its tokens."""

    def __init__(self, number: int, sequence: np.ndarray) -> None:
        self.parts: list[np.ndarray] = []
        self.depths: list[np.ndarray] = []
        self.ended: list[tuple[np.ndarray, int]] = []
        self.paths: list[tuple[int, np.ndarray]] = []
        self.path, self.last, self.count = np.zeros(0, np.int32), sequence, 0
        self.add(number, sequence, 0)

    def add(self, number: int, sequence: np.ndarray, shared: int) -> None:
        self.ended.append((self.path[shared:], self.count))
        new = len(sequence) - shared
        self.parts.append(sequence[shared:])
        self.depths.append(np.arange(shared, len(sequence), dtype=np.int32))
        self.path = np.concatenate([self.path[:shared], np.arange(self.count, self.count + new, dtype=np.int32)])
        self.last, self.count = sequence, self.count + new
        self.paths.append((number, self.path))

    def row(self) -> Row:
        until = np.full(self.count, self.count, np.int32)
        for places, end in self.ended:
            until[places] = end
        return Row(np.concatenate(self.parts), np.concatenate(self.depths), until, tuple(self.paths))


def choose_lengths(sizes: Sequence[int], *, cost: Cost, shape_cost: float, step: int = 64) -> list[int]:
    """Lengths to pad rows to, ascending multiples of `step`, for the least cost of padding and compilation together.

    Args:
        sizes: tokens of each row.
        cost: as in `build_rows`; only `cost(0, length)` is used.
        shape_cost: the cost of compiling a program for one more length, in the same unit.
    """
    rounded = np.array([-(-size // step) * step for size in sizes])
    lengths, counts = np.unique(rounded, return_counts=True)
    costs = [cost(0, int(length)) for length in lengths]
    before = np.concatenate([[0], np.cumsum(counts)])
    # best[i]: the least cost of the rows of the first i lengths, if a program is compiled for the last of these.
    best, chosen = [0.0], [0]
    for i in range(1, len(lengths) + 1):
        totals = [best[j] + (before[i] - before[j]) * costs[i - 1] + shape_cost for j in range(i)]
        chosen.append(int(np.argmin(totals)))
        best.append(float(min(totals)))
    found, i = [], len(lengths)
    while i:
        found.append(int(lengths[i - 1]))
        i = chosen[i]
    return found[::-1]
