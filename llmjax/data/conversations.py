"""Conversations, preferences and prompts from files, in the formats that people have them in.

Every format becomes `Row`s. Column names are those of TRL; ShareGPT, Alpaca, OpenAssistant and H2O trees, and pairs
with marks in their text are read too. The columns of a file's first row decide its format. A row that does not fit is
given back with its reason, its file and its number, and costs itself alone.

    messages                              a conversation; every turn of the assistant may be trained
    prompt + completion                   texts, or lists of messages
    instruction [+ input] + output        Alpaca (also response); history has earlier pairs
    conversations | conversation          ShareGPT: from, value
    chosen + rejected [+ prompt]          a preference; without a prompt it is what both begin with. Also margin. The prompt
                                          may be conversations, instruction [+ input] or question too
    prompt + completion + label           unpaired: true is good
    prompt + completions | responses + ranks | scores | ratings   a ranking, the best first or with numbers
    input + output_1 + output_2 + label   LLMBar's pairs: 1 or 2 is better
    rater + prompt + answers + choice | ranks   ratings of `llmjax rate`
    prompt + text + finish                answers of `llmjax generate --out`, if they came to an end
    prompt with replies                   OpenAssistant's trees: conversations along the best answers, and rankings
    id + parent_id + instruction + output H2O's trees: one conversation a leaf
    text [+ text_b] + label               a text, or two, of a class or with a number
    prompt                                a prompt alone, for rewards; the other columns go with it

A column `system` is the system message of any of them, and `tools` are the tools, as a list or as JSON.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmjax.config.ranges import LARGEST
from llmjax.data.chat import Message
from llmjax.data.messages import (
    SPEAKERS,
    TURN,
    RowError,
    Text,
    behind,
    common_prompt,
    listed,
    messages_of,
    short,
    turns_of,
    with_system,
)
from llmjax.data.records import records
from llmjax.errors import UserError

GIVEN = ("messages", "tools", "reply", "add_generation_prompt")  # what a template gets of the row, not of its variables
TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@dataclass(frozen=True)
class Row:
    """A prompt with answers to it. `ranks` has a number an answer, the smaller the better; empty: not compared."""

    prompt: Text
    answers: tuple[Text, ...] = ()
    ranks: tuple[float, ...] = ()
    good: bool | None = None  # unpaired feedback: the only answer is good or bad
    label: str | float | None = None  # of a text (the prompt): its class, or a number
    second: str = ""  # a second text that the label is about
    margin: float = 0.0  # by how much the first answer of a pair is better
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)  # for the template (`chat_template_kwargs`)
    columns: Mapping[str, Any] = field(default_factory=dict)  # what else the row has: a reward function gets it
    root: str = ""  # of a tree: what it begins with. Its rows hold parts of each other, and are held out together
    number: int = 0  # in its file, from 1


class Rejected(NamedTuple):
    """A row of a file that is left out, with its number (from 1) and the reason."""

    file: Path
    number: int
    reason: str


def read(file: Path) -> Iterator[Row | Rejected]:
    """The rows of a file, or why one is left out.

    Raises:
        UserError: for a file that cannot be read, that is of no format known here, or whose first row is of none.
    """
    reader: Callable[[Mapping[str, Any]], Iterable[Row]] | None = None
    unread = ""  # why the first row has no columns
    for number, record in records(file):
        if isinstance(record, str):
            unread = unread or f": row {number} is {record}"
            yield Rejected(file, number, record)
            continue
        if reader is None:
            name, reader = _format_of(record, file)
            if name == "H2O":
                yield from _h2o(file, first=number)
                return
        other = _name_of(record)
        if other != name:
            columns = f"has the columns of {other}" if other else f"lacks columns of {name}"
            yield Rejected(
                file, number, f"the row {columns}, and the file began as {name}: give each format its own file"
            )
            continue
        try:
            yield from (replace(row, number=number) for row in reader(record))
        except RowError as error:
            yield Rejected(file, number, str(error))
    if reader is None:
        raise UserError(
            f"{file} has no rows{unread}; give JSON lines, a JSON list of objects, CSV or Parquet with one row or more"
        )


def check(record: Mapping[str, Any]) -> None:
    """Raise RowError for a row that `read` would leave out of its file."""
    _, reader = _format_of(record, Path("the row"))
    for _ in reader(record):
        pass


# Formats: a reader each, from a row of a file to `Row`s.


def _messages(record: Mapping[str, Any]) -> Iterable[Row]:
    messages = with_system(messages_of(record["messages"]), record.get("system"))
    yield Row([], (messages,), **_beside(record, "messages", "system"))


def _completion(record: Mapping[str, Any]) -> Iterable[Row]:
    prompt, answer = with_system(_text(record, "prompt"), record.get("system")), _text(record, "completion")
    good = None
    if "label" in record:
        good = TRUTHS.get(str(record["label"]).lower())
        if good is None:
            raise RowError(f"label is {record['label']!r}: give true for a good completion and false for a bad one")
    yield Row(prompt, (answer,), good=good, **_beside(record, "prompt", "completion", "label", "system"))


def _alpaca(record: Mapping[str, Any]) -> Iterable[Row]:
    output = "output" if "output" in record else "response"
    asked, answer = _instruction(record), [{"role": "assistant", "content": _plain(record, output)}]
    beside = _beside(record, "instruction", "input", output, "system", "history")
    history = listed(record.get("history")) or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError(f"history is {short(history)}: give a list of pairs, what was asked and what was answered")
    if not history:
        yield Row(with_system(asked, record.get("system")), (answer,), **beside)
        return
    before = [
        {"role": role, "content": said}
        for pair in history
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    yield Row([], (with_system(messages_of([*before, *asked, *answer]), record.get("system")),), **beside)


def _sharegpt(record: Mapping[str, Any]) -> Iterable[Row]:
    column = "conversations" if "conversations" in record else "conversation"
    yield Row([], (with_system(_turns(record, column), record.get("system")),), **_beside(record, column, "system"))


def _preference(record: Mapping[str, Any]) -> Iterable[Row]:
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and TURN.match(chosen) and TURN.match(rejected):
        chosen, rejected = turns_of(chosen), turns_of(rejected)
    asked = _asked(record)
    prompt, chosen, rejected = common_prompt(chosen, rejected) if asked is None else behind(asked, chosen, rejected)
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    if not chosen or not rejected:
        raise RowError(f"{'chosen' if not chosen else 'rejected'} is empty behind the prompt")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(answer, str) and answer[0]["role"] in ("user", "system", "developer"):
            raise RowError(
                f"{name} begins with a message of the {answer[0]['role']} where the other one has none like it"
            )
    margin = _read_number(record.get("margin") or 0.0)
    if not _is_number(margin):
        raise RowError(f"margin is {short(margin)}: give a number")
    beside = _beside(record, "chosen", "rejected", "prompt", "margin", "system")
    prompt = with_system(prompt, record.get("system"))
    yield Row(prompt, (chosen, rejected), (0.0, 1.0), margin=float(margin), **beside)


def _ranking(record: Mapping[str, Any]) -> Iterable[Row]:
    answers_in = "completions" if "completions" in record else "responses"
    answers = listed(record[answers_in])
    numbers_in = next((name for name in ("ranks", "scores", "ratings", "labels") if name in record), None)
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError(f"{answers_in} has fewer than two answers")
    numbers = list(range(len(answers))) if numbers_in is None else listed(record[numbers_in])
    if not isinstance(numbers, list) or len(numbers) != len(answers):
        raise RowError(f"{numbers_in} has not a number for each of the {len(answers)} answers")
    if not all(map(_is_number, numbers)):
        raise RowError(f"{numbers_in} is {short(numbers)}: give numbers")
    sign = -1.0 if numbers_in in ("scores", "ratings", "labels") else 1.0
    ranks = tuple(sign * float(number) for number in numbers)
    if len(set(ranks)) == 1:
        raise RowError("all answers tie, so the row prefers none")
    made = tuple(answer if isinstance(answer, str) else messages_of(answer) for answer in answers)
    for i, answer in enumerate(made):
        if isinstance(answer, str) and not answer.strip():
            raise RowError(f"answer {i + 1} of {answers_in} is empty")
        twin = made.index(answer)
        if ranks[twin] != ranks[i]:
            raise RowError(f"answers {twin + 1} and {i + 1} of {answers_in} are the same, and one is preferred")
    prompt = with_system(_text(record, "prompt"), record.get("system"))
    yield Row(prompt, made, ranks, **_beside(record, "prompt", answers_in, numbers_in or "", "system"))


def _rating(record: Mapping[str, Any]) -> Iterable[Row]:
    answers = record["answers"]
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer for answer in answers):
        raise RowError("answers is no list of texts")
    if "ranks" in record:
        given = record["ranks"]
    elif record["choice"] in (0, 1) and not isinstance(record["choice"], bool):
        given = [record["choice"], 1 - record["choice"]]  # the better answer has the smaller rank
    else:
        raise RowError("the answers tie" if record["choice"] == "tie" else "the judgement failed")
    if not isinstance(given, list) or len(given) != len(answers) or not all(map(_is_number, given)):
        raise RowError(f"ranks is {short(given)}: give a number for each of the {len(answers)} answers")
    if len(set(given)) == 1:
        raise RowError("all answers tie, so the row prefers none")
    beside = _beside(record, "rater", "time", "prompt", "answers", "choice", "ranks", "order", "systems")
    yield Row(_text(record, "prompt"), tuple(answers), tuple(map(float, given)), **beside)


def _written(record: Mapping[str, Any]) -> Iterable[Row]:
    if record["finish"] not in ("eos", "stop"):
        raise RowError(f"the answer ended by {record['finish']!r}, and would be learnt as a whole one")
    beside = _beside(record, "prompt", "text", "finish", "tokens", "log_probability")
    yield Row(_text(record, "prompt"), (_plain(record, "text"),), **beside)


def _llmbar(record: Mapping[str, Any]) -> Iterable[Row]:
    label = _read_number(record["label"])
    if isinstance(label, bool) or not _is_number(label) or label not in (1, 2):
        raise RowError(f"label is {short(record['label'])}: give 1 or 2, the better output")
    better, worse = ("output_1", "output_2") if label == 1 else ("output_2", "output_1")
    answers = tuple([{"role": "assistant", "content": _plain(record, name)}] for name in (better, worse))
    if answers[0] == answers[1]:
        raise RowError("both outputs are the same")
    asked = [{"role": "user", "content": _plain(record, "input")}]
    yield Row(asked, answers, (0.0, 1.0), **_beside(record, "input", "output_1", "output_2", "label"))


def _labelled(record: Mapping[str, Any]) -> Iterable[Row]:
    label = record["label"]
    if isinstance(label, bool) or not (_is_number(label) or (isinstance(label, str) and label)):
        raise RowError(f"label is {label!r}: give the name of a class, or a number")
    second = _plain(record, "text_b") if record.get("text_b") not in (None, "") else ""
    yield Row(_plain(record, "text"), label=label, second=second, **_beside(record, "text", "text_b", "label"))


def _prompt(record: Mapping[str, Any]) -> Iterable[Row]:
    prompt = with_system(_text(record, "prompt"), record.get("system"))
    yield Row(prompt, **_beside(record, "prompt", "system"))


def _tree(record: Mapping[str, Any]) -> Iterable[Row]:
    """A tree of OpenAssistant: the conversations along the best answers, then a ranking for each prompt with several."""
    root = record["prompt"]

    def rank(reply: Mapping[str, Any]) -> float:
        if reply.get("rank") is None:
            return math.inf
        if not _is_number(reply["rank"]):
            raise RowError(f"a message of the tree has the rank {reply['rank']!r}: give a number, or null")
        return float(reply["rank"])

    def kept(node: Mapping[str, Any]) -> list[Any]:
        return [reply for reply in node.get("replies") or () if not reply.get("deleted")]

    def message(node: Mapping[str, Any]) -> Message:
        return {"role": SPEAKERS.get(node["role"], node["role"]), "content": node["text"]}

    def follow(node: Mapping[str, Any], before: list[Message], *, best: bool) -> Iterator[Row]:
        here, replies = [*before, message(node)], kept(node)
        if node["role"] == "assistant":
            if best and not any(map(kept, replies)):  # trees often end with questions that nobody has answered
                yield Row([], (messages_of(here),))
            for reply in replies:
                yield from follow(reply, here, best=best)
            return
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if len(ranked) > 1:
            answers = tuple([message(reply)] for reply in ranked)
            yield Row(messages_of(here), answers, tuple(rank(reply) for reply in ranked))
        first = min(replies, key=rank, default=None)
        for reply in replies:
            yield from follow(reply, here, best=best and reply is first)

    try:
        found = (
            [] if root.get("deleted") else [replace(row, root=str(root["text"])) for row in follow(root, [], best=True)]
        )
    except KeyError as error:
        raise RowError(f"the tree lacks {error} at a message: give role, text and replies") from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise RowError(f"the tree has a message that is none ({error}): give role, text and replies") from error
    if not found:
        raise RowError("the tree has no answer that is not deleted")
    yield from found


def _h2o(file: Path, *, first: int) -> Iterator[Row | Rejected]:
    """Trees whose rows name their parents: each leaf is a conversation, from its root.

    first: the number of the file's first row that is one; those before it are rejected already.
    """
    rows: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for number, record in records(file):
        if isinstance(record, str) or _name_of(record) != "H2O":
            if number > first:
                yield Rejected(file, number, record if isinstance(record, str) else "the row lacks columns of H2O")
        elif not (key := _id(record["id"])):
            yield Rejected(file, number, "the row has no id")
        elif key in rows:
            yield Rejected(file, number, f"the id {key!r} is that of row {rows[key][0]} too")
        else:
            rows[key] = number, record
    parents = {_id(record["parent_id"]) for _, record in rows.values()}
    for key, (number, record) in rows.items():
        if key in parents:
            continue
        turns: list[Message] = []
        seen: set[str] = set()
        at = key
        try:
            while at:
                if at in seen:
                    raise RowError(f"the row is its own ancestor through {at!r}")
                seen.add(at)
                if at not in rows:
                    raise RowError(f"the parent {at!r} is not in the file")
                here = rows[at][1]
                output = "output" if "output" in here else "response"
                turns = [
                    {"role": "user", "content": _plain(here, "instruction" if "instruction" in here else "prompt")},
                    {"role": "assistant", "content": _plain(here, output)},
                    *turns,
                ]
                at = _id(here["parent_id"])
            whole = with_system(messages_of(turns), record.get("system"))
            yield Row([], (whole,), root=turns[0]["content"], number=number)
        except RowError as error:
            yield Rejected(file, number, str(error))


def _id(value: Any) -> str:
    """An id as a text; "": there is none. A column of whole numbers with gaps is one of fractions in many tables."""
    if value is None or value != value:
        return ""
    return re.sub(r"^(-?\d+)\.0$", r"\1", str(value).strip())


FORMATS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[Mapping[str, Any]], Iterable[Row]]]] = {
    # name: (columns that it needs, of each tuple one), reader. The first that fits is taken.
    "rating": ((("rater",), ("prompt",), ("answers",), ("choice", "ranks")), _rating),
    "written": ((("prompt",), ("text",), ("finish",)), _written),
    "preference": ((("chosen",), ("rejected",)), _preference),
    "messages": ((("messages",),), _messages),
    "ranking": ((("prompt",), ("completions", "responses")), _ranking),
    "prompt and completion": ((("prompt",), ("completion",)), _completion),
    "LLMBar": ((("input",), ("output_1",), ("output_2",), ("label",)), _llmbar),
    "ShareGPT": ((("conversations", "conversation"),), _sharegpt),
    "H2O": ((("id",), ("parent_id",), ("instruction", "prompt"), ("output", "response")), _alpaca),
    "Alpaca": ((("instruction",), ("output", "response")), _alpaca),
    "tree": ((("message_tree_id",), ("prompt",)), _tree),
    "text and label": ((("text",), ("label",)), _labelled),
    "prompt": ((("prompt",),), _prompt),
}


def _name_of(record: Mapping[str, Any]) -> str | None:
    return next((name for name, (needs, _) in FORMATS.items() if all(set(one) & set(record) for one in needs)), None)


def _format_of(record: Mapping[str, Any], file: Path) -> tuple[str, Callable[[Mapping[str, Any]], Iterable[Row]]]:
    name = _name_of(record)
    if name is None:
        raise UserError(
            f"{file}: the first row has the columns {', '.join(record)}, which are no known format: give messages, prompt and "
            "completion, chosen and rejected, prompt and completions with ranks, instruction and output, or conversations"
        )
    return name, FORMATS[name][1]


# Parts of rows.


def _asked(record: Mapping[str, Any]) -> Text | None:
    """The prompt of a pair, under the names that it has in files; None: there is none."""
    if record.get("prompt") is not None:
        return _text(record, "prompt")
    if column := next((name for name in ("conversations", "conversation") if record.get(name)), None):
        return _turns(record, column)
    if record.get("instruction"):
        return _instruction(record)
    return [{"role": "user", "content": _plain(record, "question")}] if record.get("question") else None


def _instruction(record: Mapping[str, Any]) -> list[Message]:
    more = record.get("input") or ""
    if not isinstance(more, str):
        raise RowError(f"input is {short(more)}: give a text")
    parts = filter(None, (_plain(record, "instruction"), more.strip()))
    return [{"role": "user", "content": "\n\n".join(parts)}]


def _turns(record: Mapping[str, Any], column: str) -> list[Message]:
    turns = listed(record[column])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"{column} is no list of turns")
    return messages_of(turns)


def _text(record: Mapping[str, Any], column: str) -> Text:
    value = record[column]
    if isinstance(value, str):
        found = listed(value)  # in a table messages are JSON in a text
        if (
            isinstance(found, list)
            and found
            and all(isinstance(one, dict) and {"role", "from"} & set(one) for one in found)
        ):
            return messages_of(found)
        if not value.strip() and column != "prompt":
            raise RowError(f"{column} is empty")
        return value
    if value is None:
        raise RowError(f"{column} is empty")
    if not isinstance(value, list | Mapping):
        raise RowError(f"{column} is {short(value)}: give a text, or a list of messages")
    return messages_of(value)


def _plain(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{column} is empty" if not value else f"{column} is {short(value)}: give a text")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _read_number(value: Any) -> Any:
    """The number that a text says, as all values of CSV are texts; any other value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _beside(record: Mapping[str, Any], *read: str) -> dict[str, Any]:
    """What a row says beside its texts: tools, variables of the template, and the columns for rewards."""
    tools = record.get("tools")
    try:
        tools = json.loads(tools.strip() or "null") if isinstance(tools, str) else tools
        if isinstance(tools, list):
            tools = [json.loads(one) if isinstance(one, str) else one for one in tools]
    except (ValueError, RecursionError) as error:
        raise RowError(f"tools is a text that is no JSON: {error}") from error
    others = {k: v for k, v in record.items() if k not in (*read, "tools", "chat_template_kwargs")}
    return {"tools": tools or None, "variables": _variables(record), "columns": others}


def _variables(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The variables of the template, an object, or JSON of one as in tables."""
    given = record.get("chat_template_kwargs")
    try:
        given = json.loads(given.strip() or "null") if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise RowError(f"chat_template_kwargs is a text that is no JSON: {error}") from error
    if not isinstance(given or {}, Mapping):
        raise RowError(f"chat_template_kwargs is {short(given)}: give an object, such as {{'enable_thinking': false}}")
    if taken := next((name for name in GIVEN if name in (given or {})), ""):
        raise RowError(f"chat_template_kwargs has {taken}, which the row itself says: leave it out")
    return given or {}
