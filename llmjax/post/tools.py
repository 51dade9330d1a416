"""Tools that a policy may call while it answers: Python functions, their JSON schemas, and what their answers add.

The model calls a tool as most templates write calls: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. The
conversation goes on in ids: the sampled ids stay as they are. The chat template writes only the tool's answer and the
beginning of the model's next turn, which are then encoded.
"""

import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmjax.data.chat import Message
from llmjax.data.examples import as_messages, ids_behind
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
Reply = Callable[[int, Sequence[int]], list[int] | None]  # (number of the text, its ids so far) -> ids that follow


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. Its answer must depend on its arguments alone, so that runs can be repeated."""

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]  # as chat templates read it

    def __call__(self, arguments: Any) -> str:
        """The answer as a text. A call that does not fit the signature, and a tool that raises, give the error's text."""
        try:
            if not isinstance(arguments, Mapping):
                raise TypeError(f"the arguments are {arguments!r}, which is no object")
            made = self.function(**arguments)
        except Exception as error:  # whatever a tool raises is an answer to the model
            return f"{type(error).__name__}: {error}"
        return made if isinstance(made, str) else json.dumps(made, ensure_ascii=False, default=str)


def parse(given: Sequence[str]) -> dict[str, Tool]:
    """The tools of `rollout.tools`, by name. Raises UserError for one that is not there or has no schema."""
    found: dict[str, Tool] = {}
    for text in given:
        module, _, name = text.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"rollout.tools: {text!r} is no tool ({error}): give module:function") from error
        if name in found:
            raise UserError(f"rollout.tools has two tools called {name}: give one another name")
        found[name] = Tool(name, function, schema_of(function))
    return found


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments, from its signature and the first line of its docstring.

    Raises UserError for a parameter without a type that JSON has, and for *arguments.
    """
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UserError(f"the tool {function.__name__} takes {parameter}: give it parameters with names")
        properties[name] = _schema_of_type(hints.get(name), f"{function.__name__}({name})")
        if parameter.default is parameter.empty:
            required.append(name)
    described = (inspect.getdoc(function) or "").partition("\n")[0]
    arguments = {"type": "object", "properties": properties, "required": required}
    inside = {"name": function.__name__, "description": described, "parameters": arguments}
    return {"type": "function", "function": inside}


def _schema_of_type(hint: Any, where: str) -> dict[str, Any]:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(inside)}
    if origin in (typing.Union, types.UnionType):
        others = [one for one in inside if one is not type(None)]
        if len(others) == 1:  # a parameter that may be left out
            return _schema_of_type(others[0], where)
    kind = origin or hint
    if kind not in JSON_TYPES:
        raise UserError(f"the tool's parameter {where} has no type that JSON has: annotate it, such as with str or int")
    if kind is list and inside:
        return {"type": "array", "items": _schema_of_type(inside[0], where)}
    return {"type": JSON_TYPES[kind]}


def calls_of(text: str) -> list[tuple[str, Any]]:
    """The calls in a text: names and arguments. A call that is no JSON has the name "" and its text as argument."""
    found: list[tuple[str, Any]] = []
    for written in CALL.findall(text):
        try:
            call = json.loads(written)
            found.append((str(call["name"]), call.get("arguments", {})))
        except (ValueError, KeyError, TypeError, AttributeError):
            found.append(("", written.strip()))
    return found


def answer_to(tools: Mapping[str, Tool], name: str, arguments: Any) -> str:
    """The answer to a call."""
    if not name:
        return 'the call is no JSON: write {"name": ..., "arguments": {...}}'
    if name not in tools:
        return f"there is no tool {name!r}; there are {', '.join(tools)}"
    return tools[name](arguments)


def make_reply(
    tokenizer: Tokenizer, tools: Mapping[str, Tool], prompts: Sequence[Sequence[Message]], *, turns: int
) -> Reply:
    """The ids that follow each text's last turn: the tools' answers, or None where the model called no tool.

    Args:
        prompts: the messages that each text answers.
        turns: the most turns of the model in a text.
    """
    schemas = [tool.schema for tool in tools.values()]
    said: list[list[Message]] = [list(prompt) for prompt in prompts]
    begins = [0] * len(prompts)  # where the last turn of the model begins in its text
    taken = [0] * len(prompts)

    def reply(number: int, ids: Sequence[int]) -> list[int] | None:
        text = tokenizer.decode(ids[begins[number] :])
        calls = calls_of(text)
        taken[number] += 1
        if not calls or taken[number] >= turns:
            return None
        answers = [{"role": "tool", "name": n, "content": answer_to(tools, n, given)} for n, given in calls]
        turn = {"role": "assistant", "content": text}
        behind = ids_behind(tokenizer, [*said[number], turn], answers, stop=ids[-1], tools=schemas)
        said[number] += [turn, *answers]
        begins[number] = len(ids) + len(behind)
        return behind

    return reply


def check(tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None:
    """Raise UserError when the chat template cannot write a conversation in which tools are called."""
    asked = as_messages("?", "user")
    turn = {"role": "assistant", "content": '<tool_call>{"name": "f", "arguments": {}}</tool_call>'}
    answer = {"role": "tool", "name": "f", "content": "1"}
    schemas = [tool.schema for tool in tools.values()]
    ids_behind(tokenizer, [*asked, turn], [answer], stop=tokenizer.end_id, tools=schemas)
