"""Every format of conversations becomes the same rows, and a broken row says what is wrong with it."""

import contextlib
import dataclasses
import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_config

from llmjax.data import records
from llmjax.data.conversations import Rejected, Row, RowError, read
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.errors import UserError
from llmjax.post.rows import _is_held_out, groups_of

DATA = Path("../shared/data/posttrain")
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def rows(tmp_path: Path, *records: Any, name: str = "chats.jsonl") -> list[Row | Rejected]:
    file = tmp_path / name
    if name.endswith(".json"):
        file.write_text(json.dumps(records))
    else:
        file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return list(read(file))


SAME = {
    "messages": {"messages": CHAT},
    "prompt and completion": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "Alpaca": {"instruction": "hi", "input": "", "output": "hello"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "H2O": {"id": "1", "parent_id": None, "instruction": "hi", "output": "hello"},
    "tree": {
        "message_tree_id": "1",
        "prompt": {
            "role": "prompter",
            "text": "hi",
            "replies": [{"role": "assistant", "text": "hello", "rank": 0, "replies": []}],
        },
    },
}


@pytest.mark.parametrize("name", SAME)
def test_one_conversation_in_every_format_is_the_same_messages(name, tmp_path):
    (row,) = rows(tmp_path, SAME[name])
    assert isinstance(row, Row)
    assert [*row.prompt, *row.answers[0]] == CHAT


PAIRS = {
    "with a prompt": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "go"}]},
    "an implicit prompt": {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "go"}]},
    "a repeated prompt": {"prompt": CHAT[:1], "chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "go"}]},
    "marks in a text": {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"},
    "two outputs": {"input": "hi", "output_1": "go", "output_2": "hello", "label": 2},
    "a ranking": {"prompt": CHAT[:1], "completions": [CHAT[1:], [{"role": "assistant", "content": "go"}]], "ranks": [1, 2]},
    "scores": {"prompt": CHAT[:1], "responses": [CHAT[1:], [{"role": "assistant", "content": "go"}]], "scores": [5, -1]},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_one_preference_in_every_format_is_the_same_pair(name, tmp_path):
    (row,) = rows(tmp_path, PAIRS[name])
    assert isinstance(row, Row)
    assert row.prompt == CHAT[:1]
    assert row.answers == (CHAT[1:], [{"role": "assistant", "content": "go"}])
    assert row.ranks[0] < row.ranks[1]


def test_an_implicit_prompt_of_texts_tears_no_word(tmp_path):
    (row,) = rows(tmp_path, {"chosen": "say it: interesting", "rejected": "say it: internal"})
    assert (row.prompt, row.answers) == ("say it: ", ("interesting", "internal"))


def test_unpaired_feedback_keeps_its_label_and_other_columns_go_with_a_prompt(tmp_path):
    good, bad = rows(tmp_path, *({"prompt": "a", "completion": "b", "label": label} for label in (True, False)))
    assert (good.good, bad.good) == (True, False)
    (row,) = rows(tmp_path, {"prompt": "2+2", "solution": "4", "level": 1})
    assert dict(row.columns) == {"solution": "4", "level": 1} and row.answers == ()


def test_a_tree_gives_the_conversation_along_the_best_answers_and_the_rankings(tmp_path):
    def reply(text: str, rank: int | None, *replies: Any) -> dict[str, Any]:
        return {"role": "assistant", "text": text, "rank": rank, "replies": list(replies)}

    asked = {"role": "prompter", "text": "why?", "replies": [reply("because", 0)]}
    root = {"role": "prompter", "text": "hi", "replies": [reply("worse", 1), reply("best", 0, asked)]}
    ranking, chat = rows(tmp_path, {"message_tree_id": "1", "prompt": root})
    assert ranking.ranks == (1.0, 0.0) and ranking.answers[1][0]["content"] == "best"
    assert [m["content"] for m in chat.answers[0]] == ["hi", "best", "why?", "because"]


def test_rows_that_name_their_parents_become_one_conversation_a_leaf(tmp_path):
    found = rows(
        tmp_path,
        {"id": 1, "parent_id": None, "instruction": "a", "output": "b"},
        {"id": 2, "parent_id": 1, "instruction": "c", "output": "d"},
        {"id": 3, "parent_id": 1, "instruction": "e", "output": "f"},
        {"id": 4, "parent_id": 9, "instruction": "g", "output": "h"},
    )
    assert ["".join(m["content"] for m in row.answers[0]) for row in found[:2]] == ["abcd", "abef"]
    assert isinstance(found[2], Rejected) and "'9' is not in the file" in found[2].reason


def test_rows_are_told_apart_whose_ids_are_0_or_were_made_fractions_by_a_table(tmp_path):
    parents: list[tuple[str, Any]] = [
        ("rows.jsonl", 0),
        ("rows.jsonl", 0.0),
        ("rows.jsonl", "0.0"),
        ("rows.jsonl", "0"),
    ]
    for name, parent in parents:
        first = {"id": 0, "parent_id": None, "instruction": "a", "output": "b"}
        (row,) = rows(tmp_path, first, {"id": 1, "parent_id": parent, "instruction": "c", "output": "d"}, name=name)
        assert isinstance(row, Row) and "".join(m["content"] for m in row.answers[0]) == "abcd", parent
    (nameless,) = rows(tmp_path, {**first, "id": None})
    assert isinstance(nameless, Rejected) and nameless.reason == "the row has no id"


def test_a_table_has_numbers_and_variables_as_texts_and_an_open_quote_is_an_error_with_its_row(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text(
        'prompt, chosen,rejected,margin,chat_template_kwargs\na,b,c,0.5,"{""x"": 1}"\na,b,c,,\na,b,c,much,\n'
    )
    known, plain, wrong = read(file)
    assert isinstance(known, Row) and (known.margin, known.variables) == (0.5, {"x": 1})
    assert isinstance(plain, Row) and (plain.margin, plain.variables) == (0.0, {})
    assert isinstance(wrong, Rejected) and wrong.reason == "margin is 'much': give a number"
    file.write_text("input,output_1,output_2,label\na,b,c,2\n")
    (row,) = read(file)
    assert isinstance(row, Row) and [answer[0]["content"] for answer in row.answers] == ["c", "b"]
    file.write_text('prompt,completion\na,b\na,"b\na,b\na,b\n')
    with pytest.raises(UserError, match="pairs.csv cannot be read: row 2: .*write a quote twice"):
        list(read(file))


def test_rows_of_one_tree_hold_parts_of_each_other_and_are_held_out_together(tmp_path):
    def tree(number: int) -> dict[str, Any]:
        end = {
            "role": "prompter",
            "text": f"more {number}",
            "replies": [{"role": "assistant", "text": "end", "rank": 0, "replies": []}],
        }
        answers = [{"role": "assistant", "text": f"{text} {number}", "rank": rank, "replies": replies}
                   for rank, (text, replies) in enumerate((("best", [end]), ("worse", [])))]  # fmt: skip
        return {
            "message_tree_id": str(number),
            "prompt": {"role": "prompter", "text": f"ask {number}", "replies": answers},
        }

    parents: list[dict[str, Any]] = []
    for number in range(30):
        parents += [
            {"id": f"{number}", "parent_id": None, "instruction": f"ask {number}", "output": "b"},
            *({"id": f"{number}{leaf}", "parent_id": f"{number}", "instruction": leaf, "output": "d"} for leaf in "xy"),
        ]
    for given in ([tree(number) for number in range(30)], parents):
        found = rows(tmp_path, *given)
        sides: dict[str, list[bool]] = {}
        for row in found:
            assert isinstance(row, Row)
            sides.setdefault(row.root, []).append(_is_held_out(row, 50.0))
        assert len(sides) == 30 and all(len(side) == 2 and len(set(side)) == 1 for side in sides.values())
        assert 5 < sum(side[0] for side in sides.values()) < 25


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown role": ({"messages": [CHAT[0], {"role": "wizard", "content": "x"}]}, "message 2 has the role 'wizard'"),
    "an empty content": ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "message 2, of the assistant, is empty"),
    "no messages": ({"messages": []}, "there are no messages"),
    "messages of another type": ({"messages": 5}, "there are no messages"),
    "chosen is rejected": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    "nothing behind the prompt": ({"prompt": "a", "chosen": "a", "rejected": "ab"}, "chosen is empty"),
    "ties": ({"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}, "all answers tie"),
    "too few ranks": ({"prompt": "a", "completions": ["b", "c"], "ranks": [1]}, "a number for each of the 2 answers"),
    "a call without an answer": (
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"id": "1"}]}, CHAT[0], CHAT[1]]},
        "message 2 calls a tool, and no answer follows",
    ),
    "an answer without a call": ({"messages": [CHAT[0], {"role": "tool", "content": "x"}]}, "no call stands before it"),
    "tools that are no JSON": ({"messages": CHAT, "tools": "{"}, "tools is a text that is no JSON"),
    "calls that are no objects": (
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"function": "f"}]}, CHAT[1]]},
        "message 2 has the call {'function': 'f'}: give a list of",
    ),
    "variables that are no object": ({"messages": CHAT, "chat_template_kwargs": "no"}, "chat_template_kwargs is a text that is no JSON"),
    "variables in a list": ({"messages": CHAT, "chat_template_kwargs": [1]}, "chat_template_kwargs is [1]: give an object"),
    "variables that the row says": ({"messages": CHAT, "chat_template_kwargs": {"reply": 1}}, "chat_template_kwargs has reply"),
    "a prompt that is a number": ({"prompt": 5, "completion": "b"}, "prompt is 5: give a text, or a list of messages"),
    "a margin beyond all numbers": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "give a number"),
    "a second text that is none": ({"text": "a", "text_b": ["b"], "label": "x"}, "text_b is ['b']: give a text"),
    "a better output that is a list": ({"input": "a", "output_1": "b", "output_2": "c", "label": [1]}, "give 1 or 2"),
    "a label that is no label": ({"prompt": "a", "completion": "b", "label": "good"}, "label is 'good'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_costs_itself_and_says_what_is_wrong(name, tmp_path):
    record, reason = BROKEN[name]
    found = rows(tmp_path, record)
    assert isinstance(found[0], Rejected) and reason in found[0].reason and found[0].number == 1


def test_a_file_of_mixed_formats_and_lines_that_are_no_json_say_so_by_number(tmp_path):
    good, mixed, torn, listed = rows(tmp_path, {"messages": CHAT}, SAME["Alpaca"], '{"messages"', "[1]")
    assert isinstance(good, Row)
    assert mixed.reason.startswith("the row has the columns of Alpaca, and the file began as messages")
    assert (torn.number, listed.number) == (3, 4) and "no JSON" in torn.reason and "a list" in listed.reason


def test_files_that_are_nothing_are_refused_with_what_to_give(tmp_path):
    with pytest.raises(UserError, match="no known format: give messages"):
        rows(tmp_path, {"question": "a"})
    with pytest.raises(UserError, match="has no rows"):
        rows(tmp_path)
    with pytest.raises(UserError, match="has no rows: row 1 is no JSON object but a list; give"):
        rows(tmp_path, "[1]")
    torn = tmp_path / "chats.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"messages": []}\n' * 999)[:40])
    with pytest.raises(UserError, match="cannot be read"):
        list(read(torn))
    with pytest.raises(UserError, match="has no file of conversations"):
        records.files_of([str(tmp_path / "none")])


def test_the_same_rows_come_from_every_kind_of_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    both = [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}]
    wanted = rows(tmp_path, *both)
    assert rows(tmp_path, *both, name="chats.json") == wanted
    parquet.write_table(pyarrow.Table.from_pylist(both), tmp_path / "chats.parquet")
    assert list(read(tmp_path / "chats.parquet")) == wanted
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress((tmp_path / "chats.jsonl").read_bytes()))
    assert list(read(tmp_path / "chats.jsonl.gz")) == wanted
    assert len(records.files_of([str(tmp_path)])) == 4


@pytest.mark.skipif(not DATA.exists(), reason="needs the published conversations")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("instruct/gpteacher_codegen.json.gz", 4535),
        ("preference/hh_harmless_test.jsonl.gz", 2312),
        ("preference/mt-bench_human.json.gz", 200),
    ],
)
def test_published_files_are_read(name, count):
    found = list(read(DATA / name))
    assert len(found) == count
    assert sum(isinstance(row, Rejected) for row in found) <= 0.02 * count


@pytest.mark.skipif(not DATA.exists(), reason="needs the published conversations")
def test_the_trees_of_open_assistant_have_212_rankings():
    found = list(read(DATA / "instruct/oasst_100_trees.jsonl.gz"))
    assert sum(len(row.ranks) > 1 for row in found if isinstance(row, Row)) == 212


def test_answers_that_a_teacher_wrote_to_their_end_are_rows(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"id": 1, "prompt": "ask", "text": "said", "finish": "eos", "tokens": 2, "log_probability": -1.0}]
    rows += [{**rows[0], "id": 2, "finish": "length"}, {"id": 3, "error": "too long"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, cut, failed = read(path)
    assert (whole.prompt, whole.answers) == ("ask", ("said",))
    assert "ended by 'length'" in cut.reason and "lacks columns of written" in failed.reason


def test_labels_of_texts_are_names_or_numbers(tmp_path):
    path = tmp_path / "labelled.jsonl"
    rows = [{"text": "a", "label": 0}, {"text": "a", "text_b": "b", "label": "yes"}, {"text": "a", "label": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    number, name, missing = read(path)
    assert (number.prompt, number.label, number.second) == ("a", 0, "") and (name.label, name.second) == ("yes", "b")
    assert "give the name of a class, or a number" in missing.reason


ODD: tuple[Any, ...] = (
    None,
    "",
    "[",
    "\ud800",
    5,
    0.5,
    math.nan,
    10**400,
    [],
    [5],
    {},
    {"a": 1},
    [{"function": "f"}],
    {"reply": 1},
)


def spoilt(value: Any) -> Iterator[Any]:
    """The value with each of its parts, and itself, replaced by each of ODD."""
    yield from ODD
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for part in spoilt(value[key]):
            copy = value.copy()
            copy[key] = part
            yield copy


def test_whatever_stands_in_a_row_costs_at_most_that_row_with_its_reason(tmp_path):
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}{% endfor %}"
    ours = dataclasses.replace(byte_tokenizer(), chat_template=template, prefix_ids=())
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    called = {"messages": [CHAT[0], call, {"role": "tool", "content": "1"}, CHAT[1]]}
    judged = {"prompt": "a", "completion": "b", "label": True, "chat_template_kwargs": {"x": 1}}
    compared = {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}
    objectives = {name: tiny_config(data__format="conversations", objective__name=name, rollout__samples=2, model__value_head=True)
                  for name in ("causal", "preference", "unpaired", "policy")}  # fmt: skip
    for good in (*SAME.values(), *PAIRS.values(), called, judged, compared, {"prompt": "a", "answer": "1"}):
        made = [one for one in spoilt(good) if isinstance(one, dict) and one]
        found = rows(tmp_path, good, *made)
        assert {row.number for row in found} == set(range(1, len(made) + 2)) or "parent_id" in good
        for row in found:
            for c in objectives.values() if isinstance(row, Row) else ():
                with contextlib.suppress(RowError, UserError):
                    assert all(len(e.ids) for group in groups_of(ours, row, c) for e in group.examples)
