"""POST /v1/chat/completions of a persona: it answers from its writings, with quotes that were checked, and says what it is.

An answer is told when it is checked, so a stream has signs of life and then the answer in one piece. Beside the text it has `persona`: the name, that it
is simulated, the disclosure, and the citations. Fields that would change what an answer is made of are refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.errors import UserError
from llmjax.infer.asking import Ask, Conversation, fitting
from llmjax.infer.request import Request
from llmjax.serve import answering, whole
from llmjax.serve.answering import Asked
from llmjax.serve.calls import Call
from llmjax.serve.choices import Written, usage
from llmjax.serve.messages import ChatBody
from llmjax.serve.server import Served
from llmjax.serve.tickets import Ticket

if TYPE_CHECKING:
    from llmjax.persona.card import Persona
    from llmjax.persona.reply import Reply


def opened(folder: Path) -> "Persona | None":
    """The persona in a folder; None: it is that of a run, or of adapters.

    Raises UserError for the training inside a persona's folder: served alone, it would not say what it is.
    """
    from llmjax.persona import card

    if card.is_persona(folder):
        return card.read(folder)
    for above in folder.resolve().parents:
        if card.is_persona(above):
            raise UserError(f"{folder} is the training of the persona in {above}: serve {above}, which says what it is")
    return None


def with_personas(served: Sequence[Served], personas: Mapping[str, "Persona"]) -> list[Served]:
    """The models: adapters of personas as personas, and personas without training as such of the first model."""
    marked = [replace(one, persona=personas[one.adapter]) if one.adapter in personas else one for one in served]
    plain = {name: persona for name, persona in personas.items() if not persona.run}
    return marked + [replace(served[0], name=name, parent=served[0].name, persona=one) for name, one in plain.items()]


async def converse(call: Call, body: ChatBody, served: Served, messages: Sequence[Mapping[str, Any]]) -> None:
    """Answer a conversation with a persona."""
    whole.check_fields(body, "a persona")
    with call.server.ticket(served, 1, call.key) as ticket:
        begun = await call.server.prepare(_begun, served, body, whole.plain(messages))
        if not isinstance(begun, tuple):
            await _send(call, served, body, begun, Asked(call, ticket, [], [0]))
            return
        reply, asked = await _written(call, served, begun, ticket, stream=bool(body.stream))
        await _send(call, served, body, reply, asked)


def _begun(
    served: Served, body: ChatBody, messages: Sequence[Mapping[str, Any]]
) -> "Reply | tuple[Conversation[Reply], Ask]":
    """The conversation with what it asks first, or its answer where it declines."""
    from llmjax.persona.reply import (
        MOST_TOKENS,
        reply,
    )  # takes half a second, which the server's start need not wait for

    assert served.persona is not None
    tokens = body.max_completion_tokens or body.max_tokens or MOST_TOKENS
    conversation = reply(
        served.persona, messages, adapter=served.adapter, temperature=body.temperature or 0.0, seed=body.seed or 0, tokens=tokens
    )  # fmt: skip
    try:
        return conversation, next(conversation)
    except StopIteration as end:
        declined: Reply = end.value
        return declined


async def _written(
    call: Call, served: Served, begun: "tuple[Conversation[Reply], Ask]", ticket: Ticket, *, stream: bool
) -> "tuple[Reply, Asked]":
    """The answer of the conversation, when the engine has written what it asked for."""
    conversation, wanted = begun
    kept, ids = await call.server.prepare(fitting, served.model.tokenizer, served.room, wanted)
    del kept["messages"]
    await ticket.submit([Request(ids=tuple(ids), **kept)])
    asked = Asked(call, ticket, [Written(served.names)], [len(ids)])
    if stream:  # signs of life can be sent from now on
        await call.reply.stream()
    await answering.finish(asked)
    try:
        conversation.send(asked.texts[0].text)
    except StopIteration as end:
        return end.value, asked
    raise AssertionError("a persona asks the model once")


async def _send(call: Call, served: Served, body: ChatBody, reply: "Reply", asked: Asked) -> None:
    assert served.persona is not None
    told = {
        **served.persona.public, "said": reply.said, "citations": [vars(one) for one in reply.citations], "declined": reply.declined,
        "reason": reply.reason,
    }  # fmt: skip
    await whole.send(call, served, body, reply.text, usage(asked.prompts, asked.texts), beside={"persona": told})
