"""Rows of tokens that hold many sequences with common beginnings once: what a model is given to score choices fast.

The choices of a question share its prompt, and the questions of a subject share their examples. Sorted, sequences with a
common beginning lie side by side, and laid behind one another without what the one before already has they are a tree
in depth-first order: a token sees those in front of it whose subtree has not ended (`until` of `Transformer`). Whether
a sequence joins the row of its neighbour or begins its own is decided by what either would cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Cost = Callable[[int, int], float]  # (tokens before in the row, new tokens) -> what computing the new ones costs


@dataclass(frozen=True)
class Row:
    """A tree of sequences; arrays of int32, one entry a token.

    `paths` has for every sequence (its number, the places of its tokens in the row).
    """

    tokens: np.ndarray
    positions: np.ndarray
    until: np.ndarray
    paths: tuple[tuple[int, np.ndarray], ...]


def build_rows(sequences: Sequence[Sequence[int]], *, cost: Cost, longest: int, branches: bool = True) -> list[Row]:
    """Every sequence in one of the rows.

    Args:
        sequences: token ids, at least one each.
        cost: decides who shares a row.
        longest: tokens of a row; a sequence that is longer has its own.
        branches: False for models that cannot read trees: then a row holds a sequence and beginnings of it.
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
    """How many of their first elements are equal."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


class _Tree:
    """A row while it grows; `last` is the sequence that was added last, `path` where its tokens are."""

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
    """Lengths, ascending multiples of `step`, that rows of these sizes are padded to, so that the padding and the
    compilation of a program for each length cost least together.

    Args:
        cost: as of `build_rows`; only `cost(0, length)` is asked.
        shape_cost: of one more length, in the same unit.
    """
    rounded = np.array([-(-size // step) * step for size in sizes])
    lengths, counts = np.unique(rounded, return_counts=True)
    costs = [cost(0, int(length)) for length in lengths]
    before = np.concatenate([[0], np.cumsum(counts)])
    # best[i]: the least that rows of the first i lengths cost when the last of them is one that is compiled.
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
