"""Decoding: the encoding of some bytes, and whether they are text at all."""

import codecs
import functools
import re

from llmjax.errors import UserError
from llmjax.prepare.formats import RejectedError
from llmjax.prepare.formats.code_pages import legacy_codec

DETECTED_BYTES = 131_072  # a guess looks at this many bytes; all bytes must then decode without error
DETECT = "detect"
DECLARED_BYTES = 8192  # a page declares its encoding within this many bytes
CONTROL_SHARE = 0.02  # more control characters than this, or a NUL, and the document is binary
BAD_SHARE = 0.001  # a text may have this share of bytes that are no characters
SURE_CHARACTERS = 10  # this many characters of UTF-8 beyond ASCII do not come about by chance in another encoding
_BOMS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\x1b\b"))  # escapes and backspaces are in logs and manual pages
_MAGIC = (b"%PDF-", b"\x7fELF", b"\x89PNG", b"GIF8", b"PK\x03\x04", b"\x1f\x8b", b"\xff\xd8\xff", b"\x28\xb5\x2f\xfd")
_DECLARED = re.compile(
    rb"(?i)<meta\b[^<>]{0,500}?\bcharset\s{0,9}=\s{0,9}[\"']?\s{0,9}([\w.:-]{2,40})"
    rb"|<\?xml\b[^<>]{0,200}\bencoding\s{0,9}=\s{0,9}[\"']([\w.:-]{2,40})"
)
# On the web and in mail the label of an encoding means a larger encoding that contains it (WHATWG, Encoding Standard,
# section 4.2). The names are Python's. _LABELS are labels that Python does not know.
_CODECS = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "shift_jis": "cp932", "euc_kr": "cp949",
    "iso2022_jp": "iso2022_jp_ext",
}  # fmt: skip
_LABELS = {
    "iso-8859-8-i": "iso8859-8", "x-sjis": "shift_jis", "windows-31j": "shift_jis", "x-gbk": "gbk", "gb_2312": "gbk",
    "gb_2312-80": "gbk", "cn-big5": "big5", "x-x-big5": "big5", "x-euc-jp": "euc_jp", "ks_c_5601-1989": "euc_kr",
    "x-cp1250": "cp1250", "x-cp1251": "cp1251", "x-cp1252": "cp1252", "x-mac-roman": "mac_roman",
    "x-mac-cyrillic": "mac_cyrillic", "dos-874": "cp874", "windows-874": "cp874", "koi": "koi8-r", "koi8": "koi8-r",
    "unicode-1-1-utf-8": "utf-8",
}  # fmt: skip


@functools.lru_cache(maxsize=1000)
def codec_of(label: str) -> str:
    """Python's name of the encoding that a page or a message calls by a label; "" for a label that nobody knows."""
    label = label.strip(" \t\"'").lower()
    try:
        name = codecs.lookup(_LABELS.get(label, label)).name
        b"a".decode(name)
    except (LookupError, UnicodeError, ValueError, AssertionError):  # not a text encoding, or a NUL in the label
        return ""
    return _CODECS.get(name, name)


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
    for mark, name in _BOMS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(name), {}
            except UnicodeDecodeError:
                break
    detect = DETECT in encodings
    nul = data.find(0)
    if nul >= 0:
        is_wide = (detect and nul < DETECTED_BYTES) or "utf-16" in declared.lower()
        text = _wide(data) if is_wide else None
        if text is None:
            raise RejectedError(f"binary: NUL at byte {nul}")
        return text, {"extract.guessed_encoding": 1}
    if looks_binary(data):
        raise RejectedError("binary: control characters")
    given = [codecs.lookup(name).name for name in encodings if name != DETECT]
    said = _declared(data, declared, markup=markup, detect=detect)
    failed = 0
    for name in (*said, *given):
        try:
            return data.decode(name), {}
        except UnicodeError as error:
            failed = max(failed, getattr(error, "start", 0))
    if "utf-8" in (*said, *given) and (nearly := _nearly_utf8(data)):
        return nearly
    if detect or markup:
        for name in _guesses(data, markup=markup):
            try:
                text = data.decode(name)
            except (UnicodeError, LookupError):
                continue
            if _controls_of(text) <= CONTROL_SHARE * len(text):
                return text, {"extract.guessed_encoding": 1}
    for name in (*said, *given):
        text = data.decode(name, "replace")
        bad = text.count("\ufffd")
        if bad <= BAD_SHARE * len(data):
            return text, {"extract.bad_bytes": bad}
    if given == ["utf-8"] and not detect:
        raise RejectedError(f"invalid UTF-8: at byte {failed}")
    raise RejectedError(f"wrong encoding: neither {', '.join(given)}{' nor any that is known' if detect else ''}")


def looks_binary(data: bytes) -> bool:
    """Whether the bytes begin as a known kind of binary file does, or have more control characters than any text."""
    controls = len(data) - len(data.translate(None, _CONTROLS))
    return data.startswith(_MAGIC) or controls > CONTROL_SHARE * len(data)


def _declared(data: bytes, header: str, *, markup: bool, detect: bool) -> list[str]:
    """The encodings that the header and the page declare, after UTF-8 if the bytes are surely in it."""
    labels = [header]
    if markup and (found := _DECLARED.search(data, 0, DECLARED_BYTES)):
        labels.append((found[1] or found[2]).decode("ascii", "replace"))
    names = [name for name in map(codec_of, labels) if name]
    if b"\x1b$" in data and (markup or detect):  # these 7-bit bytes are UTF-8 too
        names.append("iso2022_jp_ext")
    if not names or data.isascii():
        return names
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return names
    beyond = sum(not c.isascii() for c in text[:DETECTED_BYTES])
    any_byte = len(bytes(range(128, 256)).decode(names[0], "replace")) == 128  # a code page: it decodes any bytes
    return ["utf-8", *names] if any_byte or beyond >= SURE_CHARACTERS else names


def _nearly_utf8(data: bytes) -> tuple[str, dict[str, int]] | None:
    """The text if it is UTF-8 with few bad bytes, as where a file was cut: many more characters beyond ASCII are right."""
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd") - data.count("\ufffd".encode())
    right = sum(not c.isascii() for c in text) - bad
    if bad <= max(1, BAD_SHARE * len(data)) and right >= SURE_CHARACTERS * bad:
        return text, {"extract.bad_bytes": bad}
    return None


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
