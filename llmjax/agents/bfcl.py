"""Function calling by the data of BFCL (Patil et al. 2025): does a model write the call that a question asks for, or none?

A model answers {"calls": [...]} under a schema of the question's own functions, so it cannot write a call that is invalid. A call is
right if it names the function, gives every argument that is needed, and each value is one of those that are accepted; strings are
compared without case, white space and punctuation. Several calls are right in any order. Of questions to which no function belongs,
no call is right.

The files of a category are CATEGORY.jsonl (id, question, function) and CATEGORY.answers.jsonl (id, ground_truth).
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax.agents.schemas import narrowed, problem, undescribed
from llmjax.errors import UserError
from llmjax.eval import local_data
from llmjax.eval.leaderboard import TaskScore
from llmjax.eval.statistics import mean
from llmjax.infer import asking
from llmjax.infer.language_model import LanguageModel

NONE = ("irrelevance",)  # categories without answers: no call is right
LENGTH, NEW_TOKENS = 2048, 384
MOST = 16  # calls of an answer
SYSTEM = """You answer with the calls of functions that the user's request needs, as JSON: {"calls": [{"name": ..., "arguments": {...}}]}. \
If none of the functions fits the request, the list is empty.
Functions:
"""
Call = tuple[str, Mapping[str, Any]]


def read(category: str, folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The questions of a category: id, messages, functions (name -> schema), shown, and accepted (None: no call is right).

    Raises UserError if no folder has its files.
    """
    for folder in map(Path, folders):
        if (folder / f"{category}.jsonl").is_file():
            break
    else:
        raise UserError(f"no questions of BFCL's {category}: give --data DIR, a folder with {category}.jsonl")
    answers: dict[str, Any] = {}
    if category not in NONE:
        answers = {row["id"]: row["ground_truth"] for row in local_data.read(folder / f"{category}.answers.jsonl")}
    found = []
    for row in local_data.read(folder / f"{category}.jsonl"):
        functions = {one["name"]: _schema(one["parameters"]) for one in row["function"]}
        shown = "\n".join(
            f"- {one['name']}: {' '.join(one['description'].split())} Arguments: {json.dumps(functions[one['name']]['properties'])}"
            for one in row["function"]
        )
        found.append(
            {"id": row["id"], "messages": row["question"][0], "functions": functions, "shown": shown, "accepted": answers.get(row["id"])}
        )  # fmt: skip
    return found


def schema_of(functions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of an answer to a question with these functions."""
    calls = [
        {
            "type": "object", "properties": {"name": {"const": name}, "arguments": undescribed(schema)},
            "required": ["name", "arguments"], "additionalProperties": False,
        }
        for name, schema in functions.items()
    ]  # fmt: skip
    properties = {"calls": {"type": "array", "items": {"anyOf": calls}, "maxItems": MOST}}
    return {"type": "object", "properties": properties, "required": ["calls"], "additionalProperties": False}


def prompt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages that a model gets."""
    own = "\n\n".join([*(m["content"] for m in row["messages"] if m["role"] == "system"), SYSTEM + row["shown"]])
    rest = [message for message in row["messages"] if message["role"] != "system"]
    return [{"role": "system", "content": own}, *rest]


def score(row: Mapping[str, Any], text: str) -> dict[str, float]:
    """Of an answer: whether it is right, and whether it is cut (no JSON) or has an invalid call."""
    calls = calls_of(text)
    wrong = [call for call in calls or () if invalid(row["functions"], call)]
    right = calls is not None and not wrong and matches(calls, row["accepted"])
    return {"right": float(right), "invalid": float(bool(wrong)), "cut": float(calls is None)}


def calls_of(text: str) -> list[Call] | None:
    """The calls in an answer; None: it is not of that form."""
    try:
        return [(str(one["name"]), one["arguments"]) for one in json.loads(text)["calls"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def invalid(functions: Mapping[str, Mapping[str, Any]], call: Call) -> str:
    """Why a call cannot be made; "" if it can."""
    name, arguments = call
    return problem(arguments, functions[name]) if name in functions else f"there is no function {name!r}"


def matches(calls: Sequence[Call], accepted: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether calls are those that are accepted, in any order."""
    left = list(calls)
    for one in accepted or ():
        ((name, values),) = one.items()
        fitting = next((call for call in left if call[0] == name and _fits_all(call[1], values)), None)
        if fitting is None:
            return False
        left.remove(fitting)
    return not left


def gold(row: Mapping[str, Any]) -> str:
    """An answer with the first of the values that are accepted, and without what may be absent."""
    calls = [
        {"name": name, "arguments": _first_of_all(values, row["functions"][name]["required"])}
        for one in row["accepted"] or () for name, values in one.items()
    ]  # fmt: skip
    return json.dumps({"calls": calls})


def evaluate(category: str, model: LanguageModel, folders: Sequence[str | Path], *, limit: int = 0) -> TaskScore:
    """The scores of a model's greedy answers to a category."""
    rows = read(category, folders)
    return scores(category, rows[:limit] if limit else rows, model)


def scores(category: str, rows: Sequence[Mapping[str, Any]], model: LanguageModel, *, free: bool = False) -> TaskScore:
    """The scores of a model; with `free` it writes without a schema."""
    engine = model.engine(slots=4, length=min(LENGTH, model.config.model.max_length))
    jobs = [(number, functools.partial(_asked, row, free)) for number, row in enumerate(rows)]
    texts = {one.key: one.result or "" for one in asking.run(engine, jobs)}
    items = [{"id": row["id"], **score(row, texts[n]), "text": texts[n]} for n, row in enumerate(rows)]
    metrics = {name: mean([item[name] for item in items]) for name in ("right", "invalid", "cut")}
    return TaskScore(f"bfcl_{category}", 0, "right", metrics, items)


def _asked(row: Mapping[str, Any], free: bool) -> asking.Conversation[str]:
    schema = "" if free else json.dumps(schema_of(row["functions"]))
    return (yield asking.Ask("calls", (prompt(row),), json_schema=schema, max_new_tokens=NEW_TOKENS))


def _schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, also of one without any."""
    made = narrowed(parameters)
    return {"type": "object", "properties": {}, "required": [], **made, "additionalProperties": False}


def _fits_all(given: Any, values: Mapping[str, Any]) -> bool:
    """Whether an object has values that are accepted, and lacks only those that may be absent ("" is accepted)."""
    if not isinstance(given, Mapping) or not given.keys() <= values.keys():
        return False
    return all(_fits(given[name], some) if name in given else "" in some for name, some in values.items())


def _fits(value: Any, some: Sequence[Any]) -> bool:
    return any(_same(value, one) for one in some)


def _same(value: Any, one: Any) -> bool:
    """Whether a value is an accepted one. An accepted object has lists of accepted values."""
    if isinstance(one, Mapping):
        return _fits_all(value, one)
    if isinstance(one, list):
        return isinstance(value, list) and len(value) == len(one) and all(map(_same, value, one))
    if isinstance(one, str):
        return isinstance(value, str) and _folded(value) == _folded(one)
    return value == one and isinstance(value, bool) == isinstance(one, bool)


def _folded(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def _first_of_all(values: Mapping[str, Any], needed: Sequence[str] = ()) -> dict[str, Any]:
    given = {
        name: [one for one in some if one != ""] for name, some in values.items() if name in needed or "" not in some
    }
    return {name: _first(some[0]) for name, some in given.items() if some}


def _first(one: Any) -> Any:
    if isinstance(one, Mapping):
        return _first_of_all(one)
    return [_first(part) for part in one] if isinstance(one, list) else one


simple = functools.partial(evaluate, "simple_python")
multiple = functools.partial(evaluate, "multiple")
parallel = functools.partial(evaluate, "parallel")
parallel_multiple = functools.partial(evaluate, "parallel_multiple")
irrelevance = functools.partial(evaluate, "irrelevance")
live_simple = functools.partial(evaluate, "live_simple")
