"""Rows of batches, which the objectives transform: arrays of length L by name (see data/batches.py)."""

import numpy as np

Row = dict[str, np.ndarray]


def documents(segments_L: np.ndarray) -> list[np.ndarray]:
    """The places of each document of a row, in order."""
    return [np.flatnonzero(segments_L == segment) for segment in range(1, segments_L.max(initial=0) + 1)]


def empty(length: int, *names: str) -> Row:
    """A row of padding."""
    return {name: np.zeros(length, np.float32 if name == "weights" else np.int32) for name in names}


def languages_of(row: Row, segments_L: np.ndarray) -> np.ndarray:
    """The language of each place of a new row whose segments number the documents of `row`: int32, 0 for padding."""
    by_number = [0, *(row["languages"][places[0]] for places in documents(row["segments"]))]
    return np.array(by_number, np.int32)[segments_L]
