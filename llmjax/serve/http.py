"""The HTTP server: uvicorn on httptools, with limits of time and size for headers, and an end that waits for answers."""

import asyncio
import resource
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmjax.errors import UserError
from llmjax.serve.guard import HEADER_BYTES
from llmjax.serve.refusals import Refusal
from llmjax.serve.server import Server

HEADER_SECONDS = 10.0  # for the headers of a request to arrive
IDLE_SECONDS = 75  # between the requests of a connection
WATCH_SECONDS = 1.0
SPARE = 4096  # connections beside those of texts that are written or wait: they are answered with 429
MOST_FILES = 65536  # open files that the process asks for, one for each connection


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol; it closes connections whose headers come too slowly, or do not end."""

    _seen = 0  # bytes of headers that are not whole yet
    _open = True  # whether headers are being read
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        self._open = False
        self._stop()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._open:
            self._seen += len(data)
            if self._seen > HEADER_BYTES:
                self._close(b"431 Request Header Fields Too Large")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop()
        self._open, self._seen = True, 0
        self._timer = self.loop.call_later(HEADER_SECONDS, self._close, b"408 Request Timeout")

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self, status: bytes) -> None:
        if self._open and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn's server. At the first signal it takes no more requests and waits for the answers; at the second it ends."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._served, self._draining = server, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining:
            self._served.stop_answers(Refusal(503, "the server is ending", code="draining"))
            self.should_exit = True
            return
        self._draining = True
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    async def _drain(self) -> None:
        await self._served.drain(self._served.settings.drain_seconds)
        self.should_exit = True

    async def run_until_end(self, sockets: list[socket.socket], on_ready: Callable[[], None]) -> None:
        """Serve. `on_ready` is called when requests are answered. Raises what stopped the worker, if it failed."""
        self._loop = asyncio.get_running_loop()
        self._served.start()
        watching = asyncio.ensure_future(self._watch(on_ready))
        try:
            await self.serve(sockets=sockets)
        finally:
            watching.cancel()
            self._served.stop()
        if self._served.worker.failure is not None:
            raise self._served.worker.failure
        if self._served.worker.stalled >= self._served.settings.stall_seconds:
            raise RuntimeError(f"the engine computed nothing for {self._served.settings.stall_seconds:.0f} s")

    async def _watch(self, on_ready: Callable[[], None]) -> None:
        """Tell when the worker is ready, and end the server when the worker has ended or computes nothing any more."""
        served, told = self._served, False
        while True:
            if not told and served.ready and self.started:
                told = True
                on_ready()
            stalled = served.worker.stalled >= served.settings.stall_seconds
            if served.worker.failure is not None or stalled:
                served.stop_answers(Refusal(503, "the engine has stopped", code="engine_error"))
                await asyncio.sleep(0.2)  # the answers end
                self.should_exit = True
                return
            with_change = asyncio.ensure_future(served.changed.wait())
            await asyncio.wait({with_change}, timeout=WATCH_SECONDS if told else 0.05)
            with_change.cancel()
            served.changed.clear()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: a free one. Raises UserError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise UserError(
            f"{host}:{port} cannot be listened on ({error}): give another --port, or 0 for a free one"
        ) from error
    made.set_inheritable(True)
    return made


def configured(app: ASGIApp, *, connections: int) -> uvicorn.Config:
    """uvicorn's settings for an application with at most so many connections."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=5,
        limit_concurrency=connections,
        proxy_headers=False,
    )


def _allow_files() -> None:
    """Let the process have as many open files as it may: many systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(app: ASGIApp, server: Server, listening: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until a signal. Raises what stopped the worker."""
    _allow_files()
    config = configured(app, connections=server.admission.places + SPARE)
    asyncio.run(HttpServer(config, server).run_until_end([listening], on_ready))
