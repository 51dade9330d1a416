"""Instructions are checked as lm-evaluation-harness checks them, and judges count only where they give a verdict."""

import gzip
import json
import types
from pathlib import Path

import pytest
from helpers import tiny_config

from llmjax.data.tokenizer import byte_tokenizer
from llmjax.data.tokenizer_files import with_template
from llmjax.errors import UserError
from llmjax.eval import constraints, ifeval, judge, mt_bench, needle, registered
from llmjax.eval.likelihood import Likelihood
from llmjax.post import instructions

# Verdicts of lm-evaluation-harness 0.4.13 (`lm_eval.tasks.ifeval.utils.process_results`, langdetect with the seed 0).
STORED = json.loads((Path(__file__).parent / "fixtures" / "ifeval.json").read_text())
NEED_DATA = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


def rows_of(stored):
    return [
        {"key": i, "prompt": "p", "instruction_id_list": [s["name"]], "kwargs": [s["arguments"]]}
        for i, s in enumerate(stored)
    ]


@pytest.fixture
def no_data(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    constraints._sentences.cache_clear()
    yield
    constraints._sentences.cache_clear()


def test_scores_are_the_harness_s_to_the_last_digit():
    assert {s["name"] for s in STORED} == set(constraints.CHECKS)
    stored = [s for s in STORED if s["name"] not in NEED_DATA]
    found = ifeval.scores(rows_of(stored), [s["answer"] for s in stored])
    assert [item["strict"] for item in found.items] == [[s["strict"]] for s in stored]
    assert [item["loose"] for item in found.items] == [[s["loose"]] for s in stored]
    for kind in "strict", "loose":
        expected = sum(s[kind] for s in stored) / len(stored)
        assert (
            found.metrics[f"prompt_level_{kind}_acc"].value == found.metrics[f"inst_level_{kind}_acc"].value == expected
        )
    # A prompt is followed if all of its constraints are.
    both = {
        "prompt": "p",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}],
    }
    found = ifeval.scores([both], ["<<a>>, b"])
    assert found.metrics["prompt_level_strict_acc"].value == 0 and found.metrics["inst_level_strict_acc"].value == 0.5


def test_missing_data_is_named_and_is_found_in_the_folder_that_was_advised(no_data, tmp_path):
    import nltk
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    ask = {"num_sentences": 2, "relation": "at least"}
    with pytest.raises(UserError, match="give a folder with tokenizers/punkt_tab/english by --data"):
        constraints.follows("One. Two.", NEED_DATA[0], ask)
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    nltk.data.path[:] = [str(tmp_path)]  # it writes to no other place
    save_punkt_params(PunktParameters(), str(folder))
    nltk.data.path[:] = []
    constraints.find_data([tmp_path])
    assert constraints.follows("One. Two.", NEED_DATA[0], ask) and not constraints.follows("One", NEED_DATA[0], ask)
    capitals = {"capital_frequency": 2, "capital_relation": "at least"}
    assert constraints.follows("NASA and ESA.", NEED_DATA[1], capitals)
    for name, arguments, told in (
        ("no:such", {}, "is no constraint of IFEval"), (NEED_DATA[0], {"relation": "at most"}, "cannot be checked"),
        (NEED_DATA[0], {**ask, "relation": "at most"}, "neither 'less than' nor 'at least'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            constraints.follows("One.", name, arguments)


def test_prompts_for_training_and_held_out_ones_are_apart(tmp_path):
    rows = rows_of(STORED)
    rows = [{**row, "prompt": f"prompt {i // 2}"} for i, row in enumerate(rows)]  # some prompts stand twice
    source = tmp_path / "source"
    source.mkdir()
    (source / "ifeval_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held = instructions.write_prompts(source, tmp_path / "made", without=NEED_DATA)
    trained = [json.loads(line) for line in (tmp_path / "made" / "train.jsonl").read_text().splitlines()]
    kept = ifeval.find([tmp_path / "made"])
    assert (len(trained), len(kept)) == (train, held) and train > 20 and held > 20
    assert not {row["prompt"] for row in trained} & {row["prompt"] for row in kept}
    names = [{name for row in part for name in row["instruction_id_list"]} for part in (trained, kept)]
    assert set(instructions.HELD_OUT) <= names[1] - names[0] and not (names[0] | names[1]) & set(NEED_DATA)
    both = {"instruction_id_list": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, {}]}
    assert [instructions.ifeval(text, both) for text in ("<<a>>", "<<a>>, b", ",")] == [1, 0.5, 0]
    with pytest.raises(UserError, match="rows with instruction_id_list and kwargs"):
        instructions.ifeval("a", {"prompt": "b"})
    assert instructions.ifeval("a", {"prompt": "b", "instruction_id_list": None, "kwargs": None}) is None


QUESTIONS = [
    {"question_id": 1, "category": "math", "turns": ["1+1?", "and 2+2?"], "reference": ["2", "4"]},
    {"question_id": 2, "category": "writing", "turns": ["Write.", "Again."], "reference": []},
]
ANSWERS = [["2", "5"], ["a text", "another"]]


def test_answers_are_rated_beside_the_reference_and_a_missing_rating_is_no_number(tmp_path):
    asked = []

    def ask(prompts):
        asked.extend(prompts)
        return ["Good. [[9]]", "It is 4. [[2]]", "Nice [[7]]", "I cannot say"]

    found = mt_bench.score(QUESTIONS, ANSWERS, ask)
    assert "[Reference answer]\n4" in asked[1] and "5" in asked[1] and "1+1?" in asked[1]
    assert "and 2+2?" not in asked[0] and "Reference" not in asked[2]
    assert found.metrics["rating"].value == 6 and found.metrics["rating_turn_1"].value == 8
    assert found.metrics["rating"].count == 3 and "no rating on 1 of 4" in found.notes[0]
    # What a judge said is kept, and is a judge itself.
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(item) + "\n" for item in found.items if item["text"]))
    again = mt_bench.score(QUESTIONS, ANSWERS, judge.ask_of(str(tmp_path / "said.jsonl")))
    assert again.metrics == found.metrics
    with pytest.raises(UserError, match="no rating .* on any answer"):
        mt_bench.score(QUESTIONS, ANSWERS, lambda prompts: [None] * len(prompts))
    with pytest.raises(UserError, match="is no run, no module:function and no .jsonl"):
        judge.ask_of("nobody")
    assert [judge.rating(text) for text in ("[[10]]", "[[3.0]]", "[[11]]", "[[1]] or [[2]]", None)] == [
        10,
        3,
        None,
        None,
        None,
    ]


def test_a_win_is_a_win_in_both_orders():
    def ask(prompts):  # prefers the answer with "5"; of the writing always the first that is shown
        if "Two assistants" not in prompts[0]:
            return ["[[5]]"] * len(prompts)
        return ["[[A]]" if "Write." in p or p.index("5") < p.index("[Answer B]") else "[[B]]" for p in prompts]

    found = mt_bench.score(QUESTIONS, ANSWERS, ask, others={1: ["2", "4"], 2: ["x", "y"]})
    assert found.metrics["win_rate"].value == 0.75  # a win and a tie


def test_the_agreement_of_a_judge_with_people_counts_ties_half():
    rows = [
        {"input": "q", "output_1": "good", "output_2": "bad", "label": 1},
        {"input": "q", "output_1": "bad", "output_2": "good", "label": 1},
        {"input": "first", "output_1": "x", "output_2": "y", "label": 2},
        {"input": "silent", "output_1": "x", "output_2": "y", "label": 2},
    ]

    def ask(prompts):
        def of(prompt):
            if "first" in prompt:
                return "[[A]]"
            if "silent" in prompt:
                return "hm"
            return "[[A]]" if prompt.index("good") < prompt.index("bad") else "[[B]]"

        return [of(prompt) for prompt in prompts]

    found = mt_bench.agreement(rows, ask)
    values = {name: estimate.value for name, estimate in found.metrics.items()}
    assert values == {"agreement": 0.5, "consistent": pytest.approx(2 / 3), "missing": 0.25}


@pytest.mark.parametrize("name", ["mt-bench_human.json", "mt-bench_human.json.gz"])
def test_a_model_judges_pairs_that_people_judged_through_its_template(name, tmp_path):
    """The whole path of `--tasks mt_bench_human`, with a model that says what the script says."""
    rows = [
        {"input": "Which is a fruit?", "output_1": "an apple", "output_2": "a stone", "label": 1},
        {"input": "Which is a stone?", "output_1": "an apple", "output_2": "a pebble", "label": 2},
        {
            "input": "long " * 400,
            "output_1": "an apple",
            "output_2": "a stone",
            "label": 1,
        },  # longer than the model reads
        {"input": "never asked", "output_1": "a", "output_2": "b", "label": 1},
    ]
    text = json.dumps(rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    asked = []

    class Model:
        tokenizer = with_template(byte_tokenizer(), "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
        config = tiny_config(model__max_length=1500)

        def generate(self, prompts, *, temperature, max_new_tokens, **settings):
            asked.extend(self.tokenizer.decode(ids) for ids in prompts)
            assert temperature == 0 and all(len(ids) + max_new_tokens <= 1500 for ids in prompts)
            said = [
                "The apple is better. [[A]]" if p.index("an apple") < p.index("[Answer B]") else "[[B]]" for p in asked
            ]
            return [types.SimpleNamespace(text=text) for text in said[-len(prompts) :]]

    found = registered.evaluate("mt_bench_human", Model(), [tmp_path], limit=3)
    assert len(asked) == 4 and all(prompt.startswith("<user>Two assistants") for prompt in asked)
    values = {name: estimate.value for name, estimate in found.metrics.items()}
    assert values == {"agreement": 0.5, "consistent": 1.0, "missing": pytest.approx(1 / 3)}
    assert [item["choice"] for item in found.items] == [0, 0, None]
    with pytest.raises(UserError, match="give --data DIR, a folder with mt-bench_human.json"):
        registered.evaluate("mt_bench_human", Model(), [tmp_path / "none"])


def test_a_needle_stands_at_every_depth_and_length_and_is_found_by_a_model_that_copies(monkeypatch):
    seen = []

    class Model:
        tokenizer = byte_tokenizer()
        config = tiny_config(model__max_length=512)

    def copies(model, requests, *, max_length):
        assert max_length == 512
        seen.extend(requests)
        texts = [(byte_tokenizer().decode(r.context), byte_tokenizer().decode(r.continuation)) for r in requests]
        return [Likelihood(0.0 if end in context else -9.0, end in context) for context, end in texts]

    monkeypatch.setattr(needle, "score_requests", copies)
    found = needle.evaluate(Model(), (), limit=1)
    assert {name: e.value for name, e in found.metrics.items()} == dict.fromkeys(found.metrics, 1.0)
    assert {"acc_128", "acc_256", "acc_512"} <= found.metrics.keys() and len(found.items) == 15
    assert {len(r.context) + len(r.continuation) for r in seen} == {128, 256, 512}
    places = [
        byte_tokenizer().decode(r.context).index(" The secret number")
        for r in seen[-5 * needle.CHOICES :: needle.CHOICES]
    ]
    assert places == sorted(places) and places[0] < 4 and places[-1] > 350
    Model.config = tiny_config(model__max_length=64)
    with pytest.raises(UserError, match="too few for a fact and a question"):
        needle.evaluate(Model(), (), limit=1)
