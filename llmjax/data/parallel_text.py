"""Parallel text: two files whose lines are translations of each other, read as documents of one pair each.

A pair is a document like any other, with two lines of text, until it is encoded: then each text is a document of its
own in the token stream, the first and the second of a pair in turn, and a table of offsets says where pairs begin.
Every other document has the language that its source is named after.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmjax.errors import UserError

BOM = b"\xef\xbb\xbf"
PAIRS_FILE = "pairs.npy"  # beside the records of a stream: where each pair begins, and the end, uint64


@dataclass(frozen=True)
class Spec:
    """A parallel entry of `data.sources`, "FIRST|SECOND=FILE|FILE" or "FILE|FILE" (then the files name the languages)."""

    languages: tuple[str, str]
    files: tuple[Path, Path]

    @property
    def name(self) -> str:
        """What the source is called, in mixtures and on disk."""
        return "-".join(self.languages)


def parse_spec(spec: str) -> Spec | None:
    """The parallel entry of `data.sources` that `spec` is, or None if it is of another kind. Reads nothing.

    Raises:
        UserError: for more than two files, a missing file, or languages that are no names or the same.
    """
    if "|" not in spec or Path(spec).exists() or glob.has_magic(spec):
        return None
    names, equals, paths = spec.rpartition("=")
    files = [Path(path).expanduser() for path in paths.split("|")]
    languages = names.split("|") if equals else [file.name.partition(".")[0] for file in files]
    if len(files) != 2 or len(languages) != 2:
        raise UserError(
            f"data.sources: {spec!r} is not understood: parallel text is two files with as many lines, FILE|FILE, or "
            "with the names of their languages FIRST|SECOND=FILE|FILE"
        )
    for language in languages:
        if not re.fullmatch(r"\w[\w.]*", language, re.ASCII):
            raise UserError(
                f"data.sources: {spec!r}: {language!r} cannot name a language, which takes letters, digits, '_' and "
                "'.': write FIRST|SECOND=FILE|FILE"
            )
    if languages[0] == languages[1]:
        raise UserError(
            f"data.sources: {spec!r}: both languages are called {languages[0]!r}: name them, FIRST|SECOND=FILE|FILE"
        )
    for file in files:
        if not file.is_file():
            raise UserError(f"data.sources: {spec!r}: there is no file {file}")
    return Spec((languages[0], languages[1]), (files[0], files[1]))


def read_pairs(first: Path, second: Path) -> Iterator[tuple[int, bytes, str]]:
    """(line number from 1, "TEXT\\nTEXT" in UTF-8, reason why it cannot be used or "") of each pair of lines.

    Raises:
        UserError: if one file has more lines than the other.
    """
    with first.open("rb") as a, second.open("rb") as b:
        number = 0
        while True:
            number += 1
            lines = a.readline(), b.readline()
            if not all(lines):
                break
            texts = [line.removeprefix(BOM).rstrip(b"\r\n").replace(b"\r", b" ") for line in lines]
            empty = [file.name for file, text in zip((first, second), texts, strict=True) if not text.strip()]
            yield number, b"\n".join(texts), f"empty line: in {' and '.join(empty)}" if empty else ""
        if any(lines):
            counts = [number - 1 + bool(line) + sum(1 for _ in file) for line, file in zip(lines, (a, b), strict=True)]
            raise UserError(
                f"parallel text must have as many lines in both files, but {first} has {counts[0]:,} and {second} has "
                f"{counts[1]:,}: line {number} is the first without a partner"
            )


def sides(text: str, languages: Sequence[str]) -> list[str]:
    """The texts of a document that are encoded one by one: both of a pair, or the text itself."""
    return text.split("\n") if len(languages) == 2 else [text]


def rows_of_pairs(starts: np.ndarray, *, length: int) -> np.ndarray:
    """The first pair of each row, and the number of pairs, int64: as many whole pairs a row as `length` tokens hold.

    Args:
        starts: where pairs begin in the stream, and its end.
    """
    firsts, pair, pairs = [0], 0, len(starts) - 1
    while pair < pairs:
        fits = int(np.searchsorted(starts, starts[pair] + np.uint64(length), side="right")) - 1
        pair = max(fits, pair + 1)
        firsts.append(pair)
    return np.array(firsts, np.int64)


def shorten(pair: np.ndarray, *, length: int, start_id: int) -> np.ndarray:
    """A pair of texts cut to at most `length` tokens: the longer one first, at its end, but for its last token."""
    middle = int(np.flatnonzero(pair == start_id)[1])
    texts = [pair[:middle], pair[middle:]]
    over = len(pair) - length
    if over <= 0:
        return pair
    longer = int(len(texts[1]) > len(texts[0]))
    difference = abs(len(texts[0]) - len(texts[1]))
    cut = [0, 0]
    cut[longer] = min(over, difference)
    rest = over - cut[longer]
    cut[0] += rest // 2
    cut[1] += rest - rest // 2
    return np.concatenate(
        [np.append(text[: len(text) - 1 - c], text[-1:]) if c else text for text, c in zip(texts, cut, strict=True)]
    )
