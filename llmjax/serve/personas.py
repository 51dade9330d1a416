"""POST /v1/chat/completions of a persona: it answers from its writings, with quotes that were checked, and says what it is.

An answer is told when it is checked, so a stream has signs of life and then the answer in one piece. Beside the text it has `persona`: the name, that it
is simulated, the disclosure, and the citations. Fields that would change what an answer is made of are refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.errors import UserError
from llmjax.infer.asking import Conversation
from llmjax.serve import whole
from llmjax.serve.calls import Call
from llmjax.serve.conversing import Talk
from llmjax.serve.fields import length_of, seed_of
from llmjax.serve.messages import ChatBody
from llmjax.serve.server import Served

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
    assert served.persona is not None
    whole.check_fields(body, "a persona")
    conversation = _conversation(served.persona, body, whole.plain(messages))
    with call.server.ticket(served, 1, call.key) as ticket:
        talk = Talk(call, served, ticket, streams=bool(body.stream))
        reply = await talk.result(conversation)
    told = {
        **served.persona.public, "said": reply.said, "citations": [vars(one) for one in reply.citations], "declined": reply.declined,
        "reason": reply.reason,
    }  # fmt: skip
    await whole.send(call, served, body, reply.text, talk.usage, beside={"persona": told})


def _conversation(persona: "Persona", body: ChatBody, messages: Sequence[Mapping[str, Any]]) -> "Conversation[Reply]":
    from llmjax.persona.reply import (
        MOST_TOKENS,
        reply,
    )  # takes half a second, which the server's start need not wait for

    return (
        yield from reply(
            persona, messages, temperature=body.temperature or 0.0, seed=seed_of(body, 0), tokens=length_of(body) or MOST_TOKENS
        )
    )  # fmt: skip
