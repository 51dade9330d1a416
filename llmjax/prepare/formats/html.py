"""Readable text out of HTML pages: resiliparse finds the content, and what it would lose is mended in the markup first.

What resiliparse 2.0 does well is left to it: which blocks are content, paragraphs, headings, <pre> with its indentation.
Mended here, in the markup, since a step in the parsed tree from Python costs more than parsing the element:

- Bullet lists less than three elements below <body> count as menus there; one whose text is mostly not links is kept.
- Cells of tables come out two tabs apart, and a <p> or <br> inside a cell breaks its row: short cells are made one
  line, and the cells of a row are joined by " | ".
- Columns of line numbers beside code are dropped.
- Headers of the site that hold no title are dropped.

Finding the main content takes time with the depth of each element, so a page nested deeper than any browser shows it
is not searched but taken whole.
"""

import re
from collections.abc import Callable

import numpy as np

from llmjax.errors import UserError

KINDS = ("main", "all", "raw")
CELL_CHARACTERS = 300  # a longer cell is taken for layout, and keeps its paragraphs
FALLBACK_CHARACTERS = 200  # a page without main content keeps its visible text if there is at least this much
DEPTH_OF_MENUS = 3  # lists nearer to <body> are menus for resiliparse
DEPTH = 512  # browsers nest no deeper
SHALLOW_TAGS = 20_000  # with fewer tags no page takes more than a second or two, however they are nested
_GUTTERS = {  # of code and headings; the key is in the markup of any page that has one
    "lineno": "td.linenos, span.linenos, pre.lineno, span.lineno",
    "gutter": "td.gutter",
    "blob-num": "td.blob-num",
    "line-numbers": "td.line-numbers",
    "headerlink": "a.headerlink",
}
_SITE_HEADER = re.compile(
    r"<header\b(?:(?!<h1\b|<main\b|<article\b).){0,20000}?</header\s*>", re.IGNORECASE | re.DOTALL
)
_LISTS = re.compile(r"<(/?)ul\b", re.IGNORECASE)
_CELL = re.compile(r"(<t[dh]\b[^>]*>)([^<]*(?:<(?!/?t[dhr]\b|/?table\b|pre\b)[^<]*)*)", re.IGNORECASE)
_BLOCK_TAG = re.compile(r"</?(?:p|div|br|ul|ol|li|dl|dt|dd|blockquote|center|h[1-6])\b[^>]*>", re.IGNORECASE)
_PRE = re.compile(r"<pre\b.*?</pre", re.IGNORECASE | re.DOTALL)
_NESTING = re.compile(  # tags that stay open until they are closed
    r"<(/?)(?!(?:br|hr|img|input|meta|link|p|li|dt|dd|t[drh]|thead|tbody|tfoot|option|col|wbr|area|base|source)\b)[a-z]",
    re.IGNORECASE,
)
_TAG = re.compile(r"<[^>]*>")
_LINK = re.compile(r"<a[ >][^<]*(?:<(?!/a>)[^<]*)*</a>", re.IGNORECASE)
_TAB = "\ue0ff"  # stands for a tab within <pre> while two tabs mean the border of a cell; private use, repaired away


def make_extractor(kind: str = "main") -> Callable[[str], tuple[str, bool]]:
    """A function from a page to (its text, whether the text is the fallback for a page without main content).

    Args:
        kind: "main" for the main content, "all" for all visible text, "raw" for the page as it is.

    Raises:
        UserError: kind is none of these, or resiliparse is not installed.
    """
    if kind not in KINDS:
        raise UserError(f"html={kind!r} is not known; use one of {', '.join(KINDS)}")
    if kind == "raw":
        return lambda page: (page, False)
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as error:
        raise UserError("the text of HTML needs resiliparse: pip install 'llmjax[data]'") from error

    def extract(page: str) -> tuple[str, bool]:
        if _is_deep(page):
            text = extract_plain_text(page, main_content=False, alt_texts=False)
            return text, kind == "main"
        lowered = page.lower()
        tables = "<table" in lowered
        if tables:
            page = _mend_cells(page, pre="\t\t" in page and "<pre" in lowered)
        if kind == "main" and "<ul" in lowered:
            page = _keep_content_lists(page)
        if kind == "main" and "<header" in lowered:
            first = _SITE_HEADER.search(page)
            if first and not re.search(r"(?i)<(?:main|article)\b", page[: first.start()]):
                page = page[: first.start()] + page[first.end() :]
        # A selector costs as much as a hundred elements, so only those are given that a page may need.
        skipped = [selector for words, selector in _GUTTERS.items() if words in lowered]
        # Of a page, not of a parsed tree: the tree's way through Python takes a third as long again.
        text = extract_plain_text(page, main_content=kind == "main", alt_texts=False, skip_elements=skipped)
        fallback = kind == "main" and not text.strip()
        if fallback:
            furniture = [*skipped, "nav", "footer", "aside"]
            text = extract_plain_text(page, main_content=False, alt_texts=False, skip_elements=furniture)
            if len(text) < FALLBACK_CHARACTERS:
                return "", False
        if tables:
            text = _draw_borders(text).replace(_TAB, "\t")
        return text, fallback

    return extract


def _is_deep(page: str) -> bool:
    """Whether elements may be nested more than DEPTH deep, from the tags opened and not closed anywhere in the page."""
    if page.count("<") < SHALLOW_TAGS:
        return False
    opened = np.fromiter((-1 if match[1] else 1 for match in _NESTING.finditer(page)), np.int64)
    depth = np.concatenate([[0], np.cumsum(opened)])
    return bool((depth - np.minimum.accumulate(depth)).max() > DEPTH)


def _keep_content_lists(page: str) -> str:
    """The page with lists of text, not of links, put so deep that they are not taken for menus."""
    parts, at, depth, start = [], 0, 0, 0
    for match in _LISTS.finditer(page):
        depth = depth - 1 if match[1] else depth + 1
        if depth == 1 and not match[1]:
            start = match.start()
        elif depth <= 0 and match[1]:
            end = page.find(">", match.end()) + 1
            if depth == 0 and end and _is_content(page[start:end]):
                parts += [page[at:start], "<div>" * DEPTH_OF_MENUS, page[start:end], "</div>" * DEPTH_OF_MENUS]
                at = end
            depth = 0
    return "".join([*parts, page[at:]])


def _is_content(markup: str) -> bool:
    """Whether the markup of a list is mostly text outside of links."""
    opening = markup[: markup.find(">")]
    if re.search(r"(?i)\b(nav|menu)", opening):
        return False
    text = len(_TAG.sub("", markup))
    if "<a" not in markup and "<A" not in markup:
        return text >= 20
    return text >= 20 and len(_TAG.sub("", _LINK.sub("", markup))) >= 0.5 * text


def _mend_cells(page: str, *, pre: bool) -> str:
    """The page with short cells as one line each; with `pre`, tabs of <pre> are marked as no borders of cells."""

    def flatten(match: re.Match[str]) -> str:
        opening, content = match.groups()
        if "<" not in content or not _BLOCK_TAG.search(content) or len(_TAG.sub("", content)) > CELL_CHARACTERS:
            return match[0]
        return opening + _BLOCK_TAG.sub(" ", content).strip()

    if pre:
        page = _PRE.sub(lambda match: match[0].replace("\t", _TAB), page)
    return _CELL.sub(flatten, page)


def _draw_borders(text: str) -> str:
    """The text with " | " where two tabs part the cells of a row, and none behind the last cell that is not empty."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if line.endswith(("\t", " ")):
            end = len(line.rstrip(" \t"))
            if "\t\t" in line[end:]:
                lines[i] = line[:end]
    # Replacing thrice takes a tenth of the time of a regular expression with optional spaces.
    return "\n".join(lines).replace(" \t\t", "\t\t").replace("\t\t ", "\t\t").replace("\t\t", " | ")
