"""Running text out of PDF files, by pypdf: pages without their headers and footers, words without their line ends.

What is bounded, so that no file can hold a worker for long or fill its memory:
pages (PAGES), characters of text (CHARACTERS), the bytes that any one stream may be decompressed to (STREAM_BYTES;
pypdf stops there), and its operators (OPERATORS). The two latter reject the file, the two former too, by name.
pypdf itself also bounds page trees, cross-reference tables and forms. Images are never decoded.
"""

import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence

from llmjax.errors import UserError

PAGES = 5_000
CHARACTERS = 50_000_000
STREAM_BYTES = 32_000_000
OPERATORS = 2_000_000
MARGIN_LINES = 2  # so many lines at the top and at the bottom of a page may be margins
MARGIN_PAGES = 3  # a margin stands on at least so many pages,
MARGIN_SHARE = 0.3  # and on this share of them: books have one header on the left and another on the right
_DIGITS = re.compile(r"\d+")
_ROMAN = re.compile(r"(?i)[ivxlc]{1,7}")
_HYPHENS = "-\u00ad\u2010"
_BROKEN_WORD = re.compile(rf"(\w+)([{_HYPHENS}])\n[ \t]*(\w+)")


class PdfError(Exception):
    """A PDF that gives no text; the message is the detail of the reason for its rejection."""


def make_extractor(*, margins: bool = True) -> Callable[[bytes], str]:
    """A function from the bytes of a PDF to its text; it raises PdfError where there is none.

    Args:
        margins: drop headers, footers and page numbers, and join words that were hyphenated at line ends.

    Raises:
        UserError: pypdf is not installed.
    """
    try:
        import pypdf
        from pypdf.errors import DependencyError, FileNotDecryptedError, LimitReachedError
    except ImportError as error:
        raise UserError("the text of PDF needs pypdf: pip install 'llmjax[data]'") from error
    # pypdf logs every oddity that it could mend, thousands in a crawl; what it could not mend is a reject with a reason.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)

    def read(data: bytes) -> list[str]:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):  # many files are encrypted with an empty password
            raise PdfError("password")
        count = len(reader.pages)
        if count > PAGES:
            raise PdfError(f"more than {PAGES} pages")
        pages, characters = [], 0
        for page in reader.pages:
            pages.append(page.extract_text())
            characters += len(pages[-1])
            if characters > CHARACTERS:
                raise PdfError(f"more than {CHARACTERS} characters")
        return pages

    def extract(data: bytes) -> str:
        try:
            with pypdf.apply_configuration(
                zlib_maximum_output_length=STREAM_BYTES,
                lzw_maximum_output_length=STREAM_BYTES,
                run_length_maximum_output_length=STREAM_BYTES,
                brotli_maximum_output_length=STREAM_BYTES,
                array_based_stream_maximum_output_length=STREAM_BYTES,
                stream_parsing_work_maximum_count=OPERATORS,
                jbig2dec_binary=None,
            ):
                pages = read(data)
        except PdfError:
            raise
        except FileNotDecryptedError as error:
            raise PdfError("password") from error
        except DependencyError as error:
            raise PdfError("encrypted; pip install cryptography") from error
        except LimitReachedError as error:
            raise PdfError("too large when decompressed") from error
        except RecursionError as error:
            raise PdfError("nested too deeply") from error
        except Exception as error:  # pypdf lets KeyError, TypeError and others of broken files through
            raise PdfError(f"broken, {type(error).__name__}") from error
        text = join_pages(pages) if margins else "\n\n".join(page.strip("\n") for page in pages)
        if not text.strip():
            raise PdfError("no text")  # scanned pages
        return text

    return extract


def join_pages(pages: Sequence[str]) -> str:
    """One text of the pages' texts, without what stands at the margin of many pages, broken words joined."""
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

    A line is a margin if it is among the outermost two lines that are not blank, and the same line, numbers aside,
    is there on at least 3 pages and 30 % of them.
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
    """The text with words joined that a hyphen breaks at a line end; the rest of the line follows the word.

    The hyphen itself stays where the text elsewhere has the word with it ("well-known") and not without it, and
    between numbers and before capitals.
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
