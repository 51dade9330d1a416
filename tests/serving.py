"""A server within the process, around a tiny model with random parameters, and a client of its ASGI application."""

import asyncio
import base64
import dataclasses
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import uvicorn
from networks import make

from llmjax import config
from llmjax.data.tokenizer import Tokenizer, byte_tokenizer
from llmjax.infer import asking
from llmjax.infer.asking import Ask
from llmjax.infer.language_model import LanguageModel
from llmjax.parallel import mesh as meshes
from llmjax.serve.agent import Agents
from llmjax.serve.app import make_app
from llmjax.serve.conversing import Talk
from llmjax.serve.guard import LOOPBACK
from llmjax.serve.http import SPARE, bind, configured
from llmjax.serve.server import LIKELIEST, Served, Server, with_adapters
from llmjax.serve.sources import Source

ROOM, SLOTS = 512, 4
TEMPLATE = (
    "{% if tools %}{{ 'Tools: ' + (tools | tojson) + ' in <tool_call>\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ call.function | tojson }}</tool_call>{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
GREEDY = {"temperature": 0.0, "top_p": 1.0}


@functools.cache
def language_model(**changes: Any) -> LanguageModel:
    """A model of bytes with random parameters."""
    c = config.base()
    c.name = "tiny"
    c.model.update({"layers": 1, "width": 16, "heads": 2, "mlp_width": 16, "max_length": ROOM, "vocab_size": 272})
    c.model.attention = "reference"
    c.generate.update({"temperature": 1.0, "top_p": 1.0})
    for key, value in changes.items():
        config.set_key(c, key.replace("__", "."), value)
    tokenizer: Tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE, prefix_ids=())
    module, params = make(c.model)
    mesh = meshes.make_mesh("", devices=jax.devices()[:1])
    return LanguageModel(c.lock(), module, params, tokenizer, 7, mesh, lambda *_: None)


class Client:
    """Asks an ASGI application whose loop runs in another thread."""

    def __init__(self, app: Any, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.app, self.server, self.loop = app, server, loop

    def run(self, coroutine: Any) -> Any:
        """The result of a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=120)

    def open(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, *, reads: bool = True
    ) -> "Exchange":
        """Send a request, and do not wait for the answer. Without `reads` nothing of it is read until `held` is set."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        given = {"host": "127.0.0.1:8000", **({"content-type": "application/json"} if data else {}), **(headers or {})}
        pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items() if value != "-"]
        exchange = Exchange(self, method, path, data, pairs)
        if not reads:
            exchange.held.clear()
        asyncio.run_coroutine_threadsafe(exchange.talk(), self.loop)
        return exchange

    def get(self, path: str, **headers: str) -> "Exchange":
        return self.open("GET", path, headers=headers).wait()

    def post(self, path: str, body: Any, **headers: str) -> "Exchange":
        return self.open("POST", path, body, headers).wait()

    def chat(self, **fields: Any) -> "Exchange":
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **fields}
        return self.post("/v1/chat/completions", {key: value for key, value in body.items() if value is not ...})

    def complete(self, **fields: Any) -> "Exchange":
        body = {"prompt": "hi", "max_tokens": 8, **fields}
        return self.post("/v1/completions", {key: value for key, value in body.items() if value is not ...})


class Exchange:
    """A request and its answer, as much of it as has come."""

    def __init__(self, client: Client, method: str, path: str, data: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self._client, self._method, self._data, self._pairs = client, method, data, headers
        self._path, _, self._query = path.partition("?")
        self.status, self.headers, self.parts = 0, {}, list[bytes]()
        self.done, self.first = threading.Event(), threading.Event()
        self._left: asyncio.Event | None = None
        self.held = asyncio.Event()  # the reader takes what is sent; cleared: it reads nothing
        self.held.set()

    async def talk(self) -> None:
        self._left = asyncio.Event()
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": self._data, "more_body": False}
            assert self._left is not None
            await self._left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, Any]) -> None:
            await self.held.wait()
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            elif message["type"] == "http.response.body":
                self.parts.append(message.get("body", b""))
                self.first.set()

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": self._method, "scheme": "http",
            "path": self._path, "raw_path": self._path.encode(), "query_string": self._query.encode(), "root_path": "",
            "headers": self._pairs, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        try:
            await self._client.app(scope, receive, send)
        finally:
            self.done.set()
            self.first.set()

    def wait(self) -> "Exchange":
        assert self.done.wait(120)
        return self

    def leave(self) -> None:
        """Close the connection."""
        self._client.loop.call_soon_threadsafe(lambda: self._left and self._left.set())

    @property
    def text(self) -> str:
        return b"".join(self.parts).decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def chunks(self) -> list[Any]:
        """The values of a stream, without its end."""
        lines = [line[6:] for line in self.text.split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


def joined(chunks: Sequence[Mapping[str, Any]], index: int = 0) -> dict[str, Any]:
    """A stream of chat completions as one message, put together as OpenAI's client does."""
    message: dict[str, Any] = {"content": "", "calls": [], "logprobs": [], "finish": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            message["content"] += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                while len(message["calls"]) <= call["index"]:
                    message["calls"].append({"id": "", "name": "", "arguments": ""})
                into = message["calls"][call["index"]]
                into["id"] += call.get("id", "")
                into["name"] += call["function"].get("name", "")
                into["arguments"] += call["function"].get("arguments", "")
            message["logprobs"] += (choice["logprobs"] or {}).get("content", [])
            message["finish"] = choice["finish_reason"] or message["finish"]
    return message


def floats(encoded: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(encoded), "<f4")


def until(true: Callable[[], Any], seconds: float = 30.0) -> bool:
    """Wait for something to become true; whether it did."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true())


@contextmanager
def listening(client: Client) -> Iterator[int]:
    """The port of a real HTTP server with the application of a client."""
    socket = bind("127.0.0.1", 0)
    server = uvicorn.Server(configured(client.app, connections=client.server.admission.places + SPARE))
    serve = asyncio.run_coroutine_threadsafe(server.serve([socket]), client.loop)
    try:
        assert until(lambda: server.started or serve.done())
        yield socket.getsockname()[1]
    finally:
        server.should_exit = True
        serve.result(30)
        socket.close()


@contextmanager
def serving(
    model: LanguageModel, *, feedback: Path | None = None, keys: Sequence[str] = (), slots: int = SLOTS, steps: int = 4,
    make_engines: Callable[[], Mapping[str, Any]] | None = None, sources: Sequence[Source] = (), agents: Agents | None = None,
    **settings: Any,
) -> Iterator[Client]:  # fmt: skip
    """A client of a server with this model, under the name "tiny"."""
    c = config.base()
    c.serve.update(settings)
    served = Served("tiny", model, {**model.config.generate.to_dict(), "stop": ()}, model.config.model.max_length)
    served = dataclasses.replace(
        served, defaults={k: v for k, v in served.defaults.items() if k not in ("prompts", "beams", "length_penalty")}
    )

    def engines() -> dict[str, Any]:
        return {
            "tiny": model.engine(
                slots=slots,
                length=model.config.model.max_length,
                steps=steps,
                chunks=(32, 256),
                likeliest=LIKELIEST,
                weight_format="stored",
            )
        }

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin() -> Client:
        server = Server(
            [served, *with_adapters(served)],
            make_engines or engines,
            c.serve,
            slots=slots,
            sources=sources,
            agents=agents,
            feedback=feedback,
        )
        server.log = lambda **facts: None  # type: ignore[method-assign]
        server.start()
        return Client(make_app(server, hosts=LOOPBACK, keys=keys), server, loop)

    client: Client = asyncio.run_coroutine_threadsafe(begin(), loop).result(10)
    try:
        assert until(lambda: client.server.worker.ready or client.server.worker.failure, 120)
        yield client
    finally:
        client.server.stop()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)


@contextmanager
def scripted(monkeypatch: pytest.MonkeyPatch, write: Callable[[Ask], str]) -> Iterator[None]:
    """Let a function write the texts that conversations ask for, in place of the engine."""

    async def written(talk: Talk, asked: Ask) -> str:
        if talk.streams and not talk.call.reply.status:
            await talk.call.reply.stream()
        text = write(asked)
        kept = asking._kept(asked, 0)
        talk.transcript.append({"purpose": asked.purpose, "asked": kept, "text": text, "finish": "script"})
        return text

    with monkeypatch.context() as patch:
        patch.setattr(Talk, "_written", written)
        yield
