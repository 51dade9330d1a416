"""The published quality rules reject what they say, at their thresholds, with their reason."""

import json

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("numba")

from ml_collections import ConfigDict

from llmjax import config
from llmjax.prepare import documents, rules
from llmjax.prepare.steps.quality_rules import c4, fineweb, gopher_quality, gopher_repetition

STEPS = (gopher_quality, gopher_repetition, c4, fineweb)
PROSE = (
    "Of the seven houses on that hill, two have gardens to the south.",
    "My aunt would rather live by the river, where it is cool in June.",
    "They say that the old mill was sold with all of its land last year!",
    "Nobody knows who bought it, and the new owner has not been seen.",
    "Is it not odd to pay so much for a roof that lets the rain in?",
    "A carpenter came on Monday to look at the beams under the attic.",
    "He measured every one, wrote the numbers down, and shook his head.",
    "Good oak can be had from the valley, but it must dry for a decade.",
    "Until then, somebody will have to sleep with a bucket near the bed.",
    "We laughed about this at dinner, until the lamp above us went out.",
    "Outside, a storm had begun to bend the poplars along our road.",
    "In the morning most of them were still standing, to our surprise.",
)


def settings(**changes):
    return ConfigDict({"words": "unicode", "c4_end_marks": True, **changes})


def apply(make, *texts, **changes):
    step = make(settings(**changes))
    return step(documents.make_batch([{"text": text} for text in texts]))


def prose(sentences=12):
    """Text that all rules keep."""
    return "\n".join(PROSE[:sentences])


@pytest.mark.parametrize("words", ["unicode", "spacy_compat"])
def test_prose_is_kept_by_all_rules(words):
    for make in STEPS:
        batch = apply(make, prose(), words=words)
        assert batch["reason"].to_pylist() == [""], make.__name__
        assert batch["text"].to_pylist() == [prose()]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the of " * 24 + "x", "words 49"),
        ("the be of and to " * 20 + "ab " * 100, "mean word length 2.2"),
        ("the of word " * 20 + "#" * 7, "hash signs a word 0.1167"),
        ("the of word " * 20 + "… ..." * 4, "ellipses a word 0.1333"),
        ("- the of word list\n" * 19 + "the end of it", "lines with a bullet 0.95"),
        (
            "the words of this line go on to ...\n" * 4 + "the others of them do not go on\n" * 9,
            "lines ending in an ellipsis 0.3077",
        ),
        ("the of word 1234 " * 20, "words with a letter 0.75"),
        ("only words which never are counted " * 10, "different stop words 0"),
    ],
)
def test_gopher_quality_gives_the_rule_that_was_broken(text, reason):
    batch = apply(gopher_quality, text, prose())
    assert batch["reason"].to_pylist() == [f"gopher_quality: {reason}", ""]
    name, value = reason.rsplit(" ", 1)
    facts = json.loads(batch["facts"][0].as_py())
    assert facts == {f"gopher_quality.{name}": pytest.approx(float(value), rel=1e-3)}
    assert batch["facts"][1].as_py() == ""


def numbered(count, start=0):
    return [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(start, start + count)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "characters 0"),
        ("\n\n".join([*numbered(6), *["wa"] * 5]), "repeated paragraphs 0.3636"),
        ("\n\n".join([*numbered(5), *["long paragraph"] * 2]), "characters in repeated paragraphs 0.2545"),
        ("\n".join([*numbered(6), *["wa"] * 5]), "repeated lines 0.3636"),
        ("\n".join([*numbered(9), *["a longer line"] * 2]), "characters in repeated lines 0.2063"),
        (
            " ".join(word for i in range(10) for word in ("wa", "wb", *numbered(3, 10 + 3 * i))),
            "characters in the top 2-gram 0.2793",
        ),
        (" ".join(numbered(60) + numbered(30)), "characters in repeated 5-grams 0.2507"),
    ],
)
def test_gopher_repetition_gives_the_rule_that_was_broken(text, reason):
    batch = apply(gopher_repetition, text, " ".join(numbered(60)))
    assert [r[: len("gopher_repetition: ") + len(reason)] for r in batch["reason"].to_pylist()] == [
        f"gopher_repetition: {reason}",
        "",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n", "lines 0"),
        (
            "A line without an end, and long enough not to be short\n" * 9 + "One that ends in a full stop.",
            "lines ending a sentence 0.1",
        ),
        (
            "\n".join(f"Short line {i}." for i in range(9)),
            "short lines 1",
        ),
        ("The same long line, over and over, once more.\n" * 2 + prose(), "characters in repeated lines"),
        ("\n".join(f"Incomprehensibilities{i}x incomprehensibilities{i}y." for i in range(9)), "line ends a word"),
    ],
)
def test_fineweb_gives_the_rule_that_was_broken(text, reason):
    batch = apply(fineweb, text, prose())
    assert batch["reason"][0].as_py().startswith(f"fineweb: {reason}") and batch["reason"][1].as_py() == ""


def test_c4_cuts_lines_and_keeps_the_rest():
    bad = [
        "No mark at the end",
        "It goes on ...",
        "Two words.",
        "Enable JavaScript to see this page.",
        "This site uses cookies to know you.",
        "x" * 1001 + " is a long word.",
    ]
    text = "\n".join([*bad, prose(6), "As was shown.[12][citation needed] It has been edited[edit]."])
    batch = apply(c4, text)
    assert batch["reason"].to_pylist() == [""]
    assert batch["text"][0].as_py() == prose(6) + "\nAs was shown. It has been edited."
    assert json.loads(batch["facts"][0].as_py()) == {"c4.lines": len(bad)}


def test_c4_without_the_rule_of_end_marks_keeps_headings_as_the_web_config_says():
    text = "A heading without any mark\n" + prose(6)
    assert apply(c4, text, c4_end_marks=False)["text"].to_pylist() == [text]
    assert apply(c4, text)["text"].to_pylist() == [prose(6)]
    assert not config.load("configs/data/web.py").prepare.c4_end_marks


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (prose() + "\nif (x) { return the value. }.", "c4: curly bracket"),
        (prose() + "\nLorem ipsum dolor sit amet.", "c4: lorem ipsum"),
        (prose(4), "c4: sentences 4"),
        ("Here are five. Short ones here! Are there? Yes. There are.", ""),
        ("", "c4: sentences 0"),
    ],
)
def test_c4_rejects_whole_texts_and_leaves_them_as_they_were(text, reason):
    batch = apply(c4, text)
    assert batch["reason"].to_pylist() == [reason] and batch["text"].to_pylist() == [text]


@pytest.mark.parametrize("make", STEPS)
def test_rejected_rows_and_rows_without_text_are_left_alone(make):
    rows = [{"text": ""}, {"text": "", "reason": "language: xx"}, {"text": None}, {"text": prose()}]
    for selected in (rows, rows[1:3], []):
        batch = documents.make_batch(selected)
        result = make(settings())(batch)
        assert result.schema == batch.schema and result.num_rows == len(selected)
        for row, before in enumerate(selected):
            if before["text"] is None or before.get("reason"):
                assert result.slice(row, 1) == batch.slice(row, 1)
    whole = make(settings())(documents.make_batch(rows))
    for row in range(len(rows)):
        alone = make(settings())(documents.make_batch(rows[row : row + 1]))
        assert alone.slice(0, 1) == whole.slice(row, 1)


def test_the_defaults_are_the_published_thresholds():
    quality, repetition, web, lines = rules.GopherQuality(), rules.GopherRepetition(), rules.FineWeb(), rules.C4()
    assert (quality.words, quality.mean_word_length, quality.alphabetic_words) == ((50, 100_000), (3, 10), 0.8)
    assert (quality.hashes, quality.ellipses, quality.bullet_lines, quality.ellipsis_lines) == (0.1, 0.1, 0.9, 0.3)
    assert dict(repetition.top) == {2: 0.20, 3: 0.18, 4: 0.16}
    assert dict(repetition.repeated) == {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    assert (web.terminal_lines, web.short_lines, web.repeated_characters, web.line_ends) == (0.12, 0.67, 0.01, 0.3)
    assert (lines.sentences, lines.line_words, lines.word_characters) == (5, 3, 1000)
