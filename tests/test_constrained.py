"""Texts of a given form are valid, whatever the model and the tokenizer."""

import json
import re

import pytest
from networks import make, settings

from llmjax.data.hf_tokenizer import load
from llmjax.data.tokenizer import Tokenizer, byte_tokenizer, from_model, train_tokenizer
from llmjax.infer import constrained
from llmjax.infer.engine import Engine
from llmjax.infer.request import Completion, Request

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog \u00e9"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
LARK = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/\n'


@pytest.fixture(scope="module", params=["byte", "sentencepiece", "tokenizer.json"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "byte":
        return byte_tokenizer()
    texts = ['{"name": "the cat", "age": 12}\n caf\u00e9 dog 1 + 2 = 3 ' * 20]
    if request.param == "sentencepiece":
        return from_model(train_tokenizer(texts, kind="bpe", vocab_size=320).model)
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = HfTokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return load(folder / "tokenizer.json")


def write(tokenizer: Tokenizer, count: int = 6, **form) -> list[Completion]:
    """Texts of a random model, hot ones, beside one that is free."""
    module, params = make(settings(vocab_size=-(-tokenizer.vocab_size // 32) * 32))
    engine = Engine(module, params, tokenizer, slots=4, length=128, steps=4)
    made = constrained.constraint(constrained.vocabulary(tokenizer, module.c.vocab_size), **form)
    numbers = [engine.submit(Request((5, 6), 100, temperature=1.0, seed=i, constraint=made)) for i in range(count)]
    free = engine.submit(Request((5, 6), 20, temperature=1.0, seed=0))
    done = dict(engine.run())
    alone = engine.submit(Request((5, 6), 20, temperature=1.0, seed=0))
    assert dict(engine.run())[alone].tokens == done[free].tokens
    return [done[number] for number in numbers]


def test_every_answer_is_valid_by_its_schema(tokenizer):
    answers = write(tokenizer, json=SCHEMA)
    for answer in answers:
        assert answer.finish != "length"
        value = json.loads(answer.text)
        assert list(value) == ["name", "age", "kind"]
        assert isinstance(value["name"], str) and len(value["name"]) <= 6
        assert type(value["age"]) is int and 0 <= value["age"] <= 150
        assert value["kind"] in ("cat", "dog \u00e9")
    assert len({answer.text for answer in answers}) > 1


def test_every_answer_matches_its_regular_expression_or_grammar():
    for answer in write(byte_tokenizer(), regex=r"[a-f]{3}-(yes|no)\."):
        assert re.fullmatch(r"[a-f]{3}-(yes|no)\.", answer.text)
    for answer in write(byte_tokenizer(), grammar=LARK):
        assert re.fullmatch(
            r"\d{1,3}(\+\d{1,3})*", answer.text.removesuffix("+") if answer.finish == "length" else answer.text
        )


def test_forms_that_cannot_be_read_are_refused_with_what_is_wrong():
    vocabulary = constrained.vocabulary(byte_tokenizer())
    for form, message in (
        ({"json": "{"}, "no JSON schema"),
        ({"json": {"type": "thing"}}, "cannot be used"),
        ({"regex": "("}, "regex cannot be used"),
        ({"grammar": "start: missing"}, "grammar cannot be used"),
        ({"yaml": "a"}, "one of json, regex, grammar"),
        ({}, "nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            constrained.constraint(vocabulary, **form)


def test_speculation_and_forms_do_not_go_together():
    module, params = make(settings(vocab_size=288))
    made = constrained.constraint(constrained.vocabulary(byte_tokenizer()), regex="a")
    engine = Engine(module, params, byte_tokenizer(), length=64, ahead=2)
    with pytest.raises(ValueError, match="ahead=0"):
        engine.submit(Request((5,), 4, constraint=made))
