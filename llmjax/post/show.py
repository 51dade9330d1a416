"""Shows what a run would learn: the first examples of its sources with their masks, before any training."""

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from llmjax.data.conversations import Rejected, Row, RowError
from llmjax.data.examples import Example, as_messages
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.eval import text_metrics
from llmjax.post import classes, rows

LEARNT, CONTROL, PLAIN = "\x1b[32m", "\x1b[35m", "\x1b[0m"  # green, magenta
OPEN, CLOSE = "[[", "]]"  # around what is learnt, where there are no colours
MOST_ROWS = 10_000  # of which the diversity is told


class Shown(NamedTuple):
    """Examples as text, and the rows that were left out on the way."""

    lines: list[str]
    rejected: list[Rejected]


def show(c: ConfigDict, *, count: int, colour: bool) -> Shown:
    """The first `count` examples of `data.sources`, one text each.

    Control tokens are shown by their names. Raises UserError as the rows stage does.
    """
    tokenizer = rows.tokenizer_of(c)
    if c.objective.name == "classify":
        c = classes.with_labels(c, [row for _, row in rows.read(c, [])])
    rejected: list[Rejected] = []
    lines: list[str] = []
    for example, title in _examples(c, tokenizer, rejected):
        if len(lines) == count:
            break
        tokens, learnt = len(example.ids), int(example.weights.sum())
        lines.append(f"{title}: {tokens} tokens, {learnt} learnt\n{as_text(tokenizer, example, colour=colour)}")
    return Shown(lines, rejected)


def diversity(c: ConfigDict) -> str:
    """The diversity of the first users' requests in `data.sources`, as a line; "" for fewer than two."""
    read = itertools.islice(rows.read(c, []), MOST_ROWS)
    asked = [_asked(row) for _, row in read]
    asked = [text for text in asked if text.strip()]
    return str(text_metrics.diversity(asked)) if len(asked) > 1 else ""


def _asked(row: Row) -> str:
    said = [*as_messages(row.prompt, "user"), *as_messages(row.answers[0] if row.answers else "", "assistant")]
    return next((str(message.get("content") or "") for message in said if message["role"] == "user"), "")


def as_text(tokenizer: Tokenizer, example: Example, *, colour: bool) -> str:
    """An example's text, with the learnt tokens in colour or in double brackets."""
    names = {i: name for name, i in tokenizer.control_ids.items()}
    pieces: list[
        tuple[bytes, bool, bool]
    ] = []  # text, learnt, control; runs of one kind are joined, for whole characters
    for i, weight in zip(example.ids.tolist(), example.weights > 0, strict=True):
        text, kind = (
            (names[i].encode(), (bool(weight), True))
            if i in names
            else (tokenizer.piece_bytes[i], (bool(weight), False))
        )
        if pieces and pieces[-1][1:] == kind:
            pieces[-1] = (pieces[-1][0] + text, *kind)
        else:
            pieces.append((text, *kind))
    if colour:
        return "".join(
            f"{CONTROL if control and not learnt else LEARNT if learnt else ''}{text.decode('utf-8', 'replace')}{PLAIN}"
            for text, learnt, control in pieces
        )
    shown, inside = "", False
    for text, learnt, _ in pieces:
        shown += (OPEN if learnt else CLOSE) * (learnt != inside) + text.decode("utf-8", "replace")
        inside = learnt
    return shown + CLOSE * inside


def _examples(c: ConfigDict, tokenizer: Tokenizer, rejected: list[Rejected]) -> Iterator[tuple[Example, str]]:
    for file, row in rows.read(c, rejected):
        try:
            groups = rows.groups_of(tokenizer, row, c)
        except (RowError, UserError) as error:
            rejected.append(Rejected(file, row.number, str(error)))
            continue
        if c.objective.name == "classify":  # a text is judged as a whole, and none of its tokens is learnt
            ids = groups[0].examples[0].ids[:-1]
            yield Example(ids, np.zeros(len(ids), np.float32)), f"{file.name}, row {row.number}, label {row.label}"
            continue
        for group in groups:
            for example, rank in zip(group.examples, group.ranks, strict=True):
                compared = f", rank {rank:g}" if len(group.examples) > 1 else ""
                yield example, f"{file.name}, row {row.number}{compared}"


def in_colour() -> bool:
    """Whether the terminal shows colours."""
    return sys.stdout.isatty()
