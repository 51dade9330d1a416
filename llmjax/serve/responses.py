"""POST /v1/responses: OpenAI's newer interface, without memory. A conversation comes whole with every request."""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from llmjax.serve import answering
from llmjax.serve import chat as chats
from llmjax.serve.answering import Asked
from llmjax.serve.calls import Call
from llmjax.serve.choices import Written, usage
from llmjax.serve.messages import ChatBody, Function, ResponsesBody, Tool
from llmjax.serve.refusals import Refusal
from llmjax.serve.server import Served, new_id
from llmjax.serve.tools import MOST_TOOLS, chosen

SKIPPED = ("reasoning", "item_reference")  # items of the input that tell the model nothing


async def responses(call: Call) -> None:
    """Answer a conversation in the form of responses."""
    body = call.read(ResponsesBody)
    served = call.server.writer(body.model)
    with _renamed(places := list[str]()):
        asked_as = _as_chat(body, places)
        tools = chosen(asked_as.tools, asked_as.tool_choice, asked_as.parallel_tool_calls)
        messages = chats.checked(asked_as.messages)
    with call.server.ticket(served, 1, call.key) as ticket:
        with _renamed(places):
            asked = await chats.asked(call, served, asked_as, messages, tools, 1, ticket)
        if body.stream:
            await _stream(asked, served, body)
            return
        await answering.finish(asked)
        items = _items(asked.texts[0], new_id("msg"))
        await call.reply.json(_whole(asked, served, body, new_id("resp"), int(time.time()), items))


NAMES = {
    "max_completion_tokens": "max_output_tokens", "max_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input",
}  # fmt: skip


@contextlib.contextmanager
def _renamed(places: Sequence[str]) -> Iterator[None]:
    """Name the fields of a Refusal as the request has them.

    Args:
        places: of each message of the chat.
    """
    try:
        yield
    except Refusal as refusal:
        if refusal.param is None:
            raise
        names = {**{f"messages[{number}]": place for number, place in enumerate(places)}, **NAMES}
        names |= {f"tools[{number}].function": f"tools[{number}]" for number in range(MOST_TOOLS)}
        old = next((name for name in names if re.match(re.escape(name) + r"(?!\w)", refusal.param)), "")
        param = names.get(old, "") + refusal.param[len(old) :]
        message = refusal.message.replace(old, names[old]) if old else refusal.message
        raise Refusal(refusal.status, message, code=refusal.code, param=param, again=refusal.again) from refusal


def _as_chat(body: ResponsesBody, places: list[str]) -> ChatBody:
    """The same request to chat completions; `places` gets the place of each message. Raises Refusal."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
        places.append("instructions")
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for number, item in enumerate(items):
        _add(messages, item, f"input[{number}]")
        places += [f"input[{number}]"] * (len(messages) - len(places))
    if not messages or all(message["role"] == "system" for message in messages):
        messages.append({"role": "user", "content": ""})  # clients look with an empty input whether a server is there
    form = (body.text or {}).get("format")
    if form is not None and not isinstance(form, dict):
        raise Refusal(400, "text.format must be an object with a type", param="text.format")
    if form is not None and form.get("type") == "json_schema":
        if not isinstance(form.get("schema"), dict):
            raise Refusal(
                400, "text.format must be {type: json_schema, name, schema: {...}}", param="text.format.schema"
            )
        form = {"type": "json_schema", "json_schema": {"name": form.get("name"), "schema": form.get("schema")}}
    # Types of tools that only one client knows are skipped, as its own servers do.
    tools = [
        Tool("function", Function(tool.name or "", tool.description, tool.parameters))
        for tool in body.tools or []
        if tool.type == "function"
    ]
    return ChatBody(
        model=body.model, messages=messages, max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature, top_p=body.top_p, response_format=form,
        tools=tools, tool_choice=body.tool_choice if tools else None, parallel_tool_calls=body.parallel_tool_calls,
    )  # fmt: skip


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    """Append an item of the input to the messages. Calls that follow each other are one message."""
    kind = item.get("type") or "message"
    if kind == "message":
        messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == "function_call":
        call = {
            "id": item.get("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "tool_calls": [call]})
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind not in SKIPPED:
        raise Refusal(400, f"{where}: items of the type {str(kind)[:40]!r} are not read", param=f"{where}.type")


def _message(text: str, number: str, status: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": number, "status": status, "role": "assistant", "content": content}


def _call(call: Any, status: str) -> dict[str, Any]:
    return {
        "type": "function_call", "id": f"fc_{call.id[5:]}", "call_id": call.id, "name": call.name,
        "arguments": call.arguments, "status": status,
    }  # fmt: skip


def _items(written: Written, number: str) -> list[dict[str, Any]]:
    """The items of the output: a message, then calls."""
    status = "incomplete" if written.finish_reason == "length" else "completed"
    items = [_message(written.content, number, status)] if written.content or not written.calls else []
    return items + [_call(call, "completed" if call.whole else "incomplete") for call in written.calls]


def _whole(
    asked: Asked, served: Served, body: ResponsesBody, number: str, created: int, items: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """The response. `items` None: it has only begun."""
    cut = items is not None and asked.texts[0].finish_reason == "length"
    status = "in_progress" if items is None else "incomplete" if cut else "completed"
    made: dict[str, Any] = {
        "id": number, "object": "response", "created_at": created, "status": status, "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens, "model": body.model or served.name, "output": items or [],
        "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None, "store": False,
        "temperature": body.temperature, "top_p": body.top_p, "tool_choice": body.tool_choice or "auto",
        "tools": msgspec.to_builtins(body.tools or []), "text": body.text or {"format": {"type": "text"}}, "usage": None,
        "metadata": body.metadata or {},
    }  # fmt: skip
    if items is not None:
        counts = usage(asked.prompts, asked.texts)
        made["usage"] = {
            "input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"],
            "total_tokens": counts["total_tokens"], "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens_details": {"reasoning_tokens": 0},
        }  # fmt: skip
    return made


class _Events:
    """The events of a stream, with rising numbers."""

    def __init__(self, asked: Asked) -> None:
        self._reply, self._number = asked.call.reply, 0

    async def tell(self, kind: str, **fields: Any) -> None:
        await self._reply.event(
            f"response.{kind}", {"type": f"response.{kind}", "sequence_number": self._number, **fields}
        )
        self._number += 1


async def _stream(asked: Asked, served: Served, body: ResponsesBody) -> None:
    reply, written, events = asked.call.reply, asked.texts[0], _Events(asked)
    number, created, message = new_id("resp"), int(time.time()), new_id("msg")
    begun = _whole(asked, served, body, number, created, None)
    await reply.stream()
    await events.tell("created", response=begun)
    await events.tell("in_progress", response=begun)
    text = {"item_id": message, "output_index": 0, "content_index": 0}
    opened = 0  # 1: the message is open; 2: it is closed
    calls: list[dict[str, Any]] = []  # items of the calls that are open or done

    async def open_message() -> None:
        await events.tell(
            "output_item.added", output_index=0, item={**_message("", message, "in_progress"), "content": []}
        )
        await events.tell("content_part.added", **text, part={"type": "output_text", "text": "", "annotations": []})

    async def close_message() -> None:
        item = _items(written, message)[0]
        await events.tell("output_text.done", **text, text=written.content)
        await events.tell("content_part.done", **text, part=item["content"][0])
        await events.tell("output_item.done", output_index=0, item=item)

    async def close_call(index: int) -> None:
        call = written.calls[index]
        item = _call(call, "completed" if call.whole else "incomplete")
        place = {"item_id": item["id"], "output_index": index + (1 if opened else 0)}
        await events.tell("function_call_arguments.done", **place, arguments=call.arguments)
        await events.tell("output_item.done", output_index=place["output_index"], item=item)

    async for _, delta in answering.deltas(asked):
        if delta.content:
            if not opened:
                opened = 1
                await open_message()
            await events.tell("output_text.delta", **text, delta=delta.content)
        for told in delta.calls:
            if opened == 1:
                opened = 2
                await close_message()
            index, call = told["index"], written.calls[told["index"]]
            place = {"item_id": f"fc_{call.id[5:]}", "output_index": index + (1 if opened else 0)}
            if "id" in told:
                if index:
                    await close_call(index - 1)
                item = {**_call(call, "in_progress"), "arguments": ""}
                calls.append(item)
                await events.tell("output_item.added", output_index=place["output_index"], item=item)
            else:
                await events.tell("function_call_arguments.delta", **place, delta=told["function"]["arguments"])
    if not opened and not calls:
        opened = 1
        await open_message()
    if opened == 1:
        await close_message()
    if calls:
        await close_call(len(calls) - 1)
    items = _items(written, message)
    whole = _whole(asked, served, body, number, created, items)
    await events.tell("incomplete" if written.finish_reason == "length" else "completed", response=whole)
    await reply.end()
