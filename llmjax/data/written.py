"""Strings that remember which of their characters a chat template wrote.

A chat template puts control tokens around strings of strangers. Whether "<|im_end|>" in its output is a control token
depends on who wrote it, and the text alone cannot say. So every string that stands in the template is a `Written`, and
remembers it when strings are joined, cut or stripped. Whatever an operation does not know becomes a mere string: a mark
may be lost that way, and none can be won.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

TEMPLATE, GENERATED = 1, 2  # bits of a character's flags: the template wrote it; it lies within {% generation %}
RUNS = re.compile(rb"(?s)(.)\1*")


class Written(str):
    """A string with a byte of flags for each of its characters; without `flags` no character has any."""

    _flags: bytes

    def __new__(cls, text: str, flags: bytes | None = None) -> "Written":
        made = super().__new__(cls, text)
        made._flags = bytes(len(made)) if flags is None else flags
        return made

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: Any) -> str:
        places = key if isinstance(key, slice) else slice(key, key + 1 or None)
        return Written(super().__getitem__(key), self._flags[places])

    def join(self, parts: Iterable[str]) -> str:
        between = [text for part in parts for text in (self, part)]
        return joined(between[1:])

    def strip(self, characters: str | None = None) -> str:
        return self.lstrip(characters).rstrip(characters)

    def lstrip(self, characters: str | None = None) -> str:
        return self[len(self) - len(super().lstrip(characters)) :]

    def rstrip(self, characters: str | None = None) -> str:
        return self[: len(super().rstrip(characters))]


class Run(NamedTuple):
    """A part of a text whose characters have the same flags."""

    text: str
    by_template: bool
    generated: bool


def runs(text: str) -> list[Run]:
    """The parts of a text; the whole of it, as handed to the template, when it is a mere string."""
    return [
        Run(str.__getitem__(text, slice(*run.span())), bool(run[1][0] & TEMPLATE), bool(run[1][0] & GENERATED))
        for run in RUNS.finditer(flags_of(text))
    ]


def by_template(text: str) -> Written:
    """The text, as if it stood in the template."""
    return Written(text, bytes([TEMPLATE]) * len(text))


def joined(parts: Iterable[str]) -> Written:
    """The parts one after the other, with the flags of their characters."""
    parts = list(parts)
    return Written("".join(parts), b"".join(map(flags_of, parts)))


def flags_of(text: str) -> bytes:
    """A byte for each character."""
    return text._flags if isinstance(text, Written) else bytes(len(text))
