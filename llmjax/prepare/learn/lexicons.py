"""Word lists of this project's own (prepare/lexicons/*.txt), and how their words are found in text.

A list has sections ([profanity], [slur], [threat], [ambiguous]). A line is a word, a word with * for any ending, or a
phrase. Only whole words match, so Scunthorpe, assassin and cockpit do not. A word under [ambiguous] (an insult that is also
an animal, a name or a technical term) counts only in a document with another match. No list has medical or anatomical
terms, or names that groups use for themselves.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from llmjax.errors import UserError

FOLDER = Path(__file__).parents[1] / "lexicons"
LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "sv")
AMBIGUOUS = "ambiguous"
LONGEST = 64  # characters; longer words are not looked up: they are data, such as base64
MOST_REMEMBERED = 200_000  # words whose verdict is kept, a bound on memory

_TOKEN = re.compile(r"[\w@$*!]+")
_SPELLED = re.compile(r"(?<!\w)\w(?:[ .\-_*]\w){2,19}(?!\w)")
_REPEATED = re.compile(r"(\w)\1{2,}")
_LEET = str.maketrans("013457@$!|", "oieastasil")
_LEET_L = str.maketrans("013457@$!|", "oleastasil")
# Cyrillic letters that look like Latin ones.
_LOOKALIKE = str.maketrans("\u0430\u0435\u043e\u0440\u0441\u0445\u0443\u0456", "aeopcxyi")


@dataclass(frozen=True)
class Lexicon:
    """A word list ready for look-up; all words are case-folded.

    Attributes:
        words: word -> section. stems: beginning -> section. phrases: words of a phrase -> section.
        shortest: the length of the shortest stem.
        known: verdicts so far, a cache.
    """

    words: dict[str, str]
    stems: dict[str, str]
    phrases: dict[tuple[str, ...], str]
    shortest: int
    known: dict[str, str] = field(default_factory=dict, compare=False)


@cache
def sections(name: str) -> dict[str, tuple[str, ...]]:
    """The entries of lexicons/NAME.txt by section, case-folded, in the file's order.

    Raises:
        UserError: if there is no such list, or a line stands outside a section or twice in the file.
    """
    path = FOLDER / f"{name}.txt"
    if not path.exists():
        raise UserError(
            f"no word list {name!r}: there are {', '.join(sorted(p.stem for p in path.parent.glob('*.txt')))}"
        )
    found: dict[str, list[str]] = {}
    section, seen = "", set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        entry = line.split("#")[0].strip().casefold()
        if not entry:
            continue
        if entry.startswith("["):
            section = entry.strip("[]")
            found[section] = []
        elif not section or entry in seen:
            raise UserError(f"{path.name}:{number}: {entry!r} {'is there twice' if section else 'is in no [section]'}")
        else:
            found[section].append(entry)
            seen.add(entry)
    return {name: tuple(entries) for name, entries in found.items()}


def load(name: str) -> Lexicon:
    """The list lexicons/NAME.txt for `find`."""
    words: dict[str, str] = {}
    stems: dict[str, str] = {}
    phrases: dict[tuple[str, ...], str] = {}
    for section, entries in sections(name).items():
        for entry in entries:
            if len(parts := tuple(_TOKEN.findall(entry))) > 1 and parts[-1] != "*":
                phrases[parts] = section
            elif entry.endswith("*"):
                stems[entry[:-1]] = section
            else:
                words[entry] = section
    return Lexicon(words, stems, phrases, min(map(len, stems), default=0))


def find(lexicon: Lexicon, text: str) -> tuple[dict[str, int], int]:
    """How many words of each section a text has, and how many words in all.

    It recognises disguises: digits and signs for letters (sh1t, @sshole), stretched letters (fuuuck), stars (f*ck), single
    letters in a row (f u c k), Cyrillic look-alikes. A phrase counts as one word.
    """
    folded = text.casefold()
    tokens = _TOKEN.findall(folded)
    counts = Counter(tokens)
    total = len(tokens)
    hits: Counter[str] = Counter()
    known = lexicon.known
    for token, count in counts.items():
        if len(token) > LONGEST:
            continue
        verdict = known.get(token)
        if verdict is None:
            verdict = _verdict(lexicon, token)
            if len(known) < MOST_REMEMBERED:
                known[token] = verdict
        if verdict:
            hits[verdict] += count
    joined = ""
    for phrase, section in lexicon.phrases.items():
        if all(word in counts for word in phrase):
            joined = joined or f" {' '.join(tokens)} "
            hits[section] += joined.count(f" {' '.join(phrase)} ")
    for match in _SPELLED.finditer(folded):
        letters = re.sub(r"[\W_]", "", match.group())
        found = [
            section
            for word, section in (lexicon.words | lexicon.stems).items()
            if len(word) >= 4 and section != AMBIGUOUS and word in letters
        ]
        if found:
            hits[found[0]] += 1
    return {section: count for section, count in hits.items() if count}, total


def _verdict(lexicon: Lexicon, token: str) -> str:
    """The section of a token, "" for none."""
    plain = token.strip("*!_@$") or token
    section = _look_up(lexicon, plain)
    if section:
        return section
    if plain == token.rstrip("!*_") and plain.isalpha() and plain.isascii() and not _REPEATED.search(plain):
        return ""
    if "*" in plain and sum(map(str.isalpha, plain)) >= 2 and plain[0].isalpha():
        for word, section in (lexicon.words | lexicon.stems).items():
            same = len(word) == len(plain) or (word in lexicon.stems and len(word) < len(plain))
            if same and section != AMBIGUOUS and all(c in ("*", w) for c, w in zip(plain, word, strict=False)):
                return section
    forms = {plain}
    if 2 * sum(map(str.isalpha, plain)) >= len(plain) or token != plain:
        forms |= {form.translate(table) for form in (plain, token.rstrip("!*")) for table in (_LEET, _LEET_L)}
    if not plain.isascii() and any("a" <= c <= "z" for c in plain):
        forms |= {form.translate(_LOOKALIKE) for form in forms}
    forms |= {_REPEATED.sub(letters, form) for form in forms for letters in (r"\1", r"\1\1")}
    for form in sorted(forms):
        section = _look_up(lexicon, form) if form.isalpha() else ""
        if section and section != AMBIGUOUS:
            return section
    return ""


def _look_up(lexicon: Lexicon, word: str) -> str:
    if word in lexicon.words:
        return lexicon.words[word]
    if lexicon.stems:
        for length in range(lexicon.shortest, len(word) + 1):
            if word[:length] in lexicon.stems:
                return lexicon.stems[word[:length]]
    return ""
