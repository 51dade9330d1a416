"""Recipes of objectives that do not read from left to right run to their end and say what they measure."""

import json

import pytest
from helpers import tiny_config

import llmjax
from llmjax import recipe


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("masked", {"model__direction": "bidirectional", "objective__whole_words": True}),
        ("span", {"model__encoder_layers": 1, "model__position": "t5"}),
    ],
)
def test_a_recipe_without_left_to_right_text_measures_its_own_predictions(tiny_sources, tmp_path, name, changes):
    c = tiny_config(tiny_sources, objective__name=name, model__vocab_size=0, **changes).lock()
    workdir = tmp_path / "run"
    results = recipe.run(c, workdir, ("prepare", "tokenizer", "train", "eval", "generate", "report"))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["heldout_loss"] < rows[3]["heldout_loss"] and 0 <= rows[-1]["heldout_accuracy"] <= 1
    assert not any(key.startswith("heldout_bits_per_byte") for key in rows[-1])
    assert results["eval/objective"] == name and "eval/bits_per_byte" not in results
    assert results["loss"] > 0 and 0 <= results["accuracy"] <= 1
    assert results["generate/prompts"] == 0
    assert (workdir / "report").is_dir()
    model = llmjax.load(workdir)
    for ask in (lambda: model.loss("some text"), lambda: model.generate(["some"])):
        with pytest.raises(ValueError, match=f"objective.name={name} does not teach it to predict text from left to"):
            ask()


@pytest.mark.usefixtures("one_device")
def test_translation_without_parallel_text_is_refused(tiny_sources, tmp_path):
    c = tiny_config(
        tiny_sources, objective__name="translation", model__languages=2, model__direction="bidirectional"
    ).lock()
    with pytest.raises(ValueError, match=r"needs parallel text, and data.sources has none: give two files"):
        recipe.run(c, tmp_path / "run", ("prepare", "tokenizer", "train"))


def test_a_vocabulary_without_room_for_special_ids_is_refused(prepared_run, tmp_path):
    from llmjax.data.tokenizer_files import load_tokenizer
    from llmjax.train.pretrain import resolve

    tokenizer = load_tokenizer(prepared_run / "tokenizer")
    c = tiny_config(objective__name="span", model__vocab_size=320)
    with pytest.raises(ValueError, match=r"model.vocab_size=320 has room for the tokenizer's 260 ids, but .* 365"):
        resolve(c, tokenizer)
    c = resolve(tiny_config(objective__name="span", model__vocab_size=0, objective__label_smoothing=0.1), tokenizer)
    assert (c.model.vocab_size, c.objective.vocab_size) == (384, 365)  # smoothed over the ids that are in use


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "masked"}, "set model.direction=bidirectional"),
        ({"name": "causal", "model__direction": "bidirectional"}, "set model.direction=causal"),
        ({"name": "permutation"}, "set model.two_stream=true"),
        ({"model__two_stream": True, "model__position": "xlnet"}, "model.two_stream is for objective.name=permutation"),
        ({"name": "multi_token"}, "set model.ahead to 2 or more"),
        ({"model__ahead": 2}, "only objective.name=multi_token trains"),
        ({"name": "translation", "model__direction": "bidirectional"}, "set model.languages to 2 or more"),
        ({"model__encoder_layers": 2}, "model.encoder_layers=2 is for objective.name=span"),
        ({"name": "prefix", "model__pattern": ("rglru", "local")}, "rglru layers only read from left to right"),
        ({"name": "unilm", "model__types": 2}, "marks its kinds of rows with 6 types"),
        ({"name": "span", "train__sequence_length": 4096}, "there are 100 sentinels"),
        ({"whole_words": True}, "objective.whole_words is for the masked"),
        ({"mask_split": (0.8, 0.1)}, "three shares that add up to 1"),
        ({"modes": (0, 0, 0, 0)}, "four weights, not all 0"),
        ({"focal": -1.0}, "objective.focal=-1.0 must be at least 0"),
        (
            {
                "name": "permutation", "model__two_stream": True, "model__position": "xlnet",
                "recurrence": 3,
            },
            "objective.recurrence=3 must divide train.sequence_length=16",
        ),
        ({"data__sources": ("a.txt|b.txt",), "data__holdout_tail_percent": 5.0}, "has pairs of lines"),
    ],
)  # fmt: skip
def test_combinations_that_make_no_sense_are_refused_with_the_reason(changes, message):
    changes = {key if "__" in key else f"objective__{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
