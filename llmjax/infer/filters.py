"""Filters on what a model reads and writes: block, mask or warn, by lists, patterns and classifiers, with a log.

    {"rules": [
      {"name": "abuse", "lexicon": "en", "sections": ["slur", "threat"], "action": "block"},
      {"name": "project names", "words": ["Blue Heron"], "action": "mask", "on": "output"},
      {"name": "numbers", "pattern": "[0-9]{12,}", "action": "mask"},
      {"name": "unsafe", "classifier": "unsafe.npz", "threshold": 0.9, "action": "block", "on": "input"}]}

Lists and patterns see the text after NFKC, without invisible characters, and with Cyrillic letters that look like Latin
ones replaced. A classifier is one of `llmjax classify`. A rule that fails blocks the text: filters fail closed. The log has
what was done and a hash of the text, never the text. A list flags words, not meanings: it also flags those who quote or
report them, so measure over-refusal (`benchmarks/safety.py`) before a list may block.
"""

import hashlib
import json
import re
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax import storage
from llmjax.errors import UserError

ACTIONS, SIDES, KINDS = (
    ("block", "mask", "warn"),
    ("input", "output", "both"),
    ("words", "pattern", "lexicon", "classifier"),
)
FIELDS = {"name", "action", "on", "threshold", "sections", *KINDS}
PATTERN_LENGTH = 1000
MASK = "[removed]"
_LOOKALIKE = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0445\u0443\u0456\u0410\u0415\u041e\u0420\u0421\u0425", "aeopcxyiAEOPCX"
)

Span = tuple[int, int]


@dataclass(frozen=True)
class Rule:
    """A rule: `find` gives the parts of a text that it is about, (0, length) for the whole text."""

    name: str
    action: str
    on: str
    find: Callable[[str], list[Span]]


@dataclass(frozen=True)
class Verdict:
    """What filters make of a text."""

    text: str  # with masks; "" if blocked
    blocked: str = ""  # the name of the rule that blocks it
    masked: tuple[str, ...] = ()  # names of rules
    warned: tuple[str, ...] = ()


def load(path: Path) -> tuple[Rule, ...]:
    """The rules of a JSON file. Paths of classifiers are relative to it. Raises UserError for a rule that is wrong."""
    given = storage.read_json(path, mend="write it as llmjax/infer/filters.py shows")
    if not isinstance(given, dict) or not isinstance(given.get("rules"), list) or not given["rules"]:
        raise UserError(f'{path} must be {{"rules": [...]}} with at least one rule')
    return tuple(
        _rule(row, f"{path}, rule {number}", path.parent) for number, row in enumerate(given["rules"], start=1)
    )


def check(rules: Sequence[Rule], text: str, side: str, *, log: Path | None = None) -> Verdict:
    """Filter a text. All rules see the text as it came.

    Args:
        side: "input" or "output".
        log: a JSONL file to which a row is appended for each rule that finds something.
    """
    blocked, masked, warned, spans = "", list[str](), list[str](), list[Span]()
    for rule in rules:
        if rule.on not in (side, "both"):
            continue
        failed = ""
        try:
            found = rule.find(text)
        except Exception as error:  # a filter that fails must not let the text pass
            found, failed = [(0, len(text))], f"{type(error).__name__}: {error}"
        if not found:
            continue
        action = "block" if failed else rule.action
        if log is not None:
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
            row = {"time": time.time(), "side": side, "rule": rule.name, "action": action, "found": len(found), "text": digest, "failed": failed}  # fmt: skip
            storage.append_line(log, json.dumps(row))
        if action == "block":
            blocked = blocked or rule.name
        elif action == "mask":
            masked.append(rule.name)
            spans += found
        else:
            warned.append(rule.name)
    return Verdict("" if blocked else _masked(text, spans), blocked, tuple(masked), tuple(warned))


def _rule(row: Any, where: str, folder: Path) -> Rule:
    if not isinstance(row, dict):
        raise UserError(f"{where} must be an object")
    if unknown := sorted(row.keys() - FIELDS):
        raise UserError(f"{where}: {unknown[0]!r} is not known; there are {', '.join(sorted(FIELDS))}")
    kinds = [kind for kind in KINDS if kind in row]
    if len(kinds) != 1:
        raise UserError(f"{where} must have one of {', '.join(KINDS)}")
    action, on = row.get("action", "warn"), row.get("on", "both")
    if action not in ACTIONS or on not in SIDES:
        raise UserError(f"{where}: action is one of {', '.join(ACTIONS)}, and on one of {', '.join(SIDES)}")
    return Rule(str(row.get("name", kinds[0])), action, on, FINDERS[kinds[0]](row, where, folder))


def _words(row: Mapping[str, Any], where: str, _: Path) -> Callable[[str], list[Span]]:
    words = row["words"]
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise UserError(f"{where}: words must be a list of texts")
    parts = (r"\W+".join(map(re.escape, _plain(word)[0].casefold().split())) for word in words)
    return _search(re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", re.I))


def _pattern(row: Mapping[str, Any], where: str, _: Path) -> Callable[[str], list[Span]]:
    source = row["pattern"]
    if not isinstance(source, str) or len(source) > PATTERN_LENGTH:
        raise UserError(f"{where}: pattern must be a text of at most {PATTERN_LENGTH} characters")
    try:
        return _search(re.compile(source))
    except re.error as error:
        raise UserError(f"{where}: this is no regular expression: {error}") from error


def _search(pattern: re.Pattern[str]) -> Callable[[str], list[Span]]:
    def find(text: str) -> list[Span]:
        plain, places = _plain(text)
        return [
            (places[match.start()], places[match.end() - 1] + 1) for match in pattern.finditer(plain) if match.end() > match.start()
        ]  # fmt: skip

    return find


def _lexicon(row: Mapping[str, Any], where: str, _: Path) -> Callable[[str], list[Span]]:
    from llmjax.prepare.learn import lexicons

    lexicon = lexicons.load(row["lexicon"])
    sections = row.get("sections")
    known = {*lexicon.words.values(), *lexicon.stems.values(), *lexicon.phrases.values()} - {lexicons.AMBIGUOUS}
    if sections is not None and not set(sections) <= known:
        raise UserError(f"{where}: the list {row['lexicon']!r} has the sections {', '.join(sorted(known))}")

    def find(text: str) -> list[Span]:
        counts, _ = lexicons.find(lexicon, _plain(text)[0])
        return [(0, len(text))] if any(counts.get(name) for name in (sections or known)) else []

    return find


def _classifier(row: Mapping[str, Any], where: str, folder: Path) -> Callable[[str], list[Span]]:
    from llmjax.prepare.learn import classifier

    model = classifier.load(folder / row["classifier"])
    threshold = row.get("threshold", 0.5)
    if not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise UserError(f"{where}: threshold={threshold!r} must be above 0 and at most 1")
    return lambda text: [(0, len(text))] if float(classifier.score(model, [text])[0]) >= threshold else []


FINDERS = {"words": _words, "pattern": _pattern, "lexicon": _lexicon, "classifier": _classifier}


def _plain(text: str) -> tuple[str, list[int]]:
    """The text as lists see it, and for each of its characters the place in the text that it comes from."""
    made: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        if unicodedata.category(character) == "Cf":  # zero-width and other invisible characters
            continue
        for one in unicodedata.normalize("NFKC", character).translate(_LOOKALIKE):
            made.append(one)
            places.append(place)
    return "".join(made), places


def _masked(text: str, spans: Sequence[Span]) -> str:
    made, at = [], 0
    for start, end in sorted(spans):
        if end > at:
            made.append(text[at : max(start, at)] + (MASK if start >= at else ""))
            at = end
    return "".join(made) + text[at:]
