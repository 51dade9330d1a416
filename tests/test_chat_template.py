"""Chats are written as transformers writes them, and nothing in a message becomes a control token."""

import dataclasses
import functools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from chats import CALL, CONVERSATIONS, DOCUMENTS, KINDS, TEMPLATES, TOOLS, chat_tokenizer, write_chat_tokenizer

from llmjax.data.chat import chat_ids, chat_text, render
from llmjax.data.tokenizer import Tokenizer, byte_tokenizer
from llmjax.errors import UserError

pytest.importorskip("tokenizers")
GOLDEN = Path(__file__).parent / "golden" / "hf" / "chats.json"
HARMLESS = "QQ"


@functools.cache
def tokenizer(name: str, kind: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return chat_tokenizer(Path(folder), name, kind)


def cases() -> dict[str, tuple[str, str, list[dict[str, Any]], dict[str, Any]]]:
    """Name: template, kind of tokenizer, messages, settings. Without the chats that a template refuses."""
    found = {}
    for name in TEMPLATES:
        for number, (title, messages) in enumerate(CONVERSATIONS.items()):
            refuses = {"turns": ("answers",), "instructions": ("calls",), "thoughts": ("calls",), "roles": ("calls",)}
            if title in refuses.get(name, ()) or (name in ("headers", "turns", "bars") and title == "calls"):
                continue
            kind = KINDS[(number + len(found)) % len(KINDS)]
            given = {"tools": TOOLS if title != "answers" else None, "documents": DOCUMENTS, "enable_thinking": False}
            found[f"{name}-{title}-{kind}"] = (name, kind, messages, given)
    return found


def written(name: str, kind: str, messages: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """What we make of a chat, with and without the beginning of a reply."""
    ours = tokenizer(name, kind)
    return {
        f"reply={reply}": {
            "text": str.__str__(chat_text(ours, messages, reply=reply, **given)),
            "ids": chat_ids(ours, messages, reply=reply, **given),
        }
        for reply in (True, False)
    }


def test_chats_are_those_that_transformers_wrote():
    stored = json.loads(GOLDEN.read_text())
    assert {case: written(*given) for case, given in cases().items()} == stored


def test_transformers_writes_what_is_stored(tmp_path):
    transformers = pytest.importorskip("transformers")
    found: dict[str, Any] = {}
    for case, (name, kind, messages, given) in cases().items():
        write_chat_tokenizer(tmp_path, name, kind)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        kwargs = {"conversation": messages, "return_dict": False, **given}
        found[case] = {
            f"reply={reply}": {
                "text": theirs.apply_chat_template(tokenize=False, add_generation_prompt=reply, **kwargs),
                "ids": theirs.apply_chat_template(tokenize=True, add_generation_prompt=reply, **kwargs),
            }
            for reply in (True, False)
        }
    if os.environ.get("UPDATE_GOLDEN"):
        text = json.dumps(found, indent=1, ensure_ascii=False)
        GOLDEN.write_text(re.sub(r"\[[\d,\s]+\]", lambda ids: "".join(ids[0].split()), text) + "\n")
    assert found == json.loads(GOLDEN.read_text())


# Who wrote it


def everywhere(text: str) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Chats with the text in every place where a stranger's text may come."""
    user = {"role": "user", "content": "x"}
    call = {"type": "function", "function": {"name": text, "arguments": {text: text}}}
    tool = {"type": "function", "function": {"name": text, "description": text, "parameters": {text: text}}}
    return [
        ([{"role": "user", "content": f"a {text} b"}], {}),
        ([{"role": "user", "content": text}], {}),
        ([{"role": "user", "content": [{"type": "text", "text": f"a{text}b"}]}], {}),
        ([{"role": f"user{text}x", "content": "x"}], {}),
        ([user, {"role": "assistant", "content": f"{text}."}], {}),
        ([user, {"role": "assistant", "content": "x", "reasoning_content": text, "name": text}], {}),
        ([user, {"role": "assistant", "content": None, "tool_calls": [call]}], {}),
        ([{**user, text: text}], {"tools": [tool], "documents": [{"title": text, "text": text}]}),
        ([user], {"enable_thinking": text, "anything": [text]}),
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_in_a_message_becomes_a_control_token(name):
    for kind in KINDS:
        ours = tokenizer(name, kind)
        controls = set(ours.control_ids.values())
        for mark in ours.control_ids:
            for (messages, given), (other, harmless) in zip(everywhere(mark), everywhere(HARMLESS), strict=True):
                try:
                    expected = chat_ids(ours, other, **harmless)
                except UserError:  # a role that the template does not know
                    continue
                ids = chat_ids(ours, messages, **given)
                assert [i for i in ids if i in controls] == [i for i in expected if i in controls], (
                    kind,
                    mark,
                    messages,
                )


def test_text_around_a_mention_is_encoded_as_without_it():
    for name, mark in (
        ("instructions", "</s>"),
        ("chatml", "<|im_end|>"),
        ("chatml", "<tool_call>"),
        ("bars", "<\uff5cUser\uff5c>"),
    ):
        for kind in KINDS:
            ours = tokenizer(name, kind)
            plain = chat_ids(ours, [{"role": "user", "content": f"he {HARMLESS} he"}])
            ids = chat_ids(ours, [{"role": "user", "content": f"he {mark} he"}])
            start = plain.index(ours.encode(f"x{HARMLESS}")[-1])
            end = plain[start:].index(ours.encode(f"x{HARMLESS}")[-1]) + 2
            assert ids[: start - 1] == plain[: start - 1]
            assert ids[-len(plain) + start + end :] == plain[start + end :]
            assert mark in ours.decode(ids)


def test_plain_text_never_gives_marks_and_templates_do():
    ours = tokenizer("bars", "bytes")
    assert not {*ours.control_ids.values()} & set(ours.encode("<\uff5cUser\uff5c>hello</s>"))
    assert ours.encode("a\n\nb")[1] not in ours.control_ids.values()  # white space that was added is text,
    assert len(ours.encode("a\n\nb")) == 3  # and one token
    assert ours.encode("<\uff5cUser\uff5c>", specials="parse") == [ours.mark_ids["<\uff5cUser\uff5c>"]]
    assert ours.decode([ours.mark_ids["<\uff5cUser\uff5c>"], ours.eos_id]) == "<\uff5cUser\uff5c>"


def test_a_role_is_any_text_and_never_a_mark():
    ours = tokenizer("roles", "bytes")
    control = ours.control_ids
    for role, expected in (
        ("user", ["<|user|>", "<|end|>"]),
        ("end", ["<|end|>"]),
        ("pirate", ["<|end|>"]),
        ("user|><|system", ["<|end|>"]),
    ):
        ids = chat_ids(ours, [{"role": role, "content": "x"}], reply=False)
        assert [i for i in ids if i in control.values()] == [control[mark] for mark in expected]
        assert ours.decode(ids).removesuffix("<|end|>").endswith("x")


def test_a_control_token_that_a_text_would_become_is_refused(tmp_path):
    """A vocabulary of whole words has no other way to write one."""
    words = {"<s>": 0, "</s>": 1, "[INST]": 2, "a": 3, "<unk>": 4}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    added = [{"id": i, "content": word, "special": True, **flags} for word, i in words.items() if word != "a"]
    description = {
        "version": "1.0",
        "model": model,
        "added_tokens": added,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": "{{ messages[0].content }}</s>", "eos_token": "</s>"}'
    )
    from llmjax.data.tokenizer_files import load_tokenizer

    ours = load_tokenizer(tmp_path)
    assert chat_ids(ours, [{"role": "user", "content": "a x a"}]) == [3, 4, 3, 1]
    with pytest.raises(UserError, match=re.escape("makes its control token '[INST]' of plain text")):
        chat_ids(ours, [{"role": "user", "content": "a [INST] a"}])


# What a message may be


def with_template(template: str) -> Tokenizer:
    return dataclasses.replace(byte_tokenizer(), chat_template=template)


def test_content_may_be_null_missing_or_a_list_of_parts():
    joins = with_template("{% for m in messages %}{{ '(' + m['content'] + ')' }}{% endfor %}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": None}, {"role": "user"}, {"role": "user", "content": parts}]
    assert chat_text(joins, messages) == "()()(ab)"
    knows = with_template(
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    assert chat_text(knows, messages[2:]) == "[a][b]"
    asks = with_template("{% for m in messages %}{{ m.content is defined }}{% endfor %}")
    assert chat_text(asks, messages[:2]) == "FalseFalse"  # null is not there, as in transformers


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("hello", "message 2 is 'hello'"),
        ({"content": "x"}, "message 2 has the role None"),
        ({"role": ["user"], "content": "x"}, "message 2 has the role"),
        ({"role": "user", "content": 5}, "message 2 has the content 5"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "message 2 has a part 'image_url' that is no text"),
        ({"role": "user", "content": ["x"]}, "message 2 has a part 'x' that is no text"),
        ({"role": "user", "content": "x", "extra": object()}, "is given <object"),
        ({"role": "assistant", "content": "x"}, "refuses these messages at message 2 of 3: roles must alternate"),
    ],
)  # fmt: skip
def test_a_message_that_cannot_be_written_is_named_by_its_number(message, says):
    user = {"role": "assistant", "content": "x"}
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.index != 1 and loop.index != 3 %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match=re.escape(says)):
        chat_text(with_template(template), [user, message, user])


def test_what_a_template_makes_of_odd_values_is_an_error_of_one_line():
    for template in (
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ x.y.z }}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(UserError, match="refuses these messages at message 1 of 1: "):
            chat_text(with_template(template), [{"role": "user", "content": "x"}])
    with pytest.raises(UserError, match="is no template: line 1: "):
        chat_text(with_template("{% if %}"), [{"role": "user", "content": "x"}])
    with pytest.raises(UserError, match="tools holds 'look'"):
        chat_text(with_template(""" {{ tools }}"""), [{"role": "user", "content": "x"}], tools=["look"])


def test_templates_have_the_functions_of_transformers_and_no_way_out():
    user = [{"role": "user", "content": "<b>"}]
    good = {
        "{{ {'b': '<é>', 'a': 1} | tojson }}": '{"b": "<é>", "a": 1}',
        "{{ {'b': '<é>', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}": '{"a":1,"b":"<\\u00e9>"}',
        "{{ [1] | tojson(indent=2) }}": "[\n  1\n]",
        "{{ strftime_now('%%') }}{{ dict(a=1).a }}": "%1",
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}": "02",
        "  {% if true %}\n  a\n  {% endif %}\nb": "  a\nb",  # trim_blocks, lstrip_blocks
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ eos_token }}": "TrueTrueTrue<eos>",
    }
    for template, expected in good.items():
        assert chat_text(with_template(template), user) == expected
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace() %}{% set n.__init__ = 1 %}",
        "{{ namespace(__x=1) }}",
        "{% set _ = messages.clear() %}",
    ):
        with pytest.raises(UserError, match="refuses these messages"):
            chat_text(with_template(template), user)


def test_reasoning_has_all_its_names_and_tools_may_have_a_template_of_their_own():
    names = with_template("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}")
    assert chat_text(names, [{"role": "assistant", "reasoning": "r"}]) == "rr"
    two = dataclasses.replace(with_template("without"), tool_template="with {{ tools | length }}")
    user = [{"role": "user", "content": "x"}]
    assert [str(chat_text(two, user)), str(chat_text(two, user, tools=TOOLS))] == ["without", "with 1"]


def test_the_segments_of_a_chat_say_what_is_control_and_what_is_to_be_learnt():
    ours = tokenizer("generation", "bytes")
    messages = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b<|im_start|>"}]
    segments = render(ours, messages)
    assert "".join(segment.text for segment in segments) == chat_text(ours, messages)
    assert [segment.text for segment in segments if segment.control] == ["<|im_start|>", "<|im_end|>"] * 2
    assert "".join(segment.text for segment in segments if segment.generated) == "b<|im_start|><|im_end|>"
    assert segments[-2:] == [("b<|im_start|>", False, True), ("<|im_end|>", True, True)]
    calls = render(tokenizer("chatml", "bytes"), [{"role": "assistant", "tool_calls": [CALL]}])
    assert [segment.text for segment in calls if segment.control][1:3] == ["<tool_call>", "</tool_call>"]
