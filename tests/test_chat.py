"""Conversations keep to what the model can read, and files of prompts are answered once whatever interrupts."""

import dataclasses
import functools
import io
import json
import re
from typing import Any

import jax
import numpy as np
import pytest
from networks import make, settings

from llmjax import cli, config
from llmjax.data.tokenizer import Tokenizer, byte_tokenizer
from llmjax.infer import bench
from llmjax.infer.chat import Chat, talk
from llmjax.infer.engine import Engine
from llmjax.infer.generate import generate
from llmjax.infer.language_model import LanguageModel
from llmjax.infer.request import Request
from llmjax.parallel import mesh as meshes
from llmjax.train.step import make_eval_step

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@functools.cache
def tokenizer() -> Tokenizer:
    return dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE)


@functools.cache
def model() -> tuple[Any, Any]:
    return make(settings(vocab_size=288))


def engine(**given: Any) -> Engine:
    return Engine(*model(), tokenizer(), **{"slots": 2, "length": 96, "chunks": (16, 64), **given})


def conversation(**given: Any) -> tuple[Chat, list[str]]:
    shown: list[str] = []
    defaults = {"max_new_tokens": 8, "temperature": 0.0}
    return Chat(engine(slots=1), defaults, shown.append, **given), shown


def language_model(given: Tokenizer) -> LanguageModel:
    c = config.base()
    module, params = model()
    c.model.update(module.c.to_dict())
    c.model.max_length = 96
    c.generate.max_new_tokens = 6
    mesh = meshes.make_mesh("data=1", devices=jax.devices()[:1])
    step = jax.jit(make_eval_step(module, c))
    return LanguageModel(c.lock(), module, jax.tree.map(jax.numpy.asarray, params), given, 7, mesh, step)


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """The command finds a run, and a chat model in it."""
    made = language_model(tokenizer())
    (tmp_path / "config.json").write_text(config.to_json(made.config))
    monkeypatch.setattr("llmjax.infer.language_model.load", lambda _, **__: made)
    return tmp_path


# Conversations


def test_an_answer_is_shown_as_it_comes_and_continues_the_whole_conversation():
    chat, shown = conversation(system="be kind")
    talk(chat, ["hello", "", "and now?"])
    first, second = (m["content"] for m in chat.messages if m["role"] == "assistant")
    assert "".join(shown) == f"{first}\n{second}\n"
    prompt = f"s:be kind\nu:hello\na:{first}\nu:and now?\na:"
    ids = tokenizer().encode(prompt)
    expected = generate(*model(), tokenizer(), [ids], max_new_tokens=8, temperature=0.0)[0]
    assert second == expected.text


def test_what_was_said_before_is_not_computed_again():
    chat, _ = conversation()
    chat.say("x" * 40)
    before = chat.engine.prefilled
    chat.say("y")
    assert chat.engine.prefilled - before < 32  # of more than 50


def test_the_oldest_turns_are_forgotten_when_the_conversation_grows_too_long():
    chat, _ = conversation(system="sys")
    for i in range(6):
        chat.say(f"message {i}")
    text = tokenizer().decode(chat.prompt()[:-1])
    assert len(chat.prompt()) + 8 <= chat.engine.limit
    assert text.startswith("s:sys\nu:message")
    assert "message 0" not in text
    with pytest.raises(ValueError, match="the message is too long"):
        chat.say("z" * 200)
    assert len(chat.messages) == 12  # it is as if it had not been said


def test_a_conversation_that_grows_gets_a_larger_engine_and_the_same_answers():
    large, _ = conversation()
    made = []

    def longer(length: int) -> Engine:
        made.append(length)
        return large.engine

    small = Chat(engine(slots=1, length=32), dict(large.settings), [].append, longer=longer, longest=96)
    for said in ("hi", "again", "x" * 30):
        assert small.say(said) == large.say(said)
    assert made == [96]
    assert small.messages == large.messages
    with pytest.raises(ValueError, match="the message is too long"):
        small.say("z" * 200)


def test_commands_do_what_they_say(tmp_path):
    chat, shown = conversation()
    file = tmp_path / "talk.json"
    lines = ["hi", f"/save {file}", "/temperature 0.5", "/temperature", "/top_k many", "/top_p 2", "/nothing", "/reset"]
    talk(chat, [*lines, "/system be brief", "/help", "/quit", "never said"])
    said = "".join(shown)
    for part in (
        "saved in",
        "temperature = 0.5",
        "'many' is not a number",
        "top_p=2.0 must be",
        "there is no /nothing",
    ):
        assert part in said
    assert "/repetition_penalty" in said
    assert (chat.system, chat.messages, chat.settings["temperature"]) == ("be brief", [], 0.5)
    talk(chat, [f"/load {file}", "/load nowhere.json"])
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.system == ""
    assert "nowhere.json cannot be read" in "".join(shown)


def test_an_interrupted_answer_keeps_what_there_is_of_it(monkeypatch):
    chat, shown = conversation()
    whole = chat.say("hello")
    chat.messages.clear()
    chat.engine._scheduler.prefixes.forget()
    steps, step = [], chat.engine.step
    monkeypatch.setattr(chat.engine._scheduler, "steps", 2)

    def interrupted() -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(chat.engine, "step", interrupted)
    shown.clear()
    answer = chat.say("hello")
    assert whole.startswith(answer) and answer != whole
    assert "".join(shown) == answer == chat.messages[-1]["content"]


def test_answers_have_the_form_that_is_asked_for(tmp_path):
    pytest.importorskip("llguidance")
    chat, shown = conversation()
    (tmp_path / "schema.json").write_text('{"enum": ["yes", "no"]}')
    talk(chat, ["/regex [a-c]{4}", "hi", f"/json_schema {tmp_path / 'schema.json'}", "hi", "/regex (", "hi", "/regex"])
    answers = [message["content"] for message in chat.messages if message["role"] == "assistant"]
    assert re.fullmatch("[a-c]{4}", answers[0])
    assert json.loads(answers[1]) in ("yes", "no")
    assert len(answers) == 2 == len(chat.messages) / 2  # what could not be answered is forgotten
    assert "regex cannot be used" in "".join(shown)
    talk(chat, ["/grammar nowhere.lark"])
    assert "nowhere.lark cannot be read" in "".join(shown)
    assert chat.settings["regex"] == ""


def test_the_command_talks_with_a_pipe(loaded, one_device, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/top_k 3\n/quit\n"))
    assert cli.main(["chat", "--workdir", str(loaded), "--system", "be kind"]) == 0
    assert "top_k = 3" in capsys.readouterr().out
    monkeypatch.setattr("llmjax.infer.language_model.load", lambda _, **__: language_model(byte_tokenizer()))
    assert cli.main(["chat", "--workdir", str(loaded)]) == 2
    assert "no chat template" in capsys.readouterr().err


# Speed


@pytest.mark.slow
def test_the_benchmark_counts_what_it_says(tmp_path):
    found = bench.measure(engine(), prompt=8, new=40, rounds=2, peak=1e9)
    assert found["slots"] == 2
    assert found["seconds_per_token"] > 0
    assert np.isclose(found["decoded_tokens_per_second"], 2 / found["seconds_per_token"])
    assert found["bytes_per_step"] > sum(leaf.nbytes for leaf in jax.tree.leaves(model()[1]))
    bench.write({"rows": [found]}, tmp_path)
    assert json.loads((tmp_path / "infer.json").read_text())["rows"][0]["slots"] == 2
    assert (tmp_path / "infer.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_benchmark_command_measures_int8(loaded, capsys):
    (loaded / "text.txt").write_text("some text to predict " * 4)
    command = ["bench-infer", "--workdir", str(loaded), "--slots", "1,2", "--prompt-tokens", "5", "--new-tokens", "4"]
    assert cli.main([*command, "--text", str(loaded / "text.txt"), "--config.infer.weights=int8"]) == 0
    results = json.loads((loaded / "bench-infer" / "infer.json").read_text())
    assert [row["slots"] for row in results["rows"]] == [1, 2]
    assert 0 < abs(results["bits_per_byte"]["int8"] / results["bits_per_byte"]["stored"] - 1) < 0.02
    assert "bits per byte" in capsys.readouterr().out


def test_the_best_of_several_samples_has_the_largest_mean_log_probability():
    def mean(one: Any) -> float:
        return sum(one.log_probabilities) / len(one.log_probabilities)

    best = generate(*model(), tokenizer(), ["ab", "c"], max_new_tokens=5, best_of=3, seed=3)
    made = engine()
    for row, text in enumerate(["ab", "c"]):
        ids = (1, *tokenizer().encode(text))
        for number in range(3 * row, 3 * row + 3):
            made.submit(Request(ids, 5, seed=3, number=number))
        assert mean(best[row]) == pytest.approx(max(mean(one) for _, one in made.run()), abs=1e-5)
