"""Tools: how a model is told of them, what it may write, and the calls in what it wrote.

A call is `<tool_call>` with a JSON object of name and arguments, as Hermes, Qwen and SmolLM write it. The grammar of the
answer lets the model name only tools that exist, with arguments of their schemas. A text may come in place of calls, as
`tool_choice` says. A template that does not write `<tool_call>` gets the tools in a system message.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmjax.serve.messages import Tool, text_of
from llmjax.serve.refusals import Refusal

OPENING, CLOSING = "<tool_call>", "</tool_call>"
MARK = f"{OPENING}\n"  # behind it the grammar lets a call follow, and nothing else; a text has none
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
COMBINED = ("$ref", "anyOf", "oneOf", "allOf")  # a schema with one of these has its properties elsewhere
MOST_TOOLS, MOST_CHARACTERS = 128, 1 << 16
INTRODUCTION = (
    "You may call these functions:\n{functions}\n"
    f'To call one, answer with {OPENING}\n{{{{"name": <its name>, "arguments": <its arguments>}}}}\n{CLOSING}'
)
# How llguidance writes JSON: with the spaces that models have learnt.
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}


@dataclass(frozen=True)
class Choice:
    """Which tools an answer may call. Without tools an answer is a text."""

    tools: Sequence[Tool] = ()
    required: bool = False  # an answer is a call, and no text
    parallel: bool = True  # an answer may have several calls


def chosen(tools: Sequence[Tool] | None, choice: Any, parallel: bool | None) -> Choice:
    """What `tools`, `tool_choice` and `parallel_tool_calls` ask for. Raises Refusal."""
    tools = tools or ()
    names = [tool.function.name for tool in tools]
    if len(tools) > MOST_TOOLS or sum(len(json.dumps(tool.function.parameters)) for tool in tools) > MOST_CHARACTERS:
        raise Refusal(
            400, f"{MOST_TOOLS} tools with {MOST_CHARACTERS:,} characters of schemas are the most", param="tools"
        )
    for number, name in enumerate(names):
        if not NAME.fullmatch(name) or name in names[:number]:
            why = "occurs twice" if name in names[:number] else "must be 1 to 64 letters, digits, _ and -"
            raise Refusal(400, f"the name {name[:80]!r} {why}", param=f"tools[{number}].function.name")
        if (tools[number].function.parameters or {}).get("type", "object") != "object":
            raise Refusal(400, "arguments are an object", param=f"tools[{number}].function.parameters.type")
    if choice in (None, "auto", "none", "required"):
        if choice == "required" and not tools:
            raise Refusal(400, "tool_choice is required, and there are no tools", param="tool_choice")
        return Choice() if choice == "none" or not tools else Choice(tools, choice == "required", parallel is not False)
    named = choice.get("function", choice) if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(named, dict) or named.get("name") not in names:
        raise Refusal(
            400, "tool_choice must be none, auto, required or {type: function, function: {name}} of one of the tools",
            param="tool_choice",
        )  # fmt: skip
    return Choice([tools[names.index(named["name"])]], required=True, parallel=False)


def schema_of(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments. No argument can be invented, unless the schema permits others."""
    given = tool.function.parameters or {}
    if any(key in given for key in COMBINED):
        return {"type": "object", **given}
    return {"type": "object", "properties": {}, "additionalProperties": False, **given}


def call_schema(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a call. References of the arguments' schema begin at its root: definitions move there."""
    arguments = schema_of(tool)
    shared: dict[str, Any] = {key: _within(arguments.pop(key)) for key in ("$defs", "definitions") if key in arguments}
    properties = {"name": {"const": tool.function.name}, "arguments": _within(arguments)}
    return {
        "type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False,
        "x-guidance": SPACED, **shared,
    }  # fmt: skip


def _within(schema: Any) -> Any:
    """A part of the arguments' schema, with references to other places than definitions as they are from that of a call."""
    if isinstance(schema, list):
        return [_within(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _within(value) for key, value in schema.items()}
    found = re.fullmatch(r"#(?!/(?:\$defs|definitions)/)(/.*)?", str(schema.get("$ref")))
    return {**made, "$ref": f"#/properties/arguments{found[1] or ''}"} if found else made


def grammar(choice: Choice, answer: Mapping[str, Any] | None = None) -> str:
    """The grammar, in Lark's notation, of an answer. `answer`: the schema of a text that is JSON; None: any text."""
    calls = " | ".join(f"call_{i}" for i in range(len(choice.tools)))
    lines = [f"call_{i}: %json {json.dumps(call_schema(tool))}" for i, tool in enumerate(choice.tools)]
    block = f'"{OPENING}\\n" call "\\n{CLOSING}"'
    more = f'("\\n" {block})*' if choice.parallel else ""
    lines.append(f"call: {calls}")
    if choice.required:
        return "\n".join([f"start: {block} {more}", *lines]) + "\n"
    if answer is not None:
        lines.append(f"text: %json {json.dumps({**answer, 'x-guidance': SPACED})}")
        return "\n".join([f"start: text | {block} {more}", *lines]) + "\n"
    # A text up to the mark of a call is lazy: it ends there. A text without a call has no such mark.
    lines.append(f"before[lazy]: /(?s:.*){OPENING}\\n/")
    lines.append(f"TEXT: /(?s:.*)/ & ~/(?s:.*{OPENING}\\n.*)/")
    return "\n".join([f'start: TEXT | before call "\\n{CLOSING}" {more}', *lines]) + "\n"


def knows_calls(template: str) -> bool:
    """Whether a chat template writes calls as this module does."""
    return OPENING in template


def introduced(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The messages for a template that knows no tools: they are in a system message, and calls and results are texts."""
    functions = "\n".join(json.dumps(described(tool)["function"], ensure_ascii=False) for tool in tools)
    told = INTRODUCTION.format(functions=functions)
    found: list[dict[str, Any]] = []
    for message in messages:
        content, role = message.get("content") or "", message.get("role")
        if role == "tool":
            found.append({"role": "user", "content": f"<tool_response>\n{text_of(content)}\n</tool_response>"})
        elif message.get("tool_calls"):
            calls = [
                f"{OPENING}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSING}"
                for call in message["tool_calls"]
            ]
            found.append({"role": "assistant", "content": "\n".join([*filter(None, [text_of(content)]), *calls])})
        else:
            found.append(dict(message))
    if not tools:
        return found
    if found and found[0].get("role") == "system":
        return [{**found[0], "content": f"{text_of(found[0].get('content') or '')}\n\n{told}"}, *found[1:]]
    return [{"role": "system", "content": told}, *found]


def described(tool: Tool) -> dict[str, Any]:
    """A tool as templates read it."""
    function = {"name": tool.function.name, "description": tool.function.description or ""}
    return {"type": "function", "function": {**function, "parameters": schema_of(tool)}}


@dataclass
class Call:
    """A call that the model is writing, or has written."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
    whole: bool = False
    told: int = -1  # characters of the arguments that a stream has told; -1: nothing of the call


@dataclass
class Parser:
    """Parts the text of an answer under `grammar` into content and calls, whatever pieces it comes in."""

    content: str = ""
    calls: list[Call] = field(default_factory=list)
    _rest: str = ""  # not understood yet
    _inside: bool = False  # behind the mark of a call
    _depth: int = 0
    _quoted: bool = False
    _escaped: bool = False

    def feed(self, piece: str, *, last: bool = False) -> None:
        """Read a piece of the text; with `last`, what was held back is content. A call without a name is dropped."""
        self._rest += piece
        while self._step():
            pass
        if last and not self._inside and not self.calls:
            self.content += self._rest

    def _step(self) -> bool:
        """Understand the next part of the rest; False: it needs more text."""
        if self.calls and not self.calls[-1].whole:
            return self._arguments(self.calls[-1])
        if self._inside:
            if head := HEAD.match(self._rest):
                self._rest = self._rest[head.end() :]
                self.calls.append(Call(json.loads(f'"{head[1]}"')))
                return True
            return False
        if self.calls:  # behind a call: its end, and maybe the next one
            behind = re.match(r"[\s}]*" + CLOSING + r"\s*", self._rest)
            if behind:
                self._rest = self._rest[behind.end() :]
        if (at := self._rest.find(MARK)) >= 0:
            self.content += self._rest[:at] if not self.calls else ""
            self._rest, self._inside = self._rest[at + len(MARK) :], True
            return True
        if not self.calls:
            certain = len(self._rest) - _held_back(self._rest)
            self.content, self._rest = self.content + self._rest[:certain], self._rest[certain:]
        return False

    def _arguments(self, call: Call) -> bool:
        for place, character in enumerate(self._rest):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    call.arguments += self._rest[: place + 1]
                    self._rest, self._inside, call.whole = self._rest[place + 1 :], False, True
                    return True
        call.arguments, self._rest = call.arguments + self._rest, ""
        return False


def _held_back(text: str) -> int:
    """How many characters at the end may begin the mark of a call."""
    return next((n for n in range(min(len(MARK) - 1, len(text)), 0, -1) if MARK.startswith(text[-n:])), 0)


def as_json(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Calls in the form of a whole answer."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def news(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """What a stream has not told of the calls. The id and the name come once, with empty arguments."""
    found: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        if call.told < 0:
            head = {"index": index, "id": call.id, "type": "function"}
            found.append({**head, "function": {"name": call.name, "arguments": ""}})
            call.told = 0
        if call.told < len(call.arguments):
            found.append({"index": index, "function": {"arguments": call.arguments[call.told :]}})
            call.told = len(call.arguments)
    return found
