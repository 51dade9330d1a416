"""Checks of citations, in rising cost: the number of the passage, the quote in it, the numbers and names of the sentence.

A citation that fails is dropped and counted, and its sentence is shown as not supported. A citation that passes says that
the passage has these words, numbers and names, not that the sentence follows from it.
"""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

QUOTE_SHARE = 0.9  # of the quote that must stand in the passage in one piece, where it does not stand there as it is
QUOTE_WORDS = 3  # a shorter quote says nothing, unless it is the whole passage
_QUOTES = str.maketrans(
    "\u2018\u2019\u201a\u201b\u2032\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb`", '\'\'\'\'\'"""""""\''
)
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:[.,]\d+)*")
_WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")
_MONTHS = frozenset(
    [
        "january",
        "february",
        "march",
        "april",
        "may",
        "june",
        "july",
        "august",
        "september",
        "october",
        "november",
        "december",
    ]
)  # names that also begin sentences


@dataclass(frozen=True)
class Check:
    """Whether a citation holds, and where its quote stands in the passage."""

    failed: str = ""  # "", "quote", "numbers" or "names"
    detail: str = ""
    start: int = -1
    end: int = -1


def check(sentence: str, quote: str, passage: str, *, above: str = "") -> Check:
    """Check a sentence and its quote against the passage that it cites.

    Args:
        above: the headings and the title of the passage. Names may stand there.
    """
    place = find_quote(quote, passage)
    if place is None:
        return Check("quote", quote)
    if missing := [number for number in numbers_of(sentence) if number not in numbers_of(passage)]:
        return Check("numbers", ", ".join(missing))
    words = {word.casefold() for word in _words(f"{above} {passage}")}
    if lacking := [name for name in names_of(sentence) if not _has_name(name, words)]:
        return Check("names", ", ".join(lacking))
    return Check("", "", *place)


def find_quote(quote: str, passage: str) -> tuple[int, int] | None:
    """Where a quote stands in a passage, after NFKC and with white space, quotes and dashes folded; None: nowhere.

    Where it does not stand there, the longest common part must be 90 % of it.
    """
    wanted, _ = _folded(quote)
    text, places = _folded(passage)
    if not wanted or (len(_WORD.findall(wanted)) < QUOTE_WORDS and wanted != text):
        return None
    at, size = text.find(wanted), len(wanted)
    if at < 0:
        match = difflib.SequenceMatcher(None, text, wanted, autojunk=False).find_longest_match()
        at, size = match.a, match.size
        if size < QUOTE_SHARE * len(wanted):
            return None
    return places[at], places[at + size - 1] + 1


def numbers_of(text: str) -> list[str]:
    """The numbers of a text in one spelling: without signs of thousands and without zeros at the end of a fraction."""
    found = []
    for number in _NUMBER.findall(unicodedata.normalize("NFKC", text).translate(_DASHES)):
        plain = number.lstrip("+-")
        if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", plain):
            plain = plain.replace(",", "")
        elif re.fullmatch(r"\d{1,3}(?:\.\d{3}){2,}", plain):
            plain = plain.replace(".", "")
        plain = plain.replace(",", ".")
        if plain.count(".") == 1:
            plain = plain.rstrip("0").rstrip(".")
        found.append(plain.lstrip("0") or "0")
    return found


def names_of(sentence: str) -> list[str]:
    """Words of a sentence that look like names: with a capital inside a sentence, or with several anywhere."""
    found, is_first = [], True
    for match in _WORD.finditer(unicodedata.normalize("NFKC", sentence)):
        word = match[0]
        before = sentence[: match.start()].rstrip()
        is_first = not before or before[-1] in '.!?:\u201c"(['
        capitals = sum(c.isupper() for c in word)
        looks = capitals > 1 or (capitals == 1 and word[0].isupper() and (not is_first or word.casefold() in _MONTHS))
        if looks and word != "I" and not word.isdigit():
            found.append(word)
    return found


def _has_name(name: str, words: set[str]) -> bool:
    folded = name.casefold().removesuffix("'s").removesuffix("\u2019s")
    return folded in words or all(part in words for part in re.split(r"[-'\u2019]", folded) if part)


def _words(text: str) -> list[str]:
    found = _WORD.findall(unicodedata.normalize("NFKC", text))
    return [part for word in found for part in {word, word.removesuffix("'s").removesuffix("\u2019s"), *re.split(r"[-'\u2019]", word)}]  # fmt: skip


def _folded(text: str) -> tuple[str, list[int]]:
    """The text folded, and for each of its characters the place in the text that it comes from."""
    made: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        for one in unicodedata.normalize("NFKC", character).translate(_QUOTES).translate(_DASHES).casefold():
            if one.isspace():
                if not made or made[-1] == " ":
                    continue
                one = " "
            made.append(one)
            places.append(place)
    while made and made[-1] == " ":
        made.pop()
        places.pop()
    return "".join(made), places


def distinct(passages: Sequence[str]) -> list[int]:
    """The numbers of the passages that do not nearly repeat one before them: nine of ten words in the same order."""
    kept: list[int] = []
    shingles: list[set[tuple[str, ...]]] = []
    for number, text in enumerate(passages):
        words = [word.casefold() for word in _WORD.findall(text)]
        own = {tuple(words[i : i + 3]) for i in range(max(len(words) - 2, 1))}
        if all(len(own & other) < QUOTE_SHARE * min(len(own), len(other)) for other in shingles):
            kept.append(number)
            shingles.append(own)
    return kept
