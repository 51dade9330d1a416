"""Step "spelling": plain misspelt words are corrected and, in English, British and American forms made one.

Precision comes before recall, since a wrong correction is worse than a typing error. The step considers only words in
lower case, of five letters or more, between spaces and ordinary punctuation, on lines that do not look like code. So it
never touches names, URLs, paths, e-mail addresses, identifiers and words with digits. It corrects a word if one word of the
dictionary is one edit away (after the first letter) and much more frequent than any other such word, if the word is
not made of known words, and if the document has it less than three times (jargon is repeated). The dictionaries (word
frequencies) are pyspellchecker's; the table of British and American forms is this project's (lexicons/british.txt).
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from llmjax.errors import UserError
from llmjax.prepare.documents import Step, add_facts, kept, replace
from llmjax.prepare.learn import lexicons

LETTERS = 8  # least letters of a word; shorter ones have too many neighbours ("codecs")
USUAL_LETTERS = 5  # the same for usual errors: letters swapped, a double letter written once, a single one twice
REPEATED = 3  # a word that a document has this often is intended
FREQUENCY = 3_000  # least frequency of a correction in the dictionary; that of English counts 1.6e9 words
FACTOR = 5.0  # a correction must be this many times as frequent as any other candidate
USUAL_FACTOR = 2.0  # the same for usual errors
_WORD = re.compile(r"[^\W\d_]{4,}")
_BEFORE = r"""(?<!\S)(["(“]{0,2})"""
_AFTER = r"""(?=[.,;:!?)"'”\u2019]{0,3}(?:\s|\Z))"""
_CODE = re.compile(
    r"^(?:\t| {4}|>>> |\.\.\. |\$ |#!|@|//|/\*|\s*(?:def|class|import|from \S+ import|return|if .*:$|for .*:$|else:|"
    r"try:|with .*:$|let|const|var|function|public|private|static|void|int|char|struct|package|select|SELECT)\b)"
    r"|[{}<>\\|=]|;$|\w\(|\)\.|->|::|\w_\w|--\w|&&|\[\w*\]|\$[A-Za-z_]"
)
_DOUBLING = ("ed", "ing", "er", "ers", "able", "ence")  # suffixes before which a consonant may have to be doubled
_SUFFIXES = ("s", "es", "'s", "d", "ly", "ness", "less", "like", "ish", "wise", "able", "ize", "ized", "izing", "izer",
             "ise", "ised", "ising", "ed", "ing", "er", "ers", "or", "ors", "ism", "ist", "ists", "ify",
             "ity", "st", "est", "eth")  # fmt: skip
_PREFIXES = ("un", "re", "pre", "non", "sub", "super", "multi", "over", "under", "micro", "macro", "meta", "de", "mis",
             "auto", "anti", "inter", "intra", "semi", "co", "hyper", "pseudo", "quasi", "out", "up", "down")  # fmt: skip


def make(settings: Any) -> Step:
    """The step. Reads settings.spelling: "en_US", "en_GB", or a language of pyspellchecker such as "de" or "fr".

    Documents whose column language names another language are left as they are; "" is taken for the language of
    the speller. Facts: "spelling.corrected" and "spelling.variant" (British made American or the other way round).

    Raises:
        UserError: no dictionary for the language, or pyspellchecker is not installed.
    """
    language = settings.spelling
    corrector(language)
    code = language.split("_")[0]

    def step(batch: Any) -> Any:
        texts, languages = batch["text"].to_pylist(), batch["language"].to_pylist()
        facts: dict[int, dict[str, int]] = {}
        for row in kept(batch).nonzero()[0].tolist():
            if texts[row] and languages[row].split("-")[0].split("_")[0] in ("", code):
                texts[row], facts[row] = correct(texts[row], language)
        return add_facts(replace(batch, text=texts), facts) if any(facts.values()) else batch

    return step


def is_code(line: str) -> bool:
    """Whether a line looks like code, a command or markup rather than prose; true in doubt."""
    return _CODE.search(line) is not None


def correct(text: str, language: str = "en_US") -> tuple[str, dict[str, int]]:
    """The text with plain misspelt words corrected, and how many: "spelling.corrected", "spelling.variant"."""
    known, correction, variants = corrector(language)
    counts = Counter(_WORD.findall(text))
    new_words = {word: variants[word] for word in counts.keys() & variants.keys()}
    for word, count in counts.items():
        if count < REPEATED and word.islower() and not known(word):
            corrected = correction(word)
            if corrected is not None:
                new_words[word] = corrected
    facts: dict[str, int] = {}
    if not new_words:
        return text, facts
    token = re.compile(
        _BEFORE + "(" + "|".join(sorted(map(re.escape, new_words), key=len, reverse=True)) + ")" + _AFTER
    )

    def put(match: re.Match[str]) -> str:
        name = "spelling.variant" if match[2] in variants else "spelling.corrected"
        facts[name] = facts.get(name, 0) + 1
        return match[1] + new_words[match[2]]

    lines = text.split("\n")
    fenced = False
    for row, line in enumerate(lines):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced and token.search(line) and not is_code(line):
            parts = line.split("`")  # what stands between two backticks is code
            parts[::2] = [token.sub(put, part) for part in parts[::2]]
            lines[row] = "`".join(parts)
    return ("\n".join(lines), facts) if facts else (text, facts)


@functools.cache
def corrector(language: str) -> tuple[Callable[[str], bool], Callable[[str], str | None], dict[str, str]]:
    """Whether a lower-case word is in the dictionary, its correction or None, and the forms to be made others."""
    try:
        from spellchecker import SpellChecker
    except ImportError as error:
        raise UserError("the step spelling needs pyspellchecker: pip install 'llmjax[data]'") from error
    code = language.split("_")[0]
    languages = sorted(SpellChecker.languages())
    if language not in ("en_US", "en_GB") and (language != code or code not in languages):
        raise UserError(f"spelling={language!r} has no dictionary; use en_US, en_GB, or one of {', '.join(languages)}")
    speller = SpellChecker(language=code, distance=1)
    frequencies: dict[str, int] = dict(speller.word_frequency.dictionary)
    variants: dict[str, str] = {}
    if code == "en":
        british = british_forms()
        for american, form in british.items():
            frequencies.setdefault(form, frequencies.get(american, 1))
            frequencies.setdefault(american, 1)
        american_forms = {form: american for american, form in british.items()}
        variants = british if language == "en_GB" else american_forms
        frequencies.setdefault("programme", 1)  # British, except for computers
        frequencies.setdefault("programmes", 1)
        for ambiguous in ("analyses", "paralyses", "meter", "meters", "dialogue", "dialogues", "catalogs", "program"):
            variants = {old: new for old, new in variants.items() if old != ambiguous}

    def known(word: str) -> bool:
        return word in frequencies

    @functools.lru_cache(maxsize=200_000)  # of words, in each process
    def correction(word: str) -> str | None:
        near = (w for w in speller.edit_distance_1(word) if w[0] == word[0] and w in frequencies)
        ranked = sorted(((frequencies[w], w) for w in near), reverse=True)
        if not ranked or ranked[0][0] < FREQUENCY:
            return None
        frequency, best = ranked[0]
        usual = _usual(word, best) or _irregular(word, best)
        if len(word) < (USUAL_LETTERS if usual else LETTERS):
            return None
        factor = USUAL_FACTOR if usual else FACTOR
        if len(ranked) > 1 and frequency < factor * ranked[1][0]:
            return None
        if abs(len(best) - len(word)) == 1 and (best == word + "s" or word == best + "s"):
            return None
        if _made_of_known(word, frequencies) and not _irregular(word, best):
            return None
        return variants.get(best, best)

    return known, correction, variants


def _made_of_known(word: str, frequencies: dict[str, int]) -> bool:
    """Whether a word is a known one with a prefix or suffix, or two common words in one ("backend")."""
    for suffix in _SUFFIXES:
        stem = word.removesuffix(suffix)
        if stem != word and len(stem) >= 3 and (stem in frequencies or stem + "e" in frequencies):
            return True
        if len(stem) >= 4 and stem != word and stem[-1] == stem[-2] and stem[:-1] in frequencies:
            return True
    for prefix in _PREFIXES:
        stem = word.removeprefix(prefix)
        if stem != word and len(stem) >= 5 and stem in frequencies:
            return True
    common = 5_000
    return any(
        frequencies.get(word[:cut], 0) >= common and frequencies.get(word[cut:], 0) >= common
        for cut in range(3, len(word) - 2)
    )


def _usual(word: str, best: str) -> bool:
    """Whether two neighbouring letters were swapped, or a double letter written once or a single one twice."""
    if len(word) == len(best):
        return sorted(word) == sorted(best)
    short, long = sorted((word, best), key=len)
    return any(long[i] == long[i - 1] and long[:i] + long[i + 1 :] == short for i in range(1, len(long)))


def _irregular(word: str, best: str) -> bool:
    """Whether a word was derived by the rule where the language has an exception: "refered", "truely", "writting"."""
    for suffix in _DOUBLING:
        if word.endswith(suffix) and best.endswith(suffix):
            stem, other = word.removesuffix(suffix), best.removesuffix(suffix)
            if len(stem) > 2 and (other == stem + stem[-1] or stem == other + other[-1]):
                return True
    return word.endswith("ely") and best == word[:-3] + "ly"


_OUR_SUFFIXES = ("", "s", "ed", "ing", "er", "ers", "able", "ably", "ful", "fully", "less", "ite", "ites", "al", "ally",
                 "hood", "hoods", "ly", "y")  # fmt: skip
_IZE_SUFFIXES = ("e", "es", "ed", "ing", "er", "ers", "ation", "ations", "able")


@functools.cache
def british_forms() -> dict[str, str]:
    """American form -> British form, lower case, of words that differ in nothing but spelling."""
    stems = lexicons.sections("british")
    table = {f"{stem}or{suffix}": f"{stem}our{suffix}" for stem in stems["our"] for suffix in _OUR_SUFFIXES}
    table |= {f"{stem}iz{suffix}": f"{stem}is{suffix}" for stem in stems["ize"] for suffix in _IZE_SUFFIXES}
    table |= {f"{stem}er{suffix}": f"{stem}re{suffix}" for stem in stems["er"] for suffix in ("", "s")}
    table |= {f"{stem}{suffix}": f"{stem}l{suffix}" for stem in stems["ll"] for suffix in ("ed", "ing", "er", "ers")}
    table |= {"centered": "centred", "centering": "centring"}
    return table | dict(pair.split() for pair in stems["words"])
