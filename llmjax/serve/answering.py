"""Reading an answer's texts from the engine: the deltas for a stream, or all of it, with signs of life and accounts."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from llmjax.serve.calls import PING_SECONDS, Call
from llmjax.serve.choices import Delta, Written
from llmjax.serve.tickets import Ticket

WAIT_SECONDS = 1.0  # between two looks at the deadlines


@dataclass(frozen=True)
class Asked:
    """The texts of an answer that the engine is writing."""

    call: Call
    ticket: Ticket
    texts: Sequence[Written]
    prompts: Sequence[int]  # tokens of each prompt


async def events(asked: Asked) -> AsyncIterator[tuple[int, Delta]]:
    """What each event adds, with the index of its text. A stream gets signs of life. Raises Refusal."""
    told = time.monotonic()
    while not asked.ticket.done:
        news = await asked.ticket.news(WAIT_SECONDS)
        for index, event in news:
            delta = asked.texts[index].take(event)
            if delta:
                yield index, delta
                told = time.monotonic()
        if asked.call.reply.status and time.monotonic() - told > PING_SECONDS:
            await asked.call.reply.ping()
            told = time.monotonic()


async def deltas(asked: Asked) -> AsyncIterator[tuple[int, Delta]]:
    """As `events`, and at the end the texts are accounted for."""
    async for index, delta in events(asked):
        yield index, delta
    account(asked)


async def finish(asked: Asked) -> None:
    """Read the texts to their end. Raises Refusal."""
    async for _ in deltas(asked):
        pass


def account(asked: Asked) -> None:
    """Count the tokens, and note them for the log."""
    metrics, ticket = asked.call.server.metrics, asked.ticket
    seconds = time.monotonic() - ticket.arrived
    done = [one.completion for one in asked.texts if one.completion is not None]
    made = sum(len(one.tokens) for one in done)
    metrics.prompt_tokens.inc(sum(asked.prompts))
    metrics.generation_tokens.inc(made)
    metrics.cached_tokens.inc(sum(one.cached for one in done))
    for written in asked.texts:
        metrics.finished.labels(written.finish_reason).inc()
    metrics.first_token.observe(ticket.first_after)
    metrics.whole.observe(seconds)
    for one in done:
        if len(one.tokens) > 1:
            metrics.each_token.observe((seconds - ticket.first_after) / (len(one.tokens) - 1))
    asked.call.facts |= {
        "prompt_tokens": sum(asked.prompts), "completion_tokens": made, "first_seconds": round(ticket.first_after, 4),
        "finish": [written.finish_reason for written in asked.texts],
    }  # fmt: skip
    if asked.call.server.log_texts:
        asked.call.facts["texts"] = [written.text for written in asked.texts]
