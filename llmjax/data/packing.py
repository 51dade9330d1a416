"""Whole examples packed into rows: best fit, decreasing. Nothing is cut, and what belongs together shares a row."""

from collections.abc import Mapping, Sequence

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


MOST_PLACES = 0.9  # of a row; with more of them learnt all logits are computed


def most_places(learnt: int, length: int) -> int:
    """For how many places of a row logits are computed if at most so many are learnt; 0: for all."""
    count = -(-learnt // 8) * 8
    return count if 0 < count <= MOST_PLACES * length else 0


def learnt_places(weights_L: np.ndarray, count: int) -> np.ndarray:
    """The places of a row that have a weight, and of the others the first ones up to `count`: (count,) int32, ascending.

    Raises ValueError when more have a weight.
    """
    if (weights_L > 0).sum() > count:
        raise ValueError(f"{(weights_L > 0).sum()} places are learnt, and there is room for {count}")
    return np.sort(np.argsort(weights_L <= 0, kind="stable")[:count]).astype(np.int32)


def text_of(example: Example) -> Row:
    """An example as it lies in a row: tokens, targets and weights, (`size_of`,) each."""
    return {"tokens": example.ids[:-1], "targets": example.ids[1:], "weights": example.weights[1:]}


def shared_size(texts: Sequence[Mapping[str, np.ndarray]]) -> int:
    """How many first places all texts have in common: the same tokens, and nothing learnt.

    The last token of a prompt is not among them, because the answers' first tokens are its targets.
    """
    sizes = [len(text["tokens"]) for text in texts]
    unlearnt = [int(np.argmax(text["weights"] > 0)) if text["weights"].any() else size for text, size in zip(texts, sizes, strict=True)]  # fmt: skip
    most = min(unlearnt)
    same = np.all([text["tokens"][:most] == texts[0]["tokens"][:most] for text in texts], axis=0)
    return most if same.all() else int(np.argmin(same))


def tree_size(texts: Sequence[Mapping[str, np.ndarray]]) -> int:
    """The places that texts take in a row which holds what they share once."""
    return sum(len(text["tokens"]) for text in texts) - (len(texts) - 1) * shared_size(texts)


def packed_trees(
    groups: Sequence[Sequence[Mapping[str, np.ndarray]]], *, length: int
) -> tuple[Row, list[tuple[int, int, int]]]:
    """A row of groups of texts, each a tree: what the group's texts share, and behind it the rest of each text.

    Args:
        groups: texts of tokens, targets, weights, and what else belongs to tokens.

    Returns:
        The row, all (length,): the texts' arrays; positions, which go on from what is shared; segments, the number of the
        tree, from 1; answers, the number of the text, from 1, and 0 where nothing is learnt because it is shared; until, by which
        tokens see their own text alone (see `Transformer`). And for each text where its own part begins in the row
        and in the text, and the size of that part.

    Raises ValueError when the row is too short.
    """
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "positions", "segments", "answers")}
    row |= {"weights": np.zeros(length, np.float32), "until": np.full(length, length, np.int32)}
    row |= {name: np.zeros(length, values.dtype) for name, values in (groups[0][0] if groups else {}).items()}
    places: list[tuple[int, int, int]] = []
    at = 0
    for tree, texts in enumerate(groups, start=1):
        shared, size = shared_size(texts), tree_size(texts)
        if at + size > length:
            raise ValueError(f"{at + size} tokens do not fit into a row of {length}")
        row["segments"][at : at + size] = tree
        for number, (text, first) in enumerate([(texts[0], 0), *((text, shared) for text in texts)]):
            last = len(text["tokens"]) if number else shared
            place = slice(at, at + last - first)
            for name, values in text.items():
                row[name][place] = values[first:last]
            row["positions"][place] = np.arange(first, last)
            if number:
                row["answers"][place] = len(places) + 1
                places.append((at, first, last - first))
            row["until"][place] = at + (last - first if number else size)
            at += last - first
    return row, places
