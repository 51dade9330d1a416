"""Conversations keep to what the model can read, and files of prompts are answered once whatever interrupts."""

import dataclasses
import functools
import io
import json
from typing import Any

import jax
import numpy as np
import pytest
from networks import make, settings

import llmjax
from llmjax import cli, config
from llmjax.api import LanguageModel
from llmjax.data.tokenizer import Tokenizer, byte_tokenizer
from llmjax.infer import beam, bench, files
from llmjax.infer.chat import Chat, talk
from llmjax.infer.engine import Engine
from llmjax.infer.generate import generate
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
    return Engine(*model(), tokenizer(), **{"slots": 2, "length": 96, "parts": (16, 64), **given})


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
    monkeypatch.setattr(llmjax, "load", lambda _, mesh="": made, raising=False)
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


def test_commands_do_what_they_say(tmp_path):
    chat, shown = conversation()
    file = tmp_path / "talk.json"
    lines = ["hi", f"/save {file}", "/temperature 0.5", "/temperature", "/top_k many", "/top_p 2", "/nothing", "/reset"]
    talk(chat, [*lines, "/system be brief", "/help", "/quit", "never said"])
    said = "".join(shown)
    for part in ("saved in", "temperature = 0.5", "'many' is no number", "top_p=2.0 must be", "there is no /nothing"):
        assert part in said
    assert "/repetition_penalty" in said
    assert (chat.system, chat.messages, chat.settings["temperature"]) == ("be brief", [], 0.5)
    talk(chat, [f"/load {file}", "/load nowhere.json"])
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.system == ""
    assert "nowhere.json cannot be read" in "".join(shown)


def test_the_command_talks_with_a_pipe(loaded, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/top_k 3\n/quit\n"))
    assert cli.main(["chat", "--workdir", str(loaded), "--system", "be kind"]) == 0
    assert "top_k = 3" in capsys.readouterr().out
    monkeypatch.setattr(llmjax, "load", lambda _, mesh="": language_model(byte_tokenizer()))
    assert cli.main(["chat", "--workdir", str(loaded)]) == 2
    assert "no chat template" in capsys.readouterr().err


# Files


def test_files_of_prompts_go_on_where_they_were_interrupted(loaded, capsys):
    prompts = loaded / "prompts.jsonl"
    rows = [{"id": f"q{i}", "prompt": "ask " * (i % 4)} for i in range(9)]
    rows[3] |= {"temperature": 0.0, "max_new_tokens": 3}
    rows[4] = {"id": "q4", "messages": [{"role": "user", "content": "hello"}]}
    rows[5] = {"id": "q5", "prompt": "x", "temperature": -1.0}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answers(name: str) -> dict[str, Any]:
        command = ["generate", "--workdir", str(loaded), "--prompts", str(prompts), "--out", str(loaded / name)]
        assert cli.main(command) == 0
        found = [json.loads(line) for line in (loaded / name).read_text().splitlines()]
        assert len({row["id"] for row in found}) == len(found) == 9
        return {row["id"]: row for row in found}

    whole = answers("whole.jsonl")
    assert whole["q3"]["tokens"] == 3
    assert "temperature=-1.0 must be" in whole["q5"]["error"]
    lines = (loaded / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (loaded / "part.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:-9])  # killed while it wrote
    again = answers("part.jsonl")
    for i, row in whole.items():
        assert (again[i].get("text"), again[i].get("finish")) == (row.get("text"), row.get("finish"))
    assert "4 answered before" in capsys.readouterr().out
    assert answers("part.jsonl") == again
    assert "all 9 prompts are answered" in capsys.readouterr().out


def test_lines_of_text_are_prompts_with_their_numbers_as_ids(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\nthree\n")
    assert list(files.read_prompts(tmp_path / "a.txt")) == [{"prompt": "one", "id": 1}, {"prompt": "three", "id": 3}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a.jsonl:1: this is no JSON"),
        ('{"id": 1}', "one of prompt, messages and ids"),
        ('{"prompt": "x", "heat": 1}', "no setting is called 'heat'"),
        ('{"id": 1, "prompt": "x"}\n{"id": 1, "prompt": "y"}', "a.jsonl:2: the id 1 comes twice"),
    ],
)
def test_mistakes_in_files_are_named_with_their_line(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(files.read_prompts(tmp_path / "a.jsonl"))


def test_a_file_that_is_no_answers_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes\n")
    with pytest.raises(ValueError, match="no file of answers"):
        files.answered(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"


# Speed, and beam search


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


@pytest.mark.slow
def test_beams_that_are_wide_enough_find_the_likeliest_texts():
    module, params = make(settings(vocab_size=8))
    given = dataclasses.replace(byte_tokenizer(), vocab_size=8, unsampled_ids=(0, 1, 3))
    found = beam.search(module, params, given, [5, 6], beams=25, max_new_tokens=2, length_penalty=0.0)
    run = jax.jit(lambda tokens: jax.nn.log_softmax(module.apply({"params": params}, tokens)))
    allowed, every = [2, 4, 5, 6, 7], {}
    for a in allowed:
        log_p = np.asarray(run(np.array([[5, 6, a]])))[0]
        if a == 2:
            every[(a,)] = log_p[1, a]
            continue
        for b in allowed:
            every[(a, b)] = log_p[1, a] + log_p[2, b]
    best = sorted(every, key=lambda tokens: -every[tokens])
    assert [one.tokens for one in found] == best
    np.testing.assert_allclose([one.log_probability for one in found], [every[t] for t in best], atol=1e-4)
    assert all((one.finish == "eos") == (one.tokens[-1] == 2) for one in found)
    greedy = beam.search(module, params, given, [5, 6], beams=1, max_new_tokens=5)[0]
    assert greedy.tokens == generate(module, params, given, [[5, 6]], max_new_tokens=5, temperature=0.0)[0].tokens


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
