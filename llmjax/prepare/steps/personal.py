"""Step "personal": personal data and secrets are masked by class: <EMAIL>, <PHONE>, <IP>, <CARD>, <IBAN>, <KEY>.

Numbers are masked only where a checksum or a form that little else has speaks for them: cards by their prefix, length
and the Luhn checksum (ISO/IEC 7812), accounts by their country's length and the remainder 97 (ISO 13616), addresses of
the internet by `ipaddress` and only public ones (private, loopback, link-local and documentation ranges belong to
nobody), telephones with a calling code or in the form of a country (US, UK, France, Germany) or after a word such as
"tel". Versions, dates, identifiers and decimals are left alone. Names and postal addresses are not masked.
"""

import functools
import ipaddress
import re
from collections.abc import Callable
from typing import Any

from llmjax.errors import UserError
from llmjax.prepare.documents import Step, add_facts, kept, replace

CLASSES = ("key", "email", "iban", "card", "ip", "phone")  # in the order in which they are looked for

# Any document with personal data matches this, and few others do: an at sign, seven digits with little between them,
# three groups of an IPv6 address, or the beginning of a key.
_PREFILTER = re.compile(  # each part begins with its rarest character: looking back is cheaper than trying everywhere
    r"@(?<=[\w%+'&-]@)\w|\d(?:[ ().\-/]{0,3}\d){6}|\d(?:\.\d{1,3}){3}|[23](?<!\w[23])[0-9A-Fa-f]{3}:|[A-Z]{2}\d\d[ -]?[A-Z0-9]{4}"
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
        texts = batch["text"].to_pylist()
        facts: dict[int, dict[str, int]] = {}
        for row in kept(batch).nonzero()[0].tolist():
            if texts[row]:
                texts[row], facts[row] = mask(texts[row], classes)
        return add_facts(replace(batch, text=texts), facts) if any(facts.values()) else batch

    return step


def mask(text: str, classes: tuple[str, ...] = CLASSES) -> tuple[str, dict[str, int]]:
    """The text with data of the classes masked, and the number of each masked, such as {"personal.email": 2}."""
    counts: dict[str, int] = {}
    if "key" in classes and "-----BEGIN " in text:
        text, number = _KEY_BLOCKS.subn("<KEY>", text)
        if number:
            counts["key"] = number
    parts, at = [], 0
    while found := _PREFILTER.search(text, at):  # only its lines are looked at closely
        start, end = text.rfind("\n", at, found.start()) + 1 or at, text.find("\n", found.end())
        end = len(text) if end < 0 else end
        parts.append(text[at:start])
        line, number = text[start:end], 1
        while number:  # what stood beside something that is masked now may be seen for what it is
            number = 0
            for name in CLASSES:
                if name in classes:
                    line, masked = _MASKERS[name](line)
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


# E-mail. Two letters are a country; longer endings are listed, since "x@layer.weight" is no address.
_ENDINGS = [
    "com",
    "org",
    "net",
    "edu",
    "gov",
    "mil",
    "int",
    "info",
    "biz",
    "name",
    "pro",
    "aero",
    "coop",
    "museum",
    "mobi",
    "jobs",
    "travel",
    "xyz",
    "online",
    "site",
    "tech",
    "store",
    "app",
    "dev",
    "cloud",
    "blog",
    "shop",
    "live",
    "news",
    "agency",
    "studio",
    "design",
    "digital",
    "email",
    "global",
    "group",
    "health",
    "host",
    "life",
    "media",
    "network",
    "solutions",
    "space",
    "systems",
    "today",
    "tools",
    "website",
    "work",
    "world",
    "zone",
    "example",
    "invalid",
    "test",
    "arpa",
    "london",
    "berlin",
    "paris",
    "amsterdam",
    "bank",
    "club",
    "company",
    "consulting",
    "education",
    "engineering",
    "finance",
    "foundation",
    "institute",
    "international",
    "legal",
    "science",
    "software",
    "support",
    "university",
]
_LOCAL = r"[^\W_][\w.+%&'-]{0,63}"
_EMAIL = re.compile(
    rf"(?<![\w.+%-])(?:mailto:)?({_LOCAL})@((?:[^\W_](?:[\w-]{{0,62}}[^\W_])?\.)+(?:[^\W\d_]{{2}}|xn--[a-z0-9]+|"
    rf"(?i:{'|'.join(_ENDINGS)})))(?![\w-]|\.[\w-]*\()"
)
_SPELT_EMAIL = re.compile(
    r"(?i)\b[a-z0-9][\w.+-]{0,63} ?[\[(]at[\])] ?[a-z0-9][a-z0-9-]*(?:(?: ?[\[(]dot[\])] ?|\.)[a-z0-9-]+){1,4}\b"
)
_CLONES = ("git", "hg", "svn")  # git@host:path names a service, not a person


def _mask_email(text: str) -> tuple[str, int]:
    total = 0
    if "@" in text:
        text, total = _mask_where(_EMAIL, "<EMAIL>", lambda match: match[1] not in _CLONES, text)
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


# International bank account numbers: letters of the country, and how long theirs are.
_LENGTHS = dict(
    re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BI27BR29BY28CH21CR22CY28CZ24DE22DJ27DK18DO28EE20EG29ES24FI18FK18FO18FR27"
        "GB22GE22GI23GL18GR27GT28HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20LU20LV21LY25MC27MD24ME22MK19"
        "MN20MR27MT31MU30NI28NL18NO15OM23PK24PL28PS29PT25QA29RO24RS22RU33SA24SC31SD18SE24SI19SK24SM27SO23ST25SV28TL23"
        "TN24TR26UA29VA22VG24XK20YE30",
    )
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?=(?:[ \u00a0-]?[A-Z0-9]){11})", re.ASCII)


def _mask_iban(text: str) -> tuple[str, int]:
    parts, at, total = [], 0, 0
    for match in _IBAN.finditer(text):
        length = int(_LENGTHS.get(match[0][:2], 0))
        if not length or match.start() < at:
            continue
        form = re.compile(r"[A-Z0-9](?:[ \u00a0-]?[A-Z0-9]){%d}(?![A-Za-z0-9])" % (length - 1))  # noqa: UP031
        found = form.match(text, match.start())
        if found and _iban_valid(re.sub(r"[ \u00a0-]", "", found[0])):
            parts += [text[at : found.start()], "<IBAN>"]
            at, total = found.end(), total + 1
    return "".join([*parts, text[at:]]), total


def _iban_valid(compact: str) -> bool:
    if not "02" <= compact[2:4] <= "98":
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


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
    doubled = sum(sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0


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


# Telephones
_CODES = (
    r"(?:1|7|20|27|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-69]\d|3[578]\d|42[013]|50\d|59\d|67\d|68\d|69\d|"
    r"85[0256]|88[06]|9[679]\d)"
)
_PHONE = re.compile(
    r"(?<![\w.+\-/:#=])(?:"
    rf"\+{_CODES}[ .\-/]?(?:\(0?\d{{0,4}}\)[ .\-/]?)?\d(?:[ .\-/]?\d){{6,11}}"  # with the calling code
    rf"|00{_CODES}[ \-/]\(?\d(?:\)?[ \-/]?\(?\d){{6,11}}"
    r"|(?:\+?1[ .-])?\([2-9]\d\d\) ?[2-9]\d\d[ .-]\d{4}"  # North America, the code in brackets
    r"|(?:1[-.])?[2-9]\d\d([-.])[2-9]\d\d\1\d{4}"
    r"|0\d{2} \d{4} \d{4}|0\d{3} \d{3} \d{4}|07\d{3} \d{6}|0\d{4} \d{3} \d{3}|\(0\d{2,4}\) ?\d{3,4} ?\d{3,4}"  # United Kingdom
    r"|0[1-9](?:([ .-])\d\d)(?:\2\d\d){3}"  # France
    r"|0[1-9]\d{1,4}[ ]?/[ ]?\d{3,4}[ -]?\d{2,5}|01[5-7]\d[ -]\d{7,8}|0[1-9]\d{1,3}-\d{6,8}"  # Germany
    r")(?![\w/]|[.\-]\d| \d{2,})"
)
_NAMED_PHONE = re.compile(
    r"(?i)\b((?:tele?(?:phone|fon|f)?|phone|fon|ph|mobile|mobil|mob|cell|call|fax|whatsapp|handy|télé?(?:phone)?|☎)"
    r"(?: (?:no|nr|number|us|me|at|on|at:))?[.:]{0,2}[ \u00a0]{0,2})(\+?\(?\d(?:[ .()\-/]{0,2}\d){6,14})(?![\w/]|[.\-]\d)"
)


def _phone_plausible(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    if not 8 <= len(digits) <= 15 or len(set(digits)) < 3:
        return False
    if re.fullmatch(r"\+\d{1,9}", match[0]):
        return False  # too short for all but small countries: a number with its sign
    if re.match(r"\+?\d{4}-\d\d-\d\d", match[0]):
        return False  # a date
    if re.fullmatch(r"\+\d{1,3}\.\d+", match[0]):
        return False  # a number with its sign
    return len(re.findall(r"\b0\d\b", match[0])) < 4  # 01 02 03 04 05 counts


def _mask_phone(text: str) -> tuple[str, int]:
    text, number = _mask_where(_PHONE, "<PHONE>", _phone_plausible, text)
    text, named = _NAMED_PHONE.subn(r"\1<PHONE>", text)
    return text, number + named


_MASKERS: dict[str, Callable[[str], tuple[str, int]]] = {
    "key": _mask_key,
    "email": _mask_email,
    "iban": _mask_iban,
    "card": functools.partial(_mask_where, _CARD, "<CARD>", _card_valid),
    "ip": _mask_ip,
    "phone": _mask_phone,
}
