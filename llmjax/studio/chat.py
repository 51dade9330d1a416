"""A chat with any checkpoint: the server of `llmjax serve` within the studio, around one model at a time.

A model is loaded when somebody asks for it, in a thread. The one before is freed first. A model that nobody has asked for
a while is freed too.
"""

import asyncio
import gc
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from starlette.types import ASGIApp, Receive, Scope, Send

from llmjax.serve.refusals import Refusal

PREFIX = "/chat"
WATCH_SECONDS = 5.0
DRAIN_SECONDS = 2.0  # for texts of the model that another one takes the place of


class Chat:
    """An ASGI application for the paths below PREFIX, and what `app` says of it. All methods are for one event loop."""

    def __init__(self, settings: ConfigDict, *, hosts: Collection[str], idle_seconds: float) -> None:
        """
        Args:
            settings: of the engine (`infer`) and of the server (`serve`).
            hosts: names by which the studio may be asked.
            idle_seconds: how long a model stays that nobody asks.
        """
        self._settings, self._hosts, self._idle = settings, hosts, idle_seconds
        self._app: ASGIApp | None = None
        self._server: Any = None
        self._changing = asyncio.Lock()
        self._asked = 0.0
        self._watch: asyncio.Task[None] | None = None
        self.name, self.loading, self.error = "", "", ""

    @property
    def state(self) -> dict[str, Any]:
        """The model that is there ("name"), the one that is being loaded, and why the last one was not."""
        failure = self._server.worker.failure if self._server is not None else None
        ready = self._server is not None and self._server.ready
        return {"name": self.name, "ready": ready, "loading": self.loading, "error": str(failure or self.error)}

    async def open(self, name: str, folder: Path) -> None:
        """Load the model of a run or of a checkpoint, in the place of another one.

        Raises Refusal while another one is being loaded, and UserError for a model that cannot be.
        """
        if self.loading:
            raise Refusal(409, f"{self.loading} is being loaded", code="loading", again=True)
        async with self._changing:
            self._asked = time.monotonic()
            if self.name == name and self.state["ready"]:
                return
            self.loading, self.error = name, ""
            try:
                await self._free()
                await self._load(name, folder)
            except Exception as error:
                self.error = str(error) or repr(error)
                raise
            finally:
                self.loading = ""

    async def _load(self, name: str, folder: Path) -> None:
        from llmjax.serve.app import make_app
        from llmjax.serve.models import engines, open_model
        from llmjax.serve.server import Server

        c = self._settings
        served = await asyncio.to_thread(open_model, folder, c, name=name)
        run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
        kept = run / "serve" / "preferences.jsonl"
        self._server = Server([served], lambda: engines([served], c), c.serve, slots=c.infer.slots, feedback=kept)
        self._app, self.name = make_app(self._server, hosts=self._hosts), name
        self._server.start()
        self._watch = asyncio.create_task(self._free_when_idle())

    async def close(self) -> None:
        """Free the model that is there."""
        async with self._changing:
            await self._free()

    async def _free(self) -> None:
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
        server, self._server, self._app, self.name, self._watch = self._server, None, None, "", None
        if server is not None:
            await server.drain(DRAIN_SECONDS)
            await asyncio.to_thread(server.stop)
            del server
            gc.collect()  # the arrays of the model are in circles of references

    async def _free_when_idle(self) -> None:
        while self._server is not None:
            await asyncio.sleep(min(WATCH_SECONDS, self._idle))
            if self._server is not None and self._server.worker.texts:
                self._asked = time.monotonic()
            if time.monotonic() - self._asked > self._idle and not self._changing.locked():
                await self.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if app is None:
            refusal = Refusal(503, "no model is loaded: choose Chat at a run of the studio", code="no_model")
            await refusal.response()(scope, receive, send)
            return
        self._asked = time.monotonic()
        path = scope["path"].removeprefix(PREFIX)
        await app({**scope, "path": path, "raw_path": path.encode(), "root_path": ""}, receive, send)
