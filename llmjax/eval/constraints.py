"""The 25 constraints of IFEval (Zhou et al. 2023), each a function of an answer, scored as lm-evaluation-harness 0.4.13 does.

A constraint has a name, such as "punctuation:no_comma", and arguments from its prompt. Two kinds need data of NLTK
(`tokenizers/punkt_tab/english`), which is read from the folders of `eval.data` or from NLTK's own; three need `langdetect`.

Two rules of the harness draw random numbers: the language of a short text, and the letter where a prompt asks for a mark.
Here the language is found with a fixed seed, and the mark itself is counted.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax.errors import UserError

Check = Callable[..., bool]
QUOTED_JSON = ("```json", "```Json", "```JSON", "```")
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
POSTSCRIPTS = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}


def follows(answer: str, name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether an answer follows a constraint; an empty one follows none.

    Raises UserError for a constraint that is not known, arguments that it does not have, and data that is missing.
    """
    if name not in CHECKS:
        raise UserError(f"{name!r} is no constraint of IFEval; they are {', '.join(CHECKS)}")
    given = {key: value for key, value in arguments.items() if value}
    try:
        return bool(answer.strip()) and CHECKS[name](answer, **given)
    except TypeError as error:
        raise UserError(f"the constraint {name} cannot be checked with the arguments {given}: {error}") from error


def follows_loosely(answer: str, name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether an answer follows a constraint without its first line, its last line, its asterisks, or several of them."""
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(follows(text, name, arguments) for text in (*cut, *(text.replace("*", "") for text in cut)))


def find_data(folders: Sequence[str | Path]) -> None:
    """Let NLTK look for its data in these folders too."""
    import nltk

    ours = [str(Path(folder).resolve()) for folder in folders]
    nltk.data.path[:] = list(dict.fromkeys([*ours, *nltk.data.path]))


# ------------------------------------------------------------------ parts


def _compared(count: int, relation: str, threshold: int) -> bool:
    if relation not in ("less than", "at least"):
        raise UserError(f"a constraint says {relation!r}, which is neither 'less than' nor 'at least'")
    return count < threshold if relation == "less than" else count >= threshold


def _language(text: str) -> str | None:
    """The language of a text by `langdetect`; None if it has no letters."""
    try:
        import langdetect
    except ImportError as error:
        raise UserError("constraints on languages need langdetect: pip install 'llmjax[eval]'") from error
    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


@functools.cache
def _sentences() -> Any:
    """The English sentence splitter of NLTK."""
    try:
        from nltk.tokenize.punkt import PunktTokenizer

        return PunktTokenizer("english")
    except ImportError as error:
        raise UserError("constraints on sentences need nltk: pip install 'llmjax[eval]'") from error
    except LookupError as error:
        raise UserError(
            "constraints on sentences and capital words need NLTK's punkt_tab: give a folder with "
            "tokenizers/punkt_tab/english by --data, or in the environment variable NLTK_DATA"
        ) from error


def _paragraphs(text: str, mark: str) -> list[str] | None:
    """The parts between marks, without an empty first or last one; None if another one is empty."""
    parts = [part.strip() for part in re.split(mark, text)]
    inner = parts[1 if not parts[0] else 0 : len(parts) - 1 if len(parts) > 1 and not parts[-1] else len(parts)]
    return inner if all(inner) else None


# ------------------------------------------------------------------ constraints


def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compared(len(re.findall(keyword.strip(), text, re.IGNORECASE)), relation, frequency)


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _in_language(text: str, language: str) -> bool:
    return _language(text) in (language, None)


def _sentence_count(text: str, num_sentences: int, relation: str) -> bool:
    return _compared(len(_sentences().tokenize(text)), relation, num_sentences)


def _word_count(text: str, num_words: int, relation: str) -> bool:
    return _compared(len(re.findall(r"\w+", text)), relation, num_words)


def _paragraph_count(text: str, num_paragraphs: int) -> bool:
    parts = _paragraphs(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in text.split("\n\n")]
    count = sum(map(bool, parts))
    if nth_paragraph > count or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    pattern = POSTSCRIPTS.get(marker, rf"\s*{marker.lower()}.*$")
    return bool(re.search(pattern, text.lower(), re.MULTILINE))


def _bullets(text: str, num_bullets: int) -> bool:
    stars, dashes = (re.findall(pattern, text, re.MULTILINE) for pattern in (r"^\s*\*[^\*].*$", r"^\s*-.*$"))
    return len(stars) + len(dashes) == num_bullets


def _one_of_three(text: str) -> bool:
    return any(choice in text for choice in CHOICES)


def _highlights(text: str, num_highlights: int) -> bool:
    once = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    twice = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part[2:-2].strip()]
    return len(once) + len(twice) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) - 1 >= num_sections


def _is_json(text: str) -> bool:
    body = text.strip()
    for quote in QUOTED_JSON:
        body = body.removeprefix(quote)
    try:
        json.loads(body.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _title(text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    answers = [part for part in parts if part]
    return len(answers) == 2 and answers[0] != answers[1]


def _repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    from nltk.tokenize.destructive import NLTKWordTokenizer

    words = [word for sentence in _sentences().tokenize(text) for word in NLTKWordTokenizer().tokenize(sentence)]
    return _compared(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _upper(text: str) -> bool:
    return text.isupper() and _language(text) in ("en", None)


def _lower(text: str) -> bool:
    return text.islower() and _language(text) in ("en", None)


def _no_comma(text: str) -> bool:
    return "," not in text


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _in_language,
    "length_constraints:number_sentences": _sentence_count,
    "length_constraints:number_paragraphs": _paragraph_count,
    "length_constraints:number_words": _word_count,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _one_of_three,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats_prompt,
    "startend:end_checker": _ends_with,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _upper,
    "change_case:english_lowercase": _lower,
    "punctuation:no_comma": _no_comma,
}
