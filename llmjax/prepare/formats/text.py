"""Characters out of bytes: which encoding some text is in, and what is no text."""

import codecs
import re

from llmjax.errors import UserError
from llmjax.prepare.formats import RejectedError
from llmjax.prepare.formats.code_pages import legacy_codec

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
    if not names or not decodes(data, names[0]):
        best = from_bytes(head[:16_384]).best()
        if best is not None:
            names.append(best.encoding)
    return names


def decodes(data: bytes, name: str) -> bool:
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
