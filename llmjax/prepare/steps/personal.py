"""Step "personal": personal data and secrets are masked by class: <EMAIL>, <PHONE>, <IP>, <CARD>, <IBAN>, <KEY>.

A number is masked only if a checksum or a distinctive form identifies it:

- cards by prefix, length and the Luhn checksum (ISO/IEC 7812), accounts by their country's form and checksum (ISO 13616);
- public internet addresses, by `ipaddress` (private, loopback, link-local and documentation ranges belong to nobody);
- telephones with a calling code by the numbering plan of its country, others by the plans of the countries of the
  document's language, or after a word such as "tel:".

Versions, dates, identifiers, decimals and code are left alone. Names and postal addresses are not masked.
"""

import functools
import ipaddress
import re
from collections.abc import Callable
from typing import Any

from llmjax.errors import UserError
from llmjax.prepare.documents import Step, add_facts, kept, replace
from llmjax.prepare.learn.lexicons import FOLDER
from llmjax.prepare.steps.spelling import is_code

try:
    import phonenumbers
    from stdnum import iban, luhn
    from stdnum.exceptions import ValidationError
except ImportError as missing:
    raise UserError("the step personal needs phonenumbers and python-stdnum: pip install 'llmjax[data]'") from missing

CLASSES = ("key", "email", "iban", "card", "ip", "phone")  # in the order of the search

# Every document with personal data matches this pattern, and few others do: an at sign, seven digits with little between
# them, three groups of an IPv6 address, or the beginning of a key.
_PREFILTER = re.compile(  # each part begins with its rarest character: looking back is cheaper than trying every place
    r"@(?<=[\w%+'&-]@)\w|\d(?:[ \u00a0().\-/\u2010\u2011\uff0d]{0,3}\d){6}|\d(?:\.\d{1,3}){3}|[23](?<!\w[23])[0-9A-Fa-f]{3}:|[A-Z]{2}\d\d[ -]?[A-Z0-9]{4}"
    r"|://[^/\s:@]+:|[\[(][aA][tT][\])]|A(?:KI|SI)A[A-Z0-9]{16}|AIza|eyJ|sk-(?:proj-|ant-|svcacct-|or-v1-|[A-Za-z0-9]{20})"
    r"|_(?:(?<=gh[pousr]_)|(?<=pat_)|(?<=live_)|(?<=test_)|(?<=hf_)|(?<=npm_))[A-Za-z0-9]{11}|xox[abeprs]-|glpat-|pypi-"
    r"|ya29\.|hooks\.slack|[sS](?:ecret|ECRET)_?(?:access|ACCESS|Access)?_?(?:key|KEY|Key)"
)


def make(settings: Any) -> Step:
    """The step. Reads settings.personal, the classes to mask: email, phone, ip, card, iban, key.

    Facts: "personal.email" and so on, the numbers masked.

    Raises:
        UserError: a class is not known.
    """
    classes = tuple(settings.personal)
    for name in classes:
        if name not in CLASSES:
            raise UserError(f"personal: {name!r} is not known; use some of {', '.join(CLASSES)}")

    def step(batch: Any) -> Any:
        texts, languages = batch["text"].to_pylist(), batch["language"].to_pylist()
        facts: dict[int, dict[str, int]] = {}
        for row in kept(batch).nonzero()[0].tolist():
            if texts[row]:
                language = re.split("[-_]", languages[row].lower())[0]
                texts[row], facts[row] = mask(texts[row], classes, language)
        return add_facts(replace(batch, text=texts), facts) if any(facts.values()) else batch

    return step


def mask(text: str, classes: tuple[str, ...] = CLASSES, language: str = "") -> tuple[str, dict[str, int]]:
    """The text with data of the classes masked, and the number of each masked, such as {"personal.email": 2}.

    Args:
        language: ISO 639 code, for the form of telephone numbers; "" if it is not known.
    """
    counts: dict[str, int] = {}
    if "key" in classes and "-----BEGIN " in text:
        text, number = _KEY_BLOCKS.subn("<KEY>", text)
        if number:
            counts["key"] = number
    parts, at = [], 0
    while found := _PREFILTER.search(text, at):  # only its lines are searched
        start, end = text.rfind("\n", at, found.start()) + 1 or at, text.find("\n", found.end())
        end = len(text) if end < 0 else end
        parts.append(text[at:start])
        line, number = text[start:end], 1
        while number:  # masking one thing may reveal another beside it
            number = 0
            for name in CLASSES:
                if name in classes:
                    line, masked = _mask_phone(line, language) if name == "phone" else _MASKERS[name](line)
                    if masked:
                        counts[name] = counts.get(name, 0) + masked
                        number += masked
        parts.append(line)
        at = end
    facts = {f"personal.{name}": number for name, number in counts.items()}
    return ("".join([*parts, text[at:]]), facts) if facts else (text, facts)


def _mask_where(
    pattern: re.Pattern[str], label: str, check: Callable[[re.Match[str]], bool], text: str
) -> tuple[str, int]:
    """The text with each match that passes the check replaced by the label, and how many were."""
    number = 0

    def put(match: re.Match[str]) -> str:
        nonlocal number
        if not check(match):
            return match[0]
        number += 1
        return label

    return pattern.sub(put, text), number


# E-mail. An address ends in a top-level domain: "x@layer.weight" is no address.
_LOCAL = r"[^\W_][\w.+%&'-]{0,63}"
_EMAIL = re.compile(
    rf"(?<![\w.+%-])(?:mailto:)?({_LOCAL})@((?:[^\W_](?:[\w-]{{0,62}}[^\W_])?\.)+)([^\W\d_]{{2,24}}|xn--[a-z0-9-]+)"
    r"(?![\w-]|\.[\w-]*\()"
)
_SPELT_EMAIL = re.compile(
    r"(?i)\b[a-z0-9][\w.+-]{0,63} ?[\[(]at[\])] ?[a-z0-9][a-z0-9-]*(?:(?: ?[\[(]dot[\])] ?|\.)[a-z0-9-]+){1,4}\b"
)
_CLONES = ("git", "hg", "svn")  # git@host:path names a service, not a person
# Domains that are also suffixes of files ("notes@v2.md"), or attributes of objects ("dot(a@b.to)").
_FILE_ENDINGS = frozenset(["md", "mov", "py", "rs", "sh", "zip"])
_ATTRIBUTE_NAMES = (
    "app as at call cash center channel data date dot fit group id in is it link map name next no now open "
    "plus read run select show so to zip"
)
_ATTRIBUTES = frozenset(_ATTRIBUTE_NAMES.split())
_OBJECTS = frozenset(["self", "cls", "this", "np", "jnp", "tf", "torch", "math"])  # names of code, not of hosts
_WRITTEN_TO = re.compile(r"(?i)(?:mailto:|[\"'<]|\b(?:e-?mail|mail|contact|write to|reach|from:|to:|cc:)[\s:]{0,3})$")


@functools.cache
def _domains() -> frozenset[str]:
    lines = (FOLDER / "tlds.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def _is_email(match: re.Match[str]) -> bool:
    local, host, domain = match[1], match[2], match[3].casefold()
    if local in _CLONES or re.match(r"\d+x\.", host) or not (domain in _domains() or domain.startswith("xn--")):
        return False  # icon@2x.app is a picture
    before = match.string[max(0, match.start() - 40) : match.start()]
    if match[0].startswith("mailto:") or _WRITTEN_TO.search(before):
        return True
    if domain in _FILE_ENDINGS and host.count(".") == 1:
        return False
    if host.partition(".")[0] in _OBJECTS:
        return False
    is_product = domain in _ATTRIBUTES or max(len(local), len(host) - 1) <= 2  # of matrices: "a@b.to", "q@k.me"
    return not (is_product and is_code(match.string))


def _mask_email(text: str) -> tuple[str, int]:
    total = 0
    if "@" in text:
        text, total = _mask_where(_EMAIL, "<EMAIL>", _is_email, text)
    if re.search(r"(?i)[\[(]at[\])]", text):
        text, number = _SPELT_EMAIL.subn("<EMAIL>", text)
        total += number
    return text, total


# Keys and tokens, each by the prefix that its issuer documents.
_KEY_BLOCKS = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:[A-Za-z0-9+/=:,\-. \s\\\"']{1,12000}?"
    r"-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|(?:\s+[A-Za-z0-9+/=]{16,120}(?=\s|\Z))+)"  # or cut off
)
_KEYS = re.compile(
    r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|gh[pousr]_[A-Za-z0-9]{30,255}\b|github_pat_\w{40,255}\b|glpat-[\w-]{20,60}|xox[abeprs]-[A-Za-z0-9-]{10,250}"
    r"|sk-(?:proj-|ant-(?:api\d\d-)?|svcacct-|or-v1-)?(?=[A-Za-z_-]*\d)(?=[\d_-]*[A-Za-z])[A-Za-z0-9_-]{20,250}"
    r"|[srp]k_(?:live|test)_[A-Za-z0-9]{16,250}\b|AIza[\w-]{35}(?![\w-])|ya29\.[\w-]{20,400}"
    r"|hf_[A-Za-z0-9]{30,60}\b|npm_[A-Za-z0-9]{36}\b|pypi-AgE[\w-]{50,400}"
    r"|eyJ[\w-]{8,4000}\.eyJ[\w-]{8,8000}\.[\w-]{8,2000})"
    r"|(?<=hooks\.slack\.com/services/)T\w{6,14}/B\w{6,14}/\w{20,30}"
)
_NAMED_SECRET = re.compile(
    r"(?i)((?:aws_?secret(?:_?access)?_?key|secret_?access_?key)[\"']?\s{0,3}[=:]\s{0,3}[\"']?)([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])"
)
_URL_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]{1,15}://[^/\s:@<>\"']{1,64}:)([^/\s@<>\"']{3,128})(?=@[\w\[])")


def _mask_key(text: str) -> tuple[str, int]:
    text, total = _KEYS.subn("<KEY>", text)
    if "ecret" in text or "ECRET" in text:
        text, number = _NAMED_SECRET.subn(r"\1<KEY>", text)
        total += number
    if "://" in text and "@" in text:
        text, number = _URL_PASSWORD.subn(r"\1<KEY>", text)
        total += number
    return text, total


# International bank account numbers. Other words may follow, so every end of a group is tried, from the last.
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ \u00a0-]?[A-Z0-9]){11,30}(?![A-Za-z0-9])", re.ASCII)
_GROUP_END = re.compile(r"(?<=[A-Z0-9])(?=[ \u00a0-]|\Z)")


def _mask_iban(text: str) -> tuple[str, int]:
    total = 0

    def put(match: re.Match[str]) -> str:
        nonlocal total
        for end in reversed([found.start() for found in _GROUP_END.finditer(match[0])]):
            if end >= 15 and _is_iban(re.sub(r"[ \u00a0-]", "", match[0][:end])):
                total += 1
                return "<IBAN>" + match[0][end:]
        return match[0]

    return _IBAN.sub(put, text), total


def _is_iban(compact: str) -> bool:
    """By the length and form of its country, and its checksum."""
    try:
        return "02" <= compact[2:4] <= "98" and bool(iban.validate(compact, check_country=False))
    except ValidationError:
        return False


# Cards
_CARD = re.compile(
    r"(?<![\w.+=/-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{4,5})(?![\w=/]|[.-]\d)"
)
_ISSUERS = re.compile(
    r"(?:4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d+|3[47]\d{13}|"
    r"(?:6011|65\d\d|64[4-9]\d)\d{12}|62\d{14,17}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11})"
)


def _card_valid(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    before, after = match.string[max(0, match.start() - 20) : match.start()], match.string[match.end() :][:2]
    if " " in match[0] and (re.search(r"(?:^|\s)\d+ $", before) or re.match(r" \d", after)):
        return False  # part of a longer row of numbers
    if not _ISSUERS.fullmatch(digits) or (digits[0] in "52" and len(digits) != 16) or len(set(digits)) < 2:
        return False
    return bool(luhn.is_valid(digits))


# Addresses of the internet
_IPV4 = re.compile(r"(?<![\w.])(?<!\w[-+])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?=[23][0-9A-Fa-f]{3}:)(?:[0-9A-Fa-f]{1,4}:{1,2}){2,7}(?:[0-9A-Fa-f]{1,4})?(?![\w:])")
_VERSIONED = re.compile(
    r"(?i)(?:version|versions|ver|v|release|rev|revision|build|firmware|section|chapter|clause|paragraph|table|figure|"
    r"appendix|release|upgrade to|oid|§|[=~<>!]=|==)[\s.:=_(\"'-]{0,3}$"
)
_ADDRESSED = re.compile(
    r"(?i)\b(?:ip|ipv4|address|host|server|dns|ping|nameserver|addr|client|gateway|from|resolver)\b"
)


def _ipv4_public(match: re.Match[str]) -> bool:
    found = match[0]
    octets = found.split(".")
    if any(len(octet) > 1 and octet[0] == "0" for octet in octets) or any(int(octet) > 255 for octet in octets):
        return False
    before = match.string[max(0, match.start() - 40) : match.start()]
    if _VERSIONED.search(before):
        return False
    doubtful = all(len(octet) == 1 for octet in octets) and len(set(octets)) > 1
    doubtful |= octets[:2] in (["1", "2"], ["1", "3"], ["2", "5"])  # object identifiers begin so
    if doubtful and not _ADDRESSED.search(before):
        return False  # 1.2.3.4 is more often a section or a version
    address = ipaddress.IPv4Address(found)
    return address.is_global and not address.is_multicast


def _ipv6_public(match: re.Match[str]) -> bool:
    try:
        return ipaddress.IPv6Address(match[0]).is_global
    except ValueError:
        return False


def _mask_ip(text: str) -> tuple[str, int]:
    text, four = _mask_where(_IPV4, "<IP>", _ipv4_public, text)
    if ":" not in text:
        return text, four
    text, six = _mask_where(_IPV6, "<IP>", _ipv6_public, text)
    return text, four + six


# Telephones: digits and what may stand between them, judged by the numbering plans of `phonenumbers`.
_NUMBER = re.compile(
    r"(?<![\w.+\-/:#=@])(?<!\w\()(?:\+|\()?\d(?:[ \u00a0().\-/\u2010\u2011\uff0d]{0,3}\d){6,16}(?![\w/]|[ .\-]\d)"
)
_NAMED = re.compile(
    r"(?i)\b(?:tele?(?:phone|fon|f)?|phone|fon|ph|mobile|mobil|mob|cell|call|fax|whatsapp|handy|télé?(?:phone)?|☎)"
    r"(?: (?:no|nr|number|us|me|at|on|at:))?([.:]{1,2}[ \u00a0]{0,2}|[ \u00a0]{1,2})$"
)
_DATE = re.compile(r"\d{4}[-./]\d\d?[-./]\d\d?|\d\d?[-./]\d\d?[-./]\d{4}")
_NOT_CALLED = re.compile(r"(?i)\b(?:isbn|issn|rfc|doi|arxiv|order|ref|id|no\.|pages?|pp\.)[\s:.#-]{0,3}$")
# Countries whose national numbers are looked for in a text of a language. Plans of eight digits without a leading 0,
# as in Denmark and Singapore, match too much else.
_REGIONS = {
    "": "US GB FR DE", "en": "US GB AU IN ZA", "de": "DE AT CH", "fr": "FR BE CH", "es": "ES MX AR CO", "pt": "BR PT",
    "it": "IT CH", "nl": "NL BE", "ru": "RU", "uk": "UA", "pl": "PL", "sv": "SE", "fi": "FI", "tr": "TR", "ja": "JP",
    "ko": "KR", "zh": "CN TW", "hi": "IN", "he": "IL", "fa": "IR", "ar": "EG SA AE", "cs": "CZ", "sk": "SK", "hu": "HU",
    "ro": "RO", "el": "GR", "id": "ID", "vi": "VN", "th": "TH",
}  # fmt: skip


# Forms that are telephones' even where the plan has not given out the number yet.
_AMERICAN = re.compile(r"(?:\+?1[ .-])?\([2-9]\d\d\) ?[2-9]\d\d[ .-]\d{4}|(?:1[-.])?[2-9]\d\d([-.])[2-9]\d\d\1\d{4}")
_FRENCH = re.compile(r"0[1-9]([ .-])\d\d(?:\1\d\d){3}")
_FORMS = {"": (_AMERICAN, _FRENCH), "en": (_AMERICAN,), "fr": (_FRENCH,)}


@functools.lru_cache(maxsize=10_000)
def _is_phone(number: str, language: str) -> bool:
    """Whether a number is a telephone's: of any country if it begins with "+" or 00, else of the language's countries."""
    regions, leniency = _REGIONS.get(language, "").split(), phonenumbers.Leniency.STRICT_GROUPING
    if number.startswith("00"):
        number = "+" + number[2:].lstrip(" -/")
    if number.startswith("+"):
        regions, leniency = ["ZZ"], phonenumbers.Leniency.POSSIBLE
    for region in regions:
        matches = phonenumbers.PhoneNumberMatcher(number, region, leniency=leniency)
        if any(match.raw_string == number for match in matches):
            return True
    return False


def _mask_phone(text: str, language: str) -> tuple[str, int]:
    def check(match: re.Match[str]) -> bool:
        number, digits = match[0], re.sub(r"\D", "", match[0])
        before = match.string[max(0, match.start() - 40) : match.start()]
        if len(digits) > 15 or len(set(digits)) < 3 or number in "01234567890123" or _DATE.match(number):
            return False
        if len(re.findall(r"\b0\d\b", number)) > 3:
            return False  # 01 02 03 04 05 counts
        if re.fullmatch(r"\+\d{1,9}|\+?\d+\.\d+", number):
            return False  # a decimal, or a number with its sign: telephones of all but small countries are longer
        named = _NAMED.search(before)
        if named and (named[1].strip() or re.search(r"[^\d ]", number)):
            return True  # "Tel.: 555 1234"
        if number.isdigit() and not named and not (language and (int(number[0]) == 0 or language == "zh")):
            return False  # digits without a separator are mostly something else
        if _NOT_CALLED.search(before) and not number.startswith("+"):
            return False
        return any(form.fullmatch(number) for form in _FORMS.get(language, ())) or _is_phone(number, language)

    return _mask_where(_NUMBER, "<PHONE>", check, text)


_MASKERS: dict[str, Callable[[str], tuple[str, int]]] = {
    "key": _mask_key,
    "email": _mask_email,
    "iban": _mask_iban,
    "card": functools.partial(_mask_where, _CARD, "<CARD>", _card_valid),
    "ip": _mask_ip,
}
