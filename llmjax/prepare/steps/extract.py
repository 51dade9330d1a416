"""Step "extract": raw bytes become text, by their format: text, html, pdf or mail.

Every document that gives no text is a reject with a reason; no input raises. Line ends become "\\n".
"""

import codecs
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llmjax.errors import UserError
from llmjax.prepare.documents import Step, add_facts, kept, reject, replace, well_formed
from llmjax.prepare.formats import RejectedError, html
from llmjax.prepare.formats.extraction import Options, text_of
from llmjax.prepare.formats.text import DETECT, line_ends


def make(settings: Any) -> Step:
    """The step. Reads settings.html, .pdf_margins, .encodings, .max_document_bytes and .max_document_seconds.

    Facts: "extract.guessed_encoding" 1 where the encoding was guessed, "extract.bad_bytes" the bytes that
    U+FFFD replaces, "extract.fallback" 1 for a page of HTML without main content. Reasons: "invalid
    UTF-8", "wrong encoding", "binary", "empty", "html: no text", "pdf: password", "pdf: no text" (scanned), "pdf: ..."
    (broken), "mail: no text", "format: NAME" (not known), "too large", "too slow", "broken".

    Raises:
        UserError: an encoding or kind of HTML that is not known.
    """
    names = ("html", "pdf_margins", "max_document_bytes", "max_document_seconds")
    options = Options(encodings=tuple(settings.encodings), **{name: getattr(settings, name) for name in names})
    encodings = options.encodings
    if DETECT in encodings[:-1] or not encodings:
        raise UserError(f"prepare.encodings must name encodings, and {DETECT!r} only as the last: {encodings}")
    for name in set(encodings) - {DETECT}:
        try:
            codecs.lookup(name)
        except LookupError as error:
            raise UserError(f"prepare.encodings: Python knows no encoding {name!r}") from error
    if settings.html not in html.KINDS:
        raise UserError(f"html={settings.html!r} is not known; use one of {', '.join(html.KINDS)}")

    def step(batch: pa.RecordBatch) -> pa.RecordBatch:
        texts, media, data = batch["text"].to_pylist(), batch["format"].to_pylist(), batch["data"]
        reasons: dict[int, str] = {}
        facts: dict[int, dict[str, int]] = {}
        for row in kept(batch).nonzero()[0].tolist():
            if texts[row] is not None:
                continue
            try:
                text, facts[row] = text_of(data[row].as_py() or b"", media[row], options)
                texts[row], media[row] = line_ends(well_formed(text)), ""
            except RejectedError as rejected:
                reasons[row] = str(rejected)
        if not facts and not reasons:
            return batch
        has_text_now = pa.array([row in facts for row in range(batch.num_rows)])
        data = pc.if_else(has_text_now, pa.scalar(None, data.type), data)
        return reject(add_facts(replace(batch, text=texts, data=data, format=media), facts), reasons)

    return step
