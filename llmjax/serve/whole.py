"""Chat completions whose answer is known at once, because it was checked first: in one piece, whole or as a stream."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.serve.calls import Call
from llmjax.serve.messages import ChatBody, text_of
from llmjax.serve.refusals import Refusal
from llmjax.serve.server import Served

# What such an answer has no use for, or what would get around its prompt.
REFUSED = (
    "tools", "tool_choice", "response_format", "structured_outputs", "chat_template_kwargs", "logprobs", "top_logprobs", "logit_bias", "stop",
    "top_k", "min_p", "typical_p", "repetition_penalty",
)  # fmt: skip


def check_fields(body: ChatBody, with_what: str) -> None:
    """Raise Refusal for a field that would change what an answer is made of."""
    if given := [name for name in REFUSED if getattr(body, name)]:
        raise Refusal(400, f"{given[0]} cannot be used with {with_what}", param=given[0], code="unsupported_parameter")
    if body.n not in (None, 1):
        raise Refusal(400, f"n must be 1 with {with_what}", param="n")


def plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The messages, each with its text."""
    return [{"role": one["role"], "content": text_of(one.get("content", ""))} for one in messages]


async def send(
    call: Call, served: Served, body: ChatBody, text: str, counts: Mapping[str, Any], *,
    beside: Mapping[str, Any], end: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Send an answer.

    Args:
        counts: its usage.
        beside: fields of ours, in every chunk of a stream.
        end: fields of ours, in the last chunk.
    """
    head = {**served.head("chatcmpl", body), **beside}
    if not body.stream:
        message = {"role": "assistant", "content": text, "refusal": None}
        choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
        made = {**head, "object": "chat.completion", "choices": choices, "usage": counts}
        await call.reply.json({**made, **(end or {})})
        return
    head |= {"object": "chat.completion.chunk", **({"usage": None} if body.counted else {})}
    if not call.reply.status:
        await call.reply.stream()
    for delta, finish in (({"role": "assistant", "content": ""}, None), ({"content": text}, None), ({}, "stop")):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        await call.reply.data({**head, "choices": [choice], **((end or {}) if finish else {})})
    if body.counted:
        await call.reply.data({**head, "choices": [], "usage": counts})
    await call.reply.data("[DONE]")
    await call.reply.end()
