"""Near-duplicates, repeated lines, repeated runs of tokens, and leaked benchmark questions."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("numba")

from llmjax.prepare import decontaminate, engine  # noqa: E402
from llmjax.prepare.dedup import corpus_steps, cutting, near, passages, text_hashes  # noqa: E402


def column(*texts):
    return pa.array(texts, pa.large_string())


def random_words(rng, count, vocabulary=5000):
    return [
        f"w{'abcdefghij'[i % 10]}{chr(97 + i // 10 % 26)}{chr(97 + i // 260)}"
        for i in rng.integers(0, vocabulary, count)
    ]


def set_jaccard(a, b, n=5):
    """The definition: words of letters alone, sets of runs of n."""
    sets = [{tuple(w[i : i + n]) for i in range(max(1, len(w) - n + 1))} for w in (a.split(), b.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(rng, words, changes):
    words = list(words)
    for at in rng.choice(len(words), changes, replace=False):
        words[at] = f"changed{'abcdefghij'[at % 10] * (1 + at // 10 % 20)}{at % 7 * 'z'}"
    return words


@pytest.mark.parametrize(("length", "changes"), [(40, 1), (60, 2), (300, 10), (300, 15), (1200, 40)])
def test_band_keys_meet_as_often_as_theory_says(length, changes):
    rng = np.random.default_rng(length + changes)
    pairs = 1500
    first = [random_words(rng, length) for _ in range(pairs)]
    texts = [" ".join(w) for w in first]
    others = [" ".join(edited(rng, w, changes)) for w in first]
    keys, counts = text_hashes.near_keys(column(*texts, *others), bands=14, rows=8, words=5)
    met = np.mean(np.any(keys[:pairs] == keys[pairs:], axis=1))
    expected = np.mean([1 - (1 - set_jaccard(a, b) ** 8) ** 14 for a, b in zip(texts, others, strict=True)])
    assert (counts == length).all()
    assert abs(met - expected) < 0.02 + 2 * np.sqrt(expected * (1 - expected) / pairs)


def test_exact_jaccard_is_that_of_the_sets_of_word_runs():
    rng = np.random.default_rng(3)
    a = [random_words(rng, int(n), 50) for n in rng.integers(1, 200, 100)]
    b = [edited(rng, w, min(len(w), 3)) for w in a]
    texts = column(*[" ".join(w) for w in a], *[" ".join(w) for w in b])
    lists = near.shingles(texts, words=5)
    found = near.jaccard_of_pairs(np.arange(100), np.arange(100, 200), np.arange(200), lists)
    expected = [set_jaccard(texts[i].as_py(), texts[i + 100].as_py()) for i in range(100)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    for row in lists.to_pylist():
        assert row == sorted(set(row))


def test_keys_do_not_depend_on_the_batch_nor_on_case_digits_and_punctuation():
    texts = [
        "One fish, two fish: 12 red fish.",
        "Ünïcode straße — ähnlich “gleich” здесь",
        "",
        None,
        "雪国のトンネルを抜けると",
        "a b",
    ]
    keys, counts = text_hashes.near_keys(column(*texts))
    for i, text in enumerate(texts):
        one, count = text_hashes.near_keys(column("padding text", text).slice(1))
        assert (one[0] == keys[i]).all() and count[0] == counts[i]
    assert counts.tolist() == [7, 5, 0, 0, 12, 2]
    same, _ = text_hashes.near_keys(column("one FISH two fish 99 red — fish", "ÜNÏCODE straße; ähnlich gleich ЗДЕСЬ"))
    assert (same == keys[:2]).all()
    assert len(np.unique(keys[[0, 1, 4, 5]])) == 4 * 14


def selected(folder, sql, **columns):
    """The sorted rows that a query of the steps selects from keys in two files."""
    table, half = pa.table(columns), len(next(iter(columns.values()))) // 2
    paths = [folder / "0.parquet", folder / "1.parquet"]
    for path, rows in zip(paths, (table.slice(half), table.slice(0, half)), strict=True):
        pq.write_table(rows, path)
    (folder / "out.parquet").unlink(missing_ok=True)
    found = engine.Local(1, 10**9, folder / "spill").query(sql, keys=paths, out=folder / "out.parquet")
    return sorted(tuple(row.values()) for row in found.to_pylist())


def test_pairs_lead_from_the_first_of_a_key_and_along_it_and_each_is_there_once(tmp_path):
    keys, ranks = [1, 1, 1, 2, 3, 3, 4, 4, 5, 5], [9, 5, 7, 5, 7, 5, 9, 7, 8, 8]
    assert selected(tmp_path, near.PAIRS_OF_BANDS, key=keys, rank=ranks) == [(5, 7), (5, 9), (7, 9)]
    heavy = selected(tmp_path, near.PAIRS_OF_BANDS, key=np.zeros(5000, np.int64), rank=np.arange(5000))
    assert len(heavy) == 4999 + 4998
    rng = np.random.default_rng(0)
    keys, ranks = rng.integers(-9, 9, 300), rng.integers(0, 100, 300)
    groups = [sorted(ranks[keys == key].tolist()) for key in np.unique(keys)]
    expected = {(rows[0], row) for rows in groups for row in rows} | {
        pair for rows in groups for pair in pairwise(rows)
    }
    assert selected(tmp_path, near.PAIRS_OF_BANDS, key=keys, rank=ranks) == sorted(
        pair for pair in expected if pair[0] < pair[1]
    )


def test_the_first_of_equal_documents_units_and_windows_is_not_selected(tmp_path):
    ids = [b"b", b"a", b"b", b"c", b"b"]
    equal = selected(tmp_path, corpus_steps.ALL_BUT_FIRST, id=ids, ordinal=[7, 3, 2, 1, 9])
    assert equal == [(7, 2), (9, 2)]
    places = {"ordinal": [2, 1, 1, 3, 2], "start": [0, 9, 4, 0, 5]}
    units = selected(tmp_path, passages.ALL_BUT_FIRST_UNIT, high=[1] * 5, low=[1, 1, 1, 2, 2], stop=[1] * 5, **places)
    assert units == [(1, 9, 1), (2, 0, 1), (3, 0, 1)]
    assert selected(tmp_path, passages.ALL_BUT_FIRST_WINDOW, key=[1, 1, 1, 2, 2], **places) == [(1, 9), (2, 0), (3, 0)]
    assert selected(tmp_path, passages.REPEATED_ANCHORS, key=[5, -1, 5, 5, 2, -1]) == [(-1,), (5,)]


def test_texts_that_differ_in_numbers_alone_meet_in_the_bands_and_are_told_apart():
    sums = column(*(f"What is {n} plus {n + 300}? It is {2 * n + 300}." for n in range(100, 200)))
    keys, _ = text_hashes.near_keys(sums)
    assert (keys == keys[0]).all()
    assert near.jaccard_of_pairs([0], [1], np.arange(100), near.shingles(sums)) < 0.5


def test_of_a_chain_both_ends_stay_where_they_are_unlike():
    table = near.components([1, 2], [2, 3], [0.8, 0.8], [0, 1, 2, 3, 4], threshold=0.7)
    assert table["kept"].to_pylist() == [True, True, False, True, True]
    assert table["root"].to_pylist() == [0, 1, 1, 1, 4]
    assert table["of"].to_pylist() == [0, 1, 1, 3, 4]
    assert near.open_pairs([1, 2], [2, 3], [0.8, 0.8], table, threshold=0.7) == (np.array([1]), np.array([3]))
    again = near.components([1, 2, 1], [2, 3, 3], [0.8, 0.8, 0.75], threshold=0.7)
    assert again["kept"].to_pylist() == [True, False, False] and again["of"].to_pylist() == [1, 1, 1]
    assert len(near.open_pairs([1, 2, 1], [2, 3, 3], [0.8, 0.8, 0.4], table, threshold=0.7)[0]) == 0


def test_the_keep_rule_is_greedy_over_every_graph():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.integers(0, 30, 40), rng.integers(0, 30, 40)
        jaccard = {}
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            jaccard.setdefault((min(x, y), max(x, y)), round(float(rng.random()), 3))
        values = [jaccard[min(x, y), max(x, y)] for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        table = near.components(a, b, values, np.arange(30), threshold=0.5).to_pydict()
        kept = set()
        for node in range(30):
            alike = [k for k in kept if jaccard.get((k, node), 0) >= 0.5]
            if not alike:
                kept.add(node)
            else:
                assert table["jaccard"][node] == max(jaccard[k, node] for k in alike)
                assert table["of"][node] in alike
        assert {n for n in range(30) if table["kept"][n]} == kept


def test_lines_and_paragraphs_are_found_trimmed_and_hashed_by_content():
    texts = column(
        "  One two three four.  \nshort\n\nOne two three four.\r\nfive six seven eight", "x", "", "One two three four."
    )
    rows, starts, stops, hashes = text_hashes.unit_keys(texts, "line")
    found = [
        (r, texts[r].as_py().encode()[a:b].decode())
        for r, a, b in zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True)
    ]
    assert found == [
        (0, "One two three four."),
        (0, "One two three four."),
        (0, "five six seven eight"),
        (3, "One two three four."),
    ]
    assert len(np.unique(hashes, axis=0)) == 2 and (hashes[0] == hashes[3]).all()
    rows, starts, stops, _ = text_hashes.unit_keys(column("a b c d\n  e\n \t\nf g h i\n\n\n"), "paragraph")
    assert starts.tolist() == [0, 15] and stops.tolist() == [11, 22]
    with pytest.raises(ValueError, match="line"):
        text_hashes.unit_keys(texts, "sentence")


@pytest.mark.parametrize(
    ("text", "cut", "left"),
    [
        ("a\nb\nc\n", ["b"], "a\nc\n"),
        ("a\n\nbb\n\nc", ["bb"], "a\n\nc"),
        ("one two three", ["two"], "one three"),
        ("one two three", ["one", "two"], "three"),
        ("x = 1\n    y = 2\n    z = 3\n", ["y = 2"], "x = 1\n    z = 3\n"),
        ("a\nb\nc\nd\n", ["b", "c"], "a\nd\n"),
        ("onetwo", ["one"], "two"),
        ("雪国の長い", ["国の"], "雪長い"),
        ("all", ["all"], ""),
    ],
)
def test_removed_spans_leave_the_white_space_that_was_there(text, cut, left):
    spans = [(text.encode().index(c.encode()), text.encode().index(c.encode()) + len(c.encode())) for c in cut]
    texts = column("before", text, "after")
    result = cutting.remove_spans(texts, [1] * len(spans), [a for a, _ in spans], [b for _, b in spans])
    assert result.to_pylist() == ["before", left, "after"]


def brute_force_repeats(documents, length):
    """(document, token) of all tokens within a window that has an equal one earlier."""
    seen, covered = set(), set()
    for d, tokens in enumerate(documents):
        for i in range(len(tokens) - length + 1):
            window = tuple(tokens[i : i + length])
            if window in seen:
                covered.update((d, j) for j in range(i, i + length))
            seen.add(window)
    return covered


def found_repeats(texts, length):
    """The same through the groupings, written out here in numpy."""
    rows, positions, hashes = text_hashes.anchors(texts, tokens=length)
    assert len(set(zip(rows.tolist(), positions.tolist(), strict=True))) == len(rows)
    values, counts = np.unique(hashes, return_counts=True)
    rows, starts, keys = text_hashes.window_keys(texts, tokens=length, repeated=values[counts > 1])
    order = np.lexsort((starts, rows, keys))
    later = order[1:][keys[order][1:] == keys[order][:-1]]
    return passages.spans_of(texts, rows[later], starts[later], tokens=length)


@pytest.mark.parametrize("seed", range(6))
def test_repeated_runs_are_those_of_brute_force(seed):
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abcdefghijklmnop"
    documents = [[rng.choice(letters) for _ in range(rng.randint(0, 120))] for _ in range(30)]
    for _ in range(12):  # copies, periods and overlaps
        source = rng.choice(documents)
        at = rng.randint(0, max(0, len(source) - 1))
        rng.choice(documents).extend(source[at : at + rng.randint(5, 40)] * rng.randint(1, 4))
    texts = column(*[" ".join(d) for d in documents])
    rows, starts, stops = found_repeats(texts, 12)
    covered = {
        (r, i // 2)
        for r, a, b in zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True)
        for i in range(a, b, 2)
    }
    assert covered == brute_force_repeats(documents, 12)


def test_of_repeated_runs_the_first_stays_whatever_the_white_space():
    passage = " ".join(f"word{i}, and" for i in range(20))
    texts = column(f"Once. {passage} End.", f"Other start\n{passage.replace(' ', chr(10))} other end", "Nothing here")
    rows, starts, stops = found_repeats(texts, 50)
    assert rows.tolist() == [1]
    assert cutting.remove_spans(texts, rows, starts, stops).to_pylist() == [
        texts[0].as_py(),
        "Other start\nother end",
        "Nothing here",
    ]
    with pytest.raises(ValueError, match="at least 8"):
        text_hashes.anchors(texts, tokens=5)
    with pytest.raises(ValueError, match="changed"):
        passages.spans_of(texts, [2], [0], tokens=50)


BENCHMARKS = {
    "arc": {
        "id": "Mercury_7",
        "question": "An astronomer observes that a planet rotates faster after a meteorite impact. Which is the most likely effect of this?",
        "choices": {"text": ["It will stop.", "Planetary days will become shorter."], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "hellaswag": {
        "ind": 4,
        "ctx": "A lady walks to a barbell. the lady",
        "endings": ["swings and lands.", "stands and lifts the weight over her head."],
        "label": "1",
    },
    "mmlu": {
        "question": "Which of these is a prime number?",
        "choices": ["4", "91 because seven times thirteen is that", "97"],
        "answer": 2,
    },
    "truthfulqa": {
        "question": "What happens if you eat watermelon seeds today?",
        "mc1_targets": {"choices": ["You grow melons", "They pass through you"], "labels": [0, 1]},
    },
    "gsm8k": {
        "question": "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?",
        "answer": "It takes 2/2=1 bolt of white fiber so 3 bolts",
    },
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": "def close(numbers):\n    '''Are any two of the numbers in the list closer to each other than threshold?'''\n",
        "canonical_solution": "    return False\n",
        "test": "x",
    },
}


@pytest.fixture
def benchmark_index(tmp_path):
    benchmarks = {}
    for name, row in BENCHMARKS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n\n")
        benchmarks[name] = decontaminate.read_benchmark(tmp_path / f"{name}.jsonl")
    return decontaminate.index(benchmarks)


def test_the_formats_of_the_harness_give_question_and_right_answer(tmp_path):
    found = {}
    for name, row in BENCHMARKS.items():
        (tmp_path / "file.jsonl").write_text(json.dumps(row))
        (item,) = decontaminate.read_benchmark(tmp_path / "file.jsonl")
        found[name] = (item.id, item.fields["question"], item.fields.get("answer"))
    assert found["arc"] == ("Mercury_7", BENCHMARKS["arc"]["question"], "Planetary days will become shorter.")
    assert found["hellaswag"] == ("4", BENCHMARKS["hellaswag"]["ctx"], "stands and lifts the weight over her head.")
    assert found["mmlu"][2] == "97" and found["truthfulqa"][2] == "They pass through you"
    assert found["gsm8k"][0] == "1" and found["gsm8k"][2].startswith("It takes 2/2")
    assert found["humaneval"][0] == "HumanEval/0" and found["humaneval"][2] == "    return False\n"
    for bad in ("[1, 2", '{"a": 3}', ""):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(ValueError, match=r"bad.jsonl"):
            decontaminate.read_benchmark(tmp_path / "bad.jsonl")


def test_leaks_are_found_whatever_case_and_punctuation_and_their_extent_is_told(benchmark_index):
    arc = BENCHMARKS["arc"]["question"]
    half = " ".join(arc.split()[:15])
    texts = column(
        "A clean text about planets that rotate, and of meteorites which fall on some of them each year.",
        f"Some text before. {arc.upper().replace('.', ' --')} And after.",
        f"{half} more slowly than before the storm",
        BENCHMARKS["hellaswag"]["ctx"] + " " + BENCHMARKS["hellaswag"]["endings"][1],
        "What happens if you eat watermelon seeds today? Nothing much.",
        "It takes: 2/2=1 bolt of white fiber, so 3 bolts.",
    )
    table = decontaminate.overlaps(texts, benchmark_index)
    rows = {(r["row"], r["benchmark"]): r for r in table.to_pylist()}
    assert set(rows) == {(1, "arc"), (2, "arc"), (3, "hellaswag"), (4, "truthfulqa"), (5, "gsm8k")}
    whole = rows[1, "arc"]
    assert (
        whole["share"] == 1 and whole["words"] == 20 and whole["field"] == "question" and whole["item"] == "Mercury_7"
    )
    assert whole["text"].startswith("AN ASTRONOMER") and whole["text"].endswith("THIS")
    assert whole["characters"] == len(arc.replace(".", "").replace("?", ""))
    common = "an astronomer observes that a planet rotates faster after a meteorite impact which is the"
    # The next words, most and more, differ at once after "mo".
    assert rows[2, "arc"]["characters"] == len(common + " mo") and rows[2, "arc"]["words"] == 15
    assert rows[3, "hellaswag"]["field"] == "question and answer"
    assert decontaminate.leaked(table).tolist() == [1, 2, 3, 4]  # of an answer alone, 100 characters are asked for
    assert decontaminate.leaked(table, characters=20).tolist() == [1, 2, 3, 4, 5]


def test_an_edited_question_is_still_found_and_half_a_proverb_is_not(benchmark_index):
    words = BENCHMARKS["arc"]["question"].split()
    words[9] = "spins"  # the longest run has 10 words
    texts = column("Before it: " + " ".join(words), " ".join(words[:9]) + " and so on")
    table = decontaminate.overlaps(texts, benchmark_index)
    assert [(r["row"], r["words"], r["run"]) for r in table.to_pylist()] == [(0, 19, 10)]
    assert decontaminate.leaked(table).tolist() == [0]


def test_longest_common_text_is_that_of_brute_force(benchmark_index):
    rng = random.Random(5)
    words = BENCHMARKS["arc"]["question"].split()
    plain = " ".join(kernel_words(" ".join(words)))
    for _ in range(30):
        a = rng.randint(0, 6)
        b = rng.randint(a + 13, 20)
        text = " ".join(["Planet", "stronger", *words[a:b], "likewise", "and", "so"])
        (row,) = decontaminate.overlaps(column(text), benchmark_index).to_pylist()
        other = " ".join(kernel_words(text))
        longest = max(n for i in range(len(plain)) for n in range(1, len(plain) - i + 1) if plain[i : i + n] in other)
        assert row["characters"] == longest


def kernel_words(text):
    return "".join(c if c.isalnum() else " " for c in text.casefold()).split()


def test_what_all_items_of_a_benchmark_share_is_no_leak():
    instruction = "Read the following question with care and then choose the one best answer from the list."
    items = [
        decontaminate.Item(str(i), {"question": f"{instruction} Why number{chr(97 + i) * 3} and what of it?"})
        for i in range(6)
    ]
    few, quiz = (decontaminate.index({"quiz": selected}) for selected in (items[:2], items))
    assert decontaminate.overlaps(column(instruction), few).num_rows == 2
    assert decontaminate.overlaps(column(instruction), quiz).num_rows == 0
    assert quiz.left_out == {"quiz": 0}
    assert decontaminate.index({"a": [decontaminate.Item("1", {"question": "Too short"})]}).left_out == {"a": 1}
    with pytest.raises(ValueError, match="at least 8"):
        decontaminate.index({}, words=5)
