"""The routes of the server, and the small endpoints: health, models, tokens, metrics, rated answers, the page."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from llmjax import storage
from llmjax.data import conversations
from llmjax.data.messages import RowError
from llmjax.data.tokenizer import check_characters
from llmjax.errors import UserError
from llmjax.serve.agent import agent, permission
from llmjax.serve.asks import ask, list_sources
from llmjax.serve.calls import Call, Endpoint, Handler
from llmjax.serve.chat import chat, checked, checked_variables
from llmjax.serve.completions import completions, fim
from llmjax.serve.guard import Access, Guard
from llmjax.serve.messages import (
    AgentBody,
    AskBody,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    FeedbackBody,
    PermissionBody,
    ReadBody,
    RerankBody,
    ResponsesBody,
    TokenizeBody,
)
from llmjax.serve.openapi import document
from llmjax.serve.reading import read
from llmjax.serve.refusals import Refusal, unsupported
from llmjax.serve.responses import responses
from llmjax.serve.server import Served, Server
from llmjax.serve.vectors import embeddings, rerank

STATIC = Path(__file__).parent / "static"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
# The page may load and ask nothing but what this server has, and no other page may show it in a frame.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def make_app(server: Server, *, hosts: Collection[str], keys: Collection[str] = ()) -> ASGIApp:
    """The ASGI application of a server.

    Args:
        hosts: names by which the server may be asked.
        keys: API keys; empty: nobody needs one.
    """
    files = {f"/{path.name}": path for path in sorted(STATIC.iterdir())}
    files["/"] = STATIC / "index.html"
    described = document(POSTS, GETS)

    async def openapi(call: Call) -> None:
        await call.reply.json(described)

    gets = {**GETS, "/openapi.json": openapi, **dict.fromkeys(files, _file_of(files))}
    routes = [
        *(Route(path, Endpoint(server, handler), methods=["POST"]) for path, (handler, _) in POSTS.items()),
        *(Route(path, Endpoint(server, handler), methods=["GET"]) for path, handler in gets.items()),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False
    access = Access(hosts, tuple(keys), tuple(server.settings.origins), page=frozenset(files))
    return Guard(app, access)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses, in the form of all errors."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    known = {404: ("not_found", "there is no such path"), 405: ("method_not_allowed", "this path has another method")}
    code, message = known.get(status, ("invalid_request", "the request cannot be read"))
    response = Refusal(status, f"{message}: {request.method} {request.url.path[:200]}", code=code).response()
    response.headers.update(getattr(error, "headers", None) or {})  # Allow
    return response


def _file_of(files: dict[str, Path]) -> Handler:
    """A handler for the files of the page: exactly these paths, so that no path leads out of the folder."""

    async def file(call: Call) -> None:
        path = files[call.scope["path"]]
        await call.reply.whole(path.read_bytes(), kind=KINDS[path.suffix], headers=PAGE_HEADERS)

    return file


async def health(call: Call) -> None:
    """Whether the process answers and its engine has not stopped."""
    if call.server.worker.failure is not None:
        raise Refusal(503, "the engine has stopped", code="engine_error")
    await call.reply.json({"status": "ok"})


async def ready(call: Call) -> None:
    """Whether requests are answered."""
    call.server.check_ready()
    await call.reply.json({"status": "ready"})


async def metrics(call: Call) -> None:
    """Counters and times for Prometheus."""
    await call.reply.whole(call.server.metrics.text(), kind="text/plain; version=0.0.4; charset=utf-8")


def _described(served: Served) -> dict[str, Any]:
    beside = {} if served.persona is None else {"persona": served.persona.public}
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "llmjax",
        "max_model_len": served.room, "parent": served.parent or None,
        **beside,
    }  # fmt: skip


async def models(call: Call) -> None:
    """The models that are served."""
    await call.reply.json({"object": "list", "data": [_described(one) for one in call.server.models.values()]})


async def model(call: Call) -> None:
    """One model; its name may have slashes."""
    await call.reply.json(_described(call.server.model(call.scope["path_params"]["model"])))


async def tokenizer_info(call: Call) -> None:
    """The named tokens and the chat template, as evaluation harnesses ask for them."""
    tokenizer = call.server.model(call.query("model")).model.tokenizer
    named = tokenizer.named_tokens
    tokens = {f"{name}_token": named.get(name) for name in ("eos", "bos", "pad", "unk")}
    await call.reply.json(
        {"tokenizer_class": tokenizer.kind, **tokens, "chat_template": tokenizer.chat_template or None}
    )


async def tokenize(call: Call) -> None:
    """The ids of a text, or of a conversation as the template writes it. Control tokens in a text become their ids."""
    body = call.read(TokenizeBody)
    served = call.server.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "give prompt or messages", param="prompt")
    if body.messages is not None:
        messages, variables = checked(body.messages), checked_variables(body.chat_template_kwargs)
        reply = body.add_generation_prompt is not False
        ids = await call.server.prepare(served.chat, messages, (), {**variables, "reply": reply})
    else:
        ids = await call.server.prepare(_plain_ids, served, body.prompt, body.add_special_tokens is not False)
    await call.reply.json({"tokens": ids, "count": len(ids), "max_model_len": served.room})


def _plain_ids(served: Served, text: str, prefix: bool) -> list[int]:
    check_characters(text)
    tokenizer = served.model.tokenizer
    return [*(tokenizer.prefix_ids if prefix else ()), *tokenizer.encode(text, specials="parse")]


async def detokenize(call: Call) -> None:
    """The text of ids."""
    body = call.read(DetokenizeBody)
    tokenizer = call.server.model(body.model).model.tokenizer
    if wrong := [i for i in body.tokens if not 0 <= i < tokenizer.vocab_size]:
        raise Refusal(400, f"the id {wrong[0]} is not from 0 to {tokenizer.vocab_size - 1}", param="tokens")
    await call.reply.json({"prompt": await call.server.prepare(tokenizer.decode, body.tokens)})


async def feedback(call: Call) -> None:
    """Keep a rated answer as a row that `llmjax dpo` reads: a preference of two, or one that is good or bad."""
    body = call.read(FeedbackBody)
    path = call.server.feedback
    if path is None:
        raise unsupported("feedback", "the server keeps no rated answers")
    row: dict[str, Any]
    if body.chosen is not None and body.rejected is not None:
        row = {"prompt": body.prompt, "chosen": _answer(body.chosen), "rejected": _answer(body.rejected)}
    elif body.completion is not None and body.label is not None:
        row = {"prompt": body.prompt, "completion": _answer(body.completion), "label": body.label}
    else:
        raise Refusal(400, "give chosen and rejected, or completion and label", param="label")
    try:
        conversations.check(row)
    except (UserError, RowError) as error:
        raise Refusal(400, f"no training would read this row: {error}", param="prompt") from error
    kept = path.with_name("preferences.jsonl" if "chosen" in row else "ratings.jsonl")
    await call.server.prepare(storage.append_line, kept, json.dumps(row, ensure_ascii=False))
    await call.reply.json({"status": "kept"})


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


POSTS: dict[str, tuple[Handler, type[Body]]] = {
    "/v1/chat/completions": (chat, ChatBody),
    "/v1/completions": (completions, CompletionBody),
    "/v1/responses": (responses, ResponsesBody),
    "/v1/embeddings": (embeddings, EmbeddingsBody),
    "/v1/rerank": (rerank, RerankBody),
    "/v1/fim/completions": (fim, CompletionBody),
    "/ask": (ask, AskBody),
    "/agent": (agent, AgentBody),
    "/agent/permission": (permission, PermissionBody),
    "/read": (read, ReadBody),
    "/tokenize": (tokenize, TokenizeBody),
    "/detokenize": (detokenize, DetokenizeBody),
    "/feedback": (feedback, FeedbackBody),
}
GETS: dict[str, Handler] = {
    "/v1/models": models,
    "/v1/models/{model:path}": model,
    "/sources": list_sources,
    "/tokenizer_info": tokenizer_info,
    "/health": health,
    "/ready": ready,
    "/metrics": metrics,
}
