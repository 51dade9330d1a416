"""Conversations, preferences and prompts from files, in the formats that people have them in.

Every format becomes `Row`s. Column names are those of TRL; ShareGPT, Alpaca, OpenAssistant and H2O trees, and pairs
with marks in their text are read too. The columns of a file's first row decide its format. A row that does not fit is
given back with its reason, its file and its number, and costs itself alone.

    messages                              a conversation; every turn of the assistant may be trained
    prompt + completion                   texts, or lists of messages
    instruction [+ input] + output        Alpaca (also response)
    conversations | conversation          ShareGPT: from, value
    chosen + rejected [+ prompt]          a preference; without a prompt it is what both begin with. Also margin
    prompt + completion + label           unpaired: true is good
    prompt + completions | responses + ranks | scores | ratings   a ranking, the best first or with numbers
    input + output_1 + output_2 + label   LLMBar's pairs: 1 or 2 is better
    rater + prompt + answers + choice | ranks   ratings of `llmjax rate`
    prompt + text + finish                answers of `llmjax generate --out`, if they came to an end
    prompt with replies                   OpenAssistant's trees: conversations along the best answers, and rankings
    id + parent_id + instruction + output H2O's trees: one conversation a leaf
    text [+ text_b] + label               a text, or two, of a class or with a number
    prompt                                a prompt alone, for rewards; the other columns go with it
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmjax.data.chat import Message
from llmjax.data.records import records
from llmjax.errors import UserError

Text = str | Sequence[Message]  # a plain text is read as it is, messages through the chat template
SPEAKERS = {"human": "user", "gpt": "assistant", "bard": "assistant", "chatgpt": "assistant", "prompter": "user"}
ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function")
TOOLS = ("tool", "function")  # whose messages answer calls
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # Anthropic's helpful and harmless pairs


class RowError(Exception):
    """Why a row is left out."""


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
                yield from _h2o(file)
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


# Formats: a reader each, from a row of a file to `Row`s.


def _messages(record: Mapping[str, Any]) -> Iterable[Row]:
    yield Row([], (messages_of(record["messages"]),), **_beside(record, "messages"))


def _completion(record: Mapping[str, Any]) -> Iterable[Row]:
    prompt, answer = _text(record, "prompt"), _text(record, "completion")
    good = None
    if "label" in record:
        if record["label"] not in (0, 1):
            raise RowError(f"label is {record['label']!r}: give true for a good completion and false for a bad one")
        good = bool(record["label"])
    yield Row(prompt, (answer,), good=good, **_beside(record, "prompt", "completion", "label"))


def _alpaca(record: Mapping[str, Any]) -> Iterable[Row]:
    output = "output" if "output" in record else "response"
    asked, more = _plain(record, "instruction"), str(record.get("input") or "").strip()
    content = f"{asked}\n\n{more}" if more else asked
    answer = [{"role": "assistant", "content": _plain(record, output)}]
    yield Row([{"role": "user", "content": content}], (answer,), **_beside(record, "instruction", "input", output))


def _sharegpt(record: Mapping[str, Any]) -> Iterable[Row]:
    column = "conversations" if "conversations" in record else "conversation"
    turns = record[column]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"{column} is no list of turns")
    made = [
        {"role": SPEAKERS.get(str(turn.get("from", turn.get("role"))).lower(), turn.get("from", turn.get("role"))),
         "content": turn.get("value", turn.get("content"))}
        for turn in turns
    ]  # fmt: skip
    yield Row([], (messages_of(made),), **_beside(record, column))


def _preference(record: Mapping[str, Any]) -> Iterable[Row]:
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and TURN.match(chosen) and TURN.match(rejected):
        chosen, rejected = turns_of(chosen), turns_of(rejected)
    if "prompt" in record and record["prompt"] is not None:
        prompt = _text(record, "prompt")
        # Some sets repeat the prompt in both answers.
        if prompt and chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        prompt, chosen, rejected = common_prompt(chosen, rejected)
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    if not chosen or not rejected:
        raise RowError(f"{'chosen' if not chosen else 'rejected'} is empty behind the prompt")
    margin = record.get("margin") or 0.0
    if not isinstance(margin, int | float):
        raise RowError(f"margin is {margin!r}: give a number")
    beside = _beside(record, "chosen", "rejected", "prompt", "margin")
    yield Row(prompt, (chosen, rejected), (0.0, 1.0), margin=float(margin), **beside)


def _ranking(record: Mapping[str, Any]) -> Iterable[Row]:
    answers_in = "completions" if "completions" in record else "responses"
    answers = record[answers_in]
    numbers_in = next((name for name in ("ranks", "scores", "ratings", "labels") if name in record), None)
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError(f"{answers_in} has fewer than two answers")
    numbers = list(range(len(answers))) if numbers_in is None else record[numbers_in]
    if not isinstance(numbers, list) or len(numbers) != len(answers):
        raise RowError(f"{numbers_in} has not a number for each of the {len(answers)} answers")
    if not all(isinstance(number, int | float) for number in numbers):
        raise RowError(f"{numbers_in} is {numbers!r}: give numbers")
    sign = -1.0 if numbers_in in ("scores", "ratings", "labels") else 1.0
    ranks = tuple(sign * float(number) for number in numbers)
    if len(set(ranks)) == 1:
        raise RowError("all answers tie, so the row prefers none")
    made = tuple(answer if isinstance(answer, str) else messages_of(answer) for answer in answers)
    yield Row(_text(record, "prompt"), made, ranks, **_beside(record, "prompt", answers_in, numbers_in or ""))


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
    if not isinstance(given, list) or len(given) != len(answers) or not all(isinstance(r, int | float) for r in given):
        raise RowError(f"ranks is {_short(given)}: give a number for each of the {len(answers)} answers")
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
    if record["label"] not in (1, 2):
        raise RowError(f"label is {record['label']!r}: give 1 or 2, the better output")
    better, worse = ("output_1", "output_2") if record["label"] == 1 else ("output_2", "output_1")
    answers = tuple([{"role": "assistant", "content": _plain(record, name)}] for name in (better, worse))
    if answers[0] == answers[1]:
        raise RowError("both outputs are the same")
    asked = [{"role": "user", "content": _plain(record, "input")}]
    yield Row(asked, answers, (0.0, 1.0), **_beside(record, "input", "output_1", "output_2", "label"))


def _labelled(record: Mapping[str, Any]) -> Iterable[Row]:
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, str | int | float) or label == "":
        raise RowError(f"label is {label!r}: give the name of a class, or a number")
    second = str(record.get("text_b") or "")
    yield Row(_plain(record, "text"), label=label, second=second, **_beside(record, "text", "text_b", "label"))


def _prompt(record: Mapping[str, Any]) -> Iterable[Row]:
    yield Row(_text(record, "prompt"), **_beside(record, "prompt"))


def _tree(record: Mapping[str, Any]) -> Iterable[Row]:
    """A tree of OpenAssistant: the conversations along the best answers, then a ranking for each prompt with several."""
    root = record["prompt"]

    def rank(reply: Mapping[str, Any]) -> float:
        return float("inf") if reply.get("rank") is None else float(reply["rank"])

    def message(node: Mapping[str, Any]) -> Message:
        return {"role": SPEAKERS.get(node["role"], node["role"]), "content": node["text"]}

    def follow(node: Mapping[str, Any], before: list[Message], *, best: bool) -> Iterator[Row]:
        here = [*before, message(node)]
        replies = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
        if node["role"] == "assistant":
            if best and not replies:
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
        yield from (replace(row, root=str(root["text"])) for row in follow(root, [], best=True))
    except (KeyError, TypeError, AttributeError) as error:
        raise RowError(f"the tree lacks {error} at a message: give role, text and replies") from error


def _h2o(file: Path) -> Iterator[Row | Rejected]:
    """Trees whose rows name their parents: each leaf is a conversation, from its root."""
    rows = {str(record["id"]): (number, record) for number, record in records(file) if isinstance(record, Mapping)}
    parents = {str(record.get("parent_id") or "") for _, record in rows.values()}
    for key, (number, record) in rows.items():
        if key in parents:
            continue
        turns: list[Message] = []
        seen: set[str] = set()
        at: str | None = key
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
                at = str(here.get("parent_id") or "") or None
            system = record.get("system")
            whole = [{"role": "system", "content": system}, *turns] if system else turns
            yield Row([], (messages_of(whole),), root=turns[0]["content"], number=number)
        except RowError as error:
            yield Rejected(file, number, str(error))


FORMATS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[Mapping[str, Any]], Iterable[Row]]]] = {
    # name: (columns that it needs, of each tuple one), reader. The first that fits is taken.
    "messages": ((("messages",),), _messages),
    "rating": ((("rater",), ("prompt",), ("answers",), ("choice", "ranks")), _rating),
    "written": ((("prompt",), ("text",), ("finish",)), _written),
    "preference": ((("chosen",), ("rejected",)), _preference),
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


def messages_of(given: Any) -> list[Message]:
    """A list of messages, checked for what training needs: roles, contents, an order that says who answers whom."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise RowError("the messages are a text that is no JSON") from None
    if not isinstance(given, list) or not given:
        raise RowError("there are no messages")
    made: list[Message] = []
    calling = 0  # the number of the message whose calls wait for their answers
    for number, message in enumerate(given, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError(f"message {number} is {_short(message)}: give a role and a content")
        role, calls = message["role"], message.get("tool_calls")
        if role not in ROLES:
            raise RowError(f"message {number} has the role {role!r}: give system, user, assistant or tool")
        if not message.get("content") and not calls and role not in TOOLS:
            raise RowError(f"message {number}, of the {role}, is empty")
        if role in TOOLS and not calling:
            raise RowError(f"message {number} is a tool's answer, and no call stands before it")
        if role not in TOOLS:
            if calling and made[-1]["role"] not in TOOLS:
                raise RowError(f"message {calling} calls a tool, and no answer follows")
            calling = number if calls else 0
        made.append({key: value for key, value in message.items() if value is not None})
    return made


def turns_of(text: str) -> list[Message]:
    """Messages from a text with marks: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    parts = TURN.split(text)
    names = {"Human": "user", "Assistant": "assistant"}
    return [{"role": names[name], "content": said.strip()} for name, said in zip(parts[1::2], parts[2::2], strict=True)]


def common_prompt(chosen: Text, rejected: Text) -> tuple[Text, Any, Any]:
    """The prompt that two answers begin with, and what follows it in each.

    Of messages it is those that are equal; of texts it ends at a space or a line's end, so that no word is torn.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("chosen and rejected are a text and messages: give both in the same form")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if isinstance(chosen, str):
        while shared and shared < max(len(chosen), len(rejected)) and not chosen[shared - 1].isspace():
            shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _text(record: Mapping[str, Any], column: str) -> Text:
    value = record[column]
    if isinstance(value, str):
        if not value and column != "prompt":
            raise RowError(f"{column} is empty")
        return value
    return messages_of(value)


def _plain(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{column} is empty" if not value else f"{column} is {_short(value)}: give a text")
    return value


def _beside(record: Mapping[str, Any], *read: str) -> dict[str, Any]:
    """What a row says beside its texts: tools, variables of the template, and the columns for rewards."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError(f"tools is a text that is no JSON: {error}") from error
    others = {k: v for k, v in record.items() if k not in (*read, "tools", "chat_template_kwargs")}
    return {"tools": tools or None, "variables": record.get("chat_template_kwargs") or {}, "columns": others}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
