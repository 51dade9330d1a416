"""Step "repair": broken encodings, normal form, control and invisible characters, whitespace.

Source code is not damaged: quotes, ligatures, tabs and indentation stay. Trailing spaces go (also the hard line breaks
of Markdown), as do form feeds and more than two blank lines in a row. No-break spaces become spaces.
"""

import functools
import re
import unicodedata
from typing import Any

from llmjax.errors import UserError
from llmjax.prepare.documents import Step, add_facts, kept, replace
from llmjax.prepare.formats import code_pages

NORMAL_FORMS = ("NFC", "NFKC", "none")
ROUNDS = 5
FEW_SPACES = 3  # at the end of a line: so many are removed faster one by one
_C1 = re.compile("[\x80-\x9f]")
# Letters that are in hardly any language: ftfy takes the Swedish "»Är" for "Ȁr" in UTF-8 read as Mac Roman.
_RARE = re.compile("[\u01a6-\u01ae\u01b1-\u01cc\u01dd-\u0217\u021c-\u0250\u02e0-\u02ff]")
_ESCAPES = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b\n]*(?:\x07|\x1b\\\\)|[@-Z\\\\^_])")
_OVERSTRIKES = re.compile("[^\n\b]\b")  # a manual page writes bold as "x\bx" and underlined as "_\bx"
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_ASCII = bytes(range(128))
_ASCII_OF_LINES = _ASCII.replace(b"\n", b"")
_ASCII_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\r"))
_INVISIBLE = re.compile(
    "[\u00ad\u180e\u200b\u2060-\u2064\ufeff\u202a-\u202e\u2066-\u206f\ufff9-\ufffc\ufdd0-\ufdef\ufffe\uffff"
    "\ue000-\uf8ff\U000f0000-\U0010ffff]"  # soft hyphens, zero width, direction overrides, private use, no characters
    "|(?<![^\x00-\x7f\\s])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f\\s])"  # joiners belong between other letters
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+"  # tags belong after the black flag
)
_MAY_BE_INVISIBLE = re.compile(  # the same characters wherever they are: a search without looking around is fast
    "[\u00ad\u180e\u200b-\u200d\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\ufdd0-\ufdef\ue000-\uf8ff\U000e0000-\U000e007f"
    "\U000f0000-\U0010ffff]"
)
_SPACES = str.maketrans({"\u00a0": " ", "\u2007": " ", "\u202f": " ", "\u0085": "\n"})
_BLANK_LINES = re.compile("\n{4,}")


def make(settings: Any) -> Step:
    """The step. Reads settings.normal_form: "NFC", "NFKC" or "none".

    Facts: "repair.mojibake" lines whose encoding was mended, "repair.control" control characters and terminal
    escapes removed, "repair.invisible" invisible and private characters removed.

    Raises:
        UserError: the normal form is not known, or ftfy is not installed.
    """
    form = settings.normal_form
    if form not in NORMAL_FORMS:
        raise UserError(f"normal_form={form!r} is not known; use one of {', '.join(NORMAL_FORMS)}")
    _ftfy()

    def step(batch: Any) -> Any:
        texts = batch["text"].to_pylist()
        facts = {}
        changed = False
        for row in kept(batch).nonzero()[0].tolist():
            if texts[row]:
                text, facts[row] = repair(texts[row], form=form)
                changed |= text != texts[row]
                texts[row] = text
        return add_facts(replace(batch, text=texts), facts) if changed else add_facts(batch, facts)

    return step


@functools.cache
def _ftfy() -> tuple[Any, Any, Any]:
    """ftfy's is_bad and fix_encoding, and a config in which only encodings are mended."""
    try:
        import ftfy
        from ftfy.badness import is_bad
    except ImportError as error:
        raise UserError("mending encodings needs ftfy: pip install 'llmjax[data]'") from error
    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    return is_bad, ftfy.fix_encoding, config


def repair(text: str, *, form: str = "NFC") -> tuple[str, dict[str, int]]:
    """The mended text, and what was mended, by fact name; only what occurred is named."""
    total: dict[str, int] = {}
    judged: dict[str, bool] = {}
    for _ in range(ROUNDS):  # a mended encoding may reveal another layer; few texts need two rounds
        before = text
        text, facts = _repair_once(text, form, judged)
        for name, number in facts.items():
            total[name] = total.get(name, 0) + number
        if text == before or text.isascii():
            break
        lines = text.split("\n")
        if not any(_is_bad(lines[row], judged) for row in _rows_beyond_ascii(text)):
            break
    return text, total


def _is_bad(line: str, judged: dict[str, bool]) -> bool:
    """Whether ftfy takes a line for broken. Its search is slow, so lines that are judged already are looked up."""
    if line not in judged:
        judged[line] = _ftfy()[0](line)
    return judged[line]


def _repair_once(text: str, form: str, judged: dict[str, bool]) -> tuple[str, dict[str, int]]:
    facts: dict[str, int] = {}
    beyond = _beyond_ascii(text)
    if beyond:
        text, mended = repair_encoding(text, judged, may_have_controls=bool(_C1.search(beyond)))
        if mended:
            facts["repair.mojibake"] = mended
            beyond = _beyond_ascii(text)
    removed = 0
    if "\x1b" in text:
        text, removed = _ESCAPES.subn("", text)
    while "\b" in text:  # "x\bx\bx": each turn removes one letter of a pile
        text, piles = _OVERSTRIKES.subn("", text)
        removed += piles
        if not piles:
            break
    data = _bytes(text)  # in which some bytes are found faster than by a regular expression
    if _C1.search(beyond) or len(data.translate(None, _ASCII_CONTROLS)) < len(data):
        text, controls = _CONTROLS.subn("", text)
        removed += controls
    if removed:
        facts["repair.control"] = removed
    if beyond:
        text, invisible = _without_invisible(text) if _MAY_BE_INVISIBLE.search(beyond) else (text, 0)
        if invisible:
            facts["repair.invisible"] = invisible
        text = text.translate(_SPACES) if re.search("[\u00a0\u2007\u202f\u0085]", beyond) else text
        if form != "none" and not unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
            text = unicodedata.normalize(form, text)  # type: ignore[arg-type]
    return clean_whitespace(text), facts


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _beyond_ascii(text: str) -> str:
    """The characters beyond ASCII alone: the few in which something may have to be mended."""
    return "" if text.isascii() else _bytes(text).translate(None, _ASCII).decode("utf-8", "surrogatepass")


def _without_invisible(text: str) -> tuple[str, int]:
    """The text without invisible characters, and their number. Joiners that a removal leaves out of place go too."""
    total = 0
    while _MAY_BE_INVISIBLE.search(text):
        text, number = _INVISIBLE.subn("", text)
        total += number
        if not number:
            break
    return text, total


def _rows_beyond_ascii(text: str) -> list[int]:
    """The numbers of the lines that may be in a broken encoding. ASCII never is, so ftfy need not see it."""
    left = _bytes(text).translate(None, _ASCII_OF_LINES)
    return [row for row, beyond in enumerate(left.split(b"\n")) if beyond]


def clean_whitespace(text: str) -> str:
    """The text without trailing spaces and tabs, with at most two blank lines in a row and none at the start or end.

    Tabs and indentation stay. A line end at the end of the text stays, one only.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Not a regular expression: "[ \t]+\n" takes quadratic time on a long run of spaces within a line.
    for _ in range(FEW_SPACES):
        if " \n" not in text and "\t\n" not in text:
            break
        text = text.replace(" \n", "\n").replace("\t\n", "\n")
    else:
        text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
    text = text.rstrip(" \t")
    if "\n\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n\n", text)
    text = text.lstrip("\n")
    return text.rstrip("\n") + "\n" if text.endswith("\n") else text


def repair_encoding(text: str, judged: dict[str, bool], *, may_have_controls: bool) -> tuple[str, int]:
    """The text with broken encodings mended, and the number of lines that changed.

    First, code pages of DOS and the Macintosh that were read as Latin-1, which leaves C1 controls in words (ftfy would
    read those as Windows-1252 and turn letters into quotation marks). Then, by ftfy and line by line, UTF-8 that was read
    as a single-byte encoding, once or several times.
    """
    before = text
    codec = code_pages.legacy_codec(text) if may_have_controls else None
    if codec:
        text = code_pages.redecode(text, codec)
    _, fix_encoding, config = _ftfy()
    lines = text.split("\n")
    for row in _rows_beyond_ascii(text):
        line = lines[row]
        if _is_bad(line, judged):
            fixed = fix_encoding(line, config)
            if len(_RARE.findall(fixed)) <= len(_RARE.findall(line)):
                lines[row] = fixed
    text = "\n".join(lines)
    if text == before:
        return text, 0
    return text, max(1, sum(a != b for a, b in zip(before.split("\n"), text.split("\n"), strict=False)))
