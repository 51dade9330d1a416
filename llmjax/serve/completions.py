"""POST /v1/completions and /v1/fim/completions: plain prompts, repeated with their log-probabilities if asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmjax.errors import UserError
from llmjax.infer.given import TokenScores, parts_of_scores
from llmjax.infer.request import Request
from llmjax.objectives.special import special_ids
from llmjax.serve import answering, chat
from llmjax.serve.answering import Asked
from llmjax.serve.calls import Call
from llmjax.serve.choices import Written, usage
from llmjax.serve.fields import MOST_LIKELIEST, choices_of, form_field, likeliest_of, requests_of
from llmjax.serve.log_probs import Placed, completion_form
from llmjax.serve.messages import CompletionBody
from llmjax.serve.refusals import Refusal, unsupported
from llmjax.serve.server import Served
from llmjax.serve.tickets import Ticket

UNKNOWN = float("nan")  # the log-probability of a text's first token


@dataclass(frozen=True)
class Echo:
    """A prompt that is repeated before its texts."""

    text: str
    placed: Placed | None  # its tokens; None: without log-probabilities


async def completions(call: Call) -> None:
    """Continue plain prompts."""
    body = call.read(CompletionBody)
    served = call.server.writer(body.model)
    count = choices_of(body, call.server.settings.choices)
    top = None if body.logprobs is None else likeliest_of("logprobs", body.logprobs)
    if body.best_of not in (None, count):
        raise unsupported("best_of", "it must be n")
    prompts = prompts_of(body.prompt, served)
    if body.echo and body.suffix:
        raise unsupported("suffix", "a text between a prompt and a suffix has no echo")
    with call.server.ticket(served, count * len(prompts), call.key) as ticket:
        rows = await call.server.prepare(_ids, served, prompts, body.suffix)
        requests = _requests(served, body, rows, count)
        echoes = await _echoes(call, served, prompts, rows, top) if body.echo else [Echo("", None)] * len(rows)
        asked = await _asked(call, served, body, rows, requests, echoes, ticket)
        send = _stream if body.stream else _whole
        await send(asked, echoes, body, served, count, top)


async def fim(call: Call) -> None:
    """Write what stands between a prompt and a suffix; the answer has the form of chat completions, as editors read it."""
    body = call.read(CompletionBody)
    served = call.server.writer(body.model)
    count = choices_of(body, call.server.settings.choices)
    with call.server.ticket(served, count, call.key) as ticket:
        if not isinstance(body.prompt, str):
            raise Refusal(400, "prompt must be a text", param="prompt")
        rows = await call.server.prepare(_ids, served, [body.prompt], body.suffix or "")
        asked = await _asked(call, served, body, rows, _requests(served, body, rows, count), [Echo("", None)], ticket)
        await chat.send(asked, served, body)


def prompts_of(
    given: str | list[str | int | list[int]], served: Served, param: str = "prompt"
) -> list[str | list[int]]:
    """The prompts of a request, each a text or ids of the model. Raises Refusal."""
    if isinstance(given, str):
        return [given]
    ids = [one for one in given if isinstance(one, int)]
    several = [one for one in given if not isinstance(one, int)]
    if not given or (ids and several) or any(not len(one) for one in several if isinstance(one, list)):
        raise Refusal(400, f"{param} must be a text, ids, or a list of texts or of ids, none empty", param=param)
    prompts: list[str | list[int]] = [ids] if ids else several
    size = served.model.config.model.vocab_size
    for one in prompts:
        if isinstance(one, list) and not 0 <= min(one) <= max(one) < size:
            raise Refusal(400, f"{param} must have ids from 0 to {size - 1}: those of this model", param=param)
    return prompts


def _requests(served: Served, body: CompletionBody, rows: Sequence[Sequence[int]], count: int) -> list[Request]:
    """The texts to write; none where only prompts are scored. Raises Refusal before anything is computed."""
    if body.echo and body.max_tokens == 0:
        if (longest := max(map(len, rows))) > served.room:
            raise Refusal(
                400, f"a prompt has {longest} tokens, and the model's context is {served.room} tokens: shorten it",
                code="context_length_exceeded", param="prompt",
            )  # fmt: skip
        return []
    return [
        one for row in rows for one in requests_of(body, row, defaults=served.defaults, room=served.room, count=count)
    ]


def _ids(served: Served, prompts: Sequence[str | Sequence[int]], suffix: str | None) -> list[list[int]]:
    """The ids of each prompt. Raises UserError."""
    if suffix is None:
        return [served.prompt(prompt) for prompt in prompts]
    tokenizer = served.model.tokenizer
    special = special_ids(served.model.config.objective, tokenizer)
    markers = (special.prefix, special.suffix, special.middle)
    known = served.model.config.objective.name == "infill" or max(markers) < tokenizer.vocab_size
    if not known:
        raise UserError("suffix cannot be used: the model was not taught to fill in the middle (objective.name=infill)")
    found = []
    for prompt in prompts:
        before = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        row = [markers[0], *before, markers[1], *tokenizer.encode(suffix), markers[2]]
        found.append([*tokenizer.prefix_ids, *row])
    return found


async def _echoes(
    call: Call, served: Served, prompts: Sequence[str | Sequence[int]], rows: Sequence[Sequence[int]], top: int | None
) -> list[Echo]:
    """The prompts as they are repeated, with the log-probabilities of their tokens if `top` is given."""
    pieces = [b"".join(map(served.names.bytes_of, row)).decode("utf-8", "replace") for row in rows]
    texts = [one if isinstance(one, str) else piece for one, piece in zip(prompts, pieces, strict=True)]
    if top is None:
        return [Echo(text, None) for text in texts]
    kept = 1 if top <= 1 else MOST_LIKELIEST  # few programs
    scores = await call.server.compute(served, lambda model: parts_of_scores(model, rows, likeliest=kept))
    return [Echo(text, _placed(served, row, one)) for text, row, one in zip(texts, rows, scores, strict=True)]


def _placed(served: Served, row: Sequence[int], scores: TokenScores) -> Placed:
    placed = Placed(served.names)
    likeliest = [
        list(zip(ids.tolist(), nats.tolist(), strict=True))
        for ids, nats in zip(scores.likeliest_LK, scores.likeliest_nats_LK, strict=True)
    ]
    placed.add(row, [UNKNOWN, *scores.nats_L.tolist()], [(), *likeliest])
    return placed


async def _asked(
    call: Call, served: Served, body: CompletionBody, rows: Sequence[Sequence[int]], requests: Sequence[Request],
    echoes: Sequence[Echo], ticket: Ticket,
) -> Asked:  # fmt: skip
    """The texts, handed to the engine."""
    if not requests:
        return Asked(call, ticket, [], [len(row) for row in rows])
    await ticket.submit(requests, form=form_field(body))
    starts = [len(echo.text) if body.echo else _characters(served, row) for row, echo in zip(rows, echoes, strict=True)]
    texts = [
        Written(served.names, every_token=True, start=start)
        for start in starts
        for _ in range(len(requests) // len(rows))
    ]
    if call.server.log_texts:
        call.facts["prompt"] = body.prompt
    return Asked(call, ticket, texts, [len(row) for row in rows])


def _characters(served: Served, row: Sequence[int]) -> int:
    return len(b"".join(map(served.names.bytes_of, row)).decode("utf-8", "replace"))


def _head(body: CompletionBody, served: Served) -> dict[str, Any]:
    return {**served.head("cmpl", body), "object": "text_completion"}


def _joined(first: Mapping[str, list[Any]] | None, second: Mapping[str, list[Any]] | None) -> dict[str, list[Any]]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [*(first or {}).get(name, []), *(second or {}).get(name, [])] for name in names}


def _of_echo(echo: Echo, top: int | None) -> dict[str, list[Any]] | None:
    if echo.placed is None or top is None:
        return None
    return completion_form(echo.placed, range(len(echo.placed.tokens)), top)


async def _whole(
    asked: Asked, echoes: Sequence[Echo], body: CompletionBody, served: Served, count: int, top: int | None
) -> None:
    await answering.finish(asked)
    choices: list[dict[str, Any]] = []
    for index in range(count * len(echoes)):
        echo = echoes[index // count]
        written = asked.texts[index] if asked.texts else None
        log_probs = None
        if top is not None:
            own = completion_form(written.placed, range(written.placed.told), top) if written else None
            log_probs = _joined(_of_echo(echo, top), own)
        text = echo.text + (written.text if written else "")
        finish = written.finish_reason if written else "length"
        choices.append({"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish})
    await asked.call.reply.json({**_head(body, served), "choices": choices, "usage": usage(asked.prompts, asked.texts)})


async def _stream(
    asked: Asked, echoes: Sequence[Echo], body: CompletionBody, served: Served, count: int, top: int | None
) -> None:
    reply, head = asked.call.reply, _head(body, served)
    beside = {"usage": None} if body.counted else {}

    def chunk(index: int, text: str, log_probs: Any, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish}
        return {**head, "choices": [choice], **beside}

    await reply.stream()
    number = count * len(echoes)
    for index in range(number if body.echo else 0):
        echo = echoes[index // count]
        await reply.data(chunk(index, echo.text, _of_echo(echo, top)))
    async for index, delta in answering.deltas(asked):
        own = completion_form(asked.texts[index].placed, delta.places, top) if top is not None else None
        await reply.data(chunk(index, delta.content, own))
    for index in range(number):
        await reply.data(chunk(index, "", None, asked.texts[index].finish_reason if asked.texts else "length"))
    if body.counted:
        await reply.data({**head, "choices": [], "usage": usage(asked.prompts, asked.texts)})
    await reply.data("[DONE]")
    await reply.end()
