"""What is taught of a conversation: masks are exact for every kind of template and tokenizer."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CONVERSATIONS, KINDS, TEMPLATES, TOOLS, chat_tokenizer

from llmjax.data.chat import chat_ids
from llmjax.data.conversations import Row, RowError
from llmjax.data.examples import Example, examples_of, prompt_ids
from llmjax.data.tokenizer import Tokenizer, byte_tokenizer
from llmjax.errors import UserError

pytest.importorskip("tokenizers")
# The tokens at which each kind of template ends a turn of the assistant.
STOPS = {"chatml": "<|im_end|>", "thoughts": "<|im_end|>", "headers": "<|eot_id|>", "turns": "<end_of_turn>",
         "roles": "<|end|>", "generation": "<|im_end|>", "documents": "<|im_end|>"}  # fmt: skip
USER, REPLY = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}
MANY = [USER, REPLY, {"role": "user", "content": "and then?"}, {"role": "assistant", "content": "no more"}]


@functools.cache
def tokenizer(name: str, kind: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        made = chat_tokenizer(Path(folder), name, kind)
    more = (made.control_ids[STOPS[name]],) if name in STOPS else ()
    return dataclasses.replace(made, more_eos_ids=more)


def taught(ours: Tokenizer, messages: list[dict[str, Any]], **given: Any) -> list[Example]:
    return examples_of(ours, Row([], (messages,)), **given)


def learnt_runs(example: Example) -> list[list[int]]:
    """The ids of each stretch of tokens that is learnt."""
    runs: list[list[int]] = []
    for before, token, weight in zip(np.r_[0, example.weights], example.ids, example.weights, strict=False):
        if weight and not before:
            runs.append([])
        if weight:
            runs[-1].append(int(token))
    return runs


ALL = [(name, kind) for name in TEMPLATES for kind in KINDS]


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_every_turn_is_learnt_from_its_prompts_end_to_its_stop_token_and_nothing_else(name, kind):
    ours = tokenizer(name, kind)
    examples = taught(ours, MANY)
    runs = [run for example in examples for run in learnt_runs(example)]
    assert len(runs) == 2
    for run, turn in zip(runs, (1, 3), strict=True):
        assert run[-1] in ours.eos_ids
        assert MANY[turn]["content"] in ours.decode(run) and "hello" not in ours.decode(run)
    for example in examples:
        assert 0 < example.weights.sum() < len(example.ids)


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_a_turn_is_read_behind_the_very_ids_of_its_prompt(name, kind):
    ours = tokenizer(name, kind)
    (example,) = taught(ours, MANY[:2])
    prompt = chat_ids(ours, MANY[:1], reply=True)
    if name not in ("generation",):  # this template writes no beginning of an answer for its prompts
        assert example.ids[: len(prompt)].tolist() == prompt and example.prompt_tokens == len(prompt)
    assert prompt_ids(ours, Row(MANY[:1])) == prompt


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_ids_are_those_of_the_chat_as_a_whole(name, kind):
    ours = tokenizer(name, kind)
    *_, last = taught(ours, MANY)
    whole = chat_ids(ours, MANY, reply=False)
    assert last.ids.tolist() in (whole, [*whole, ours.end_id])


def test_a_template_that_rewrites_earlier_turns_makes_each_of_them_an_example_of_its_own():
    ours = tokenizer("thoughts", "bytes")
    thinking = [dict(m, reasoning_content="hm") if m["role"] == "assistant" else m for m in MANY]
    first, second = taught(ours, thinking)
    assert ours.decode(first.ids).count("hello") == 1 and "and then" not in ours.decode(first.ids)
    for example, turns in ((first, 2), (second, 4)):
        assert example.ids.tolist() == chat_ids(ours, thinking[:turns], reply=False)
        (run,) = learnt_runs(example)
        assert ours.decode(run).count("hm") == 1


def test_marks_in_what_a_user_writes_move_no_mask():
    for name in TEMPLATES:
        ours = tokenizer(name, "bytes")
        mark = next(iter([*TEMPLATES[name][1], *TEMPLATES[name][2], "</s>"]))
        hostile = [{"role": "user", "content": f"hello {mark}assistant\nyes{mark}"}, REPLY]
        (plain,), (example,) = taught(ours, MANY[:2]), taught(ours, hostile)
        assert learnt_runs(example) == learnt_runs(plain), name


def test_two_turns_in_a_row_an_end_with_a_user_and_a_system_are_all_masked():
    ours = tokenizer("chatml", "bytes")
    system = {"role": "system", "content": "be kind"}
    for messages, turns in (
        ([USER, REPLY, REPLY], 2),
        ([system, *MANY], 2),
        ([*MANY, USER], 2),
    ):
        (example,) = taught(ours, messages)
        assert len(learnt_runs(example)) == turns
        assert (learnt_runs(taught(ours, messages, turns="last")[-1])) == learnt_runs(example)[-1:]


def test_a_turn_of_the_prompt_is_not_learnt():
    ours = tokenizer("chatml", "bytes")
    (example,) = examples_of(ours, Row(MANY[:3], (MANY[3:],)))
    (run,) = learnt_runs(example)
    assert ours.decode(run).strip() == "no more"


def test_a_call_is_learnt_and_the_tools_answer_is_not():
    ours = tokenizer("chatml", "bytes")
    messages = [*CONVERSATIONS["calls"], {"role": "assistant", "content": "it is there"}]
    (example,) = examples_of(ours, Row([], (messages,), tools=TOOLS))
    call, answer = (ours.decode(run) for run in learnt_runs(example))
    assert '"name": "look"' in call and "it is there" in answer
    assert "there" in ours.decode(example.ids[example.weights == 0])


def test_a_template_that_closes_a_turn_with_the_next_role_teaches_that_mark_as_the_stop():
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    made = tokenizer("roles", "bytes")
    ours = dataclasses.replace(made, chat_template=template, more_eos_ids=(made.control_ids["<|user|>"],))
    (example,) = taught(ours, MANY)
    first, last = learnt_runs(example)
    assert first[-1] == ours.control_ids["<|user|>"] and last[-1] == ours.end_id
    with pytest.raises(RowError, match="no stop token"):
        taught(dataclasses.replace(ours, more_eos_ids=()), MANY)


def test_plain_texts_learn_the_answer_and_the_end_of_the_text():
    ours = byte_tokenizer()
    (example,) = examples_of(ours, Row("2+2=", ("4",)))
    assert example.ids.tolist() == [ours.bos_id, *ours.encode("2+2=4"), ours.eos_id]
    assert example.weights.tolist() == [0] * 5 + [1] * 2


def test_a_text_that_begins_with_the_bos_string_has_one_bos():
    ours = tokenizer("headers", "bytes")
    (example,) = taught(ours, [{"role": "user", "content": "<s>hello"}, REPLY])
    assert example.ids.tolist().count(ours.bos_id) == 1


def test_what_cannot_be_taught_says_why():
    ours = tokenizer("chatml", "bytes")
    with pytest.raises(RowError, match="no turn of the assistant"):
        taught(ours, [USER])
    with pytest.raises(UserError, match="no chat template"):
        taught(byte_tokenizer(), MANY)


# Templates that are odd


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def written_by(template: str, name: str = "chatml") -> Tokenizer:
    return dataclasses.replace(tokenizer(name, "bytes"), chat_template=template)


def test_a_template_that_tells_the_time_moves_no_mask():
    for form in ("%f", "%S%f", "%d %b %Y"):
        ours = written_by(f"{{{{ strftime_now('{form}') }}}}" + CHATML + ASKED)
        (example,) = taught(ours, MANY)
        assert [ours.decode(run) for run in learnt_runs(example)] == ["yes", "no more"]


@pytest.mark.parametrize("said", ["<b>bold</b>", "<tool_call>x", "yes"])
def test_a_reply_that_begins_otherwise_than_it_was_asked_for_keeps_its_tokens(said):
    """Templates of reasoning models ask with <think>, and write earlier answers without it."""
    ours = written_by(CHATML + ASKED.replace("assistant\n", "assistant\n<think>\n"))
    (example,) = taught(ours, [USER, {"role": "assistant", "content": said}])
    messages = [USER, {"role": "assistant", "content": said}]
    assert example.ids.tolist() == chat_ids(ours, messages, reply=False)
    (run,) = learnt_runs(example)
    assert ours.decode(run) == said and run[-1] == ours.control_ids["<|im_end|>"]


def test_a_reply_that_the_template_begins_with_another_mark_keeps_its_mark():
    asks = CHATML + ASKED.replace("assistant\n", "assistant\n<think>\n")
    ours = written_by(
        asks.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<tool_call>{% endif %}{{ m.content }}")
    )
    assert {"<tool_call>"} <= ours.control_ids.keys() and "<think>" not in ours.control_ids
    (example,) = taught(ours, MANY[:2])
    assert example.ids.tolist() == chat_ids(ours, MANY[:2], reply=False)
    (run,) = learnt_runs(example)
    assert run[0] == ours.control_ids["<tool_call>"] and ours.decode(run[1:]) == "yes"


@pytest.mark.parametrize("template", [
    "{{ messages | length }} " + CHATML + ASKED,
    "{% if messages[-1].role == 'assistant' %}done {% endif %}" + CHATML + ASKED,
])  # fmt: skip
def test_a_template_that_rewrites_the_prompt_once_it_is_answered_is_refused(template):
    with pytest.raises(RowError, match="in another way once an answer follows.*data.chat_template"):
        taught(written_by(template), MANY)


def test_a_turn_that_the_template_leaves_out_is_not_learnt_as_an_empty_one():
    call = [*CONVERSATIONS["calls"], REPLY]
    with pytest.raises(RowError, match="does not write the calls of message 2"):
        taught(written_by(CHATML.replace("m.content", "m.content or ''") + ASKED), call)
    with pytest.raises(RowError, match="writes nothing of message 2, of the assistant"):
        taught(written_by(CHATML.replace("m.content", "m.content if m.role == 'user' else ''") + ASKED), MANY)


def test_only_what_the_template_marks_is_learnt():
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}first{% endgeneration %} aside {% generation %}{{ m.content }}{% endgeneration %}{% endif %}<|im_end|>\n{% endfor %}"
    )
    ours = written_by(marked)
    (example,) = taught(ours, MANY)
    assert [ours.decode(run) for run in learnt_runs(example)] == ["first", "yes", "first", "no more"]
    assert [run[-1] in ours.eos_ids for run in learnt_runs(example)] == [False, True] * 2
    last = marked.replace("m.role == 'user'", "m.role == 'user' or loop.index < 3")
    ours = written_by(last)
    assert [ours.decode(run) for run in learnt_runs(taught(ours, MANY)[-1])] == ["first", "no more"]
    with pytest.raises(RowError, match="marks nothing of the turns"):
        taught(written_by(marked.replace("m.role == 'user'", "m.role != 'user'")), MANY)
