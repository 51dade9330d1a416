"""Step "extract": raw bytes become text, by their format: text, html, pdf or mail.

Every document that gives no text is a reject with a reason; no input raises. Line ends become "\\n".
"""

import codecs
import re
from collections.abc import Callable
from typing import Any

from llmjax.errors import UserError
from llmjax.prepare import html, pdf
from llmjax.prepare.records import Step, add_facts, kept, reject, replace, well_formed
from llmjax.prepare.steps.repair import legacy_codec

DETECTED_BYTES = 131_072  # the guess of an encoding looks at so many bytes; the whole must then decode without error
DETECT = "detect"
CONTROL_SHARE = 0.02  # more control characters than this, or a NUL, and the document is binary
_BOMS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\x1b\b"))  # escapes and backspaces are in logs and manual pages
_MAGIC = (b"%PDF-", b"\x7fELF", b"\x89PNG", b"GIF8", b"PK\x03\x04", b"\x1f\x8b", b"\xff\xd8\xff", b"\x28\xb5\x2f\xfd")


class RejectedError(Exception):
    """A document without text; the message is the reason."""


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

    def mail(data: bytes) -> tuple[str, dict[str, int]]:
        return mail_text(data, encodings), {}

    def plain(data: bytes) -> tuple[str, dict[str, int]]:
        text, guessed = decode(data, encodings)
        return text, {"extract.guessed_encoding": int(guessed)}

    formats = {"text": plain, "html": page_text, "pdf": pdf_text, "mail": mail}

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


def line_ends(text: str) -> str:
    """The text with "\n" at the end of every line, for "\r\n" and "\r"; other separators are text."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decode(data: bytes, encodings: tuple[str, ...] = ("utf-8",), *, markup: bool = False) -> tuple[str, bool]:
    """The characters of some bytes, and whether the encoding had to be guessed.

    In order: a byte order mark; the encodings given. If the last of them is "detect", or a page of HTML says what it is
    in (markup): UTF-16 without a mark, by where its NULs are; what the page says; the guess of resiliparse (the
    encodings of the web), and then that of charset-normalizer (also those of DOS). A guess counts only if all the bytes
    decode by it.

    Raises:
        RejectedError: "binary: ..." for NULs or many control characters, "invalid UTF-8: at byte N" or "wrong encoding: ..."
            if nothing decodes.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(name), False
            except UnicodeDecodeError:
                break
    detect = DETECT in encodings
    nul = data.find(0)
    if nul >= 0:
        text = _wide(data) if detect and nul < DETECTED_BYTES else None
        if text is None:
            raise RejectedError(f"binary: NUL at byte {nul}")
        return text, True
    controls = len(data) - len(data.translate(None, _CONTROLS))
    if data.startswith(_MAGIC) or controls > CONTROL_SHARE * len(data):
        raise RejectedError("binary: control characters")
    failed = 0
    for name in encodings:
        if name != DETECT:
            try:
                return data.decode(name), False
            except UnicodeDecodeError as error:
                failed = max(failed, error.start)
    if detect or markup:
        for name in _guesses(data, markup=markup):
            try:
                text = data.decode(name)
            except (UnicodeError, LookupError):
                continue
            if _controls_of(text) <= CONTROL_SHARE * len(text):
                return text, True
    if encodings == ("utf-8",):
        raise RejectedError(f"invalid UTF-8: at byte {failed}")
    tried = ", ".join(name for name in encodings if name != DETECT)
    raise RejectedError(f"wrong encoding: neither {tried}{' nor any that is known' if detect else ''}")


def _controls_of(text: str) -> int:
    """How many C0 and C1 controls the text has that no text file would."""
    return len(re.findall("[\x00-\x07\x0e-\x1a\x1c-\x1f\x80-\x84\x86-\x9f]", text))


def _guesses(data: bytes, *, markup: bool) -> list[str]:
    """Encodings that the bytes may be in, the likeliest first."""
    head = data[:DETECTED_BYTES]
    names = []
    try:
        from resiliparse.parse.encoding import detect_encoding
    except ImportError as error:
        raise UserError("guessing encodings needs resiliparse: pip install 'llmjax[data]'") from error
    found = detect_encoding(head, from_html_meta=markup)
    if found and found.replace("_", "-").lower() not in ("utf-8", "utf8"):
        if re.fullmatch(r"(?i)(cp|windows-)125\d|(iso-?8859|latin).*", found):
            # To a detector for the web the bytes of DOS and of the Macintosh look like those of Windows.
            found = legacy_codec(head.decode("latin-1")) or found
        names.append(found)
    try:
        from charset_normalizer import from_bytes
    except ImportError as error:
        raise UserError("guessing encodings needs charset-normalizer: pip install 'llmjax[data]'") from error
    if not names or not _decodes(data, names[0]):
        best = from_bytes(head[:16_384]).best()
        if best is not None:
            names.append(best.encoding)
    return names


def _decodes(data: bytes, name: str) -> bool:
    try:
        data.decode(name)
    except (UnicodeError, LookupError):
        return False
    return True


def _wide(data: bytes) -> str | None:
    """The text if the bytes are UTF-16 without a mark: NULs on one side of the pairs only, and no control characters."""
    head = data[: DETECTED_BYTES & ~1]
    even, odd = head[::2].count(0), head[1::2].count(0)
    few, many = sorted((even, odd))
    if len(data) % 2 or many < 0.2 * (len(head) // 2) or few > 0.01 * many:
        return None
    try:
        text = data.decode("utf-16-le" if odd > even else "utf-16-be")
    except UnicodeDecodeError:
        return None
    return None if _controls_of(text) > CONTROL_SHARE * len(text) else text


def mail_text(data: bytes, encodings: tuple[str, ...] = ("utf-8",)) -> str:
    """Subject and body of one message (RFC 5322 and MIME); attachments are dropped.

    The plain text is taken where there is one, else the visible text of the HTML part.

    Raises:
        RejectedError: "mail: no text", or "mail: ..." for what the parser cannot read.
    """
    import email
    import email.policy

    try:
        message = email.message_from_bytes(data, policy=email.policy.default)
        subject = " ".join(str(message.get("subject", "")).split())
        part = message.get_body(preferencelist=("plain", "html"))
        payload = part.get_payload(decode=True) if part is not None else b""
        kind = part.get_content_type() if part is not None else ""
        declared = part.get_content_charset() if part is not None else None
    except (RecursionError, LookupError, ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
        raise RejectedError(f"mail: broken, {type(error).__name__}") from error
    body = ""
    if isinstance(payload, bytes) and payload:
        first = (declared,) if declared and _decodes(payload, declared) else ()
        body, _ = decode(payload, (*first, *encodings), markup=kind == "text/html")
        if kind == "text/html":
            body, _ = html.make_extractor("all")(body)
    body = line_ends(body).strip("\n")
    if not body.strip():
        raise RejectedError("mail: no text")
    return f"{subject}\n\n{body}\n" if subject else f"{body}\n"
