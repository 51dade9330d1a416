"""Cuts a text into blocks to index and to cite: first by structure, then by length, with the place of each in the text.

A block never crosses a heading. Paragraphs, code and tables stay whole where they fit; a longer paragraph is cut between
sentences, and its blocks overlap by a few sentences. `text[block.start:block.end]` is the block, so a citation can be
checked in the text that is stored.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

WORDS = 200  # of a block, some 250 tokens
OVERLAP = 25  # words of a cut paragraph that the next block repeats
HEADING_LENGTH = 120
_HEADING = re.compile(r"(#{1,6})[ \t]+(\S.*?)[ \t]*#*$")
_FENCE = re.compile(r"(```|~~~)")
_WORD = re.compile(r"\w+|[^\w\s]")
_SENTENCE_END = re.compile(r"[.!?\u2026\u3002]['\")\]\u201d\u00bb]*\s+|\n")


@dataclass(frozen=True)
class Block:
    """A part of a text, and the headings above it."""

    start: int
    end: int
    heading: str = ""  # "Methods > Data"


def count_words(text: str) -> int:
    """Words and signs of a text: a measure of its tokens that needs no tokenizer."""
    return len(_WORD.findall(text))


def cut(
    text: str, *, words: int = WORDS, overlap: int = OVERLAP, count: Callable[[str], int] = count_words
) -> list[Block]:
    """The blocks of a text, in order; together they have every character that is not white space.

    Args:
        words, overlap: of a block, in the unit of `count`.
        count: measures a text, for instance in the tokens of an encoder.
    """
    blocks: list[Block] = []
    held: list[tuple[int, int]] = []
    heading, size = "", 0

    def finish() -> None:
        nonlocal held, size
        if held:
            blocks.append(Block(held[0][0], held[-1][1], heading))
        held, size = [], 0

    for start, end, path in _units(text):
        if path != heading:
            finish()
            heading = path
        own = count(text[start:end])
        if size + own > words:
            finish()
        if own > words:
            blocks += [Block(a, b, heading) for a, b in _cut_long(text, start, end, words, overlap, count)]
        else:
            held.append((start, end))
            size += own
    finish()
    return blocks


def _units(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, headings) of paragraphs, code blocks and tables."""
    levels: list[tuple[int, str]] = []
    begun = end = -1
    fence = ""
    at = 0
    for line in text.splitlines(keepends=True):
        start, at = at, at + len(line)
        stripped = line.strip()
        stop = start + len(line.rstrip())
        if fence or _FENCE.match(stripped):
            begun = start if begun < 0 else begun
            end = stop if stripped else end
            mark = _FENCE.match(stripped)
            if mark:
                fence = "" if fence == mark[1] else fence or mark[1]
            continue
        found = _HEADING.match(stripped) if len(stripped) <= HEADING_LENGTH else None
        if (not stripped or found) and begun >= 0:
            yield begun, end, " > ".join(name for _, name in levels)
            begun = -1
        if found:
            level = len(found[1])
            levels = [one for one in levels if one[0] < level] + [(level, found[2])]
            yield start + line.index("#"), stop, " > ".join(name for _, name in levels)
        elif stripped:
            begun = start + len(line) - len(line.lstrip()) if begun < 0 else begun
            end = stop
    if begun >= 0:
        yield begun, end, " > ".join(name for _, name in levels)


def _cut_long(
    text: str, start: int, end: int, words: int, overlap: int, count: Callable[[str], int]
) -> Iterator[tuple[int, int]]:
    """Pieces of a long unit that end with sentences; one sentence that is too long is cut between words."""
    pieces = []
    for a, b in sentences(text, start, end):
        while count(text[a:b]) > words:
            middle = _middle(text, a, b, words, count)
            pieces.append((a, middle))
            a = middle + len(text[middle:b]) - len(text[middle:b].lstrip())
        if a < b:
            pieces.append((a, b))
    sizes = [count(text[a:b]) for a, b in pieces]
    first = 0
    while first < len(pieces):
        last, size = first, sizes[first]
        while last + 1 < len(pieces) and size + sizes[last + 1] <= words:
            last += 1
            size += sizes[last]
        yield pieces[first][0], pieces[last][1]
        if last + 1 == len(pieces):
            return
        back, shared = last + 1, 0
        while back - 1 > first and shared + sizes[back - 1] <= overlap:
            back -= 1
            shared += sizes[back]
        # The overlap must leave room for the next sentence, or the block would not go on.
        first = back if shared + sizes[last + 1] <= words else last + 1


def _middle(text: str, start: int, end: int, words: int, count: Callable[[str], int]) -> int:
    """The end of the longest part from `start` that has so many words, between words where there are any."""
    low, high = start + 1, end
    while low < high:
        at = (low + high + 1) // 2
        low, high = (at, high) if count(text[start:at]) <= words else (low, at - 1)
    space = max(text.rfind(" ", start + 1, low), text.rfind("\n", start + 1, low))
    return space if space > start else low


def sentences(text: str, start: int = 0, end: int = -1) -> list[tuple[int, int]]:
    """Start and end of the sentences of a part of a text. A line is never longer than a sentence's paragraph."""
    end = len(text) if end < 0 else end
    found, at = [], start
    for match in _SENTENCE_END.finditer(text, start, end):
        stop = match.start() + len(match[0].rstrip())
        if stop > at:
            found.append((at, stop))
        at = match.end()
    if at < end:
        found.append((at, end))
    return [(a, b) for a, b in found if text[a:b].strip()]
