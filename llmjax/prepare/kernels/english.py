"""Words nearly as spaCy's English tokenizer divides them. The published filter thresholds hold for its tokens.

Written from the description of its algorithm. A piece between white space loses punctuation at its two ends, one affix at
a time, unless a list knows the piece. The rest is an address, or is divided at hyphens, full stops before capitals, and
the like. Not reproduced: the exact ranges of letters (here `str.isalpha` and the case of Unicode), units that are not in
Latin letters, and rare emoticons. `benchmarks/quality_rules.py` measures how often decisions agree.
"""

# ruff: noqa: RUF001 - quotation marks and dashes that look alike are what this file is about
import functools
from collections.abc import Iterable

import numpy as np

from llmjax.prepare import rules
from llmjax.prepare.kernels import jit
from llmjax.prepare.kernels.words import (
    CHARACTER,
    SEED,
    TABLE_SIZE,
    Array,
    HashTable,
    Pair,
    entry,
    mix,
    new_table,
    number_of,
)

# Properties of code points, bits of a uint32.
BLANK, LINE_END, ALPHABETIC, SYMBOL, TERMINAL = 1, 2, 4, 8, 16
PREFIX, SUFFIX, ICON, LOWER, UPPER, NUMERAL, QUOTE, CURRENCY, MARKS = 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192

PUNCTUATION = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉⟦⟧\u2329\u232a"
MONEY = "$£€¥฿₽﷼₴" + "".join(map(chr, range(0x20A0, 0x20C0)))
UNITS = (
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph "
    "hPa Pa mbar mb MB kb KB gb GB tb TB T G M K %"
)
WHOLE = (  # pieces that are one token as they stand
    "'' 'Cause 'bout 'cause 'cos 'coz 'cuz 'd 'em 'll 'nuff 're 's 'S C++ ma'am Ma'am o'clock O'clock and/or w/o "
    "doin' goin' havin' lovin' nothin' nuthin' ol' somethin' Adm. Ak. Ala. Apr. Ariz. Ark. Aug. Bros. Calif. Co. "
    "Colo. Conn. Corp. D.C. Dec. Del. Dr. E.G. E.g. Feb. Fla. Ga. Gen. Gov. I.E. I.e. Ia. Id. Ill. Inc. Ind. Jan. "
    "Jr. Jul. Jun. Kan. Kans. Ky. La. Ltd. Mar. Mass. Md. Messrs. Mich. Minn. Miss. Mo. Mont. Mr. Mrs. Ms. Mt. "
    "N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. Ph.D. Prof. Rep. Rev. S.C. Sen. Sep. "
    "Sept. St. Tenn. Va. Wash. Wis. a.m. co. e.g. i.e. p.m. v.s. vs. (-8 (-: (-; (: (; (= )-: ): -_- -__- 0.0 0.o "
    "0_0 0_o 8) 8-) 8-D 8D :'( :') :'-( :'-) :( :(( :((( :() :) :)) :))) :* :-( :-(( :-((( :-) :-)) :-))) :-* :-/ "
    ":-0 :-3 :-> :-D :-O :-P :-X :-] :-o :-p :-x :-| :-} :/ :0 :1 :3 :> :D :O :P :X :] :o :o) :p :x :| :} ;) ;-) "
    ";-D ;D ;_; <.< </3 <3 <33 <333 <space> =( =) =/ =3 =D =[ =] =| >.< >.> >:( >:o @_@ ^_^ ^__^ o.O O.o o_O O_o "
    'O.O o.o O_O o_o v.v V.V [: [= ]= [-: \\n \\t \\")'
)
PRONOUNS = {
    "i": "m ma ll d ve",
    "you": "ll d re ve",
    "he": "ll d s",
    "she": "ll d s",
    "it": "ll d s",
    "we": "ll d re ve",
    "they": "ll d re ve",
}
QUESTIONS = "who what when where why how there that this these those"
NEGATED = "ai are ca could dare did does do had has have is may might must need ought sha should was were wo would"
LONGEST = 14  # characters of a piece on the list
OTHER_WORDS = "ill its hell shell shed were well whore lets cmon"  # no contractions without their apostrophe


def _contractions() -> dict[str, tuple[int, ...]]:
    """Pieces that are several tokens, with the tokens' lengths: "don't" is do + n't, "dont" do + nt, "I'll" I + 'll."""
    result: dict[str, tuple[int, ...]] = {}

    def add(*parts: str) -> None:
        for apostrophe in ("'", "’", ""):
            spelled = [part.replace("'", apostrophe) for part in parts]
            piece = "".join(spelled)
            if piece in OTHER_WORDS.split():
                continue
            for form in (piece, piece[0].upper() + piece[1:]):
                result[form] = tuple(len(part) for part in spelled)

    for pronoun, endings in PRONOUNS.items():
        for ending in endings.split():
            if ending == "ma":
                add(pronoun, "'m", "a")
                continue
            add(pronoun, "'" + ending)
            if ending in ("ll", "d"):
                add(pronoun, "'" + ending, "'ve")
    for question in QUESTIONS.split():
        for ending in ("s", "ll", "d", "re", "ve"):
            add(question, "'" + ending)
            if ending in ("ll", "d"):
                add(question, "'" + ending, "'ve")
    for verb in NEGATED.split():
        add(verb, "n't")
        add(verb, "n't", "'ve")
    for verb in ("could", "might", "must", "should", "would", "not"):
        add(verb, "'ve")
    for whole in (("can", "not"), ("gon", "na"), ("got", "ta"), ("let", "'s"), ("y'", "all"), ("c'm", "on")):
        add(*whole)
    for hour in range(1, 13):
        for half in ("am", "pm", "a.m.", "p.m."):
            result[f"{hour}{half}"] = (len(str(hour)), len(half))
    return result


@functools.cache
def special_pieces() -> tuple[Pair, np.ndarray, Pair]:
    """The pieces that a list knows, the lengths of their tokens (int64 (pieces, 3)), and units."""
    pieces: dict[str, tuple[int, ...]] = {piece: (len(piece),) for piece in WHOLE.split()}
    pieces |= {f"{letter}.": (2,) for letter in "abcdefghijklmnopqrstuvwxyz"}
    pieces |= _contractions()
    parts_P3 = np.zeros((len(pieces), 3), np.int64)
    for number, parts in enumerate(pieces.values()):
        parts_P3[number, : len(parts)] = parts
    return word_list(pieces), parts_P3, word_list(UNITS.split())


def word_list(words: Iterable[str]) -> Pair:
    """The code points (int32) of words, one after the other, and where each begins and the last ends (int64)."""
    words = list(words)
    offsets = np.cumsum([0, *map(len, words)], dtype=np.int64)
    return np.array([ord(character) for word in words for character in word], np.int32), offsets


@jit
def word_table(words: Pair) -> HashTable:
    """The hash table of a list of words, which numbers them in order; `number_of` reads it."""
    codes, offsets = words
    table = new_table(offsets.shape[0] - 1)
    for i in range(offsets.shape[0] - 1):
        value = characters_hash(codes, offsets[i], offsets[i + 1])
        entry(table[0], table[1], table[2], table[0].shape[0] - 1, 1, value, i)
    return table


@functools.cache
def properties() -> np.ndarray:
    """The bits above for every code point below TABLE_SIZE, uint32."""
    import unicodedata

    bits = np.zeros(TABLE_SIZE, np.uint32)
    for code in range(TABLE_SIZE):
        character = chr(code)
        if character.isspace():
            bits[code] |= BLANK
        elif character.isalpha():
            bits[code] |= ALPHABETIC
            # Letters without case stand on both sides of "a lower-case letter before an upper-case one".
            bits[code] |= (0 if character.isupper() else LOWER) | (0 if character.islower() else UPPER)
        elif unicodedata.category(character) == "So":
            bits[code] |= ICON | PREFIX | SUFFIX
    for characters, bit in (
        ("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", LINE_END),
        (rules.SYMBOLS, SYMBOL),
        (rules.TERMINAL_MARKS, TERMINAL),
        ("§%=—–…" + PUNCTUATION + QUOTES + MONEY, PREFIX),
        ("—–…" + PUNCTUATION + QUOTES, SUFFIX),
        ("0123456789", NUMERAL),
        (QUOTES, QUOTE),
        (MONEY, CURRENCY),
        (PUNCTUATION + "|()?:%²-+", MARKS),
    ):
        codes = np.array([ord(c) for c in characters])
        bits[codes[codes < TABLE_SIZE]] |= bit
    return bits


@jit
def characters_hash(codes: Array, start: int, stop: int) -> np.uint64:
    """A hash of codes[start:stop], case as it stands."""
    value = SEED
    for i in range(start, stop):
        value = (value ^ np.uint64(codes[i])) * CHARACTER
    return mix(value)


@jit
def _special(codes: Array, start: int, stop: int, specials: HashTable) -> int:
    """The number of a piece in the list, or -1."""
    if stop - start > LONGEST or stop <= start:
        return -1
    return number_of(specials, characters_hash(codes, start, stop))


@jit
def _prefix(codes: Array, bits: Array, start: int, stop: int) -> int:
    """How many characters at the beginning of a piece are a token of their own, 0 if none."""
    first = codes[start]
    if first == 46:  # "." alone is none, ".." and more are
        at = start
        while at < stop and codes[at] == 46:
            at += 1
        return at - start if at - start > 1 else 0
    if bits[start] & PREFIX:
        return 1
    if first == 43:  # "+", but not before a number
        return 0 if start + 1 < stop and 48 <= codes[start + 1] <= 57 else 1
    if start + 1 < stop and codes[start + 1] == 36 and (first == 65 or first == 67):  # A$ C$
        return 2
    if start + 2 < stop and first == 85 and codes[start + 1] == 83 and codes[start + 2] == 36:  # US$
        return 3
    return 0


@jit
def _suffix(codes: Array, bits: Array, start: int, stop: int, units: HashTable) -> int:
    """How many characters at the end of a piece are a token of their own, 0 if none. The longest such end counts."""
    last = codes[stop - 1]
    if last == 46:
        at = stop
        while at > start and codes[at - 1] == 46:
            at -= 1
        if stop - at > 1:
            return stop - at
        if stop - 2 < start:
            return 0
        before = bits[stop - 2]
        if before & (NUMERAL | LOWER | QUOTE | MARKS):
            return 1
        if before & UPPER and stop - 3 >= start and bits[stop - 3] & UPPER:
            return 1
        return 0
    if (last == 115 or last == 83) and stop - 2 >= start and (codes[stop - 2] == 39 or codes[stop - 2] == 0x2019):
        return 2
    if stop - 2 >= start and bits[stop - 2] & NUMERAL and (last == 43 or bits[stop - 1] & CURRENCY):
        return 1
    # A unit after a number: it has at most four characters.
    if bits[stop - 1] & (ALPHABETIC | PREFIX) or last == 0xB2 or last == 0xB3:
        for length in range(min(4, stop - start - 1), 0, -1):
            if bits[stop - length - 1] & NUMERAL and number_of(units, characters_hash(codes, stop - length, stop)) >= 0:
                return length
    return 1 if bits[stop - 1] & SUFFIX else 0


@jit
def _is_address(codes: Array, bits: Array, start: int, stop: int) -> bool:
    """Whether a piece is a URL, e-mail address or host name: labels and dots up to a lower-case ending."""
    at = start
    for i in range(start, min(stop - 2, start + 20)):  # a scheme
        if codes[i] == 58 and codes[i + 1] == 47 and codes[i + 2] == 47:
            at = i + 3
            break
    begin = at
    for i in range(begin + 1, stop):  # a user
        if codes[i] == 64:
            at = i + 1
    if _host_end(codes, bits, at, stop):
        return True
    return at != begin and _host_end(codes, bits, begin, stop)


@jit
def _host_end(codes: Array, bits: Array, start: int, stop: int) -> bool:
    """Whether codes[start:stop] is a host name, with or without port and path."""
    at, label, dots, letters, octets = start, start, 0, True, True
    while at < stop:
        code = codes[at]
        if code == 46:
            if at == label or codes[at - 1] == 95 or codes[at - 1] == 45 or codes[label] == 95 or codes[label] == 45:
                return False
            dots += 1
            label, letters = at + 1, True
        elif code == 58 or code == 47 or code == 63 or code == 35:
            break
        elif not (bits[at] & (ALPHABETIC | NUMERAL) or code == 45 or code == 95 or (code >= 0xA1 and code <= 0xFFFF)):
            return False
        else:
            letters = letters and bits[at] & LOWER != 0
            octets = octets and bits[at] & NUMERAL != 0
        at += 1
    if octets and dots == 3 and at > label:
        return True
    if not dots or not letters or at - label < 2 or at - label > 63:
        return False
    if at < stop and codes[at] == 58:
        port = at + 1
        while port < stop and bits[port] & NUMERAL:
            port += 1
        if port - at < 3 or port - at > 6:
            return False
        at = port
    return at == stop or codes[at] == 47 or codes[at] == 63 or codes[at] == 35


@jit
def _infix(codes: Array, bits: Array, at: int, start: int, stop: int) -> int:
    """How many characters from `at` on divide a piece, 0 if none."""
    code = codes[at]
    if code == 46:
        end = at
        while end < stop and codes[end] == 46:
            end += 1
        if end - at > 1:
            return end - at
    if code == 0x2026 or bits[at] & ICON:
        return 1
    if at == start or at + 1 >= stop:
        return 0
    before, after = bits[at - 1], bits[at + 1]
    is_operator = code == 43 or code == 45 or code == 42 or code == 94
    if is_operator and before & NUMERAL and (after & NUMERAL or codes[at + 1] == 45):
        return 1
    if code == 46:
        return 1 if before & (LOWER | QUOTE) and after & (UPPER | QUOTE) else 0
    if code == 44:
        return 1 if before & ALPHABETIC and after & ALPHABETIC else 0
    if before & (ALPHABETIC | NUMERAL):
        if code == 58 or code == 60 or code == 62 or code == 61 or code == 47:
            return 1 if after & ALPHABETIC else 0
        if code == 45 or code == 0x2013 or code == 0x2014 or code == 126:
            end = at + 1
            most = 3 if code == 45 else (2 if code == 0x2014 else 1)
            while end < stop and end - at < most and codes[end] == code:
                end += 1
            return end - at if end < stop and bits[end] & ALPHABETIC else 0
    return 0


@jit
def english_tokens(
    codes: Array,
    bits: Array,
    count: int,
    specials: HashTable,
    parts: Array,
    units: HashTable,
    spans: Array,
    stack: Array,
) -> int:
    """Write the first and last + 1 character of every token of a text of `count` characters. Returns their number.

    Args:
        codes, bits: int32 and uint32 (characters,), code points and their `properties`.
        specials, parts, units: of `special_pieces`, the first and the last as a `word_table`.
        spans: int64 (characters, 2), written to.  stack: int64 (characters, 2), work space.
    """
    total, at = 0, 0
    while at < count:
        if bits[at] & BLANK:
            at += 1
            continue
        start, shared, has_dot = at, np.uint32(0xFFFFFFFF), False
        while at < count and not bits[at] & BLANK:
            shared &= bits[at]
            has_dot = has_dot or codes[at] == 46
            at += 1
        stop, depth = at, 0
        known = -1
        if shared & ALPHABETIC and _special(codes, start, stop, specials) < 0:
            spans[total, 0], spans[total, 1] = start, stop  # nearly all pieces of prose
            total += 1
            continue
        while start < stop:
            known = _special(codes, start, stop, specials)
            if known >= 0:
                break
            before = _prefix(codes, bits, start, stop)
            if before and _special(codes, start + before, stop, specials) >= 0:
                spans[total, 0], spans[total, 1] = start, start + before
                total += 1
                start += before
                continue
            after = _suffix(codes, bits, start + before, stop, units) if start + before < stop else 0
            if after and _special(codes, start, stop - after, specials) >= 0:
                before = 0
            if not before and not after:
                break
            if before:
                spans[total, 0], spans[total, 1] = start, start + before
                total += 1
                start += before
            if after:
                stack[depth, 0], stack[depth, 1] = stop - after, stop
                depth += 1
                stop -= after
        if start < stop:
            if known >= 0:
                for part in range(3):
                    if parts[known, part]:
                        spans[total, 0], spans[total, 1] = start, start + parts[known, part]
                        total += 1
                        start += parts[known, part]
            elif has_dot and _is_address(codes, bits, start, stop):
                spans[total, 0], spans[total, 1] = start, stop
                total += 1
            else:
                begin, i = start, start
                while i < stop:
                    size = _infix(codes, bits, i, start, stop)
                    if size and i > begin:
                        spans[total, 0], spans[total, 1] = begin, i
                        spans[total + 1, 0], spans[total + 1, 1] = i, i + size
                        total += 2
                        begin = i + size
                    i += max(size, 1)
                if begin < stop:
                    spans[total, 0], spans[total, 1] = begin, stop
                    total += 1
        while depth:
            depth -= 1
            spans[total, 0], spans[total, 1] = stack[depth, 0], stack[depth, 1]
            total += 1
    return total
