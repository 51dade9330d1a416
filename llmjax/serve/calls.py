"""One request and its reply: the body is read under limits, a client that leaves ends the work, errors have one form."""

import asyncio
import contextlib
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from llmjax.errors import UserError
from llmjax.serve import messages
from llmjax.serve.refusals import Refusal, encoded, of_user_error

if TYPE_CHECKING:
    from llmjax.serve.server import Server

BODY_BYTES = 4 << 20
BODY_SECONDS = 10.0  # for a body to arrive
PING_SECONDS = 15.0  # between two signs of life in a stream; proxies close what is silent for 50 s and more
STREAM_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}


class Reply:
    """The reply to a request: one JSON value, or a stream of events."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.request_id = send, request_id
        self.status = 0  # 0: nothing was sent yet
        self._ended = False

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def whole(self, data: bytes, *, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a whole body."""
        await self._start(
            status, {"content-type": kind, "content-length": str(len(data)), "x-content-type-options": "nosniff", **(headers or {})}
        )  # fmt: skip
        self._ended = True
        await self._send({"type": "http.response.body", "body": data})

    async def json(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a JSON value."""
        await self.whole(encoded(value), kind="application/json", status=status, headers=headers)

    async def stream(self) -> None:
        """Begin a stream."""
        await self._start(200, STREAM_HEADERS)

    async def _part(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def data(self, value: Any) -> None:
        """Send an event of a stream: a value, or a text as it is."""
        await self._part(b"data: " + (value.encode() if isinstance(value, str) else encoded(value)) + b"\n\n")

    async def event(self, name: str, value: Any) -> None:
        """Send an event with a name."""
        await self._part(b"event: " + name.encode() + b"\ndata: " + encoded(value) + b"\n\n")

    async def ping(self) -> None:
        """Send a sign of life, which clients skip."""
        await self._part(b": ping\n\n")

    async def end(self) -> None:
        """End a stream."""
        self._ended = True
        await self._send({"type": "http.response.body", "body": b""})

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error: as the status if nothing was sent yet, else as the last event of the stream."""
        if not self.status:
            await self.json(refusal.body, status=refusal.status, headers=refusal.headers)
        elif not self._ended:
            await self.data(refusal.body)
            await self.end()


class Call:
    """A request with its reply, and what the log says of it."""

    def __init__(self, server: "Server", scope: Scope, reply: Reply, body: bytes) -> None:
        self.server, self.scope, self.reply, self.body = server, scope, reply, body
        self.key: str = scope.get("llmjax.key", "")
        self.facts: dict[str, Any] = {}

    def read(self, kind: type[messages.T]) -> messages.T:
        """The fields of the body. Raises Refusal that names the field which is wrong."""
        return messages.read(self.body, kind, on_unknown=self.server.log_unknown)

    def header(self, name: str) -> str:
        """A header of the request, or ""."""
        return header(self.scope, name)

    def query(self, name: str) -> str | None:
        """A parameter of the address."""
        return Request(self.scope).query_params.get(name)


Handler = Callable[[Call], Awaitable[None]]


class Endpoint:
    """An ASGI application for one route: it runs a handler, and ends it when the client leaves."""

    def __init__(self, server: "Server", handler: Handler) -> None:
        self._server, self._handler = server, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, server = time.monotonic(), self._server
        reply = Reply(send, scope["llmjax.id"])
        call = Call(server, scope, reply, b"")
        gone = True
        with contextlib.suppress(_Gone):
            gone = await self._run(call, receive)
        route = getattr(scope.get("route"), "path", scope["path"])
        seconds = time.monotonic() - began
        status = "499" if gone else str(reply.status)
        server.metrics.requests.labels(route, status).inc()
        server.log(route=route, status=int(status), id=reply.request_id, seconds=round(seconds, 4), **call.facts)

    async def _run(self, call: Call, receive: Receive) -> bool:
        """Read the body and answer; whether the client left before the end."""
        try:
            call.body = await _body(call.scope, receive)
        except Refusal as refusal:
            await call.reply.refuse(refusal)
            return False
        answering = asyncio.ensure_future(self._answer(call))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return not answering.done()
        finally:
            for task in (answering, leaving):
                if not task.done():
                    task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, call: Call) -> None:
        reply = call.reply
        try:
            try:
                await self._handler(call)
            except Refusal as refusal:
                call.facts["code"] = refusal.code
                await reply.refuse(refusal)
            except UserError as error:
                await reply.refuse(of_user_error(error))
            except Exception:
                traceback.print_exc()
                await reply.refuse(Refusal(500, "the server failed at this request", code="internal_error"))
        except OSError:  # the connection is closed
            return


class _Gone(Exception):  # noqa: N818
    """The client left before its request was whole."""


def header(scope: Scope, name: str) -> str:
    """A header of a request, or ""."""
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == name.encode()), "")


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(scope: Scope, receive: Receive) -> bytes:
    """The body, counted while it comes. Raises Refusal for one that is too large, too slow or no JSON."""
    if scope["method"] not in ("POST", "PUT", "PATCH"):
        return b""
    if header(scope, "content-type").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "send JSON, with content-type: application/json", code="unsupported_media_type")
    if (coding := header(scope, "content-encoding").strip().lower()) not in ("", "identity"):
        raise Refusal(415, f"send the body as it is, not as {coding[:40]}", code="unsupported_media_type")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message: Message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > BODY_BYTES:
                    raise Refusal(413, f"the body has more than {BODY_BYTES:,} bytes", code="request_too_large")
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Refusal(408, f"the body took more than {BODY_SECONDS:.0f} s", code="request_timeout") from None
