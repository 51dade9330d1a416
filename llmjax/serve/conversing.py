"""Conversations of `infer.asking` on the server: the engine writes what they ask, and their own work runs in threads."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmjax.infer.asking import Ask, Conversation, fitting
from llmjax.infer.request import Request
from llmjax.retrieve.database import execute
from llmjax.serve import answering
from llmjax.serve.answering import WAIT_SECONDS, Asked
from llmjax.serve.calls import PING_SECONDS, Call
from llmjax.serve.choices import Written, usage
from llmjax.serve.server import Served
from llmjax.serve.tickets import Ticket
from llmjax.serve.worker import settle

T = TypeVar("T")
News = dict[str, Any]


async def _drop(news: News) -> None:
    """Who reads no news."""


@dataclass
class Talk:
    """A conversation of a request, with what was asked and written so far.

    Args:
        streams: whether the reply is a stream, which begins when the engine has the first text.
        on_news: told, in the event loop, what the conversation's work tells by `tell`.
    """

    call: Call
    served: Served
    ticket: Ticket
    streams: bool = False
    on_news: Callable[[News], Awaitable[None]] = _drop
    transcript: list[dict[str, Any]] = field(default_factory=list)
    texts: list[Written] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)  # tokens of each prompt
    _news: "asyncio.Queue[News | None]" = field(default_factory=asyncio.Queue)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    async def result(self, conversation: Conversation[T]) -> T:
        """What the conversation ends with. Raises Refusal, and whatever the conversation raises."""
        asked, value = await self._away(lambda: _advanced(conversation, None))
        while asked is not None:
            text = await self._written(asked)
            asked, value = await self._away(lambda text=text: _advanced(conversation, text))  # type: ignore[misc]
        answering.account(Asked(self.call, self.ticket, self.texts, self.prompts))
        return value  # type: ignore[return-value]

    def tell(self, news: News) -> None:
        """Tell something from a thread."""
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens of all texts."""
        return usage(self.prompts, self.texts)

    async def _written(self, asked: Ask) -> str:
        """The text that is asked for."""
        served = self.served
        kept, ids = await self.call.server.prepare(fitting, served.model.tokenizer, served.room, asked)
        settings = {"adapter": served.adapter, **{name: value for name, value in kept.items() if name != "messages"}}
        await self.ticket.submit([Request(ids=tuple(ids), **settings)])
        if self.streams and not self.call.reply.status:
            await self.call.reply.stream()
        written = Written(served.names)
        async for _ in answering.events(Asked(self.call, self.ticket, [written], [len(ids)])):
            pass
        assert written.completion is not None
        self.texts.append(written)
        self.prompts.append(len(ids))
        self.transcript.append(
            {"purpose": asked.purpose, "asked": kept, "text": written.text, "finish": written.completion.finish}
        )
        return written.text

    async def _away(self, function: Callable[[], T]) -> T:
        """What a function returns that runs in a thread, while its news are told and the client gets signs of life.

        The thread is a daemon, so that a tool which hangs does not keep the server from ending. Raises Refusal when the answer
        is stopped or takes too long. Its query to a database ends then. The thread goes on, and its result is dropped.
        """
        future: Future[T] = Future()
        thread = threading.Thread(target=settle, args=(future, function), name="conversation", daemon=True)
        thread.start()
        try:
            return await self._awaited(future)
        except BaseException:
            execute.end(thread)
            raise

    async def _awaited(self, future: Future[T]) -> T:
        """The result of a future, see `_away`."""
        running = asyncio.wrap_future(future)
        running.add_done_callback(lambda _: self._news.put_nowait(None))
        told = time.monotonic()
        while True:
            self.ticket.check()
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    news = await self._news.get()
            except TimeoutError:
                if self.call.reply.status and time.monotonic() - told > PING_SECONDS:
                    await self.call.reply.ping()
                    told = time.monotonic()
                continue
            if news is None:
                return await running
            await self.on_news(news)
            told = time.monotonic()


def _advanced(conversation: Conversation[T], text: str | None) -> tuple[Ask | None, T | None]:
    """What a conversation asks next, or its result, when it gets a text; None: it begins."""
    try:
        return (next(conversation) if text is None else conversation.send(text)), None
    except StopIteration as end:
        return None, end.value
