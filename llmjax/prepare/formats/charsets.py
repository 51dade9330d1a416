"""The labels by which pages, headers and messages declare encodings, and Python's names for these encodings."""

import codecs
import functools
import re

DECLARED_BYTES = 8192  # a page declares its encoding within this many bytes
_DECLARED = re.compile(
    rb"(?i)<meta\b[^<>]{0,500}?\bcharset\s{0,9}=\s{0,9}[\"']?\s{0,9}([\w.:-]{2,40})"
    rb"|<\?xml\b[^<>]{0,200}\bencoding\s{0,9}=\s{0,9}[\"']([\w.:-]{2,40})"
)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
# Labels of WHATWG's Encoding Standard, section 4.2, and usual misspellings that Python does not know.
_PAGE = re.compile(r"(?:x-)?(?:cp|ibm|dos|win(?:dows)?)[-_ ]?(\d{3,4})")
_ISO = re.compile(r"(?:cs)?iso[-_ ]?8859[-_ ]?(\d{1,2})(?:[-_ ]?[ei])?")
_LABELS = {
    "chinese": "gbk", "cn-big5": "big5", "csgb2312": "gbk", "cseuckr": "euc_kr", "cseucpkdfmtjapanese": "euc_jp",
    "csisolatin9": "iso8859-15", "csksc56011987": "euc_kr", "csmacintosh": "mac_roman", "csunicode": "utf-16-le",
    "csunicode11": "utf-16-le", "gb_2312": "gbk", "gb_2312-80": "gbk", "hz-gb-2312": "hz", "iso-10646-ucs-2": "utf-16-le",
    "iso-ir-149": "euc_kr", "koi": "koi8-r", "koi8": "koi8-r", "koi8-ru": "koi8-u", "ks_c_5601-1989": "euc_kr",
    "ksc_5601": "euc_kr", "logical": "iso8859-8", "mac": "mac_roman", "sun_eu_greek": "iso8859-7", "ucs-2": "utf-16-le",
    "unicode": "utf-16-le", "unicode-1-1-utf-8": "utf-8", "unicode11utf8": "utf-8", "unicode20utf8": "utf-8",
    "unicodefeff": "utf-16-le", "unicodefffe": "utf-16-be", "utf-16": "utf-16-le", "utf8mb4": "utf-8",
    "visual": "iso8859-8", "windows-31j": "shift_jis", "x-euc-jp": "euc_jp", "x-gbk": "gbk", "x-mac-cyrillic": "mac_cyrillic",
    "x-mac-roman": "mac_roman", "x-mac-ukrainian": "mac_cyrillic", "x-sjis": "shift_jis", "x-unicode20utf8": "utf-8",
    "x-user-defined": "cp1252", "x-x-big5": "big5",
}  # fmt: skip
# On the web and in mail the label of an encoding means a larger encoding that contains it (section 4.2).
_LARGER = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "shift_jis": "cp932", "euc_kr": "cp949",
    "iso2022_jp": "iso2022_jp_ext",
}  # fmt: skip
_NO_CHARSETS = ("idna", "punycode", "unicode-escape", "raw-unicode-escape")  # Python's, for other purposes
WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")


@functools.lru_cache(maxsize=1000)
def codec_of(label: str) -> str:
    """Python's name of the encoding that a page or a message calls by a label; "" for a label that nobody knows.

    An encoding in which "a" is not the byte of ASCII is one of WIDE, or not known.
    """
    label = label.strip(" \t\r\n\f\"';").lower()
    if match := _ISO.fullmatch(label):
        label = f"iso8859-{match[1]}"
    elif match := _PAGE.fullmatch(label):
        label = f"cp{match[1]}"
    try:
        name = codecs.lookup(_LABELS.get(label, label)).name
        if name not in WIDE and b"a-\n".decode(name) != "a-\n":
            return ""
    except (LookupError, UnicodeError, ValueError, AssertionError):  # not a text encoding, or a NUL in the label
        return ""
    return "" if name in _NO_CHARSETS else _LARGER.get(name, name)


def declared(data: bytes, header: str = "", *, markup: bool = False) -> list[str]:
    """The known encodings that a header, and then a page in its first bytes, declare."""
    labels = [header]
    if markup:
        head = _COMMENT.sub(b"", data[:DECLARED_BYTES])
        if found := _DECLARED.search(head):
            labels.append((found[1] or found[2]).decode("ascii", "replace"))
    return [name for name in map(codec_of, labels) if name]
