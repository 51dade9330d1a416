"""Decoding: the encoding of some bytes, and whether they are text at all."""

import codecs
import re

from llmjax.errors import UserError
from llmjax.prepare.formats import RejectedError, charsets
from llmjax.prepare.formats.code_pages import legacy_codec

DETECTED_BYTES = 131_072  # a guess looks at this many bytes; all bytes must then decode without error
DETECT = "detect"
CONTROL_SHARE = 0.02  # more control characters than this, or a NUL, and the document is binary
BAD_SHARE = 0.001  # a text may have this share of bytes that are no characters, but always one
LEAST_PER_BAD = 100  # bytes of a text for each bad one
SURE_CHARACTERS = 10  # this many characters of UTF-8 beyond ASCII do not come about by chance in another encoding
_BOMS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\x1b\b"))  # escapes and backspaces are in logs and manual pages
_LEADING = bytes(range(0xC0, 0x100))  # the first bytes of characters of UTF-8 beyond ASCII
_MAGIC = (b"%PDF-", b"\x7fELF", b"\x89PNG", b"GIF8", b"PK\x03\x04", b"\x1f\x8b", b"\xff\xd8\xff", b"\x28\xb5\x2f\xfd")


def line_ends(text: str) -> str:
    """The text with "\n" at the end of every line, for "\r\n" and "\r"; other separators are text."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decode(
    data: bytes, encodings: tuple[str, ...] = ("utf-8",), *, declared: str = "", markup: bool = False
) -> tuple[str, dict[str, int]]:
    """The characters of some bytes, and facts: "extract.guessed_encoding" (1), "extract.bad_bytes" (their number).

    Encodings are tried in this order: that of a byte order mark; UTF-8 if many characters confirm it; the declared one;
    the given ones. For a page (markup), or if the last one given is "detect", the guess of resiliparse follows (the
    encodings of the web), then that of charset-normalizer (also those of DOS). All bytes must decode. If they do in no
    encoding, and at most one byte in a thousand is bad in a declared or given one, U+FFFD replaces it.

    Args:
        declared: by a header; a page may also declare its encoding in itself.

    Raises:
        RejectedError: "binary: ..." for NULs or many control characters, "invalid UTF-8: at byte N" or "wrong encoding: ..."
            if nothing decodes.
    """
    detect = DETECT in encodings
    said = charsets.declared(data, declared, markup=markup)
    for mark, name in _BOMS:
        if data.startswith(mark) and (found := _nearly(data[len(mark) :], name)):
            return found
    nul = data.find(0)
    if nul >= 0:
        wide = [name for name in said if name in charsets.WIDE]
        guess = _wide(data) if wide or ((detect or markup) and nul < DETECTED_BYTES) else ""
        for name in (*wide, *filter(None, [guess])):
            if found := _nearly(data, name):
                return found[0], found[1] if name in wide else {**found[1], "extract.guessed_encoding": 1}
        raise RejectedError(f"binary: NUL at byte {nul}")
    is_shifted = b"\x1b$)C" in data  # ISO-2022-KR: shift-out and shift-in are controls of every word
    if looks_binary(data.translate(None, b"\x0e\x0f") if is_shifted else data):
        raise RejectedError("binary: control characters")
    given = [codecs.lookup(name).name for name in encodings if name != DETECT]
    said = [name for name in said if name not in charsets.WIDE]  # there is no NUL, so it is not in these
    if b"\x1b$" in data and (markup or detect):  # these 7-bit bytes are UTF-8 too
        said.append("iso2022_kr" if is_shifted else "iso2022_jp_ext")
    if said and said[0] != "utf-8" and _is_utf8(data, rather_than=said[0]):
        said.insert(0, "utf-8")
    failed = 0
    for name in (*said, *given):
        try:
            return data.decode(name), {}
        except UnicodeError as error:
            failed = max(failed, getattr(error, "start", 0))
    if "utf-8" in (*said, *given) and (nearly := nearly_utf8(data)):
        return nearly
    for name in said:  # but of UTF-8 with few characters beyond ASCII a guess that explains every byte is likelier
        if name != "utf-8" and (found := _nearly(data, name)):
            return found
    if detect or markup:
        for name in _guesses(data, markup=markup):
            try:
                text = data.decode(name)
            except (UnicodeError, LookupError):
                continue
            if _controls_of(text) <= CONTROL_SHARE * len(text):
                return text, {"extract.guessed_encoding": 1}
    for name in (*said, *given):
        if found := _nearly(data, name):
            return found
    if given == ["utf-8"] and not detect:
        raise RejectedError(f"invalid UTF-8: at byte {failed}")
    raise RejectedError(f"wrong encoding: neither {', '.join(given)}{' nor any that is known' if detect else ''}")


def looks_binary(data: bytes) -> bool:
    """Whether the bytes begin as a known kind of binary file does, or have more control characters than any text."""
    controls = len(data) - len(data.translate(None, _CONTROLS))
    return data.startswith(_MAGIC) or controls > CONTROL_SHARE * len(data)


def _is_utf8(data: bytes, *, rather_than: str) -> bool:
    """Whether bytes beyond ASCII are surely UTF-8, although another encoding is declared."""
    if data.isascii():
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    any_byte = len(bytes(range(128, 256)).decode(rather_than, "replace")) == 128  # a code page: it decodes any bytes
    return any_byte or _beyond_ascii(data) >= SURE_CHARACTERS


def _beyond_ascii(data: bytes) -> int:
    """How many characters beyond ASCII are in bytes of UTF-8."""
    return len(data) - len(data.translate(None, _LEADING))


def nearly_utf8(data: bytes) -> tuple[str, dict[str, int]] | None:
    """The text if it is UTF-8 with few bad bytes, as where a file was cut: many more characters beyond ASCII are right."""
    text, facts = _nearly(data, "utf-8") or ("", {})
    bad = facts.get("extract.bad_bytes", 0)
    if text and _beyond_ascii(data) >= (SURE_CHARACTERS + 1) * bad:
        return text, facts
    return None


def _nearly(data: bytes, name: str) -> tuple[str, dict[str, int]] | None:
    """The text in an encoding, with U+FFFD for its bad bytes, and their number, if these are few."""
    facts = {}
    try:
        text = data.decode(name)
    except UnicodeError:
        text = data.decode(name, "replace")
        bad = max(1, text.count("\ufffd") - data.count("\ufffd".encode()))
        if bad > max(1, BAD_SHARE * len(data)) or bad * LEAST_PER_BAD > len(data):
            return None
        facts["extract.bad_bytes"] = bad
    return (text, facts) if _controls_of(text) <= CONTROL_SHARE * len(text) else None


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


def _wide(data: bytes) -> str:
    """The encoding if the bytes are UTF-16 without a mark, else "": NULs are on one side of the pairs only."""
    head = data[: DETECTED_BYTES & ~1]
    even, odd = head[::2].count(0), head[1::2].count(0)
    few, many = sorted((even, odd))
    if many < 0.2 * (len(head) // 2) or few > 0.01 * many:
        return ""
    return "utf-16-le" if odd > even else "utf-16-be"
