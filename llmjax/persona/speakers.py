"""The lines of one speaker of a play, a script or a novel.

Plays name the speaker in a heading: on a line of its own (`HAMLET`, `HAMLET:`, `First Citizen:`), or before the words
(`HAMLET. To be`, `Ham. To be`, `Anna: Hello`). The module detects the notation: the one that gives the most lines and
speakers who return. A novel is read by its quotes, if most of them name the speaker (`"Come," said Holmes`). Other
novels are refused, because some lines would be another speaker's.
"""

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmjax.errors import UserError

NAME = r"[^\W\d_][\w'\u2019.-]*(?:[ \t]+(?:[\w'\u2019-]+|&)\.?){0,4}"
CAPITALS = r"(?:[A-Z\u00c0-\u00de0-9][A-Z\u00c0-\u00de0-9'\u2019&.-]*)(?:[ \t]+[A-Z\u00c0-\u00de0-9'\u2019&.-]+){0,4}"
MARK = r"[*_]{0,3}"  # Markdown's bold and italics around a name
# Notation -> the heading of a speech at the start of a line, with the name as its first group.
NOTATIONS: Mapping[str, re.Pattern[str]] = {
    "NAME: on a line of its own": re.compile(rf"[ \t]*{MARK}({NAME}){MARK}:{MARK}[ \t]*$"),
    "NAME on a line of its own, in capitals": re.compile(rf"[ \t]*{MARK}({CAPITALS}?)[.:]?{MARK}(?:[ \t]*\([^)]*\))?[ \t]*$"),
    "NAME. before the words, in capitals": re.compile(rf"[ \t]*{MARK}({CAPITALS}?)[.:]{MARK}(?:[ \t]+\S|[ \t]*$)"),
    "Nam. before the words, indented": re.compile(r"[ \t]+_?([A-Z][a-z]{0,11}(?: [A-Z]?[a-z]+)?)\._?[ \t]+\S"),
    "Name: before the words": re.compile(rf"[ \t]*{MARK}({NAME}){MARK}:{MARK}(?:[ \t]+\S|[ \t]*$)"),
}  # fmt: skip
# Words in the place of a name that are no names.
NO_NAME = re.compile(
    r"(act|scene|prologue|epilogue|the end|finis|chapter|book|part|volume|contents|dramatis|persons|enter|exit|exeunt|re-enter|"
    r"curtain|int|ext|note|\d+)\b.*|(?-i:(XC|XL|L?X{0,3})(IX|IV|V?I{0,3}))", re.IGNORECASE
)  # fmt: skip
BREAK = re.compile(r"[ \t]*(ACT|SCENE|Scene|Act|PROLOGUE|EPILOGUE|THE END)\b[^a-z]{0,20}.*$")
DIRECTION = re.compile(r"\[[^\[\]]{0,500}\]|^[ \t]*\([^)]*\)[ \t]*$", re.MULTILINE)
MOVES = re.compile(r"[ \t]*_?(Enter|Exit|Exeunt|Re-enter|Flourish|Alarum|Sennet|Dies)\b.*$")
COMES_BACK, SPEAKERS = 2, 2  # a speaker has so many speeches, and so many of them there are
SPOKEN = 0.5  # the least share of the words of a play that is in its speeches
LONGEST_MEAN = 150  # words of a play's speeches; longer ones are prose with a few names in it
APART = 0.9  # where more headings than this are behind empty lines, all are
NEARLY = 0.9  # of the speeches that the notation with most of them finds
ATTRIBUTED = 0.5  # the least share of a novel's quotes that say who speaks
FEWEST_QUOTES = 20  # in a novel, and of the speaker in all texts FEWEST_LINES
FEWEST_LINES = 5
SAID = (
    r"(?:said|says|cried|asked|replied|answered|exclaimed|remarked|returned|observed|whispered|shouted|continued|added|"
    r"murmured|muttered|called|told|repeated|began|went on|sagte|rief|fragte|antwortete|erwiderte)"
)
TITLED = r"(?:(?:Mr|Mrs|Miss|Ms|Dr|Sir|Lady|Lord|Captain|Colonel)\.?[ \n]+)?[A-Z][\w'-]+(?:[ \n]+[A-Z][\w'-]+){0,2}"
QUOTE = re.compile('\u201c([^\u201c\u201d]{2,2000})\u201d|"([^"]{2,2000})"')
AFTER = re.compile(rf"\s*(?:{SAID}\s+({TITLED})|({TITLED})\s+{SAID}\b)")
BEFORE = re.compile(rf"(?:({TITLED})\s+{SAID}|{SAID}\s+({TITLED}))[,:]?\s*$")


@dataclass(frozen=True)
class Speech:
    """One speech."""

    speaker: str
    text: str
    before: str = ""  # what another speaker said just before


def lines_of(texts: Mapping[str, str], name: str) -> dict[str, list[Speech]]:
    """path -> speeches of the speaker, for the texts in which there are any.

    Raises UserError for a text that is neither a play nor a novel that names its speakers, and for a speaker with too
    few lines.
    """
    found: dict[str, list[Speech]] = {}
    counts: Counter[str] = Counter()
    for path, text in texts.items():
        spoken = speeches(text)
        if not spoken:
            spoken = _quotes(text, path)
        counts.update(one.speaker for one in spoken)
        if own := [one for one in spoken if one.speaker.casefold() == name.casefold()]:
            found[path] = own
    number = sum(map(len, found.values()))
    if number < FEWEST_LINES:
        near = difflib.get_close_matches(name.casefold(), {one.casefold(): one for one in counts}, n=3)
        shown = [one for one in counts if one.casefold() in near] or [one for one, _ in counts.most_common(8)]
        told = ", ".join(f"{one} ({counts[one]})" for one in shown)
        raise UserError(
            f"--speaker {name}: {number} speeches, and at least {FEWEST_LINES} are needed; there are {told}"
        )
    return found


def speeches(text: str) -> list[Speech]:
    """The speeches of a play in order; empty if the text is no play."""
    found = [one for heading in NOTATIONS.values() if _is_play(one := _cut(text, heading), text)]
    most = max(map(len, found), default=0)
    # Later notations are looser: they take any words before a colon for names. So the first that finds nearly the most wins.
    return next((one for one in found if len(one) >= NEARLY * most), [])


def _is_play(found: Sequence[Speech], text: str) -> bool:
    """Whether speakers return, speak most of the text, and take turns."""
    counts = Counter(one.speaker for one in found)
    back = {name for name, count in counts.items() if count >= COMES_BACK}
    words = sum(len(one.text.split()) for one in found if one.speaker in back)
    return len(back) >= SPEAKERS and words >= SPOKEN * max(1, len(text.split())) and words <= LONGEST_MEAN * len(found)


def _cut(text: str, heading: re.Pattern[str]) -> list[Speech]:
    """The text cut at the headings of one notation. A name that occurs once counts as a heading only after an empty
    line."""
    lines = DIRECTION.sub("", text).splitlines()
    marks = [_heading(line, heading) for line in lines]
    alone = [not above.strip() for above in ["", *lines[:-1]]]  # whether an empty line is above
    if sum(is_alone for mark, is_alone in zip(marks, alone, strict=True) if mark) > APART * sum(map(bool, marks)):
        marks = [mark if is_alone else None for mark, is_alone in zip(marks, alone, strict=True)]
    counts = Counter(name for name, _ in filter(None, marks))
    found: list[Speech] = []
    speaker, held = "", list[str]()

    def finish() -> None:
        nonlocal held
        said = "\n".join(held).strip()
        if speaker and said:
            before = found[-1].text if found and found[-1].speaker != speaker else ""
            found.append(Speech(speaker, said, before))
        held = []

    for line, mark, is_alone in zip(lines, marks, alone, strict=True):
        if mark is not None and (counts[mark[0]] >= COMES_BACK or is_alone):
            finish()
            speaker, rest = mark
            held = [rest] if rest.strip() else []
        elif BREAK.match(line):
            finish()
            speaker = ""
        elif not MOVES.match(line):
            held.append(line.strip())
    finish()
    return found


def _heading(line: str, heading: re.Pattern[str]) -> tuple[str, str] | None:
    """The name of a heading and the words after it."""
    match = heading.match(line)
    if match is None:
        return None
    name = " ".join(match[1].split()).rstrip(".:")
    if len(name) < 2 or len(name) > 40 or NO_NAME.fullmatch(name):
        return None
    rest = line[match.end(1) :].lstrip(" \t.:*_")
    return name, re.sub(r"^\([^)]*\)\s*", "", rest)


def _quotes(text: str, path: str) -> list[Speech]:
    """The quotes of a novel that say who speaks. Raises UserError where too few do."""
    quotes, found, last = 0, list[Speech](), ""
    for match in QUOTE.finditer(text):
        said = " ".join((match[1] or match[2]).split())
        if not said or said[-1] not in ",.!?;:-\u2014\u2013\u2026":
            continue  # a word in quotes, not speech
        quotes += 1
        named = AFTER.match(text, match.end()) or BEFORE.search(text[max(0, match.start() - 80) : match.start()])
        if named is not None:
            name = " ".join((named[1] or named[2]).split())
            said = f"{said[:-1]}." if said.endswith(",") else said
            found.append(Speech(name, said, last if found and found[-1].speaker != name else ""))
        last = said
    if quotes < FEWEST_QUOTES or len(found) < ATTRIBUTED * quotes:
        share = f"{len(found)} of {quotes} quotes say who speaks" if quotes else "it has no speech in quotes"
        raise UserError(
            f"--speaker: {path} is no play, and {share}, so that lines cannot be told apart: give a play or a script, or a "
            "folder with the texts of one person and no --speaker"
        )
    return found
