"""The text of PDF files, by PDFium: pages without headers and footers, words joined over line ends.

`extraction.py` calls it in a process with limits of time and memory. Images are never decoded.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llmjax.errors import UserError
from llmjax.prepare.formats import RejectedError

PAGES = 5_000
CHARACTERS = 50_000_000
MARGIN_LINES = 2  # lines at the top, and at the bottom, of a page that may be margins
MARGIN_PAGES = 3  # a margin is on at least this many pages,
MARGIN_SHARE = 0.3  # and on this share of them: books have different headers on left and right pages
_WRONG_PASSWORD = 4  # FPDF_ERR_PASSWORD
_DIGITS = re.compile(r"\d+")
_ROMAN = re.compile(r"(?i)[ivxlc]{1,7}")
_HYPHENS = "-\u00ad\u2010"
_BROKEN_WORD = re.compile(rf"(\w+)([{_HYPHENS}])\n[ \t]*(\w+)")


def extract(data: bytes, *, margins: bool = True) -> str:
    """The text of a PDF. Ligatures become letters.

    Args:
        margins: drop headers, footers and page numbers, and join words that were hyphenated at line ends.

    Raises:
        RejectedError: "pdf: password", "pdf: broken", "pdf: no text" (scanned), "pdf: more than N pages" or characters.
        UserError: pypdfium2 is not installed.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise UserError("the text of PDF needs pypdfium2: pip install 'llmjax[data]'") from error
    try:  # a file encrypted with an empty password opens without one
        with pypdfium2.PdfDocument(data) as document:
            pages = _pages(document)
    except pypdfium2.PdfiumError as error:
        reason = "password" if getattr(error, "err_code", 0) == _WRONG_PASSWORD else "broken"
        raise RejectedError(f"pdf: {reason}") from error
    text = join_pages(pages) if margins else "\n\n".join(page.strip("\n") for page in pages)
    if not text.strip():
        raise RejectedError("pdf: no text")
    return text


def _pages(document: Any) -> list[str]:
    """The text of every page."""
    if len(document) > PAGES:
        raise RejectedError(f"pdf: more than {PAGES} pages")
    pages, characters = [], 0
    for page in document:
        text = page.get_textpage().get_text_range()
        page.close()
        # PDFium writes U+FFFE for a hyphen at a line end, and leaves out the line end.
        pages.append(text.replace("\ufffe", "-\n").replace("\r\n", "\n"))
        characters += len(text)
        if characters > CHARACTERS:
            raise RejectedError(f"pdf: more than {CHARACTERS} characters")
    return pages


def join_pages(pages: Sequence[str]) -> str:
    """The pages' texts as one, without headers and footers, words joined over line ends."""
    lines = [[line.rstrip() for line in page.splitlines()] for page in pages]
    cleaned = ["\n".join(page).strip("\n") for page in drop_margins(lines)]
    text = ""
    for page in cleaned:
        if not page:
            continue
        runs_on = text and (text[-1] in _HYPHENS or (page[0].islower() and text[-1] not in ".!?:"))
        text += ("\n" if runs_on else "\n\n") * bool(text) + page
    return join_hyphens(text)


def drop_margins(pages: Sequence[Sequence[str]]) -> list[list[str]]:
    """The lines of each page without headers, footers and page numbers.

    A line is a margin if it is one of the two outermost lines that are not blank, and at least 3 pages and 30 % of all
    pages have the same line, apart from numbers.
    """

    def key(line: str) -> str:
        line = line.strip()
        return "#" if _ROMAN.fullmatch(line) else _DIGITS.sub("#", line)

    def outer(page: Sequence[str]) -> list[int]:
        filled = [row for row, line in enumerate(page) if line.strip()]
        return sorted({*filled[:MARGIN_LINES], *filled[-MARGIN_LINES:]})

    counts = Counter(k for page in pages for k in {key(page[row]) for row in outer(page)})
    enough = max(MARGIN_PAGES, MARGIN_SHARE * len(pages))
    result = []
    for page in pages:
        margins = {row for row in outer(page) if counts[key(page[row])] >= enough}
        result.append([line for row, line in enumerate(page) if row not in margins])
    return result


def join_hyphens(text: str) -> str:
    """The text with words joined that a hyphen breaks at a line end. The rest of the line follows the word.

    The hyphen stays if the text has the word elsewhere only with it ("well-known"), between numbers, and before capitals.
    """
    if not any(f"{hyphen}\n" in text for hyphen in _HYPHENS):
        return text
    words = set(re.findall(r"\w+(?:-\w+)*", text))
    lowered = {word.lower() for word in words}

    def join(match: re.Match[str]) -> str:
        left, hyphen, right = match.groups()
        whole, dashed = f"{left}{right}", f"{left}-{right}"
        if hyphen == "\u00ad" or (right[0].islower() and left[-1].isalpha()):
            keep = hyphen != "\u00ad" and dashed.lower() in lowered and whole.lower() not in lowered
            return dashed if keep else whole
        return dashed

    return _BROKEN_WORD.sub(join, text)
