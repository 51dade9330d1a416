"""Step "emoji": emoji and emoticons become words (":red_heart:"), in the language of the document where known."""

import functools
import re
from collections.abc import Callable
from typing import Any

from llmjax.errors import UserError
from llmjax.prepare.documents import Step, add_facts, kept, replace
from llmjax.prepare.steps.spelling import is_code

KINDS = ("names", "remove", "keep")
EMOTICONS = {  # ours: the emoji that the emoticon draws
    ":-)": "🙂", ":)": "🙂", "(:": "🙂", "=)": "🙂", ":-D": "😃", ":D": "😃", "=D": "😃", ":-(": "🙁", ":(": "🙁", "=(": "🙁",
    ";-)": "😉", ";)": "😉", ":'(": "😢", ":'-(": "😢", ":-P": "😛", ":P": "😛", ":-p": "😛", ":p": "😛", ":-O": "😮",
    ":O": "😮", ":-o": "😮", ":o": "😮", ":-/": "😕", ":/": "😕", ":-|": "😐", ":|": "😐", ":-*": "😘", ":*": "😘",
    "<3": "❤️", "</3": "💔", "^_^": "😊", "^^": "😊", "-_-": "😑", "XD": "😆", "xD": "😆", ">:(": "😠", "8-)": "😎", "B-)": "😎",
    "o_O": "🤨", "O_o": "🤨", "o.O": "🤨", ":-S": "😖", ":3": "😺",
}  # fmt: skip
_EMOTICON = re.compile(
    r"(?<!\S)(?:" + "|".join(re.escape(e) for e in sorted(EMOTICONS, key=len, reverse=True)) + r")(?=[.,!?]?(?:\s|\Z))"
)
# Signs that are text unless U+FE0F asks for the emoji: ©, ™, arrows, mathematics. Names for them would only disturb.
_TEXT_BY_DEFAULT = frozenset("©®‼⁉™ℹ↔↕↖↗↘↙↩↪⌨⏏Ⓜ▪▫▶◀◻◼☑☎♀♂♠♣♥♦♾✔✖➡⤴⤵⬅⬆⬇〰〽㊗㊙✏✒✉☁✂")  # noqa: RUF001
_KEYCAP_OR_DIGIT = frozenset("#*0123456789")


def make(settings: Any) -> Step:
    """The step. Reads settings.emoji ("names", "remove" or "keep") and settings.emoticons.

    Names are those of Unicode's CLDR by the emoji package, in the document's language where it has them (of en, es,
    ja, ko, pt, it, fr, de, fa, id, zh, ru, tr, ar), else in English. Emoticons are replaced between spaces only, and
    not in code. Facts: "emoji.emoji" and "emoji.emoticon", the numbers replaced.

    Raises:
        UserError: the kind is not known, or the emoji package is not installed.
    """
    kind = settings.emoji
    if kind not in KINDS:
        raise UserError(f"emoji={kind!r} is not known; use one of {', '.join(KINDS)}")
    emoticons = bool(settings.emoticons)
    if kind != "keep" or emoticons:
        _first_characters()

    def step(batch: Any) -> Any:
        if kind == "keep" and not emoticons:
            return batch
        texts, languages = batch["text"].to_pylist(), batch["language"].to_pylist()
        facts: dict[int, dict[str, int]] = {}
        for row in kept(batch).nonzero()[0].tolist():
            if texts[row]:
                texts[row], facts[row] = replace_emoji(
                    texts[row], kind=kind, language=languages[row], emoticons=emoticons
                )
        return add_facts(replace(batch, text=texts), facts) if any(facts.values()) else batch

    return step


def replace_emoji(
    text: str, *, kind: str = "names", language: str = "en", emoticons: bool = False
) -> tuple[str, dict[str, int]]:
    """The text with its emoji replaced, and how many were: facts "emoji.emoji" and "emoji.emoticon".

    Args:
        kind: "names", "remove", or "keep" (emoticons are then still named).
        language: ISO 639 code of the names; one that has no names: English.
    """
    facts: dict[str, int] = {}
    if kind != "keep" and not text.isascii() and _first_characters().search(text):
        lines = text.split("\n")
        total = 0
        for row, line in enumerate(lines):
            if not line.isascii() and _first_characters().search(line):
                lines[row], number = _replace_in_line(line, _namer(kind, language))
                total += number
        if total:
            text, facts["emoji.emoji"] = "\n".join(lines), total
    if emoticons and _EMOTICON.search(text):
        name = _namer(kind, language)
        number = 0

        def word(match: re.Match[str]) -> str:
            nonlocal number
            number += 1
            return name(EMOTICONS[match[0]])

        lines = text.split("\n")
        fenced = False
        for row, line in enumerate(lines):
            fenced ^= line.lstrip().startswith(("```", "~~~"))
            if not fenced and _EMOTICON.search(line) and not is_code(_EMOTICON.sub("", line)):
                replaced = _EMOTICON.sub(word, line)
                lines[row] = re.sub("  +", " ", replaced).rstrip() if kind == "remove" else replaced
        if number:
            text, facts["emoji.emoticon"] = "\n".join(lines), number
    return text, facts


def _replace_in_line(line: str, name: Callable[[str], str]) -> tuple[str, int]:
    """The line with each emoji replaced by name(emoji), a space between it and what it would touch; and how many."""
    import emoji

    parts: list[str] = []
    number = at = 0
    for found in emoji.emoji_list(line):
        sign = found["emoji"]
        if (len(sign) == 1 and sign in _TEXT_BY_DEFAULT) or sign in _KEYCAP_OR_DIGIT:
            continue
        before, word = line[at : found["match_start"]], name(sign)
        number += 1
        if not word:  # a removed emoji takes the space before it along, unless words would run into each other
            after = line[found["match_end"] : found["match_end"] + 1]
            if before.endswith(" ") and (not after or after in " .,!?;:)"):
                before = before[:-1]
            elif before[-1:].isalnum() and after.isalnum():
                before += " "
            parts.append(before)
        else:
            parts.append(before)
            touches = before[-1:] or (parts[-2][-1:] if len(parts) > 1 else "")
            parts.append(f" {word}" if touches.isalnum() or (touches in ":.,!?" and touches) else word)
            if line[found["match_end"] : found["match_end"] + 1].isalnum():
                parts.append(" ")
        at = found["match_end"]
    parts.append(line[at:])
    return "".join(parts), number


@functools.cache
def _first_characters() -> re.Pattern[str]:
    """Any character with which an emoji can begin, digits aside; a text without one is spared the search for emoji."""
    try:
        import emoji
    except ImportError as error:
        raise UserError("the step emoji needs the emoji package: pip install 'llmjax[data]'") from error
    first = {sign[0] for sign in emoji.EMOJI_DATA} - _KEYCAP_OR_DIGIT
    points = sorted(map(ord, first | {"\u20e3"}))  # keycaps begin with a digit and end with this
    ranges: list[list[int]] = []
    for point in points:  # ranges with small gaps: a class of few ranges is searched several times faster
        if ranges and point - ranges[-1][1] <= 16:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return re.compile("[" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges) + "]")


@functools.cache
def _namer(kind: str, language: str) -> Callable[[str], str]:
    """A function from an emoji to its word in a language, or to nothing."""
    if kind == "remove":
        return lambda sign: ""
    import emoji

    code = language.split("-")[0].split("_")[0]
    code = code if code in emoji.LANGUAGES else "en"
    emoji.config.load_language(code)

    def name(sign: str) -> str:
        data = emoji.EMOJI_DATA.get(sign) or emoji.EMOJI_DATA.get(sign + "\ufe0f") or {}
        return str(data.get(code) or data.get("en") or "")

    return name
