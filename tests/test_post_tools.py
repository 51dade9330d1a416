"""Tools that a policy calls: what they are told to be, what they answer, and which ids they add."""

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
import pytest
from test_acceptance import tokenizer

from llmjax.data.chat import chat_ids
from llmjax.errors import UserError
from llmjax.post import tools

USER = {"role": "user", "content": "2+3?"}


def add(a: int, b: int = 1, how: Literal["exact", "rough"] = "exact", more: list[float] | None = None) -> int:
    """Add two numbers.

    The rest is for people.
    """
    return a + b


def fails(text: str) -> str:
    raise KeyError(text)


def untyped(a):
    return a


NAMES = ("test_post_tools:add", "test_post_tools:fails")


def test_a_tools_schema_comes_from_its_signature():
    inside = tools.parse(NAMES[:1])["add"].schema["function"]
    assert inside["name"] == "add" and inside["description"] == "Add two numbers."
    assert inside["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "integer"},
            "how": {"enum": ["exact", "rough"]},
            "more": {"type": "array", "items": {"type": "number"}},
        },
        "required": ["a"],
    }


def test_calls_are_answered_also_those_that_are_wrong_and_a_tool_that_raises_gives_its_error():
    made = tools.parse(NAMES)
    text = (
        'well <tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><tool_call>{"name"</tool_call>'
    )
    calls = tools.calls_of(text)
    assert calls == [("add", {"a": 2, "b": 3}), ("", '{"name"')]
    answer = functools.partial(tools.answer_to, made)
    assert answer(*calls[0]) == "5" and answer(*calls[1]).startswith("the call is no JSON")
    assert answer("fails", {"text": "why"}) == "KeyError: 'why'"
    assert answer("add", {}).startswith("TypeError") and answer("add", [1]).startswith("TypeError")
    assert answer("other", {}) == "there is no tool 'other'; there are add, fails"


def sampled(text: str) -> list[int]:
    ours = tokenizer("chatml")
    return [*ours.encode(text), ours.eos_ids[-1]]


def test_what_was_sampled_stays_and_the_tools_answer_is_written_behind_it_as_the_conversation_has_it():
    ours, made = tokenizer("chatml"), tools.parse(NAMES[:1])
    schemas = [tool.schema for tool in made.values()]
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
    reply = tools.make_reply(ours, made, [[USER]], turns=3)
    prompt = chat_ids(ours, [USER], tools=schemas)
    ids = sampled(call)
    ids += reply(0, ids)
    turn = {"role": "assistant", "content": call}
    whole = [USER, turn, {"role": "tool", "name": "add", "content": "5"}]
    # What is a mark in the template is text where the model wrote it so: the sampled ids are kept as they are.
    assert prompt + ids == chat_ids(ours, whole, tools=schemas)
    again = sampled(call)
    more = reply(0, [*ids, *again])
    assert prompt + ids + again + more == chat_ids(ours, [*whole, turn, whole[-1]], tools=schemas)
    assert reply(0, [*ids, *again, *more, *again]) is None, "the third turn is the last"
    other = tools.make_reply(ours, made, [[USER]], turns=3)
    assert other(0, sampled("it is 5")) is None


def test_a_template_that_rewrites_turns_and_functions_without_types_are_refused():
    with pytest.raises(UserError, match="give one that keeps turns"):
        tools.check(tokenizer("thoughts"), tools.parse(NAMES))
    tools.check(tokenizer("chatml"), tools.parse(NAMES))
    for given, message in (
        (["test_post_tools:untyped"], "annotate it"),
        (["test_post_tools:none"], "is no tool"),
        ([NAMES[0], NAMES[0]], "two tools called add"),
    ):
        with pytest.raises(UserError, match=message):
            tools.parse(given)


def test_a_turn_that_ends_with_the_next_roles_mark_has_it_once():
    made = tokenizer("roles")
    template = "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}{% endfor %}" \
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"  # fmt: skip
    mark = made.control_ids["<|user|>"]
    ours = dataclasses.replace(made, chat_template=template, more_eos_ids=(mark,))
    found: Any = tools.parse(NAMES[:1])
    reply = tools.make_reply(ours, found, [[USER]], turns=2)
    ids = [*ours.encode('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'), mark]
    behind = reply(0, ids)
    assert behind == [*ours.encode("2"), ours.control_ids["<|assistant|>"]]
    np.testing.assert_equal(behind.count(mark), 0)
