"""The state of a server: its models, the thread of their engines, its limits, metrics and log."""

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ml_collections import ConfigDict

from llmjax.data.chat import chat_ids, chat_text
from llmjax.errors import UserError
from llmjax.infer.engine import Engine
from llmjax.infer.given import Batch, Part, in_order
from llmjax.infer.language_model import LanguageModel
from llmjax.infer.request import prompt_ids
from llmjax.serve.admission import Admission
from llmjax.serve.fields import MOST_LIKELIEST
from llmjax.serve.log_probs import Names
from llmjax.serve.messages import Body, Tool
from llmjax.serve.metrics import Metrics
from llmjax.serve.refusals import Refusal
from llmjax.serve.sources import Source
from llmjax.serve.tickets import Deadlines, Ticket, refused
from llmjax.serve.tools import described, introduced, knows_calls
from llmjax.serve.worker import Worker
from llmjax.version import __version__

if TYPE_CHECKING:
    from llmjax.persona.card import Persona
    from llmjax.serve.agent import Agents

T = TypeVar("T")
PREPARING_SECONDS = 20.0  # for a prompt to be written by its template and tokenized
PREPARING_THREADS = 4
READERS = 2  # processes that read files
MOST_UNKNOWN = 1000  # names of fields in the log


@dataclass(frozen=True)
class Served:
    """A model that the server answers with."""

    name: str
    model: LanguageModel
    defaults: Mapping[str, Any]  # settings of `Request` for fields that a request leaves out
    room: int  # tokens of prompt and text together
    writes: bool = True  # whether it writes texts; an encoder only reads them
    adapter: str = ""  # of the model, that answers
    parent: str = ""  # the name of the model without the adapter
    persona: "Persona | None" = None  # whose writings it answers from
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def engine(self) -> str:
        """The name of the engine that writes its texts."""
        return self.parent or self.name

    @property
    def names(self) -> Names:
        """The texts of the ids."""
        return Names(self.model.tokenizer)

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes answers to the same request."""
        return f"llmjax-{__version__}-{self.model.tokenizer.fingerprint[:8]}-{self.model.step}"

    def head(self, kind: str, body: Body) -> dict[str, Any]:
        """What every part of an answer has; `kind` begins its id."""
        return {
            "id": new_id(kind), "created": int(time.time()), "model": body.model or self.name,
            "system_fingerprint": self.fingerprint,
        }  # fmt: skip

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], variables: Mapping[str, Any]
    ) -> list[int]:
        """The ids of a conversation up to the answer. Raises UserError for what the template refuses."""
        tokenizer = self.model.tokenizer
        template = tokenizer.tool_template if tools and tokenizer.tool_template else tokenizer.chat_template
        if not knows_calls(template):
            return chat_ids(tokenizer, introduced(messages, tools), **variables)
        given = [described(tool) for tool in tools] or None
        return chat_ids(tokenizer, messages, tools=given, **variables)

    def text_of(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as the template writes it."""
        return str(chat_text(self.model.tokenizer, messages))

    def prompt(self, text: str | Sequence[int]) -> list[int]:
        """The ids of a plain prompt."""
        return prompt_ids(self.model.tokenizer, [text])[0]


def with_adapters(served: Served) -> list[Served]:
    """A model with each of its adapters, under their names."""
    return [
        replace(served, name=name, defaults={**served.defaults, "adapter": name}, adapter=name, parent=served.name)
        for name in served.model.adapters
    ]


class Server:
    """See the module."""

    def __init__(
        self,
        models: Sequence[Served],
        make: Callable[[], Mapping[str, Engine]],
        settings: ConfigDict,
        *,
        slots: int,
        sources: Sequence[Source] = (),
        agents: "Agents | None" = None,
        feedback: Path | None = None,
        log_texts: bool = False,
    ) -> None:
        """
        Args:
            models: the first one answers requests that name none.
            make: builds the engines by the names of their models, in the worker's thread.
            settings: `config.serve`.
            slots: texts that an engine writes at a time.
            sources: what questions can be asked of.
            agents: the tools that models may call; None: none.
            feedback: the file for rated answers; None: they are not taken.
        """
        self.models = {one.name: one for one in models}
        self.settings, self.metrics, self.worker = settings, Metrics(), Worker(make)
        self.sources, self.agents = {one.name: one for one in sources}, agents
        self.feedback, self.log_texts = feedback, log_texts
        room = max(one.room for one in models)
        queue = settings.queue or 4 * slots
        self.admission = Admission(
            places=slots + queue, tokens=(slots + max(4, settings.queue)) * room, per_key=settings.per_key
        )
        self.readers = asyncio.Semaphore(READERS)  # files that are read at a time
        self.draining = False
        self.changed = asyncio.Event()  # the worker is ready, or has ended
        self._tickets: set[Ticket] = set()
        self._unknown: set[str] = set()  # fields that were ignored
        self._merged = ("", models[0].model)  # the last model whose adapter was merged, by its name
        self._computing = asyncio.Lock()
        self._threads = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prompts")
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="programs")  # one, also when clients leave it

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Start the worker. Called in the event loop."""
        self.worker.start(asyncio.get_running_loop(), self.changed.set)

    def stop(self) -> None:
        """End the worker."""
        self.worker.stop()
        for threads in (self._threads, self._compiling):
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self.worker.ready and not self.draining and self.worker.stalled < self.settings.stall_seconds

    def check_ready(self) -> None:
        """Raise Refusal unless requests are answered."""
        if self.draining:
            raise Refusal(503, "the server is ending", code="draining", again=True)
        if self.worker.failure is not None or self.worker.stalled >= self.settings.stall_seconds:
            raise Refusal(503, "the engine has stopped", code="engine_error")
        if not self.worker.ready:
            raise Refusal(503, "the model is being loaded", code="loading", again=True)

    def stop_answers(self, reason: Refusal) -> None:
        """End all answers."""
        for ticket in list(self._tickets):
            ticket.stop(reason)

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for the answers that are being written, so many seconds at most."""
        self.draining = True
        until = time.monotonic() + seconds
        while self._tickets and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self.stop_answers(Refusal(503, "the server is ending", code="draining", again=True))

    # ------------------------------------------------------------------ for endpoints

    def model(self, name: str | None) -> Served:
        """The model of this name. Raises Refusal for one that is not served."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise Refusal(
                404, f"the model {name[:200]!r} does not exist; there are {', '.join(self.models)}",
                code="model_not_found", param="model",
            )  # fmt: skip
        return self.models[name]

    def writer(self, name: str | None) -> Served:
        """As `model`. Raises Refusal also for a model that writes no texts, and for a persona, which only converses."""
        found = self.model(name)
        if found.persona is not None:
            raise Refusal(
                400, f"the model {found.name} is a persona, which only converses: POST /v1/chat/completions", code="unsupported_model",
                param="model",
            )  # fmt: skip
        return self._writing(found)

    def converser(self, name: str | None) -> Served:
        """As `model`. Raises Refusal also for a model that writes no texts."""
        return self._writing(self.model(name))

    def _writing(self, found: Served) -> Served:
        if not found.writes:
            raise Refusal(
                400, f"the model {found.name} reads texts and does not write them", code="unsupported_model", param="model"
            )  # fmt: skip
        return found

    def ticket(self, served: Served, count: int, key: str) -> "Held":
        """Places for so many texts. Raises Refusal when the server is not ready, or busy."""
        self.check_ready()
        limits = Deadlines(self.settings.first_seconds, self.settings.seconds)
        return Held(self, Ticket(self.worker, served.engine, self.admission.enter(count, key), limits))

    async def prepare(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns, called in a thread beside the loop. Raises Refusal for mistakes of the request."""
        loop = asyncio.get_running_loop()
        with refused():
            try:
                async with asyncio.timeout(PREPARING_SECONDS):
                    return await loop.run_in_executor(self._threads, function, *arguments)
            except TimeoutError:
                raise UserError(f"the prompt could not be prepared within {PREPARING_SECONDS:.0f} s") from None

    async def compute(self, served: Served, parts: Callable[[LanguageModel], list[Part[T]]]) -> list[T]:
        """What a model computes of rows, in their order. Each part is computed between two steps of the engines.

        So texts that are written wait for one part, and a client that leaves ends the rest. They do not wait for the
        program of a new shape, which is compiled beside them. One request is computed at a time, which keeps one merged
        adapter in memory.
        """
        self.check_ready()
        made: list[Batch[T]] = []
        loop = asyncio.get_running_loop()
        with refused():
            async with self._computing:
                for part in await self.worker.call(lambda: parts(self._reading(served))):
                    await loop.run_in_executor(self._compiling, part.compile)
                    made.append(await self.worker.call(part.compute))
        return in_order(made)

    def _reading(self, served: Served) -> LanguageModel:
        """The model that reads whole texts. An adapter is merged into it; only the last of these is kept in memory."""
        if not served.adapter:
            return served.model
        if self._merged[0] != served.name:
            self._merged = ("", served.model)
            self._merged = (served.name, served.model.merged(served.adapter))
        return self._merged[1]

    def log_unknown(self, name: str) -> None:
        """Note a field that is ignored, once."""
        if name not in self._unknown and len(self._unknown) < MOST_UNKNOWN:
            self._unknown.add(name)
            self.log(ignored_field=name[:64])

    def log(self, **facts: Any) -> None:
        """Write a line of JSON to the log, which is the standard error."""
        print(json.dumps({"time": round(time.time(), 3), **facts}), file=sys.stderr, flush=True)


@dataclass
class Held:
    """A ticket that the server knows while it is open."""

    server: Server
    ticket: Ticket

    def __enter__(self) -> Ticket:
        self.server._tickets.add(self.ticket)
        self.server.metrics.running.set(self.server.admission.taken)
        return self.ticket.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.server._tickets.discard(self.ticket)
        self.ticket.__exit__(*error)
        self.server.metrics.running.set(self.server.admission.taken)


def new_id(kind: str) -> str:
    """An id of an answer."""
    return f"{kind}-{secrets.token_hex(12)}"


LIKELIEST = MOST_LIKELIEST  # what engines report for each token
