"""The studio's HTTP server, on this machine only."""

import asyncio
import socket
from types import FrameType

import uvicorn
from ml_collections import ConfigDict
from starlette.types import ASGIApp

from llmjax.serve.guard import LOOPBACK
from llmjax.serve.http import bind, configured
from llmjax.studio.app import Studio, make_app
from llmjax.studio.chat import Chat
from llmjax.studio.places import Places


def serve(places: Places, c: ConfigDict, *, port: int, idle_seconds: float, connections: int) -> None:
    """Serve until a signal, and free the model of the chat then. Prints the URL.

    Raises UserError for a port that cannot be had.
    """
    with bind("127.0.0.1", port) as listening:
        asyncio.run(_serve(places, c, listening, idle_seconds=idle_seconds, connections=connections))


class _Server(uvicorn.Server):
    """uvicorn's server, which ends at a signal without raising it again."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True


async def _serve(
    places: Places, c: ConfigDict, listening: socket.socket, *, idle_seconds: float, connections: int
) -> None:
    hosts = {*LOOPBACK, *c.serve.hosts}
    chat = Chat(c, hosts=hosts, idle_seconds=idle_seconds)
    app: ASGIApp = make_app(Studio(places, chat), hosts=hosts, origins=c.serve.origins)
    server = _Server(configured(app, connections=connections))
    telling = asyncio.create_task(
        _tell(server, f"studio of {places.path('')} at http://127.0.0.1:{listening.getsockname()[1]}")
    )
    try:
        await server.serve(sockets=[listening])
    finally:
        telling.cancel()
        await chat.close()


async def _tell(server: uvicorn.Server, line: str) -> None:
    """Print a line when requests are answered."""
    while not server.started:
        await asyncio.sleep(0.02)
    print(line, flush=True)
