"""The text of HTML pages. resiliparse finds the content; this module first mends the markup that it would lose.

resiliparse 2.0 decides which blocks are content, and renders paragraphs, headings and <pre> with its indentation. The
rest is mended here, in the markup, because visiting an element of the parsed tree from Python costs more than parsing it:

- resiliparse takes bullet lists less than three elements below <body> for menus. Lists of text, not of links, are kept.
- It puts cells of tables two tabs apart, and a <p> or <br> in a cell breaks the row. Short cells become one line, and
  " | " stands between the cells of a row.
- Columns of line numbers beside code are dropped.
- Headers of the site without a title are dropped.

Every pattern takes time linear in the page: a tag ends at ">" or at the next "<". The search for the main content takes
time proportional to the depth of each element. A page nested deeper than browsers allow is taken whole.
"""

import functools
import re
from collections.abc import Callable

from llmjax.errors import UserError

KINDS = ("main", "all", "raw")
CELL_CHARACTERS = 300  # a longer cell is taken for layout, and keeps its paragraphs
FALLBACK_CHARACTERS = 200  # a page without main content keeps its visible text if there is at least this much
DEPTH_OF_MENUS = 3  # lists nearer to <body> are menus for resiliparse
DEPTH = 512  # browsers nest no deeper
MANY_TAGS = 4_000  # with fewer no page takes more than a second, however its tags are nested
_GUTTERS = {  # of code and headings; the key is in the markup of any page that has one
    "lineno": "td.linenos, span.linenos, pre.lineno, span.lineno",
    "gutter": "td.gutter",
    "blob-num": "td.blob-num",
    "line-numbers": "td.line-numbers",
    "headerlink": "a.headerlink",
}
_HEADERS = re.compile(r"<header\b|</header\s*>|<(?:h1|main|article)\b", re.IGNORECASE)
_LISTS = re.compile(r"<(/?)ul\b[^<>]*>", re.IGNORECASE)
_CELL = re.compile(r"(<t[dh]\b[^<>]*>)([^<]*(?:<(?!/?t[dhr]\b|/?table\b|pre\b)[^<]*)*)", re.IGNORECASE)
_BLOCK_TAG = re.compile(r"</?(?:p|div|br|ul|ol|li|dl|dt|dd|blockquote|center|h[1-6])\b[^<>]*>", re.IGNORECASE)
_PRE = re.compile(r"(<pre\b|</pre\b)", re.IGNORECASE)
_NESTING = re.compile(  # tags that stay open until they are closed
    r"<(/?)(?!(?:br|hr|img|input|meta|link|p|li|dt|dd|t[drh]|thead|tbody|tfoot|option|col|wbr|area|base|source)\b)[a-z]",
    re.IGNORECASE,
)
_TAG = re.compile(r"<[^<>]*>")
_LINK = re.compile(r"(</?)a\b[^<>]*>", re.IGNORECASE)
_TAB = "\ue0ff"  # stands for a tab within <pre> while two tabs mean the border of a cell; private use, repaired away


@functools.cache
def _plain_text() -> Callable[..., str]:
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as error:
        raise UserError("the text of HTML needs resiliparse: pip install 'llmjax[data]'") from error
    function: Callable[..., str] = extract_plain_text
    return function


def extract(page: str, kind: str = "main") -> tuple[str, bool]:
    """The text of a page, and whether it is the fallback for a page without main content.

    Args:
        kind: "main" for the main content, "all" for all visible text, "raw" for the page as it is.

    Raises:
        UserError: resiliparse is not installed.
    """
    if kind == "raw":
        return page, False
    plain_text, is_main = functools.partial(_plain_text(), alt_texts=False), kind == "main"
    if _is_deep(page):
        return plain_text(page, main_content=False), is_main
    lowered = page.lower()
    tables = "<table" in lowered
    if tables:
        page = _mend_cells(page, pre="\t\t" in page and "<pre" in lowered)
    if is_main and "<ul" in lowered:
        page = _keep_content_lists(page)
    if is_main and "<header" in lowered:
        page = _without_site_header(page)
    # A selector costs as much as a hundred elements, so only those are given that a page may need.
    skipped = [selector for words, selector in _GUTTERS.items() if words in lowered]
    # Of a page, not of a parsed tree: the tree's way through Python takes a third as long again.
    text = plain_text(page, main_content=is_main, skip_elements=skipped)
    is_fallback = is_main and not text.strip()
    if is_fallback:
        text = plain_text(page, main_content=False, skip_elements=[*skipped, "nav", "footer", "aside"])
        if len(text) < FALLBACK_CHARACTERS:
            return "", False
    return _draw_borders(text).replace(_TAB, "\t") if tables else text, is_fallback


def _is_deep(page: str) -> bool:
    """Whether elements may be nested more than DEPTH deep, from the tags opened and not closed anywhere in the page."""
    if page.count("<") < MANY_TAGS:
        return False
    depth = 0
    for match in _NESTING.finditer(page):
        depth = max(depth - 1, 0) if match[1] else depth + 1
        if depth > DEPTH:
            return True
    return False


def _without_site_header(page: str) -> str:
    """The page without the first <header> that holds no title, if it stands before the main content."""
    start = -1
    for match in _HEADERS.finditer(page):
        tag = match[0].lower()
        if tag == "<header":
            start = match.start() if start < 0 else start
        elif tag.startswith("</"):
            if start >= 0:
                return page[:start] + page[match.end() :]
        elif tag == "<h1":
            start = -1
        else:
            break
    return page


def _keep_content_lists(page: str) -> str:
    """The page with lists of text, not of links, put so deep that they are not taken for menus."""
    parts, at, depth, start = [], 0, 0, 0
    for match in _LISTS.finditer(page):
        depth = depth - 1 if match[1] else depth + 1
        if depth == 1 and not match[1]:
            start = match.start()
        elif depth <= 0 and match[1]:
            if depth == 0 and _is_content(page[start : match.end()]):
                parts += [page[at:start], "<div>" * DEPTH_OF_MENUS, page[start : match.end()]]
                parts.append("</div>" * DEPTH_OF_MENUS)
                at = match.end()
            depth = 0
    return "".join([*parts, page[at:]])


def _is_content(markup: str) -> bool:
    """Whether the markup of a list is mostly text outside of links."""
    if re.search(r"(?i)\b(nav|menu)", markup[: markup.find(">")]):
        return False
    outside = inside = 0
    pieces = _LINK.split(markup)  # text, "<" or "</" of the tag of a link, text, ...
    for tag, piece in zip(["</", *pieces[1::2]], pieces[::2], strict=True):
        size = len(_TAG.sub("", piece))
        inside, outside = (inside + size, outside) if tag == "<" else (inside, outside + size)
    return inside + outside >= 20 and outside >= inside


def _mend_cells(page: str, *, pre: bool) -> str:
    """The page with short cells as one line each; with `pre`, tabs of <pre> are marked as no borders of cells."""

    def flatten(match: re.Match[str]) -> str:
        opening, content = match.groups()
        if "<" not in content or not _BLOCK_TAG.search(content) or len(_TAG.sub("", content)) > CELL_CHARACTERS:
            return match[0]
        return opening + _BLOCK_TAG.sub(" ", content).strip()

    if pre:
        pieces = _PRE.split(page)  # text, tag, text, ...
        for i in range(1, len(pieces), 2):
            if not pieces[i].startswith("</"):
                pieces[i + 1] = pieces[i + 1].replace("\t", _TAB)
        page = "".join(pieces)
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
