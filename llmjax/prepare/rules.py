"""The published quality rules as data: thresholds, and the characters and phrases that the rules name.

Each class is one rule set with the published values as defaults. Where a paper leaves something open (what a word is,
which marks end a sentence), the constants are those of datatrove, with which FineWeb was made, so that decisions can be
compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


def _characters(ranges: str) -> str:
    """The characters of ranges of hexadecimal code points."""
    result: list[str] = []
    for part in ranges.split():
        first, _, last = part.partition("-")
        result.extend(map(chr, range(int(first, 16), int(last or first, 16) + 1)))
    return "".join(result)


TERMINAL_MARKS = _characters(  # marks that end a sentence, in the scripts of the world; quotation marks are not among them
    "21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D6 "
    "17D9-17DA 1803 1809 1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2E2E "
    "2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52 "
    "FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 "
    "111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 "
    "11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 16E98 1BC9F "
    "1DA88"
)
SYMBOLS = TERMINAL_MARKS + _characters(  # a token made only of these is not a word
    "0-8 B-1F 22-2D 2F 3A-3E 40 5B-60 7B-9F AB B4 BB 2013-2014 2019 201C-201E 2026 2236 2501 25BA 3001 3008-300D 3010-3011 "
    "FF05 FF08-FF09 FF0C FF11 FF1A-FF1B FF5E"
)
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
LINE_ENDS_C4 = (".", "?", "!", '"', "'")
POLICY_PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


@dataclass(frozen=True)
class GopherQuality:
    """Rae et al. (2021), "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", appendix A1.1.

    Attributes:
        words: fewest and most words, those of symbols alone not counted.
        mean_word_length: least and greatest, in characters, of the same words.
        hashes, ellipses: most "#", and "..." or "…", a word.
        bullet_lines, ellipsis_lines: greatest share of lines that begin with a bullet or end in an ellipsis.
        alphabetic_words: least share of words with a letter in them.
        stop_words: fewest different words of STOP_WORDS.
    """

    words: tuple[int, int] = (50, 100_000)
    mean_word_length: tuple[float, float] = (3.0, 10.0)
    hashes: float = 0.1
    ellipses: float = 0.1
    bullet_lines: float = 0.9
    ellipsis_lines: float = 0.3
    alphabetic_words: float = 0.8
    stop_words: int = 2


@dataclass(frozen=True)
class GopherRepetition:
    """Rae et al. (2021), table A1: the greatest allowed shares.

    Attributes:
        paragraphs, lines: of paragraphs (lines) that stood before in the document.
        paragraph_characters, line_characters: of characters in them.
        top: by n, of characters in the most frequent run of n words.
        repeated: by n, of characters in runs of n words that stood before, overlaps counted once.
    """

    paragraphs: float = 0.30
    paragraph_characters: float = 0.20
    lines: float = 0.30
    line_characters: float = 0.20
    top: Mapping[int, float] = field(default_factory=lambda: {2: 0.20, 3: 0.18, 4: 0.16})
    repeated: Mapping[int, float] = field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )


@dataclass(frozen=True)
class C4:
    """Raffel et al. (2020), "Exploring the Limits of Transfer Learning", section 2.2, without its list of bad words.

    Attributes:
        end_marks: whether lines that do not end in a mark are dropped; FineWeb runs C4 without this rule.
        line_words: fewest words of a line.
        word_characters: a line with a longer word is dropped.
        sentences: fewest sentences of what is left.
        citations: whether "[1]", "[edit]" and "[citation needed]" are taken out.
        placeholder, bracket: whether a document with "lorem ipsum", or with a curly bracket, is thrown away.
        javascript, policy: whether lines with that word, or about cookies and terms of use, are dropped.
    """

    end_marks: bool = True
    line_words: int = 3
    word_characters: int = 1000
    sentences: int = 5
    citations: bool = True
    placeholder: bool = True
    bracket: bool = True
    javascript: bool = True
    policy: bool = True


@dataclass(frozen=True)
class FineWeb:
    """Penedo et al. (2024), "The FineWeb Datasets", section 3.6.

    Attributes:
        terminal_lines: least share of lines that end in a terminal mark.
        short_lines: greatest share of lines of at most `short_line` characters.
        repeated_characters: greatest share of characters in lines that stood before.
        line_ends: most line ends a word.
    """

    terminal_lines: float = 0.12
    short_lines: float = 0.67
    short_line: int = 30
    repeated_characters: float = 0.01
    line_ends: float = 0.3
