"""The way of an answer's texts from the queue to their last event."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from llmjax.errors import UserError
from llmjax.infer.constrained import SECONDS
from llmjax.infer.request import Event, Request
from llmjax.serve.admission import Place
from llmjax.serve.refusals import Refusal, of_user_error
from llmjax.serve.worker import ENGINE_FAILED, Worker

MOST_BUFFERED = 256  # events that a slow reader may be behind


@dataclass(frozen=True)
class Deadlines:
    """Seconds from the arrival of a request; 0: none."""

    first: float = 0.0  # until its first event
    total: float = 0.0  # until its end


class Ticket:
    """The texts of one answer on an engine, which may be submitted one after another. Leaving the block cancels what is not done and gives the places back."""

    def __init__(self, worker: Worker, name: str, place: Place, deadlines: Deadlines) -> None:
        self.arrived = time.monotonic()
        self.first_after = 0.0  # seconds to the first event
        self._worker, self._name, self._place, self._deadlines = worker, name, place, deadlines
        self._events: deque[tuple[int, Event]] = deque()
        self._bell = asyncio.Event()
        self._numbers: list[int] = []
        self._left: set[int] = set()
        self._stopped: Refusal | None = None

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._left and self._numbers:
            self._worker.cancel(self._name, [self._numbers[index] for index in self._left])
        self._left.clear()
        self._place.leave()

    async def submit(self, requests: Sequence[Request], *, form: str | None = None) -> None:
        """Put the texts in the queue. Raises Refusal for what the engine cannot write.

        Args:
            form: the field of the request that their constraints come from.
        """
        engine = self._worker.engines[self._name]
        self._place.hold(sum(len(one.ids) for one in requests))
        self._left = set(range(len(requests)))
        with refused():
            for constraint in {one.constraint for one in requests if one.constraint}:
                await _compiled(engine.compile(constraint).future, form)
            listeners = [self._listener(index) for index in range(len(requests))]
            submitting = asyncio.ensure_future(self._worker.submit(self._name, requests, listeners))
            try:
                self._numbers = await asyncio.shield(submitting)
            except asyncio.CancelledError:  # the client left, and the engine may have the texts already
                submitting.add_done_callback(self._withdraw)
                raise

    def _withdraw(self, submitting: "asyncio.Future[list[int]]") -> None:
        if not submitting.cancelled() and submitting.exception() is None:
            self._worker.cancel(self._name, submitting.result())

    def _listener(self, index: int) -> Any:
        def listen(event: Event) -> None:
            if event.finish:
                self._left.discard(index)
            if not self.first_after:
                self.first_after = time.monotonic() - self.arrived
            self._events.append((index, event))
            if len(self._events) > MOST_BUFFERED and self._stopped is None:
                self._stopped = Refusal(503, "the answer was read too slowly", code="slow_reader")
            self._bell.set()

        return listen

    @property
    def done(self) -> bool:
        """Whether all texts have ended and their events are read."""
        return not self._left and not self._events

    def stop(self, reason: Refusal) -> None:
        """End the answer from outside; who reads it gets the reason."""
        self._stopped = self._stopped or reason
        self._bell.set()

    async def news(self, wait: float) -> list[tuple[int, Event]]:
        """The events that have come, by the index of their text; none after so many seconds.

        Raises Refusal for a text that failed, a deadline, and when the answer is stopped.
        """
        deadline = self._deadline()
        if not self._events and self._stopped is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(min(wait, deadline - time.monotonic()), 0.0)):
                    await self._bell.wait()
        self._bell.clear()
        if self._stopped is not None:
            raise self._stopped
        found = list(self._events)
        self._events.clear()
        for _, event in found:
            if event.finish == "error":
                broken = event.error.startswith(ENGINE_FAILED)
                raise Refusal(500 if broken else 400, event.error, code="engine_error" if broken else "invalid_value")
        if not found:
            self.check()
        return found

    def check(self) -> None:
        """Raise Refusal when the answer is stopped, and at its deadline."""
        if self._stopped is not None:
            raise self._stopped
        if time.monotonic() >= self._deadline():
            raise Refusal(504, "the answer took longer than the server allows", code="deadline_exceeded")

    def _deadline(self) -> float:
        limits = [self._deadlines.total]
        if not self.first_after:
            limits.append(self._deadlines.first)
        return min((self.arrived + limit for limit in limits if limit), default=float("inf"))


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Turn the UserErrors of the library into refusals."""
    try:
        yield
    except UserError as error:
        raise of_user_error(error) from error


async def _compiled(future: "Future[Any]", form: str | None) -> None:
    """Wait for a constraint to be compiled. Raises Refusal for one that is wrong or takes too long.

    A client that leaves takes its constraint out of the queue, so that those of others do not wait for it.
    """
    try:
        async with asyncio.timeout(SECONDS):
            await asyncio.wrap_future(future)
    except TimeoutError:
        raise Refusal(400, f"the constraint takes more than {SECONDS:.0f} s: make it simpler", param=form) from None
    except UserError as error:
        raise of_user_error(UserError(str(error).partition("\n")[0]), form) from error
