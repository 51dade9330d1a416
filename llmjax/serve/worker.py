"""The thread that owns the engines. Nothing else calls them, or computes with a model.

The event loop hands it functions, and it hands events back, one call of the loop for all events of a step. A request that
an engine cannot answer fails alone.
"""

import asyncio
import functools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from llmjax.infer.engine import Engine
from llmjax.infer.request import Event, Request

T = TypeVar("T")
Listener = Callable[[Event], None]
ENGINE_FAILED = "the engine failed"
MOST_FAILURES = 3  # steps that fail one after another until the thread gives up


def settle(future: Future[T], function: Callable[[], T]) -> None:
    """Call a function, whose result or error is the future's, unless nobody waits for it any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


class Worker:
    """See the module. `start` and the other methods are for one event loop."""

    def __init__(self, make: Callable[[], Mapping[str, Engine]]) -> None:
        """`make` builds and warms the engines, in the thread: name -> engine."""
        self._make = make
        self.engines: Mapping[str, Engine] = {}
        self.ready = False
        self.failure: BaseException | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._left: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()  # requests to end, also within a step
        self._listeners: dict[tuple[str, int], Listener] = {}
        self._busy_since = 0.0  # 0: it waits for work
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop, on_change: Callable[[], None]) -> None:
        """Start the thread. `on_change` is called in the loop when the engines are ready, or the thread has ended."""
        self._loop, self._on_change = loop, on_change
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after its step, and wait for it a little."""
        self._ending = True
        self._inbox.put(lambda: None)
        self._thread.join(timeout=5.0)

    @property
    def stalled(self) -> float:
        """Seconds since the step began that is being computed."""
        since = self._busy_since
        return time.monotonic() - since if self.ready and since else 0.0

    @property
    def texts(self) -> int:
        """How many texts are being written or wait."""
        return len(self._listeners)

    async def call(self, function: Callable[[], T]) -> T:
        """What a function returns that is called in the thread between two steps."""
        done: Future[T] = Future()
        if self.failure is not None:
            raise RuntimeError("the engines have ended") from self.failure
        self._inbox.put(functools.partial(settle, done, function))
        return await asyncio.wrap_future(done)

    async def submit(self, name: str, requests: Sequence[Request], listeners: Sequence[Listener]) -> list[int]:
        """Put requests in an engine's queue: their numbers. All or none; events go to the listeners, in the loop.

        Raises UserError for one that the engine cannot answer.
        """

        def submit() -> list[int]:
            engine, numbers = self.engines[name], list[int]()
            try:
                for request in requests:
                    numbers.append(engine.submit(request))
            except BaseException:
                for number in numbers:
                    engine.cancel(number)
                raise
            self._listeners |= {(name, number): one for number, one in zip(numbers, listeners, strict=True)}
            return numbers

        return await self.call(submit)

    def cancel(self, name: str, numbers: Sequence[int]) -> None:
        """End requests, also while their prompts are read. They tell nothing any more."""
        for number in numbers:
            self._left.put((name, number))
        self._inbox.put(self._end_left)

    def _end_left(self) -> None:
        while not self._left.empty():
            name, number = self._left.get()
            if self._listeners.pop((name, number), None) is not None:
                self.engines[name].cancel(number)

    def _run(self) -> None:
        try:
            self.engines = self._make()
            self.ready = True
            self._loop.call_soon_threadsafe(self._on_change)
            failures = 0
            while not self._ending:
                self._take()
                for name, engine in self.engines.items():
                    if not engine.busy:
                        continue
                    self._busy_since = time.monotonic()
                    try:
                        self._tell(name, engine.step(self._end_left))
                        failures = 0
                    except Exception as error:
                        traceback.print_exc()
                        failures += 1
                        if failures >= MOST_FAILURES:
                            raise
                        self._fail(name, engine, error)
                self._busy_since = 0.0
        except BaseException as error:
            self.failure = error
            if self.ready:
                traceback.print_exc()
            for name, engine in self.engines.items():
                self._fail(name, engine, error)
        finally:
            self.ready = False
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._on_change)

    def _take(self) -> None:
        """Do what was handed over; wait for it if no engine has work. What comes meanwhile waits for a step."""
        wait = not any(engine.busy for engine in self.engines.values())
        for _ in range(max(self._inbox.qsize(), int(wait))):
            function = self._inbox.get()
            self._busy_since = time.monotonic()
            function()

    def _tell(self, name: str, events: Sequence[Event]) -> None:
        told: list[tuple[Listener, Event]] = []
        for event in events:
            key = (name, event.number)
            listener = self._listeners.get(key)
            if event.finish:
                self._listeners.pop(key, None)
            if listener is not None:
                told.append((listener, event))
        if told:
            self._loop.call_soon_threadsafe(_deliver, told)

    def _fail(self, name: str, engine: Engine, error: BaseException) -> None:
        """End all texts of an engine, whose step failed."""
        told: list[tuple[Listener, Event]] = []
        message = f"{ENGINE_FAILED}: {type(error).__name__}"
        for key in [key for key in self._listeners if key[0] == name]:
            engine.cancel(key[1])
            told.append((self._listeners.pop(key), Event(key[1], finish="error", error=message)))
        if told:
            self._loop.call_soon_threadsafe(_deliver, told)


def _deliver(told: Sequence[tuple[Callable[[Any], None], Any]]) -> None:
    for listener, event in told:
        listener(event)
