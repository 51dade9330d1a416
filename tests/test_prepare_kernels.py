"""What the compiled loops count is what plain Python counts."""

# ruff: noqa: RUF001 - quotation marks that look alike are what is tested

import collections
import random
import re

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pytest.importorskip("numba")

from llmjax.prepare import rules  # noqa: E402
from llmjax.prepare.kernels import english, minhash, statistics, windows, words  # noqa: E402

SPACY = [  # texts, and the tokens of spacy.blank("en"), version 3.8
    ("I don't know; he'll go, won't he?", "I do n't know ; he 'll go , wo n't he ?"),
    (
        "Dr. Smith's U.S. e-mail (see http://a.org/x?y=1) costs $5.50...",
        "Dr. Smith 's U.S. e - mail ( see http://a.org/x?y=1 ) costs $ 5.50 ...",
    ),
    ('well-known re-use--really? "Quoted." ‘so’', 'well - known re - use -- really ? " Quoted . " ‘ so ’'),
    ("end.Start a.b x=1 f(x) == None os.path.join(self.x)", "end . Start a.b x=1 f(x ) = = None os.path.join(self.x )"),
    ("10km 3pm 5% C++ :-) and/or $US 1,000,000 A4.", "10 km 3 pm 5 % C++ :-) and/or $ US 1,000,000 A4 ."),
    (
        "foo@bar.com cannot gonna I'm o'clock 'tis rock 'n' roll",
        "foo@bar.com can not gon na I 'm o'clock ' tis rock ' n ' roll",
    ),
    (
        "a…b … .. ... -x --flag x+y 3+4 3-4 [1] {x} <b>bold</b>",
        "a … b … .. ... -x --flag x+y 3 + 4 3 - 4 [ 1 ] { x } < b > bold</b >",
    ),
    ("naïve café's 2nd. (B.C.) ABC. it’s they’d’ve", "naïve café 's 2nd . ( B.C. ) ABC . it ’s they ’d ’ve"),
]
SAMPLES = [
    "",
    "\n",
    "  \n \n",
    "One two three. One two three. One two three.\n\nOne two three.\nYes...\n- a bullet\n• another…\r\nlast # line",
    "the be to of\n\n\nthe be to of\n\nthe be to of and\n",
    "\na\n",
    "漢字かな交じり文。漢字かな交じり文。\n漢字かな交じり文。",
    "x\u2028y\x85z\x0bw\n\u00a0 \n…",
    "and so on and so on and so on and so on and so on and so on and so on and so on and so on",
]


def column(*texts):
    return pa.array(texts, pa.large_string())


def tokens(text, kind):
    """The words that the kernel divides a text into."""
    spans = np.empty((len(text.encode()) + 2, 2), np.int64)
    if kind == "unicode":
        data, _ = words.utf8(column(text))
        hashes = np.empty(len(spans), np.uint64)
        count = words.find_words(data, 0, len(text.encode()), words.tables(), False, hashes, spans)
        return [text.encode()[a:b].decode() for a, b in spans[:count]]
    codes = np.array([ord(c) for c in text], np.int32)
    bits = np.array([english.properties()[ord(c)] for c in text], np.uint32)
    specials, parts, units = english.special_pieces()
    tables = english.word_table(specials), parts, english.word_table(units)
    count = english.english_tokens(codes, bits, len(text), *tables, spans, np.empty_like(spans))
    return [text[a:b] for a, b in spans[:count]]


def repeated(pieces):
    again = [p for i, p in enumerate(pieces) if p in pieces[:i]]
    return len(again), sum(map(len, again))


def plain_statistics(text, parts):
    """The same numbers by their definitions."""
    lines, pieces = text.splitlines(), re.split("\n+", text)
    pieces = pieces if text else []
    full = [line for line in text.split("\n") if line.strip()]
    plain = [w for w in parts if any(c not in rules.SYMBOLS for c in w)]
    paragraphs = re.split("\n{2,}", text.strip())
    result = {
        "characters": len(text),
        "words": len(parts),
        "plain_words": len(plain),
        "plain_characters": sum(map(len, plain)),
        "alphabetic_words": sum(any(c.isalpha() for c in w) for w in parts),
        "stop_words": len(set(parts) & set(rules.STOP_WORDS)),
        "hashes": text.count("#"),
        "ellipses": text.count("...") + text.count("…"),
        "lines": len(lines),
        "bullet_lines": sum(line.lstrip().startswith(("•", "-")) for line in lines),
        "ellipsis_lines": sum(line.rstrip().endswith(("...", "…")) for line in lines),
        "paragraphs": len(paragraphs),
        "pieces": len(pieces),
        "full_lines": len(full),
        "terminal_lines": sum(line.endswith(tuple(rules.TERMINAL_MARKS)) for line in full),
        "short_lines": sum(len(line) <= 30 for line in full),
        "repeated_full_characters": repeated(full)[1],
        "line_feeds": text.count("\n"),
    }
    result["repeated_paragraphs"], result["repeated_paragraph_characters"] = repeated(paragraphs)
    result["repeated_pieces"], result["repeated_piece_characters"] = repeated(pieces)
    for n in range(2, 5):
        grams = collections.Counter(" ".join(parts[i : i + n]) for i in range(len(parts) - n + 1))
        gram, count = grams.most_common(1)[0] if grams else ("", 0)
        result[f"top_{n}"] = len(gram) * count
    for n in range(5, 11):
        seen, at, total = set(), 0, 0
        while at + n <= len(parts):
            gram = tuple(parts[at : at + n])
            if gram in seen:
                total += sum(map(len, gram))
                at += n
            else:
                seen.add(gram)
                at += 1
        result[f"repeated_{n}"] = total
    return result


@pytest.mark.parametrize("kind", ["unicode", "spacy_compat"])
def test_statistics_are_those_of_plain_python(kind):
    rng = random.Random(1)
    alphabet = [
        "the", "of", "a", "a", "...", "…", "\n", "\n\n", "\r\n", " ", " ", ". ", "-", "• ", "#", "wörd", "雪", "that's",
        "(x)", "\u2029", "12",
    ]  # fmt: skip
    texts = SAMPLES + ["".join(rng.choice(alphabet) for _ in range(rng.randint(0, 250))) for _ in range(150)]
    found = statistics.statistics(column(*texts), words=kind)
    for row, text in enumerate(texts):
        expected = plain_statistics(text, tokens(text, kind))
        assert {name: found[name][row] for name in expected} == expected, repr(text)
    assert set(found) == set(expected)


@pytest.mark.parametrize(("text", "expected"), SPACY)
def test_english_words_are_those_of_spacy(text, expected):
    assert tokens(text, "spacy_compat") == expected.split()


def test_statistics_do_not_depend_on_the_batch():
    texts = [*SAMPLES, None, "word " * 3000, "a b\n" * 500]
    whole = statistics.statistics(column(*texts), words="spacy_compat")
    for row, text in enumerate(texts):
        alone = statistics.statistics(column("something else, before", text).slice(1), words="spacy_compat")
        assert {name: values[0] for name, values in alone.items()} == {
            name: values[row] for name, values in whole.items()
        }
    with pytest.raises(ValueError, match="unicode"):
        statistics.statistics(column("x"), words="latin")


def test_remembered_statistics_are_those_of_the_rows_asked_about(monkeypatch):
    texts, all_rows = column("one two", "three", "four five six"), np.arange(3)
    counted, compute = [], statistics.statistics

    def counting(texts, **kwargs):
        counted.append(len(texts))
        return compute(texts, **kwargs)

    def words(texts, rows, kind="unicode"):
        return statistics.shared_statistics(texts, rows, words=kind, short_line=30)["words"].tolist()

    monkeypatch.setattr(statistics, "statistics", counting)
    assert words(texts, all_rows[1:]) == [1, 3] and words(texts, all_rows[2:]) == [3] and counted == [2]
    assert words(texts, all_rows) == [2, 1, 3] and counted == [2, 3]
    assert words(texts.slice(1), all_rows[:2]) == [1, 3] and words(column("seven"), all_rows[:1]) == [1]
    assert words(texts, all_rows[:1], "spacy_compat") == [2] and counted == [2, 3, 2, 1, 1]


def test_pieces_on_the_list_are_their_tokens_and_short_enough_to_be_looked_up():
    (_, pieces), parts, (_, units) = english.special_pieces()
    assert len(parts) > 800 and (parts.sum(axis=1) == np.diff(pieces)).all()
    assert np.diff(pieces).max() <= english.LONGEST and np.diff(units).max() == 4


def test_of_a_very_long_text_the_beginning_counts_whole_characters_only(monkeypatch):
    text = "the word 雪雪, and the word 雪雪 again.\n" * 9
    for limit in range(20, 26):
        monkeypatch.setattr(statistics, "LONGEST_TEXT", limit)
        beginning = text.encode()[:limit].decode("utf-8", "ignore")
        for kind in ("unicode", "spacy_compat"):
            found = statistics.statistics(column("before", text), words=kind)
            alone = statistics.statistics(column(beginning), words=kind)
            assert {name: values[1] for name, values in found.items()} == {name: v[0] for name, v in alone.items()}


def test_kernels_read_no_byte_beyond_a_text():
    cut = "wörd 雪 🙂".encode()
    for stop in range(len(cut) + 1):
        hashes = [np.empty(20, np.uint64) for _ in range(2)]
        spans = np.empty((20, 2), np.int64)
        counts = [
            words.find_words(np.frombuffer(cut[:stop] + rest, np.uint8), 0, stop, words.tables(), False, h, spans)
            for rest, h in zip((b"\x80\x80\x80\x80", b"abcd"), hashes, strict=True)
        ]
        assert counts[0] == counts[1] and (hashes[0][: counts[0]] == hashes[1][: counts[0]]).all()


def test_rolling_hashes_are_of_content_alone():
    hashes = np.arange(1, 60, dtype=np.uint64) * words.MIX
    hashes[40:50] = hashes[10:20]
    out = np.empty(60, np.uint64)
    assert words.rolling(hashes, 59, 10, out) == 50
    assert out[10] == out[40] and len(np.unique(out[:50])) == 49
    assert words.rolling(hashes, 4, 10, out) == 1 and words.rolling(hashes, 0, 10, out) == 0


def test_hash_functions_are_fixed_and_different():
    multipliers, additions = minhash.hash_functions(112)
    assert (multipliers % 2 == 1).all() and len(np.unique(multipliers)) == len(np.unique(additions)) == 112
    longer, _ = minhash.hash_functions(112)
    assert (longer == multipliers).all()
    present = windows.make_filter(np.array([0, 2**64 - 1], np.uint64))
    assert present[0] == 1 and present[-1] == 128 and present.sum() == 129


def test_words_are_divided_as_the_scripts_are_written():
    def divided(text):
        return tokens(text, "unicode")

    assert divided("Don't—stop_it… “now”, naïve cafe\u0301!") == ["Don", "t", "stop_it", "now", "naïve", "cafe\u0301"]
    assert divided("東京は abcです") == ["東", "京", "は", "abc", "で", "す"]
    assert divided("ไทย ก็ดี") == ["ไ", "ท", "ย", "ก็", "ดี"]
    assert divided("soft\u00adhyphen zero\u200bwidth x\u00a0y") == ["soft\u00adhyphen", "zero", "width", "x", "y"]
    assert divided("한국어 слово") == ["한국어", "слово"]
    assert collections.Counter(divided("a 1.5 ½ x² 🙂")) == {"a": 1, "1": 1, "5": 1, "½": 1, "x²": 1}


def test_every_mark_is_a_word_where_that_is_asked_for_and_folding_is_of_choice():
    def found(text, marks=False, fold="case"):
        hashes, spans = np.empty(40, np.uint64), np.empty((40, 2), np.int64)
        data, _ = words.utf8(column(text))
        count = words.find_words(data, 0, len(text.encode()), words.tables(fold), marks, hashes, spans)
        return [text.encode()[a:b].decode() for a, b in spans[:count]], hashes[:count].tolist()

    text = "Don't\u2014STOP_it 12\u0301 x1"
    assert found(text)[0] == ["Don", "t", "STOP_it", "12\u0301", "x1"]
    assert found(text, True)[0] == ["Don", "'", "t", "\u2014", "STOP_it", "12\u0301", "x1"]
    assert found("STOP 12")[1] == found("stop 12")[1] != found("stop 77")[1]
    assert found("STOP 12", fold="case and digits")[1] == found("stop 77", fold="case and digits")[1]
    assert found("STOP", fold="nothing")[1] != found("stop", fold="nothing")[1]
