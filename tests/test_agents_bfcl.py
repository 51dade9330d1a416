"""BFCL's function calls: which calls are right, and that a constrained model can write no invalid one."""

import json

import pytest

from llmjax.agents import bfcl
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.errors import UserError
from llmjax.infer import constrained

FUNCTIONS = [
    {"name": "math.power", "description": "A power.", "parameters": {"type": "dict", "properties": {"base": {"type": "float"}, "exponent": {"type": "integer"}, "unit": {"type": "string"}}, "required": ["base", "exponent"]}},
    {"name": "find", "description": "Rows.", "parameters": {"type": "dict", "properties": {"where": {"type": "dict", "properties": {"city": {"type": "string"}, "open": {"type": "boolean"}}}, "tags": {"type": "array", "items": {"type": "string"}, "enum": ["a", "b"]}}, "required": ["where"]}},
]  # fmt: skip
ACCEPTED = [
    {"math.power": {"base": [2, 2.0], "exponent": [3], "unit": ["m", ""]}},
    {"find": {"where": [{"city": ["New York", "NYC"], "open": ["", True]}], "tags": [["a"], ""]}},
]  # fmt: skip


@pytest.fixture
def row(tmp_path):
    question = {
        "id": "p_0",
        "question": [[{"role": "user", "content": "2^3, and find New York"}]],
        "function": FUNCTIONS,
    }
    (tmp_path / "parallel.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "parallel.answers.jsonl").write_text(json.dumps({"id": "p_0", "ground_truth": ACCEPTED}) + "\n")
    (one,) = bfcl.read("parallel", [tmp_path])
    return one


def answer(*calls):
    return json.dumps({"calls": [{"name": name, "arguments": arguments} for name, arguments in calls]})


POWER, FIND = ("math.power", {"base": 2.0, "exponent": 3}), ("find", {"where": {"city": "new-york"}})
WRONG = {
    "too few": answer(POWER), "too many": answer(POWER, FIND, FIND), "another value": answer(("math.power", {"base": 2, "exponent": 4}), FIND),
    "a value that is not accepted": answer(("math.power", {**POWER[1], "unit": "km"}), FIND), "none": answer(),
    "another object": answer(POWER, ("find", {"where": {"city": "NYC", "open": False}})), "a list": answer(POWER, ("find", {**FIND[1], "tags": ["a", "b"]})),
}  # fmt: skip
INVALID = {
    "an invented function": answer(POWER, ("search", {})), "an invented argument": answer(("math.power", {**POWER[1], "z": 1}), FIND),
    "a missing argument": answer(("math.power", {"base": 2}), FIND), "another type": answer(("math.power", {"base": "2", "exponent": 3}), FIND),
    "a truth value": answer(("math.power", {"base": True, "exponent": 3}), FIND), "an item that is no choice": answer(POWER, ("find", {**FIND[1], "tags": ["c"]})),
}  # fmt: skip


def test_calls_are_right_in_any_order_and_spelling(row):
    for text in (answer(POWER, FIND), answer(FIND, POWER), bfcl.gold(row), answer(("math.power", {**POWER[1], "unit": "M"}), ("find", {"where": {"city": "NYC", "open": True}, "tags": ["a"]}))):  # fmt: skip
        assert bfcl.score(row, text) == {"right": 1.0, "invalid": 0.0, "cut": 0.0}


@pytest.mark.parametrize("name", [*WRONG, *INVALID])
def test_other_calls_are_wrong_and_some_invalid(row, name):
    found = bfcl.score(row, {**WRONG, **INVALID}[name])
    assert found == {"right": 0.0, "invalid": float(name in INVALID), "cut": 0.0}


def test_text_that_is_no_answer_is_cut_and_no_call_is_right_where_none_fits(row):
    assert bfcl.score(row, answer(POWER)[:-3]) == {"right": 0.0, "invalid": 0.0, "cut": 1.0}
    assert [bfcl.score({**row, "accepted": None}, text)["right"] for text in (answer(), answer(POWER))] == [1.0, 0.0]


def test_the_schema_permits_every_right_call_and_no_invalid_one(row):
    pytest.importorskip("llguidance")
    tokenizer = byte_tokenizer()
    schema = json.dumps(bfcl.schema_of(row["functions"]))
    begun = constrained.compiled(constrained.vocabulary(tokenizer), "json_schema", schema)

    def writable(text: str) -> bool:
        state, ids = begun.deep_copy(), tokenizer.encode(json.dumps(json.loads(text), separators=(",", ":")))
        return state.try_consume_tokens(ids) == len(ids) and bool(state.is_accepting())

    assert all(map(writable, (answer(POWER, FIND), answer(), bfcl.gold(row))))
    assert not any(map(writable, INVALID.values()))


def test_missing_files_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"simple_python.jsonl"):
        bfcl.read("simple_python", [tmp_path])
