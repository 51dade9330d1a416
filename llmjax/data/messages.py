"""Messages of rows, in the ways that files write them: checked lists, turns of ShareGPT, texts with marks.

A part of a row that cannot be read raises `RowError`, which costs the row alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.data.chat import Message

Text = str | Sequence[Message]  # a plain text is read as it is, messages through the chat template
SPEAKERS = {
    **dict.fromkeys(("gpt", "bard", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("observation", "tool_response", "function_response"), "tool"),
}
CALLERS = ("function_call", "tool_call")  # speakers of ShareGPT whose text is a call, or a list of them
ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function")
SYSTEMS, TOOLS = ("system", "developer"), ("tool", "function")  # TOOLS: whose messages answer calls
# Calls in the text of a turn, as Hermes, Glaive, Mistral and Llama write them.
WRITTEN_CALL = re.compile(r"<\|?(tool|function)_?calls?\b|\[TOOL_CALLS\]|<\|python_tag\|>", re.IGNORECASE)
TURN = re.compile(r"\n\n(Human|Assistant): ?")  # Anthropic's helpful and harmless pairs


class RowError(Exception):
    """Why a row is left out."""


def messages_of(given: Any) -> list[Message]:
    """A list of messages, checked for what training needs: roles, contents, an order that says who answers whom.

    A single message needs no list, and the list may be JSON in a text. Turns of ShareGPT (from, value) are read too.
    """
    given = listed(given)
    if isinstance(given, str):
        raise RowError("the messages are a text that is no JSON")
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, list) or not given:
        raise RowError("there are no messages")
    made: list[Message] = []
    calling = 0  # the number of the message whose calls wait for their answers
    for number, message in enumerate(given, start=1):
        if isinstance(message, Mapping) and "from" in message and "role" not in message:
            message = _said(message)
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError(f"message {number} is {short(message)}: give a role and a content")
        role, calls = message["role"], message.get("tool_calls")
        if calls:
            calls = _checked_calls(calls, number)
            message = {**message, "tool_calls": calls}
        if role not in ROLES:
            raise RowError(f"message {number} has the role {role!r}: give system, user, assistant or tool")
        # Many files have a system message that says nothing, which templates write.
        if _is_blank(message.get("content")) and not calls and role not in (*TOOLS, *SYSTEMS):
            raise RowError(f"message {number}, of the {role}, is empty")
        if role in TOOLS and not calling and not (made and _may_be_answered(made[-1])):
            raise RowError(f"message {number} is a tool's answer, and no call stands before it")
        if role not in TOOLS:
            if calling and made[-1]["role"] not in TOOLS:
                raise RowError(f"message {calling} calls a tool, and no answer follows")
            calling = number if calls else 0
        made.append({key: value for key, value in message.items() if value is not None})
    return made


def with_system(messages: Text, system: Any) -> Text:
    """Messages with the text of a column `system` in front, if it says anything."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise RowError(f"system is {short(system)}: give a text")
    if isinstance(messages, str):
        raise RowError("system stands beside a prompt that is a plain text: give messages, or put it into the prompt")
    if messages and messages[0]["role"] in SYSTEMS:
        if messages[0].get("content") == system:
            return messages
        raise RowError("system is a column and the first message, with different texts: keep one")
    return [{"role": "system", "content": system}, *messages]


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


def behind(prompt: Text, chosen: Text, rejected: Text) -> tuple[Text, Any, Any]:
    """The prompt of a pair and the answers behind it, where the answers may repeat the prompt, or say more of it."""
    if prompt and chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    if isinstance(chosen, str) or isinstance(rejected, str) or not prompt:
        return prompt, chosen, rejected
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    shared, *rest = common_prompt(chosen, rejected)
    if isinstance(shared, str) or not shared or shared[0]["role"] not in ("user", *SYSTEMS):
        return asked, chosen, rejected
    if all(any(one == other for other in shared) for one in asked):
        return shared, rest[0], rest[1]
    raise RowError("prompt is not what chosen and rejected begin with: give it once")


def listed(value: Any) -> Any:
    """A list, which may be JSON in a text, as in tables; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def short(value: Any) -> str:
    """The value for a message."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _said(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn of ShareGPT as a message."""
    speaker = turn.get("from", turn.get("role"))
    name, said = str(speaker).lower(), turn.get("value", turn.get("content"))
    others = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    if name in CALLERS:
        return {**others, "role": "assistant", "tool_calls": _calls_of(said)}
    return {**others, "role": SPEAKERS.get(name, name if name in ROLES else speaker), "content": said}


def _calls_of(said: Any) -> list[dict[str, Any]]:
    try:
        given = json.loads(said) if isinstance(said, str) else said
    except (ValueError, RecursionError) as error:
        raise RowError(f"a call is {short(said)}, which is no JSON: {error}") from None
    made = []
    for call in given if isinstance(given, list) else [given]:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise RowError(f"a call is {short(call)}: give JSON with name and arguments")
        arguments = call.get("arguments", call.get("parameters")) or {}
        made.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return made


def _checked_calls(given: Any, number: int) -> list[Any]:
    """The calls of a message, objects whose `function` is one too, or has the name itself."""
    calls = listed(given)
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name", ""), str):
            raise RowError(
                f"message {number} has the call {short(call)}: give a list of {{'function': {{'name': ..., 'arguments': ...}}}}"
            )
    return calls if isinstance(calls, list) else [calls]


def _is_blank(content: Any) -> bool:
    if isinstance(content, list):
        return all(
            isinstance(p, Mapping) and p.get("type", "text") == "text" and _is_blank(p.get("text")) for p in content
        )
    return not content.strip() if isinstance(content, str) else content is None


def _may_be_answered(message: Message) -> bool:
    content = message.get("content")
    return message["role"] in TOOLS or (isinstance(content, str) and WRITTEN_CALL.search(content) is not None)
