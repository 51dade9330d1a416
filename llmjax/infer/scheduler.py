"""The scheduler: the queue, the slots and the state of each request. It decides, without jax, what the engine computes.

Before a call of the decoding program the engine does the actions of `reads`. It hands the tokens that the call wrote to
`take`, and gives `events` to its caller. No cost grows with the number of waiting requests.

While texts are being written, at most one chunk of prompts is read between two calls of decoding, so that a long prompt
does not stall the texts of others. The more slots still have a prompt to read, the fewer tokens the others write in a
call, so that the slots fill up.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.constrained import Constraints, Job, Matcher
from llmjax.infer.prefixes import Prefixes, Prompt
from llmjax.infer.request import Completion, Event, Request
from llmjax.infer.text import Text

TOGETHER = 4  # prompts that are read at once: on CPU more are no faster, and fewer read all weights more often
PATIENCE = 0.02  # seconds that free texts wait for constrained ones before they go on without them


@dataclass(frozen=True)
class Copy:
    """Copy the caches of a slot to another."""

    source: int
    slot: int


@dataclass(frozen=True)
class Keep:
    """Keep a copy of the caches of a slot under a key, and drop others."""

    slot: int
    key: bytes
    drop: Sequence[bytes]


@dataclass(frozen=True)
class Restore:
    """Put a kept copy into a slot."""

    key: bytes
    slot: int


@dataclass(frozen=True)
class Read:
    """Read a chunk of some prompts, and maybe their sources: one call of `prefill`."""

    rows: int  # of the call; rows beyond the prompts are padding
    size: int  # tokens of each row
    slots: Sequence[int]
    starts: Sequence[int]
    tokens: Sequence[Sequence[int]]
    sources: Sequence[Sequence[int]] | None


@dataclass(frozen=True)
class Place:
    """Begin a text: its prompt has been read."""

    slot: int
    request: Request


Action = Copy | Keep | Restore | Read | Place


@dataclass(eq=False)
class Live:
    """A request that has not ended."""

    number: int
    request: Request
    text: Text
    prompt: Prompt
    slot: int = -1
    writing: bool = False
    told: int = 0  # tokens that events have told
    job: Job | None = None  # finds the next state of a constrained text
    matcher: Matcher | None = None
    likeliest: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    error: str = ""
    cached: int = 0  # tokens of the prompt that came from another one

    def fail(self, error: str) -> None:
        """End the text with an error."""
        if not self.text.finish:
            self.error = error
            self.text.end("error")


class Scheduler:
    """See the module.

    Args:
        slots: how many there are.
        capacity: tokens of a slot, a multiple of ALIGN.
        steps: the most steps of a text in a call of decoding.
        chunks: lengths, ascending multiples of ALIGN, in which prompts are read. Each has one program or two: for `ways`
            prompts and for `together`.
        ways: devices that rows are divided over.
        prefixes: the prefix cache.
        source_length: tokens of an encoder-decoder's source.
    """

    def __init__(
        self, tokenizer: Tokenizer, constraints: Constraints, *, slots: int, capacity: int, steps: int, chunks: Sequence[int],
        ways: int = 1, prefixes: Prefixes | None = None, source_length: int = 0,
    ) -> None:  # fmt: skip
        self.tokenizer, self.constraints, self.prefixes = tokenizer, constraints, prefixes or Prefixes()
        self.capacity, self.steps, self.chunks, self.source_length = capacity, steps, chunks, source_length
        rows = -(-TOGETHER // ways) * ways
        self.ways, self.together = ways, rows if rows <= slots else ways
        self.slots: list[Live | None] = [None] * slots
        self.prefilled = 0  # tokens of prompts that were computed, without those of copied prefixes
        self.written = 0
        self._free: deque[int] = deque(range(slots))  # the slot that has been free longest first
        self._reading: deque[Live] = deque()
        self._waiting: OrderedDict[int, Live] = OrderedDict()  # they wait for a slot
        self._uncompiled: OrderedDict[int, Live] = OrderedDict()  # they wait for the compilation of their constraints
        self._compiling: dict[int, Live] = {}  # their constraints are being compiled
        self._compiled: set[int] = set()  # those of `_waiting` with a compiled constraint, which takes memory
        self._live: dict[int, Live] = {}
        self._ended: list[Live] = []  # ended without a slot; not told yet
        self._numbers = 0

    # ------------------------------------------------------------------ requests

    @property
    def busy(self) -> bool:
        """Whether there is work or news."""
        return bool(self._live)

    def submit(self, request: Request, *, salt: bytes = b"") -> int:
        """Put a request in the queue: its number. `salt`: see `Prompt`."""
        number, self._numbers = self._numbers, self._numbers + 1
        live = Live(number, request, self._text(request), Prompt(request.ids[:-1], request.source, salt))
        self._live[number] = live
        self.prefixes.expect(live.prompt)
        self._enqueue(live)
        return number

    @property
    def adapters(self) -> set[str]:
        """The names of the adapters that requests need which have not ended."""
        return {live.request.adapter for live in self._live.values()}

    def cancel(self, number: int) -> bool:
        """End a request now. False if it has ended, or is not known."""
        live = self._live.get(number)
        if live is None or live.text.finish:
            return False
        live.text.end("cancelled")
        if live.slot < 0:
            for queue in (self._waiting, self._uncompiled, self._compiling):
                queue.pop(number, None)
            self._compiled.discard(number)
            self._ended.append(live)
        return True

    def restart(self) -> None:
        """Begin all texts in slots again, after an interrupted step that may have stopped anywhere.

        Their tokens are the same again, so earlier events stay true.
        """
        for live in reversed([live for live in self.slots if live is not None and not live.text.finish]):
            shown, live.text = live.text.shown, self._text(live.request)
            live.text.shown = shown
            live.prompt.at, live.prompt.begun = 0, False
            live.slot, live.writing, live.job, live.matcher, live.likeliest = -1, False, None, None, []
            self._enqueue(live, first=True)
        for ended in [live for live in self.slots if live is not None and live.text.finish]:
            ended.slot = -1
            self._ended.append(ended)
        self.slots = [None] * len(self.slots)
        self._free, self._reading = deque(range(len(self.slots))), deque()
        self.prefixes.forget()

    def _text(self, request: Request) -> Text:
        ids = self.tokenizer.eos_ids
        return Text(self.tokenizer.piece_bytes, eos_ids=ids, stops=request.stop, stop_ids=request.stop_ids)

    def _enqueue(self, live: Live, *, first: bool = False) -> None:
        queue = self._waiting if live.request.constraint is None else self._uncompiled
        queue[live.number] = live
        if first:
            queue.move_to_end(live.number, last=False)

    # ------------------------------------------------------------------ prompts

    def reads(self) -> Iterator[Action]:
        """The actions before the next call of decoding. Each must be done before the next one is asked for."""
        self._poll()
        streams = any(live is not None and live.writing for live in self.slots)
        budget = float(self.chunks[-1]) if streams else np.inf
        spent = 0
        while True:
            yield from self._admit()
            action, group = self._chunk(budget)
            if action is None or (spent and spent + action.rows * action.size > budget):
                return
            yield action
            spent += action.rows * action.size
            for live, tokens in zip(group, action.tokens, strict=True):
                live.prompt.at += len(tokens)
                live.prompt.begun = True
                self.prefilled += len(tokens)
                if (key := self.prefixes.reached(live.prompt)) is not None:
                    yield Keep(live.slot, key, self.prefixes.dropped())
                self._reading.remove(live)
                yield from self._go_on(live)  # after the others

    def _admit(self) -> Iterator[Action]:
        """Give free slots to waiting requests, up to one whose prefix is being read for another."""
        while self._free and self._waiting:
            live = next(iter(self._waiting.values()))
            slot = self._free[0]
            if found := self.prefixes.find(live.prompt, {one.slot: one.prompt for one in self._reading}):
                match found.where:
                    case None:
                        return
                    case bytes(key):
                        yield Restore(key, slot)
                    case int(source) if source in self._free and self.prefixes.replaceable(source, live.prompt):
                        slot = source
                    case int(source) if source != slot:
                        yield Copy(source, slot)
                live.prompt.at, live.prompt.begun = found.length, True
                live.cached = found.length
            self.prefixes.begin(slot, live.prompt)
            del self._waiting[live.number]
            self._compiled.discard(live.number)
            self._free.remove(slot)
            self.slots[slot], live.slot = live, slot
            yield from self._go_on(live)

    def _go_on(self, live: Live) -> Iterator[Action]:
        """Read the rest of a prompt in its turn, or begin its text."""
        if live.prompt.at < len(live.prompt.ids) or self._source_first(live):
            self._reading.append(live)
        else:
            yield Place(live.slot, live.request)
            live.writing = True

    def _source_first(self, live: Live) -> bool:
        """Whether the source is still to be read: with the first chunk of its prompt, or alone if that has no tokens."""
        return self.source_length > 0 and not live.prompt.begun

    def _chunk(self, budget: float) -> tuple[Read | None, list[Live]]:
        """The next chunk of some similar prompts, within a finite budget of tokens, and the requests it belongs to."""
        order = [live for live in self._reading if not live.text.finish]
        if not order:
            return None, []

        def left(live: Live) -> int:
            return live.prompt.next_stop - live.prompt.at

        def fitting(group: Sequence[Live]) -> int:
            """The smallest chunk that holds the rest of all prompts, or the largest that fits."""
            room = self.capacity - max(live.prompt.at for live in group)
            sizes = [size for size in self.chunks if size <= room]
            return next((size for size in sizes if size >= max(map(left, group))), sizes[-1])

        if np.isinf(budget):  # no text waits: take prompts of similar length, so that there is little padding
            order.sort(key=lambda live: (self._source_first(live), left(live)))
        first = order[0]
        alike = [live for live in order if self._source_first(live) == self._source_first(first)]
        if np.isfinite(budget):
            alike = [first, *(live for live in alike if live is not first and left(live) <= fitting([first]))]
        rows = self.together if 2 * len(alike) > self.together else self.ways
        if rows * fitting(alike[:rows]) > budget:
            rows = self.ways
        group = alike[:rows]
        size = fitting(group)
        prompts = [live.prompt for live in group]
        tokens = [p.ids[p.at : p.at + min(left(live), size)] for p, live in zip(prompts, group, strict=True)]
        sources = [p.source for p in prompts] if self._source_first(first) else None
        return Read(rows, size, [live.slot for live in group], [p.at for p in prompts], tokens, sources), group

    # ------------------------------------------------------------------ texts

    @property
    def eager(self) -> bool:
        """Whether to fill a slot as soon as it is free."""
        return bool(self._waiting)

    def limits(self) -> np.ndarray:
        """int32 (slots,): the steps that each slot may take in the next call; 0: it writes nothing.

        A constrained text takes one step, because the next tokens depend on it.
        """
        writing = [live is not None and live.writing and not live.text.finish for live in self.slots]
        steps = self.steps
        if self._reading:
            steps = -(-steps * sum(writing) // len(self.slots))
        found = np.zeros(len(self.slots), np.int32)
        for slot, live in enumerate(self.slots):
            if live is not None and writing[slot]:
                found[slot] = steps if live.request.constraint is None else int(live.matcher is not None)
        return found

    def keep(self) -> np.ndarray:
        """bool (slots,): whether the slot has a text that goes on, now or later."""
        return np.array([live is not None and live.writing and not live.text.finish for live in self.slots])

    def words(self, count: int) -> np.ndarray | None:
        """words_BW, uint32: the bits of the tokens that may come next; None if no text of the next call is constrained."""
        found = None
        for slot, live in enumerate(self.slots):
            if live is not None and live.matcher is not None:
                if found is None:
                    found = np.full((len(self.slots), count), 2**32 - 1, np.uint32)
                found[slot] = live.matcher.words_W
        return found

    def take(self, written: Any) -> None:
        """Take the tokens that a call of decoding wrote (`steps.Written`, as NumPy arrays)."""
        for slot, live in enumerate(self.slots):
            if live is None or not live.writing:
                continue
            for at in np.flatnonzero(written.given[:, slot]):
                if live.text.finish:
                    break
                nats, sampled = (
                    float(written.log_probability[at, slot]),
                    float(written.sampled_log_probability[at, slot]),
                )
                if not (np.isfinite(nats) and np.isfinite(sampled)):
                    live.fail(
                        "nothing can come next: logit_bias and the constraint leave no token, or the logits are not finite"
                    )
                    break
                self._add(live, int(written.token[at, slot]), nats, sampled)
                ids, values = written.likeliest[at, slot].tolist(), written.likeliest_log_probability[at, slot].tolist()
                if ids:
                    live.likeliest.append(tuple(zip(ids, values, strict=True)))
            if live.job is None and len(live.text.tokens) >= live.request.max_new_tokens:
                live.text.end("length")
        self._poll()

    def _add(self, live: Live, token: int, nats: float, sampled: float) -> None:
        live.text.add(token, nats, sampled)
        self.written += 1
        if live.matcher is not None and not live.text.finish:
            live.job, live.matcher = self.constraints.follow(live.matcher, token), None

    def _poll(self) -> None:
        """Look at the jobs of constrained texts. Waits for them only briefly, unless there is nothing else to do."""
        while self._uncompiled and len(self._compiling) + len(self._compiled) < 2 * len(self.slots):
            number, live = self._uncompiled.popitem(last=False)
            live.job = self.constraints.start(live.request.constraint or ("", ""))
            self._compiling[number] = live
        following = [live for live in self.slots if live is not None and live.job is not None and not live.text.finish]
        asked = [*following, *self._compiling.values()]
        others = self._waiting or self._ended or any(live is not None and live.job is None for live in self.slots)
        if following and others:
            wait([live.job.future for live in following if live.job], timeout=PATIENCE)
        elif asked and not others:
            wait([live.job.future for live in asked if live.job], timeout=10 * PATIENCE, return_when=FIRST_COMPLETED)
        for live in asked:
            try:
                matcher = live.job.result() if live.job else None
            except UserError as error:
                live.fail(str(error))
            else:
                if matcher is None:
                    continue
                live.matcher = matcher
                if matcher.over:
                    live.text.end("stop")
                elif len(live.text.tokens) >= live.request.max_new_tokens:
                    live.text.end("length")
            live.job = None
            if self._compiling.pop(live.number, None) is not None:
                if live.text.finish:
                    self._ended.append(live)
                else:
                    self._waiting[live.number] = live
                    self._compiled.add(live.number)

    # ------------------------------------------------------------------ events

    def events(self) -> list[Event]:
        """The news of all requests since the last call. Slots of ended requests become free."""
        found = []
        for live in [live for live in self.slots if live is not None] + self._ended:
            text, told = live.text, live.told
            piece = text.take()
            if not (piece or len(text.tokens) > told or text.finish):
                continue
            live.told = max(len(text.tokens), told)
            found.append(
                Event(
                    live.number, piece, tuple(text.tokens[told:]), tuple(text.log_probabilities[told:]),
                    tuple(text.sampled[told:]), text.finish, live.error, self._completion(live) if text.finish else None,
                    tuple(live.likeliest[told:]),
                )
            )  # fmt: skip
            if text.finish:
                self._end(live)
        self._ended = []
        return found

    def _completion(self, live: Live) -> Completion:
        text = live.text
        prompt = self.tokenizer.decode([i for i in live.request.ids if i < self.tokenizer.vocab_size])
        return Completion(
            prompt, text.text, text.finish, tuple(text.tokens), tuple(text.log_probabilities), tuple(live.likeliest),
            tuple(text.sampled), live.error, live.cached,
        )  # fmt: skip

    def _end(self, live: Live) -> None:
        del self._live[live.number]
        if live.slot < 0:
            return
        if live in self._reading:
            self._reading.remove(live)
        fed = (live.request.ids[-1], *live.text.tokens[:-1]) if live.text.tokens else ()  # all but the last token
        self.prefixes.end(live.slot, live.prompt, fed)
        self.slots[live.slot] = None
        self._free.append(live.slot)
