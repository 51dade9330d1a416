"""Text of DOS and the Macintosh that was read as Latin-1: finds its code page and decodes it again."""

import re
import unicodedata

EVIDENCE = 2_000  # characters from which the code page of a document is judged
LIKELY = 0.7  # least mean plausibility of a code page, from -1 to 1
_CODECS = ("cp1252", "cp850", "mac_roman")
_TABLES = {codec: {chr(b): bytes([b]).decode(codec, "replace") for b in range(128, 256)} for codec in _CODECS}
_LONE_C1 = re.compile(  # or UTF-8 read as Latin-1, which is for ftfy to mend
    "[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}|([\x80-\x9f])"
)
_DOS_QUOTES = re.compile(r"(?<![\d\s])½(?!\d)|(?<!\d)½(?![\d\s])")


def legacy_codec(text: str) -> str | None:
    """The code page, "cp850" (DOS) or "mac_roman", in which the C1 controls of the text would be letters; or None.

    Also None if Windows-1252 explains them as well, as quotation marks and dashes in fitting places. A code page is judged
    by how well each decoded character fits its neighbours: a letter beside letters of fitting case, an apostrophe between
    letters, an opening mark before a word.
    """
    found = []
    for match in _LONE_C1.finditer(text):
        if match[1]:
            found.append(match.start())
            if len(found) == EVIDENCE:
                break
    if len(found) < 2:
        return None
    scores = {codec: sum(_fit(text, at, codec) for at in found) / len(found) for codec in _TABLES}
    best = max(_CODECS, key=scores.__getitem__)  # the first, if several are equal
    return best if best != "cp1252" and scores[best] >= LIKELY else None


def _fit(text: str, at: int, codec: str) -> float:
    """How well the character at a place, decoded by the codec, fits its neighbours: from -1 to 1."""
    table = _TABLES[codec]
    left = text[at - 1] if at else " "
    right = text[at + 1] if at + 1 < len(text) else " "
    left, right = table.get(left, left), table.get(right, right)
    character = table[text[at]]
    category = unicodedata.category(character)
    if character == "ƒ":
        return -1.0
    if category == "Ll":
        if not (left.isalpha() or right.isalpha()):
            return 0.0
        return -1.0 if right.isupper() else 1.0
    if category == "Lu":
        if not (left.isalpha() or right.isalpha()):
            return 0.0
        return -1.0 if left.islower() else 1.0
    if character in "\u2018\u2019":  # single quotation marks; the latter is also the apostrophe
        return 1.0 if left.isalnum() or right.isalnum() else 0.0
    if character in "\u201c\u201e\u2039":  # opening quotation marks
        return 1.0 if not left.isalnum() and right.isalnum() else -1.0
    if character in "\u201d\u203a":  # closing ones
        return 1.0 if not left.isspace() and not right.isalnum() else -1.0
    if character in "\u2013\u2014":  # dashes
        return 1.0 if left.isspace() == right.isspace() else 0.0
    if character in "…•€™‰†":
        return 0.5 if not (left.isalpha() and right.isalpha()) else -1.0
    return -1.0


def redecode(text: str, codec: str) -> str:
    """The text with its C1 controls read by the codec, and where it is all Latin-1, its other letters and quotes too."""
    table = {ord(c): to for c, to in _TABLES[codec].items() if c < "\xa0"}
    if max(text) <= "\xff":
        for c, to in _TABLES[codec].items():
            if to in "«»¿¡\xa0" or unicodedata.category(to) in ("Lu", "Ll"):
                table[ord(c)] = to
    text = text.translate(table)
    # In some files of DOS origin quotation marks »so» have become ½so½; a half beside a letter is no number.
    return _DOS_QUOTES.sub("»", text) if codec == "cp850" else text
