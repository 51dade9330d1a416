"""Whole examples packed into rows: best fit, decreasing. Nothing is cut, and what belongs together shares a row."""

from collections.abc import Sequence

import numpy as np

from llmjax.data.examples import Example

Row = dict[str, np.ndarray]


def best_fit(sizes: Sequence[int], *, length: int) -> list[list[int]]:
    """Which sizes share a row of that length: each, from the largest, goes to the fullest row that has room for it.

    A size above `length` raises ValueError: callers leave such examples out, and count them.
    """
    if any(size > length for size in sizes):
        raise ValueError(f"a size is above the length {length}")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # by what is left in a row: its numbers
    rooms = 0  # bit r is set where a row has r left, so that the smallest room that fits is found at once
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = rooms >> sizes[i]
        if fitting:
            room = sizes[i] + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        with_room[room - sizes[i]].append(row)
        rooms |= 1 << (room - sizes[i])
    return rows


def size_of(example: Example) -> int:
    """The places that an example takes in a row: each holds a token, and the next one as its target."""
    return len(example.ids) - 1


def packed(examples: Sequence[Example], *, length: int) -> Row:
    """A row of examples, one after another: tokens, targets, positions (from 0 in each) and segments (1, 2, ...; 0 is
    padding), int32, and weights, float32; all (length,).

    Raises ValueError when the row is too short.
    """
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "positions", "segments")}
    row["weights"] = np.zeros(length, np.float32)
    at = 0
    for number, example in enumerate(examples, start=1):
        size = size_of(example)
        place = slice(at, at + size)
        if at + size > length:
            raise ValueError(f"{at + size} tokens do not fit into a row of {length}")
        row["tokens"][place], row["targets"][place] = example.ids[:-1], example.ids[1:]
        row["weights"][place] = example.weights[1:]
        row["positions"][place], row["segments"][place] = np.arange(size), number
        at += size
    return row
