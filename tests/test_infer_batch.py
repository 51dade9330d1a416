"""Files of prompts are answered once whatever interrupts, and a row that is wrong is told while the others are answered."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest
from networks import make, settings

from llmjax import cli, config
from llmjax.data.tokenizer import Tokenizer, byte_tokenizer
from llmjax.errors import UserError
from llmjax.infer import batch, resuming
from llmjax.infer.command import request_settings
from llmjax.infer.language_model import LanguageModel
from llmjax.infer.request import Request
from llmjax.parallel import mesh as meshes
from llmjax.train.step import make_eval_step

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@functools.cache
def model() -> LanguageModel:
    c = config.base()
    module, params = make(settings(vocab_size=288))
    c.model.update(module.c.to_dict())
    c.model.max_length = 96
    c.generate.max_new_tokens = 6
    mesh = meshes.make_mesh("data=1", devices=jax.devices()[:1])
    tokenizer: Tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE)
    step = jax.jit(make_eval_step(module, c))
    return LanguageModel(c.lock(), module, jax.tree.map(jax.numpy.asarray, params), tokenizer, 7, mesh, step)


@pytest.fixture
def run(monkeypatch, tmp_path) -> Path:
    """A run's folder; the command finds the model in it."""
    (tmp_path / "config.json").write_text(config.to_json(model().config))
    monkeypatch.setattr("llmjax.infer.language_model.load", lambda *_, **__: model())
    return tmp_path


def answer(run: Path, lines: list[Any], *more: str, out: str = "out.jsonl") -> dict[Any, Any]:
    """What the command writes for rows, or for lines as they are: the answers by id."""
    text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (run / "prompts.jsonl").write_bytes(b"\n".join(text) + b"\n")
    command = ["generate", "--workdir", str(run), "--prompts", str(run / "prompts.jsonl"), "--out", str(run / out)]
    assert cli.main([*command, *more]) == 0
    found = [json.loads(line) for line in (run / out).read_text().splitlines()]
    assert len({str(row["id"]) for row in found}) == len(found) == len(lines)
    return {row["id"]: row for row in found}


def test_files_of_prompts_go_on_where_they_were_interrupted(run, capsys):
    rows: list[Any] = [{"id": f"q{i}", "prompt": "ask " * (i % 4)} for i in range(9)]
    rows[3] |= {"temperature": 0.0, "max_new_tokens": 3}
    rows[4] = {"id": "q4", "messages": [{"role": "user", "content": "hello"}]}
    rows[5] = {"id": "q5", "prompt": "x", "temperature": -1.0}
    whole = answer(run, rows, out="whole.jsonl")
    assert whole["q3"]["tokens"] == 3
    assert f"{run / 'prompts.jsonl'}:6: temperature=-1.0 must be" in whole["q5"]["error"]
    lines = (run / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (run / "part.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:-9])  # killed while it wrote
    again = answer(run, rows, out="part.jsonl")
    for i, row in whole.items():
        assert (again[i].get("text"), again[i].get("finish")) == (row.get("text"), row.get("finish"))
    assert "4 answered before" in capsys.readouterr().out
    assert answer(run, rows, out="part.jsonl") == again
    assert "all 9 prompts are answered" in capsys.readouterr().out
    rows[3]["max_new_tokens"] = 2
    again = answer(run, rows, out="part.jsonl")
    assert again["q3"]["tokens"] == 2 and "1 answers are made again (of 1 the row changed)" in capsys.readouterr().out
    old = (run / "part.before.jsonl").read_text()
    assert json.loads(old)["tokens"] == 3
    answer(run, rows, "--config.generate.max_new_tokens=5", out="part.jsonl")
    assert "9 answers are made again (of 9 the settings changed)" in capsys.readouterr().out


WRONG: list[tuple[Any, str]] = [
    # Fields of a wrong type, or out of range
    *[({"prompt": "x", name: value}, name) for name, values in {
        "temperature": ("hot", "0.5", None, [1], True, math.nan, math.inf, -1),
        "top_k": (2.5, "2", -1, None), "top_p": (0, 1.1, {}), "min_p": (2,), "typical_p": (-0.1,),
        "repetition_penalty": (0, "1"), "frequency_penalty": (1e300, []), "presence_penalty": (math.inf,),
        "max_new_tokens": (2.5, "5", True, 0, -3, None, 10**12), "seed": ("1", 1.5, -1, 2**32, None),
        "stop": ([1], None, 5, [""], "", {"a": 1}), "stop_ids": (["2"], None, [1.5], [-1], list(range(99))),
        "logit_bias": ([1, 2], None, {"x": 1}, {"5": "1"}, {"5": math.inf}, {"5": math.nan}, {"300": 1}, {"-1": 1}),
        "json_schema": (5, None, "{", {"type": "thing"}, [], {"not": {}}),
        "regex": (5, None, "(", "a{1000000}", "\ud800"), "grammar": ({}, "start: missing"),
    }.items() for value in values],
    ({"prompt": "x", "logit_bias": {str(i): -math.inf for i in range(288)}}, "forbids every token"),
    ({"prompt": "x", "regex": "a", "json_schema": {}}, "only one constraint"),
    ({"prompt": "x" * 200}, "more than the"),
    ({"prompt": "x", "max_new_tokens": 96}, "more than the"),
    # Prompts that are none
    *[({"prompt": value}, "prompt must be a text") for value in (5, None, ["x"], {}, True)],
    ({"prompt": "half \ud83d"}, "lone surrogate"),
    *[({"ids": value}, "id") for value in (["a"], 5, None, [], [1.5], [True], [-1], [300], "12", {"1": 2}, [[1]])],
    *[({"messages": value}, "message") for value in ("hi", None, 5, ["hi"], [{"role": "user", "content": 5}], [{"content": "x"}])],
    ({"messages": [{"role": "user", "content": "half \ud83d"}]}, "lone surrogate"),
    # Rows that are none
    ({"prompt": "x", "messages": []}, "one of prompt"), ({}, "one of prompt"), ({"prompt": "x", "heat": 1}, "'heat'"),
    ([1], "must be an object"), (None, "must be an object"), ("text", "must be an object"),
    (b"{", "no JSON"), (b"[" * 100_000, "no JSON"), (b'{"prompt": "caf\xe9"}', "no UTF-8"), (b"\xff\xfe", "no UTF-8"),
    (b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", "no JSON"),
    ({"id": "good 0", "prompt": "again"}, "comes twice"),
]  # fmt: skip


def test_every_good_row_is_answered_beside_hostile_ones(run):
    """Each wrong row gets an error with its line; the good ones the texts that they get alone."""
    pytest.importorskip("llguidance")
    good = [{"id": f"good {i}", "prompt": f"ask {i}"} for i in range(len(WRONG))]
    wrong = [
        {"id": f"bad {i}", **row} if isinstance(row, dict) and "id" not in row else row
        for i, (row, _) in enumerate(WRONG)
    ]
    found = answer(run, [row for pair in zip(good, wrong, strict=True) for row in pair])
    for i, (_, message) in enumerate(WRONG):
        line = 2 * i + 2
        error = found.get(f"bad {i}", found.get(f"line {line}")).get("error", "")
        assert error.startswith(f"{run / 'prompts.jsonl'}:{line}: "), error
        assert message in error, (i, error)
    engine = model().engine(slots=2, length=96)
    for i in (0, len(good) - 1):
        ids = (1, *model().tokenizer.encode(good[i]["prompt"]))
        settings = request_settings(model().config)
        number = engine.submit(Request.parse({**settings, "ids": ids, "number": 2 * i}))
        assert found[f"good {i}"]["text"] == dict(engine.run())[number].text


def test_a_row_may_have_a_form_of_its_own_and_the_command_gives_one_to_all(run):
    pytest.importorskip("llguidance")
    rows = [
        {"id": 1, "prompt": "x"},
        {"id": 2, "prompt": "x", "json_schema": {"enum": ["yes"]}},
        {"id": 3, "prompt": "x", "regex": ""},
    ]
    found = answer(run, rows, "--regex", "[ab]{3}")
    assert set(found[1]["text"]) <= {"a", "b"} and len(found[1]["text"]) == 3
    assert found[2]["text"] == '"yes"'
    assert found[3]["finish"] in ("length", "eos")
    (run / "schema.json").write_text('{"enum": ["no"]}')
    assert answer(run, rows[:1], "--json-schema", str(run / "schema.json"), out="b.jsonl")[1]["text"] == '"no"'


def test_a_form_that_cannot_be_read_is_told_before_the_model_is(run, capsys):
    for more, message in (
        (["--json-schema", "nowhere.json"], "nowhere.json cannot be read"),
        (["--json-schema", str(run / "prompts.jsonl")], "no JSON schema"),
    ):
        (run / "prompts.jsonl").write_text("not JSON")
        assert cli.main(["generate", "--workdir", str(run), "--prompt", "x", *more]) == 2
        assert message in capsys.readouterr().err


def test_lines_of_text_are_prompts_with_their_numbers_as_ids(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\nthree\r\ncaf\xe9\n")
    rows = list(batch.read_prompts(tmp_path / "a.txt"))
    assert [(row.id, row.number) for row in rows] == [(1, 0), (3, 1), ("line 4", 2)]
    assert [row.given.get("prompt") for row in rows] == ["one", "three", None]
    assert "a.txt:4: this is no UTF-8" in rows[2].error
    with pytest.raises(UserError, match="there is no file"):
        list(batch.read_prompts(tmp_path / "b.txt"))


@pytest.mark.parametrize("text", ["my notes\n", "my notes", '{"id": 1}\nmy notes'])
def test_a_file_that_is_no_answers_is_left_alone(tmp_path, text):
    (tmp_path / "notes.txt").write_text(text)
    with pytest.raises(UserError, match="not a file of answers"):
        resuming.look(tmp_path / "notes.txt", {})
    assert (tmp_path / "notes.txt").read_text() == text


def test_a_row_hands_tools_and_documents_to_the_template(tmp_path):
    template = "{{ messages[0].content }}{{ tools | tojson if tools }}{{ documents[0].text if documents }}"
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=template)
    message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    rows = [
        {"messages": [message], "tools": [{"a": "<eos>"}], "documents": [{"text": "d"}]},
        {"messages": [message, {"role": 5}]},
        {"messages": [message], "tools": 5},
        {"prompt": "x", "tools": []},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = batch.with_requests(tokenizer, list(batch.read_prompts(path)), {})
    assert found[0].request is not None
    assert found[0].request.ids == tuple(tokenizer.encode('x[{"a": "<eos>"}]d'))
    says = ("message 2 has the role 5", "tools holds 5", "no setting is called 'tools'")
    assert all(said in row.error for said, row in zip(says, found[1:], strict=True))
