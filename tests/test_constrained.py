"""Texts of a given form are valid, whatever the model and the tokenizer."""

import functools
import json
import math
import re
import threading
from typing import Any

import numpy as np
import pytest
from networks import make, settings

from llmjax.data.hf_tokenizer import load
from llmjax.data.tokenizer import Tokenizer, byte_tokenizer, from_model
from llmjax.data.tokenizer_training import train_tokenizer
from llmjax.errors import UserError
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


def write(tokenizer: Tokenizer, count: int = 6, **form: Any) -> list[Completion]:
    """Texts of a random model, hot ones, beside one that is free."""
    assert tokenizer.vocab_size <= 320  # one network for all
    module, params = make(settings(vocab_size=320))
    engine = Engine(module, params, tokenizer, slots=4, length=128, steps=4)
    numbers = [engine.submit(Request((5, 6), 100, temperature=1.0, seed=i, **form)) for i in range(count)]
    free = engine.submit(Request((5, 6), 20, temperature=1.0, seed=0))
    done = dict(engine.run())
    alone = engine.submit(Request((5, 6), 20, temperature=1.0, seed=0))
    assert dict(engine.run())[alone].tokens == done[free].tokens
    return [done[number] for number in numbers]


def test_every_answer_is_valid_by_its_schema(tokenizer):
    answers = write(tokenizer, json_schema=SCHEMA)
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


@functools.cache
def engine() -> Engine:
    return Engine(
        *make(settings(vocab_size=288)), byte_tokenizer(), slots=4, length=96, steps=8, weight_format="stored"
    )


def request(**given: Any) -> Request:
    return Request.parse({"ids": [5, 6], "max_new_tokens": 64, "logit_bias": {2: -1e9}, **given})


def test_a_union_as_pydantic_writes_it_is_a_form():
    union = {"oneOf": [{"type": "integer", "maximum": 9}, {"enum": ["a", "b"]}]}
    numbers = [engine().submit(request(json_schema=union, seed=i, logit_bias={})) for i in range(4)]
    done = dict(engine().run())
    for number in numbers:
        value = json.loads(done[number].text)
        assert value in ("a", "b") or (type(value) is int and value <= 9)


def allowed(schema: Any, text: str) -> bool:
    """Whether a text can be written under a schema, from its first byte to its end."""
    ours = byte_tokenizer()
    matcher = constrained.compiled(constrained.vocabulary(ours), "json_schema", json.dumps(schema))
    return bool(matcher.consume_tokens(ours.encode(text)) and matcher.is_accepting())


def test_a_format_that_is_not_known_says_nothing():
    """OpenAPI's formats and JSON Schema's rarer ones, where schemas stand, and not among values."""
    for name in ("password", "binary", "byte", "uri-template", "int64", "json-pointer", "mine"):
        for schema in (
            {"type": "string", "format": name},
            {"properties": {"format": {"type": "string", "format": name}}, "required": ["format"]},
            {"$ref": "#/$defs/const", "$defs": {"const": {"type": "string", "format": name}}},
            {"items": [{"anyOf": [{"format": name}]}]},
            {"additionalProperties": {"type": ["string", "null"], "format": name}},
        ):
            assert constrained.compiled(constrained.vocabulary(byte_tokenizer()), "json_schema", json.dumps(schema))
        assert allowed({"type": "string", "format": name}, '"x y"')
    value = {"format": "mine"}
    assert allowed({"const": value}, '{"format":"mine"}') and not allowed({"enum": [value]}, "{}")
    for name, good in (("date", "2024-02-29"), ("ipv4", "1.2.3.4"), ("uuid", "12345678-1234-1234-1234-123456789abc")):
        assert allowed({"type": "string", "format": name}, f'"{good}"')
        assert not allowed({"type": "string", "format": name}, '"x y"')


@pytest.mark.parametrize("schema", [True, {}])
def test_a_schema_that_says_nothing_is_any_json(schema):
    for text in ("[1,null,true]", '"x"', '{"a":{"b":[]}}', "-1.5e3"):
        assert allowed(schema, text)
    assert not allowed(schema, "{a:1}")
    assert Request.parse({"ids": [5], "json_schema": schema}).constraint == ("json_schema", json.dumps(schema))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json_schema": {"type": "thing"}}, "json_schema cannot be used"),
        ({"regex": "("}, "regex cannot be used"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: missing"}, "grammar cannot be used"),
        ({"regex": "a{1000000}"}, "too many"),
        ({"regex": "[a-z]{3}(a{1000}){1000}"}, "too many"),  # which is told after three tokens
        ({"regex": "a+b", "logit_bias": {4 + ord("a"): -math.inf}}, "leave no token"),
    ],
)
def test_a_form_that_cannot_be_ends_its_own_text_and_no_other(form, message):
    numbers = [engine().submit(request(seed=i)) for i in range(2)]
    alone = dict(engine().run())
    expected = [alone[number].tokens for number in numbers]
    bad = engine().submit(request(**form))
    numbers = [engine().submit(request(seed=i)) for i in range(2)]
    good = engine().submit(request(regex="[a-c]{5}"))
    done = dict(engine().run())
    assert done[bad].finish == "error"
    assert message in done[bad].error
    assert [done[number].tokens for number in numbers] == expected
    assert re.fullmatch("[a-c]{5}", done[good].text)
    assert engine()._scheduler.slots == [None] * 4
    assert not engine().busy


def test_a_form_that_takes_too_long_ends_its_own_text(monkeypatch):
    """The thread that compiles it is held up; the text beside it comes to its end."""
    held = threading.Event()
    compiled = constrained.compiled
    monkeypatch.setattr(constrained, "SECONDS", 0.0)
    monkeypatch.setattr(constrained, "compiled", lambda *given: (held.wait(), compiled(*given))[1])
    slow = engine().submit(request(regex="held up"))
    free = engine().submit(request())
    done = dict(engine().run())
    held.set()
    assert "takes more than" in done[slow].error
    assert done[free].finish == "length"


def test_free_texts_are_as_fast_beside_one_of_a_given_form(monkeypatch):
    """64 tokens of three texts take 8 calls of 8 steps, and one or two more when a form is ready late."""
    calls = []
    decode = engine().programs.decode
    counted = engine().programs._replace(decode=lambda *given: (calls.append(1), decode(*given))[1])
    monkeypatch.setattr(engine(), "programs", counted)
    limited = engine().submit(request(regex="[a-z]{60}"))
    free = [engine().submit(request(seed=i)) for i in range(3)]
    done: dict[int, Completion] = {}
    while not all(number in done for number in free):
        done |= {event.number: event.completion for event in engine().step() if event.completion}
    assert len(calls) <= 10
    assert all(len(done[number].tokens) == 64 for number in free)
    done |= dict(engine().run())
    assert re.fullmatch("[a-z]{60}", done[limited].text)


@pytest.mark.parametrize(
    "name",
    ["griffin", pytest.param("mamba2", marks=pytest.mark.slow), pytest.param("moe", marks=pytest.mark.slow)],
)
def test_a_text_that_waits_for_its_form_stays_as_it_is(name):
    """Its state is that of a text that is written alone, whatever others write meanwhile."""
    changes: dict[str, Any] = {
        "griffin": {"pattern": ("rglru", "local"), "window": 5},
        "mamba2": {"pattern": ("mamba2",), "recurrent": {"state_size": 8, "chunk": 4}},
        "moe": {"moe": {"experts": 4, "active": 2}},
    }
    model = make(settings(vocab_size=288, **changes[name]))
    made = Engine(*model, byte_tokenizer(), slots=2, length=96, chunks=(16,), weight_format="stored")
    limited = request(regex="[a-z]{12}")
    alone = made.submit(limited)
    expected = dict(made.run())[alone]
    number, _ = made.submit(limited), made.submit(request(max_new_tokens=80))
    found = dict(made.run())[number]
    assert (found.tokens, found.finish) == (expected.tokens, "stop")
    np.testing.assert_allclose(found.sampled_log_probabilities, expected.sampled_log_probabilities, atol=1e-4)


def test_texts_of_a_given_form_do_not_go_with_speculation():
    module, params = make(settings(vocab_size=288))
    made = Engine(module, params, byte_tokenizer(), length=64, ahead=2)
    with pytest.raises(UserError, match=r"set infer\.ahead to 0"):
        made.submit(Request((5,), 4, regex="a"))
