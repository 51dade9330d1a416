"""The text of one document, by its format. PDFs, mail and large pages are read in a separate process."""

from dataclasses import dataclass

from llmjax.prepare.formats import RejectedError, html, is_panic, isolated, mail, pdf
from llmjax.prepare.formats.text import decode

LARGE = 200_000  # bytes; no smaller page takes a parser more than a few seconds, but a header of mail can


@dataclass(frozen=True)
class Options:
    """Settings of extraction, as in c.prepare.

    Attributes:
        html: "main", "all" or "raw". pdf_margins: drop headers and footers of PDFs.
        encodings: tried in this order; "detect" as the last guesses.
        max_document_bytes: of a text. max_document_seconds: of CPU time; 0: no limit.
    """

    html: str = "main"
    pdf_margins: bool = True
    encodings: tuple[str, ...] = ("utf-8",)
    max_document_bytes: int = 256_000_000
    max_document_seconds: float = 60.0


Text = tuple[str, dict[str, int]]  # and facts about it


def text_of(data: bytes, media: str, options: Options) -> Text:
    """The text of a document and facts about it, by name.

    Args:
        media: text, html, pdf or mail, and the declared encoding where there is one: "html; charset=gbk".

    Raises:
        RejectedError: the reason why there is no text.
    """
    kind, _, declared = media.partition("; charset=")
    is_large = len(data) > LARGE or data.count(b"<") > html.MANY_TAGS
    if kind in ("pdf", "mail") or (kind == "html" and is_large):
        result: Text = isolated.call(read, data, kind, declared, options, seconds=options.max_document_seconds)
        return result
    try:
        return read(data, kind, declared, options)
    except BaseException as error:
        if not is_panic(error):
            raise
        raise RejectedError(f"broken: the parser ended with {str(error)[:100]!r}") from error


def read(data: bytes, kind: str, declared: str, options: Options) -> Text:
    """As `text_of`, always in this process."""
    if not data:
        raise RejectedError("empty")
    if kind == "text":
        text, facts = decode(data, options.encodings, declared=declared)
    elif kind == "html":
        page, facts = decode(data, options.encodings, declared=declared, markup=True)
        text, is_fallback = html.extract(page, options.html)
        facts |= {"extract.fallback": 1} if is_fallback else {}
    elif kind == "pdf":
        text, facts = pdf.extract(data, margins=options.pdf_margins), {}
    elif kind == "mail":
        text, facts = mail.text_of(data, options.encodings)
    else:
        raise RejectedError(f"format: {kind or 'none'}")
    if not text.strip():
        raise RejectedError({"html": "html: no text"}.get(kind, "empty"))
    if len(text) > options.max_document_bytes:
        raise RejectedError(f"too large: text of more than prepare.max_document_bytes={options.max_document_bytes:,}")
    return text, facts
