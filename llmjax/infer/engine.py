"""The engine: requests wait, get one of a fixed number of slots, are written a few tokens at a time, and leave.

    engine = Engine(module, params, tokenizer, slots=8, length=1024)
    number = engine.submit(Request(ids=tuple(ids), max_new_tokens=64), on_text=print)
    while engine.busy:
        for number, completion in engine.step(): ...

Requests join and leave between calls of one compiled program, so nobody waits for the longest text of a batch, and what
a request gets does not depend on what else is being written. Prompts are prefilled in parts of few lengths; the caches of
beginnings that prompts share are kept and copied (by whole `ALIGN` tokens, and wholly where the same prompt waits
several times, as with n samples). Recurrent layers keep a state and local attention its window, in the same slots.
"""

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llmjax.data.tokenizer import Tokenizer
from llmjax.infer import speculative, weights
from llmjax.infer.request import Completion, Request, check, sampling_row
from llmjax.infer.sample import settings
from llmjax.infer.slots import Row, stop_row
from llmjax.infer.steps import programs
from llmjax.infer.text import Text
from llmjax.model.transformer import Transformer
from llmjax.parallel import mesh as meshes

ALIGN = 16  # beginnings are kept by so many tokens, which every part of a prompt but the last has a multiple of
OnText = Callable[[str], None]


@dataclass
class Live:
    """A request on its way: waiting, or in a slot."""

    number: int
    request: Request
    text: Text
    on_text: OnText | None
    prompt: str
    matcher: Any = None
    likeliest: list[tuple[tuple[int, float], ...]] | None = None


class Engine:
    """See the module. Not for several threads: one calls, the others hand over (the server does)."""

    def __init__(
        self,
        module: Transformer,
        params: Any,
        tokenizer: Tokenizer,
        *,
        slots: int = 8,
        length: int = 1024,
        source_length: int = 0,
        steps: int = 8,
        parts: Sequence[int] = (16, 64, 256),
        beginnings: int = 4,
        likeliest: int = 0,
        ahead: int = 0,
        draft: tuple[Transformer, Any] | None = None,
        form: str = "auto",
        mesh: jax.sharding.Mesh | None = None,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """
        Args:
            module, params: the model; `params` is {"embedding": ..., ...}, and stays the caller's.
            slots: texts written at a time, rounded up to what the mesh's axes for rows divide.
            length: tokens of prompt and text together, rounded up to a multiple of ALIGN.
            source_length: of an encoder-decoder's sources.
            steps: tokens a slot at most between two looks at stop strings, arrivals and cancellations.
            parts: lengths, multiples of ALIGN, in which prompts are prefilled; a program each.
            beginnings: how many shared beginnings of prompts are kept.
            likeliest: for each token so many of the likeliest ids are reported.
            ahead: tokens drafted a step (speculative decoding); 0: none.
            draft: the model that drafts, of the same vocabulary; None: the text itself is looked up.
            form: of the weights: see `weights.FORMS`, or auto.
            mesh, context: where the parameters live, and what to trace under (`placement.active`).

        Raises ValueError for settings that do not go together.
        """
        c = module.c
        if c.direction == "bidirectional":
            raise ValueError("model.direction=bidirectional cannot write from left to right")
        if slots < 1 or steps < 1 or ahead < 0:
            raise ValueError(f"slots={slots} and steps={steps} must be at least 1, and ahead={ahead} at least 0")
        if bool(c.encoder_layers) != bool(source_length):
            raise ValueError("source_length is needed by encoder-decoders, and by them alone")
        if any(part % ALIGN or part < ALIGN for part in parts) or not parts:
            raise ValueError(f"parts={tuple(parts)} must be multiples of {ALIGN}")
        if draft is not None and not ahead:
            raise ValueError("a draft model drafts nothing with ahead=0: give ahead, such as 4")
        if ahead and c.encoder_layers:
            raise ValueError("speculative decoding is not for encoder-decoders: set ahead to 0")
        if draft is not None and draft[0].c.vocab_size != c.vocab_size:
            raise ValueError(f"the draft model has {draft[0].c.vocab_size} ids and the model {c.vocab_size}")
        if draft is not None and not speculative.forgets(draft[0]):
            raise ValueError("the draft model must attend to everything in every layer (model.pattern=('global',))")
        ways = 1 if mesh is None else meshes.row_ways(mesh)
        self.count = -(-slots // ways) * ways
        self.capacity = -(-length // ALIGN) * ALIGN
        if c.position == "learned":
            self.limit = min(self.capacity, c.max_length)
        else:
            self.limit = self.capacity
        self.module, self.tokenizer, self.steps, self.ahead, self.top = module, tokenizer, steps, ahead, likeliest
        self.parts, self.ways, self.beginnings = sorted({ALIGN, *parts}), ways, beginnings
        self.source_length = source_length
        self._context = context
        if form == "auto":
            leaf = jax.tree.leaves(params)[0]
            devices = len(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else 1
            form = weights.choose(platform=jax.default_backend(), devices=devices, rows=self.count * (ahead + 1))
        with self._context():
            prepared = [weights.prepare(*model, form) for model in ((module, params), *([draft] if draft else []))]
            self.params = tuple(own for _, own in prepared)
            self.programs = programs(
                tuple(one for one, _ in prepared),
                count=self.count,
                length=self.capacity + (ALIGN * -(-(ahead + 1) // ALIGN) if ahead else 0),
                source_length=source_length,
                most=steps,
                top=likeliest,
                ahead=ahead,
                mesh=mesh,
            )
            self.slots = self.programs.init()
        self._live: list[Live | None] = [None] * self.count
        self._waiting: deque[Live] = deque()
        self._done: list[tuple[int, Completion]] = []
        self._beginnings: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._numbers = 0
        V = c.vocab_size
        allowed_V = np.arange(V) < tokenizer.vocab_size
        allowed_V[[i for i in tokenizer.unsampled_ids if i < V]] = False
        self._bias_V = np.where(allowed_V, 0.0, -np.inf).astype(np.float32)
        self._unseen_V = np.zeros(V, bool)
        self._all_BW = np.full((self.count, -(-V // 32)), 2**32 - 1, np.uint32)
        self.prefilled = 0  # tokens computed by prefill, those of copied beginnings not counted
        self.written = 0  # tokens written

    # ------------------------------------------------------------------ what a caller does

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._waiting or self._done or any(self._live))

    def submit(self, request: Request, *, on_text: OnText | None = None, row: str = "") -> int:
        """Put a request in the queue: its number. ValueError for one that cannot be answered."""
        check(request, vocab_size=self.module.c.vocab_size, capacity=self.limit, row=row)
        if len(request.source) > self.source_length or (self.source_length > 0) != bool(request.source):
            raise ValueError(
                f"the source has {len(request.source)} tokens, of 1 to {self.source_length} for this engine"
            )
        if request.constraint is not None and self.ahead:
            raise ValueError("constrained texts need an engine without speculative decoding (ahead=0)")
        stop_row((*self.tokenizer.eos_ids, *request.stop_ids))
        ends = (*self.tokenizer.eos_ids, *request.stop_ids)
        text = Text(piece_bytes=self.tokenizer.piece_bytes, eos_ids=ends, stops=request.stop)
        matcher = None if request.constraint is None else request.constraint.start()
        live = Live(self._numbers, request, text, on_text, self.tokenizer.decode(request.ids), matcher)
        live.likeliest = [] if self.top else None
        self._numbers += 1
        self._waiting.append(live)
        return live.number

    def cancel(self, number: int) -> bool:
        """End a request where it is; its completion comes with the next `step`. False if it is not on its way."""
        for live in (*self._waiting, *self._live):
            if live is not None and live.number == number and not live.text.finish:
                live.text.end("cancelled")
                return True
        return False

    def step(self) -> list[tuple[int, Completion]]:
        """Admit who waits, write up to `steps` tokens in every slot, and tell what is finished: (number, completion)."""
        self._collect()
        with self._context():
            self._admit()
            if any(self._live):
                self._write()
        self._collect()
        done, self._done = self._done, []
        return done

    def run(self) -> Iterator[tuple[int, Completion]]:
        """Step until nothing is left to do."""
        while self.busy:
            yield from self.step()

    def warm_up(self) -> int:
        """Compile everything that requests can need: how many programs there are. The engine must be idle.

        Nothing is compiled afterwards (on a mesh `programs.compiled()` may still grow, by entries for the same programs).
        """
        assert not self.busy
        source, done = (1,) * min(1, self.source_length), 0
        for token, part in enumerate(self.parts):
            count = min(part, self.limit - 2)
            if count > done:
                for _ in range(2):  # the second is a twin, so a beginning is kept and copied
                    self.submit(Request((token,) * (count + 1), 1, temperature=0.0, source=source))
            done = part
        for _ in self.run():
            pass
        self._beginnings.clear()
        self.prefilled = 0
        return self.programs.compiled()

    # ------------------------------------------------------------------ what it does

    def _collect(self) -> None:
        """Completions of those that have finished; their slots are free."""
        for slot, live in enumerate(self._live):
            if live is not None and live.text.finish:
                self._finish(live)
                self._live[slot] = None
        for live in [live for live in self._waiting if live.text.finish]:
            self._waiting.remove(live)
            self._finish(live)

    def _finish(self, live: Live) -> None:
        text = live.text
        self._show(live)
        parts = (live.prompt, text.text, text.finish, tuple(text.tokens), tuple(text.log_probabilities))
        self._done.append((live.number, Completion(*parts, likeliest=tuple(live.likeliest or ()))))

    def _show(self, live: Live) -> None:
        if live.on_text is not None and (piece := live.text.take()):
            live.on_text(piece)

    def _admit(self) -> None:
        for slot in range(self.count):
            if self._live[slot] is None and self._waiting:
                live = self._waiting.popleft()
                self._prefill(slot, live.request)
                self.slots = self.programs.place(self.slots, np.int32(slot), self._row(live.request))
                self._live[slot] = live

    def _row(self, request: Request) -> Row:
        ids, bias_V, seen_V = request.ids, self._bias_V, self._unseen_V
        if request.logit_bias:
            bias_V = bias_V.copy()
            for i, bias in request.logit_bias.items():
                bias_V[i] += bias
        if request.repetition_penalty != 1:
            seen_V = seen_V.copy()
            seen_V[list(ids)] = True
        history_M = np.zeros(self.slots.history_BM.shape[1], np.int32)
        if len(history_M):
            history_M[: len(ids)] = ids
        return Row(
            token=np.int32(ids[-1]),
            position=np.int32(len(ids) - 1),
            left=np.int32(request.max_new_tokens),
            seed=np.uint32(request.seed % 2**32),
            number=np.int32(request.number),
            sampling=settings(1, **sampling_row(request)),
            stop_S=stop_row((*self.tokenizer.eos_ids, *request.stop_ids)),
            bias_V=bias_V,
            seen_V=seen_V,
            history_M=history_M,
        )

    def _prefill(self, slot: int, request: Request) -> None:
        """Fill a slot's cache with all of a prompt but its last token, from a kept beginning where there is one."""
        ids = request.ids[:-1]
        twins = any(live.request.ids == request.ids and live.request.source == request.source for live in self._waiting)
        keep = {request.shared // ALIGN * ALIGN} | ({len(ids)} if twins else set())
        at = 0
        known = [
            key
            for key in self._beginnings
            if key[0] == request.source
            and key[1] == ids[: len(key[1])]
            and (len(key[1]) % ALIGN == 0 or len(key[1]) == len(ids))
        ]
        if known:
            key = max(known, key=lambda key: len(key[1]))
            self._beginnings.move_to_end(key)
            self.slots = self.programs.put_row(self.slots, np.int32(slot), self._beginnings[key])
            at = len(key[1])
        elif self.source_length and not ids:
            self._part(slot, request, 0, 0)  # the source must be read even so
        while at < len(ids):
            stop = min([mark for mark in keep if mark > at], default=len(ids))
            count = self._part(slot, request, at, min(stop, len(ids)) - at)
            at += count
            if at in keep and self.beginnings:
                self._keep((request.source, ids[:at]), slot)

    def _part(self, slot: int, request: Request, start: int, count: int) -> int:
        """Prefill up to `count` tokens from `start`: how many it was."""
        fitting = [part for part in self.parts if start + part <= self.capacity]
        assert start % ALIGN == 0, start
        size = next((part for part in fitting if part >= count), fitting[-1])
        count = min(count, size)
        rows_R = np.full(self.ways, self.count, np.int32)
        rows_R[0] = slot
        tokens_RL = np.zeros((self.ways, size), np.int32)
        tokens_RL[0, :count] = request.ids[start : start + count]
        starts_R, counts_R = np.zeros(self.ways, np.int32), np.zeros(self.ways, np.int32)
        starts_R[0], counts_R[0] = start, count
        source = None
        if self.source_length and start == 0:
            source = {name: np.zeros((self.ways, self.source_length), np.int32) for name in ("tokens", "segments")}
            source["tokens"][0, : len(request.source)] = request.source
            source["segments"][0, : len(request.source)] = 1
        arrays = (rows_R, tokens_RL, starts_R, counts_R, source)
        self.slots = self.programs.prefill(self.params, self.slots, *arrays)
        self.prefilled += count
        return count

    def _keep(self, key: tuple[Any, ...], slot: int) -> None:
        self._beginnings[key] = self.programs.take_row(self.slots.caches, np.int32(slot))
        if len(self._beginnings) > self.beginnings:
            self._beginnings.popitem(last=False)

    def _write(self) -> None:
        """One call of the decoding program, and what came of it."""
        keep_B = np.array([live is not None and not live.text.finish for live in self._live])
        words_BW, constrained = self._all_BW, False
        for slot, live in enumerate(self._live):
            if live is not None and live.matcher is not None:
                words_BW = words_BW if constrained else words_BW.copy()
                words_BW[slot] = live.matcher.words(words_BW.shape[1])
                constrained = True
        self.slots, written = self.programs.decode(
            self.params,
            self.slots,
            keep_B,
            words_BW,
            np.bool_(constrained),
            np.int32(1 if constrained else self.steps),
            np.bool_(bool(self._waiting)),
        )
        token, nats, given, ids, likeliest = jax.device_get(written)
        for slot, live in enumerate(self._live):
            if live is None:
                continue
            for at in np.flatnonzero(given[:, slot]):
                if live.text.finish:
                    break
                live.text.add(int(token[at, slot]), float(nats[at, slot]))
                self.written += 1
                if live.likeliest is not None:
                    pairs = zip(ids[at, slot].tolist(), likeliest[at, slot].tolist(), strict=True)
                    live.likeliest.append(tuple(pairs))
                if live.matcher is not None and not live.text.finish and live.matcher.add(int(token[at, slot])):
                    live.text.end("stop")
            if len(live.text.tokens) >= live.request.max_new_tokens:
                live.text.end("length")
            self._show(live)
