"""Rows that are odd and right are read as they are meant, and rows that are wrong are refused with what to mend."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llmjax.data.conversations import Rejected, Row, read
from llmjax.errors import UserError

ASK, ANSWER, WORSE = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "assistant", "content": "go"},
)
SYSTEM = {"role": "system", "content": "be kind"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "there"}}}
TREE = {"message_tree_id": "1"}


def found(tmp_path: Path, *records: Any, name: str = "chats.jsonl") -> list[Row | Rejected]:
    file = tmp_path / name
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return list(read(file))


def node(role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), **more}


def speaks(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": said} for speaker, said in turns]


CONVERSATIONS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "null beside a content": ({"messages": [ASK, {**ANSWER, "tool_calls": None, "name": None}], "id": 1}, [ASK, ANSWER]),
    "a system message that says nothing": ({"messages": [{**SYSTEM, "content": ""}, ASK, ANSWER]}, [{**SYSTEM, "content": ""}, ASK, ANSWER]),
    "a system column": ({"system": "be kind", "messages": [ASK, ANSWER]}, [SYSTEM, ASK, ANSWER]),
    "a system column that is a message too": ({"system": "be kind", "messages": [SYSTEM, ASK, ANSWER]}, [SYSTEM, ASK, ANSWER]),
    "ShareGPT with a system column": ({"system": "be kind", "conversations": speaks(("human", "hi"), ("gpt", "hello"))}, [SYSTEM, ASK, ANSWER]),
    "ShareGPT in other letters": ({"conversations": speaks(("System", "be kind"), ("USER", "hi"), ("GPT", "hello"))}, [SYSTEM, ASK, ANSWER]),
    "ShareGPT with a call": (
        {"conversations": speaks(("human", "hi"), ("function_call", json.dumps({"name": "look", "arguments": {"where": "there"}})), ("observation", "x"), ("gpt", "hello"))},
        [ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "x"}, ANSWER],
    ),
    "ShareGPT as JSON in a text": ({"conversations": json.dumps(speaks(("human", "hi"), ("gpt", "hello")))}, [ASK, ANSWER]),
    "a call in the text of a turn": (
        {"messages": [ASK, {"role": "assistant", "content": '<tool_call>\n{"name": "look"}\n</tool_call>'}, {"role": "tool", "content": "x"}, ANSWER]},
        [ASK, {"role": "assistant", "content": '<tool_call>\n{"name": "look"}\n</tool_call>'}, {"role": "tool", "content": "x"}, ANSWER],
    ),
    "Alpaca with an input of null": ({"instruction": "hi", "input": None, "output": "hello"}, [ASK, ANSWER]),
    "Alpaca with a system and history": (
        {"instruction": "hi", "output": "hello", "system": "be kind", "history": [["a", "b"]]},
        [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, ASK, ANSWER],
    ),
    "a prompt that is one message": ({"prompt": ASK, "completion": ANSWER}, [ASK, ANSWER]),
    "a prompt that is JSON in a text": ({"prompt": json.dumps([ASK]), "completion": json.dumps([ANSWER])}, [ASK, ANSWER]),
    "a tree that ends with a question": (
        {**TREE, "prompt": node("prompter", "hi", node("assistant", "hello", node("prompter", "and?"), rank=0), node("assistant", "x", rank=None, deleted=True))},
        [ASK, ANSWER],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_odd_row_is_the_conversation_that_it_means(name, tmp_path):
    record, expected = CONVERSATIONS[name]
    (row,) = found(tmp_path, record)
    assert isinstance(row, Row), row
    assert [*row.prompt, *row.answers[0]] == expected


PAIRS: dict[str, dict[str, Any]] = {
    "a text and whole conversations": {"prompt": "hi", "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE], "messages": [ASK, ANSWER]},
    "a text and messages": {"prompt": "hi", "chosen": [ANSWER], "rejected": [WORSE]},
    "single messages": {"prompt": [ASK], "chosen": ANSWER, "rejected": WORSE},
    "ShareGPT": {"conversations": speaks(("human", "hi")), "chosen": {"from": "gpt", "value": "hello"}, "rejected": {"from": "gpt", "value": "go"}},
    "an implicit prompt with null fields": {"prompt": None, "chosen": [{**ASK, "name": None}, ANSWER], "rejected": [ASK, WORSE]},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_an_odd_pair_has_its_prompt_once(name, tmp_path):
    (row,) = found(tmp_path, PAIRS[name])
    assert isinstance(row, Row), row
    assert (row.prompt, row.answers) == ([ASK], ([ANSWER], [WORSE]))


def test_a_pair_keeps_what_stands_before_its_answers(tmp_path):
    more = [SYSTEM, ASK, ANSWER, {"role": "user", "content": "and?"}]
    pair = {"chosen": [*more, ANSWER], "rejected": [*more, WORSE]}
    turns = {"prompt": [ASK], "chosen": [ANSWER, ASK, ANSWER], "rejected": [ANSWER, ASK, WORSE]}
    texts = {"chosen": "hello", "rejected": "go"}
    rows = found(tmp_path, pair, {**pair, "prompt": [more[3]]}, turns, {**texts, "instruction": "hi", "input": "you"},
                 {**texts, "question": "hi", "system": "be kind"})  # fmt: skip
    assert [row.prompt if isinstance(row, Row) else row.reason for row in rows] == [
        more, more, [ASK], [{"role": "user", "content": "hi\n\nyou"}], [SYSTEM, ASK],
    ]  # fmt: skip
    assert rows[2].answers[0] == [ANSWER, ASK, ANSWER]


def test_labels_and_ranks_are_read_in_every_way_of_writing_them(tmp_path):
    labels = [0, 1, 0.0, True, "True", "false", "1"]
    rows = found(tmp_path, *({"prompt": "a", "completion": "b", "label": label} for label in labels))
    assert [row.good for row in rows] == [False, True, False, True, True, False, True]
    (row,) = found(tmp_path, {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 2, 2]})
    assert row.ranks == (1.0, 2.0, 2.0)


@pytest.mark.parametrize("tools", [[{"name": "look"}], json.dumps([{"name": "look"}]), [json.dumps({"name": "look"})]])
def test_tools_may_be_json_in_texts(tools, tmp_path):
    (row,) = found(tmp_path, {"messages": [ASK, ANSWER], "tools": tools})
    assert row.tools == [{"name": "look"}]
    (row,) = found(tmp_path, {"messages": [ASK, ANSWER], "tools": " "})
    assert row.tools is None


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "blanks": ({"messages": [ASK, {**ANSWER, "content": " \n"}]}, "message 2, of the assistant, is empty"),
    "parts that say nothing": ({"messages": [ASK, {**ANSWER, "content": [{"type": "text", "text": ""}]}]}, "message 2, of the assistant, is empty"),
    "two systems": ({"system": "a", "messages": [SYSTEM, ASK, ANSWER]}, "keep one"),
    "a system beside a text": ({"system": "a", "prompt": "b", "completion": "c"}, "beside a prompt that is a plain text"),
    "a system that is no text": ({"system": 5, "messages": [ASK, ANSWER]}, "system is 5: give a text"),
    "a call that is no JSON": ({"conversations": speaks(("human", "hi"), ("function_call", "look()"))}, "which is no JSON"),
    "a call without a name": ({"conversations": speaks(("human", "hi"), ("function_call", "{}"))}, "give JSON with name and arguments"),
    "an input that is no text": ({"instruction": "a", "input": float("nan"), "output": "b"}, "input is nan: give a text"),
    "history that is none": ({"instruction": "a", "output": "b", "history": [["c"]]}, "give a list of pairs"),
    "answers to other questions": ({"chosen": [ASK, ANSWER], "rejected": [{**ASK, "content": "no"}, WORSE]}, "chosen begins with a message of the user"),
    "a prompt of its own": ({"prompt": "what?", "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]}, "prompt is not what chosen and rejected begin with"),
    "an answer that is blank": ({"prompt": "a", "chosen": " ", "rejected": "b"}, "chosen is empty"),
    "an answer of null": ({"prompt": "a", "completion": None}, "completion is empty"),
    "a blank answer of several": ({"prompt": "a", "completions": ["b", ""]}, "answer 2 of completions is empty"),
    "the same answer better and worse": ({"prompt": "a", "completions": ["b", "c", "b"], "ranks": [1, 2, 3]}, "answers 1 and 3 of completions are the same"),
    "a score of NaN": ({"prompt": "a", "completions": ["b", "c"], "scores": [float("nan"), 1]}, "give numbers"),
    "a margin of infinity": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("inf")}, "margin is inf"),
    "a label of null": ({"prompt": "a", "completion": "b", "label": None}, "label is None"),
    "a tree of deleted answers": ({**TREE, "prompt": node("prompter", "hi", node("assistant", "x", deleted=True))}, "no answer that is not deleted"),
    "a rank that is a text": ({**TREE, "prompt": node("prompter", "hi", node("assistant", "x", rank="first"))}, "has the rank 'first'"),
    "a tree without a role": ({**TREE, "prompt": {"text": "hi"}}, "the tree lacks 'role'"),
    "a tree that is a text": ({**TREE, "prompt": "hi"}, "a message that is none"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_is_wrong_costs_itself_and_says_why(name, tmp_path):
    record, reason = BROKEN[name]
    (row,) = found(tmp_path, record)
    assert isinstance(row, Rejected) and reason in row.reason and row.number == 1, row


def test_rows_of_h2o_that_are_broken_are_told(tmp_path):
    first = {"id": 1, "parent_id": None, "instruction": "a", "output": "b"}
    rows = found(tmp_path, "{", first, "[", {**first, "output": "c"}, {"id": 3})
    told = {row.number: row.reason for row in rows if isinstance(row, Rejected)}
    assert sorted(told) == [1, 3, 4, 5] and "no JSON" in told[3] and "that of row 2 too" in told[4]
    assert [row.answers[0][1]["content"] for row in rows if isinstance(row, Row)] == ["b"]


# Files


LINE = json.dumps({"messages": [ASK, ANSWER]})
SPACED = json.dumps({"messages": [ASK, {**ANSWER, "content": "a\u2028b\x85c"}]}, ensure_ascii=False)
FILES: dict[str, tuple[str, bytes, list[str]]] = {  # name, bytes, and what the assistant says in each row, or why there is none
    "marks in the middle": ("a.jsonl", f"\ufeff{LINE}\n\ufeff{LINE}\n".encode(), ["hello", "hello"]),
    "line ends of Windows": ("a.jsonl", f"{LINE}\r\n\r\n{LINE}\r\n".encode(), ["hello", "hello"]),
    "UTF-16 as PowerShell writes it": ("a.jsonl", f"{LINE}\r\n".encode("utf-16"), ["hello"]),
    "UTF-16 in gzip": ("a.json.gz", gzip.compress(f"[{LINE}]".encode("utf-16")), ["hello"]),
    "lines in a file of JSON": ("a.json", f"{SPACED}\n{LINE}\n".encode(), ["a\u2028b\x85c", "hello"]),
    "a byte of Latin-1": ("a.jsonl", LINE.replace("hello", "h\xe9").encode("latin-1") + f"\n{LINE}".encode(), ["no UTF-8", "hello"]),
    "a byte of Latin-1 in a list": ("a.json", b"[" + LINE.replace("hello", "h\xe9").encode("latin-1") + f",{LINE}]".encode(), ["no UTF-8", "hello"]),
    "brackets without an end": ("a.jsonl", f"{LINE}\n{'[' * 100_000}\n".encode(), ["hello", "no JSON"]),
    "a table": ("a.csv", codecs.BOM_UTF8 + b"instruction,output\r\nhi,hello\r\nhi,a,b\r\nhi,\xe9\r\n", ["hello", "more fields than the header", "no UTF-8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_in_every_form_that_tools_write(name, tmp_path):
    file, data, expected = FILES[name]
    (tmp_path / file).write_bytes(data)
    said = [row.answers[0][-1]["content"] if isinstance(row, Row) else row.reason for row in read(tmp_path / file)]
    assert len(said) == len(expected) and all(map(str.__contains__, said, expected)), said


def test_parquet_fills_no_row_with_the_fields_of_others(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    answered = [ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "x"}, ANSWER]
    other = {"type": "function", "function": {"name": "go", "arguments": {"by": "car"}}}
    rows = [{"messages": answered}, {"messages": [ASK, {"role": "assistant", "tool_calls": [other]}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.answers[0] for row in read(tmp_path / "a.parquet")] == [row["messages"] for row in rows]
    table = pyarrow.table({"prompt": [b"hi"], "completion": pyarrow.array([b"h\xc3\xa9"], pyarrow.binary())})
    parquet.write_table(table, tmp_path / "b.parquet")
    (row,) = read(tmp_path / "b.parquet")
    assert (row.prompt, row.answers) == ("hi", ("h\u00e9",))


def test_a_damaged_archive_is_named(tmp_path):
    data = bytearray(gzip.compress(f"{LINE}\n".encode() * 99))
    data[20:40] = b"x" * 20
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        list(read(tmp_path / "a.jsonl.gz"))
