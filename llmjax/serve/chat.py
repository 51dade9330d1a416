"""POST /v1/chat/completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmjax.serve import answering, asks, personas
from llmjax.serve.answering import Asked
from llmjax.serve.calls import Call
from llmjax.serve.choices import Delta, Written, usage
from llmjax.serve.fields import choices_of, form_field, form_of, likeliest_of, requests_of, schema_of
from llmjax.serve.log_probs import chat_form
from llmjax.serve.messages import ROLES, ChatBody, Sampled, parse
from llmjax.serve.refusals import Refusal
from llmjax.serve.server import Served
from llmjax.serve.tickets import Ticket
from llmjax.serve.tools import Choice, Parser, as_json, chosen, grammar

# What the server itself gives the template, or to the function that writes it.
OWN_VARIABLES = {"chat_template", "messages", "tools", "tokenizer", "reply", "add_generation_prompt"}


async def chat(call: Call) -> None:
    """Answer a conversation."""
    body = call.read(ChatBody)
    if body.source is not None:
        await asks.converse(call, body, body.source, checked(body.messages))
        return
    served = call.server.converser(body.model)
    if served.persona is not None:
        await personas.converse(call, body, served, checked(body.messages))
        return
    count = choices_of(body, call.server.settings.choices)
    top = likeliest_of("top_logprobs", body.top_logprobs)
    if top and not body.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    tools = chosen(body.tools, body.tool_choice, body.parallel_tool_calls)
    messages = checked(body.messages)
    checked_variables(body.chat_template_kwargs)
    with call.server.ticket(served, count, call.key) as ticket:
        written = await asked(call, served, body, messages, tools, count, ticket)
        await send(written, served, body, log_probs=bool(body.logprobs), top=top)


async def send(asked: Asked, served: Served, body: Sampled, *, log_probs: bool = False, top: int = 0) -> None:
    """Send an answer in the form of chat completions, whole or as a stream."""
    head = served.head("chatcmpl", body)
    form = Form(head, log_probs, top, body.counted)
    if body.stream:
        await _stream(asked, form)
        return
    await answering.finish(asked)
    choices = [_choice(index, one, form) for index, one in enumerate(asked.texts)]
    await asked.call.reply.json(
        {**head, "object": "chat.completion", "choices": choices, "usage": usage(asked.prompts, asked.texts)}
    )


@dataclass(frozen=True)
class Form:
    """What an answer has beside its texts."""

    head: Mapping[str, Any]
    log_probs: bool
    top: int  # how many of the likeliest tokens
    counted: bool  # whether a stream ends with the usage

    def log_probs_of(self, written: Written, places: range) -> dict[str, Any] | None:
        """The log-probabilities of tokens, if they are asked for."""
        return {"content": chat_form(written.placed, places, self.top), "refusal": None} if self.log_probs else None


async def asked(
    call: Call, served: Served, body: ChatBody, messages: Sequence[Mapping[str, Any]], tools: Choice, count: int, ticket: Ticket
) -> Asked:  # fmt: skip
    """The answers' texts, handed to the engine. Raises Refusal."""
    ids = await call.server.prepare(served.chat, messages, tools.tools, body.chat_template_kwargs or {})
    constraint = form_of(body)
    if tools.tools:
        if constraint is not None and constraint[0] != "json_schema":
            raise Refusal(400, "tools and structured_outputs cannot be combined", param="structured_outputs")
        constraint = ("grammar", grammar(tools, schema_of(body.response_format)))
    requests = requests_of(body, ids, defaults=served.defaults, room=served.room, count=count, constraint=constraint)
    await ticket.submit(requests, form="tools" if tools.tools else form_field(body))
    texts = [Written(served.names, Parser() if tools.tools else None) for _ in range(count)]
    if call.server.log_texts:
        call.facts["messages"] = list(messages)
    return Asked(call, ticket, texts, [len(ids)])


def checked_variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables of a request for the template. Raises Refusal for those that the server gives."""
    for name in (given or {}).keys() & OWN_VARIABLES:
        raise Refusal(400, f"{name} cannot be given to the template", param=f"chat_template_kwargs.{name}")
    return dict(given or {})


def checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as templates read them: arguments of calls are objects. Raises Refusal for a malformed one."""
    if not messages:
        raise Refusal(400, "messages is empty: give at least one message", param="messages")
    found = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        made = {key: value for key, value in message.items() if value is not None}
        if made.get("role") not in ROLES:
            raise Refusal(400, f"{where}.role must be one of {', '.join(ROLES)}", param=f"{where}.role")
        if made["role"] == "developer":
            made["role"] = "system"
        content = made.get("content", "")
        if isinstance(content, list):
            made["content"] = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        elif not isinstance(content, str):
            raise Refusal(400, f"{where}.content must be a text or a list of parts", param=f"{where}.content")
        if made.get("tool_calls"):
            made["tool_calls"] = _calls(made["tool_calls"], f"{where}.tool_calls")
        else:
            made.pop("tool_calls", None)
            if "content" not in made and made["role"] != "assistant":
                raise Refusal(400, f"{where}.content is missing", param=f"{where}.content")
        found.append(made)
    return found


def _part(part: Any, where: str) -> dict[str, str]:
    if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "output_text", "refusal"):
        kind = part.get("type") if isinstance(part, dict) else part
        raise Refusal(
            400, f"{where}: parts of the type {str(kind)[:40]!r} are not read, only text", code="unsupported_parameter",
            param=f"{where}.type",
        )  # fmt: skip
    text = part.get("text", part.get("refusal"))
    if not isinstance(text, str):
        raise Refusal(400, f"{where}.text must be a text", param=f"{where}.text")
    return {"type": "text", "text": text}


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise Refusal(400, f"{where} must be a list", param=where)
    found = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refusal(400, f"{where}[{number}].function must have a name", param=f"{where}[{number}].function")
        arguments = function.get("arguments") or "{}"
        try:
            arguments = parse(arguments.encode()) if isinstance(arguments, str) else arguments
        except Refusal as refusal:
            at = f"{where}[{number}].function.arguments"
            raise Refusal(400, f"{at}: {refusal.message.replace('the body', 'it')}", param=at) from refusal
        found.append({**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _choice(index: int, written: Written, form: Form) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": written.content, "refusal": None}
    if written.calls:
        message |= {"content": written.content or None, "tool_calls": as_json(written.calls)}
    return {
        "index": index, "message": message, "logprobs": form.log_probs_of(written, range(written.placed.told)),
        "finish_reason": written.finish_reason,
    }  # fmt: skip


async def _stream(asked: Asked, form: Form) -> None:
    reply = asked.call.reply
    head = {**form.head, "object": "chat.completion.chunk"}
    beside = {"usage": None} if form.counted else {}

    def chunk(index: int, delta: Mapping[str, Any], finish: str | None = None, log_probs: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish}
        return {**head, "choices": [choice], **beside}

    await reply.stream()
    for index in range(len(asked.texts)):
        await reply.data(chunk(index, {"role": "assistant", "content": ""}))
    async for index, delta in answering.deltas(asked):
        told = _delta(delta)
        log_probs = form.log_probs_of(asked.texts[index], delta.places) if delta.places else None
        if told or log_probs:
            await reply.data(chunk(index, told or {"content": ""}, log_probs=log_probs))
    for index, written in enumerate(asked.texts):
        await reply.data(chunk(index, {}, written.finish_reason))
    if form.counted:
        await reply.data({**head, "choices": [], "usage": usage(asked.prompts, asked.texts)})
    await reply.data("[DONE]")
    await reply.end()


def _delta(delta: Delta) -> dict[str, Any]:
    found: dict[str, Any] = {"content": delta.content} if delta.content else {}
    return {**found, "tool_calls": delta.calls} if delta.calls else found
