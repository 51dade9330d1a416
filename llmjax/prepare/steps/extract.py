"""Step "extract": raw bytes become text, by their format: text, html, pdf or mail.

Every document that gives no text is a reject with a reason; no input raises. Line ends become "\\n".
"""

import codecs
from collections.abc import Callable
from typing import Any

from llmjax.errors import UserError
from llmjax.prepare.documents import Step, add_facts, kept, reject, replace, well_formed
from llmjax.prepare.formats import RejectedError, html, mail, pdf
from llmjax.prepare.formats.text import DETECT, decode, line_ends


def make(settings: Any) -> Step:
    """The step. Reads settings.html, settings.pdf_margins and settings.encodings.

    Facts: "extract.guessed_encoding" 1 where the encoding was guessed, "extract.fallback" 1 for a page of HTML
    without main content. Reasons: "invalid UTF-8", "wrong encoding", "binary", "empty", "html: no text", "pdf: password",
    "pdf: no text" (scanned), "pdf: ..." (broken, too large), "mail: no text", "format: NAME" (not known).

    Raises:
        UserError: an encoding or kind of HTML that is not known.
    """
    encodings = tuple(settings.encodings)
    if DETECT in encodings[:-1] or not encodings:
        raise UserError(f"prepare.encodings must name encodings, and {DETECT!r} only as the last: {encodings}")
    for name in set(encodings) - {DETECT}:
        try:
            codecs.lookup(name)
        except LookupError as error:
            raise UserError(f"prepare.encodings: Python knows no encoding {name!r}") from error
    if settings.html not in html.KINDS:
        raise UserError(f"html={settings.html!r} is not known; use one of {', '.join(html.KINDS)}")
    extractors: dict[str, Callable[..., Any]] = {}  # made at the first document of a format, which may need a library

    def page_text(data: bytes) -> tuple[str, dict[str, int]]:
        extract = extractors.get("html") or html.make_extractor(settings.html)
        extractors["html"] = extract
        page, guessed = decode(data, encodings, markup=True)
        text, fallback = extract(page)
        if not text.strip():
            raise RejectedError("html: no text")
        return text, {"extract.guessed_encoding": int(guessed), "extract.fallback": int(fallback)}

    def pdf_text(data: bytes) -> tuple[str, dict[str, int]]:
        extract = extractors.get("pdf") or pdf.make_extractor(margins=settings.pdf_margins)
        extractors["pdf"] = extract
        try:
            return extract(data), {}
        except pdf.PdfError as error:
            raise RejectedError(f"pdf: {error}") from error

    def message(data: bytes) -> tuple[str, dict[str, int]]:
        return mail.text_of(data, encodings), {}

    def plain(data: bytes) -> tuple[str, dict[str, int]]:
        text, guessed = decode(data, encodings)
        return text, {"extract.guessed_encoding": int(guessed)}

    formats = {"text": plain, "html": page_text, "pdf": pdf_text, "mail": message}

    def step(batch: Any) -> Any:
        texts, names = batch["text"].to_pylist(), batch["format"].to_pylist()
        reasons: dict[int, str] = {}
        facts: dict[int, dict[str, int]] = {}
        data_column = batch["data"]
        done = []
        for row in kept(batch).nonzero()[0].tolist():
            if texts[row] is not None:
                continue
            data = data_column[row].as_py()
            try:
                if not data:
                    raise RejectedError("empty")
                if names[row] not in formats:
                    raise RejectedError(f"format: {names[row] or 'none'}")
                text, numbers = formats[names[row]](data)
                if not text.strip():
                    raise RejectedError("empty")
                texts[row] = line_ends(well_formed(text))
                facts[row] = {name: number for name, number in numbers.items() if number}
                done.append(row)
            except RejectedError as rejected:
                reasons[row] = str(rejected)
        if not done and not reasons:
            return batch
        import pyarrow as pa
        import pyarrow.compute as pc

        for row in done:
            names[row] = ""
        gone = pa.array([row in facts for row in range(batch.num_rows)])  # rows that now have a text
        data_column = pc.if_else(gone, pa.scalar(None, data_column.type), data_column)
        return reject(add_facts(replace(batch, text=texts, data=data_column, format=names), facts), reasons)

    return step
