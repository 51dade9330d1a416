"""The engine: requests wait, get one of a fixed number of slots, are written a few tokens at a time, and leave.

    engine = Engine(module, params, tokenizer, slots=8, length=1024)
    number = engine.submit(Request(ids=tuple(ids), max_new_tokens=64), on_text=print)
    while engine.busy:
        for number, completion in engine.step(): ...

Requests join and leave between calls of one compiled program, so nobody waits for the longest text of a batch, and what
a request gets does not depend on what else is being written. Recurrent layers keep a state and local attention its
window, in the same slots. `prompts.py` reads prompts into them.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer import speculative, weights
from llmjax.infer.prompts import ALIGN, Reader
from llmjax.infer.request import Completion, Request, check, sampling_row
from llmjax.infer.sample import settings
from llmjax.infer.slots import Row, stop_row
from llmjax.infer.steps import programs
from llmjax.infer.text import Text
from llmjax.model.transformer import Transformer
from llmjax.parallel import mesh as meshes

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
        parts: Sequence[int] = (16, 32, 64, 128, 256),
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
            parts: lengths, multiples of ALIGN, in which prompts are read; see `prompts.Reader`.
            beginnings: how many shared beginnings of prompts are kept.
            likeliest: for each token so many of the likeliest ids are reported.
            ahead: tokens drafted a step (speculative decoding); 0: none.
            draft: the model that drafts, of the same vocabulary; None: the text itself is looked up.
            form: of the weights: see `weights.FORMS`, or auto.
            mesh, context: where the parameters live, and what to trace under (`placement.active`).

        Raises UserError for settings that do not go together.
        """
        c = module.c
        if c.direction == "bidirectional":
            raise UserError("model.direction=bidirectional cannot write from left to right")
        if slots < 1 or steps < 1 or ahead < 0:
            raise UserError(f"slots={slots} and steps={steps} must be at least 1, and ahead={ahead} at least 0")
        if bool(c.encoder_layers) != bool(source_length):
            raise UserError("source_length is needed by encoder-decoders, and by them alone")
        if any(part % ALIGN or part < ALIGN for part in parts) or not parts:
            raise UserError(f"parts={tuple(parts)} must be multiples of {ALIGN}")
        if draft is not None and not ahead:
            raise UserError("a draft model drafts nothing with ahead=0: give ahead, such as 4")
        if ahead and c.encoder_layers:
            raise UserError("speculative decoding is not for encoder-decoders: set ahead to 0")
        if draft is not None and draft[0].c.vocab_size != c.vocab_size:
            raise UserError(f"the draft model has {draft[0].c.vocab_size} ids and the model {c.vocab_size}")
        if draft is not None and not speculative.forgets(draft[0]):
            raise UserError("the draft model must attend to everything in every layer (model.pattern=('global',))")
        ways = 1 if mesh is None else meshes.row_ways(mesh)
        self.count = -(-slots // ways) * ways
        self.capacity = -(-length // ALIGN) * ALIGN
        if c.position == "learned":
            self.limit = min(self.capacity, c.max_length)
        else:
            self.limit = self.capacity
        self.module, self.tokenizer, self.steps, self.ahead, self.top = module, tokenizer, steps, ahead, likeliest
        self.source_length = source_length
        self._context = context
        if form == "auto":
            leaf = jax.tree.leaves(params)[0]
            devices = len(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else 1
            form = weights.choose(platform=jax.default_backend(), devices=devices, rows=self.count * (ahead + 1))
        with self._context():
            prepared = [weights.prepare(*model, form) for model in ((module, params), *([draft] if draft else []))]
            self.params = tuple(own for _, own in prepared)
            # Prompts are read with the caller's parameters: tiles are for few rows. int8 must be the same model throughout.
            read = prepared if form == "int8" else [(module, params), *([draft] if draft else [])]
            self.programs = programs(
                tuple(one for one, _ in prepared),
                tuple(one for one, _ in read),
                count=self.count,
                length=self.capacity + (ALIGN * -(-(ahead + 1) // ALIGN) if ahead else 0),
                source_length=source_length,
                most=steps,
                top=likeliest,
                ahead=ahead,
                mesh=mesh,
            )
            self.slots = self.programs.init()
        self._reader = Reader(
            self.programs, tuple(own for _, own in read), self.count, self.capacity, sorted({ALIGN, *parts}), ways,
            source_length, beginnings,
        )  # fmt: skip
        self._live: list[Live | None] = [None] * self.count
        self._waiting: deque[Live] = deque()
        self._done: list[tuple[int, Completion]] = []
        self._numbers = 0
        V = c.vocab_size
        allowed_V = np.arange(V) < tokenizer.vocab_size
        allowed_V[[i for i in tokenizer.unsampled_ids if i < V]] = False
        self._bias_V = np.where(allowed_V, 0.0, -np.inf).astype(np.float32)
        self._unseen_V = np.zeros(V, bool)
        self._all_BW = np.full((self.count, -(-V // 32)), 2**32 - 1, np.uint32)
        self.written = 0  # tokens written

    # ------------------------------------------------------------------ what a caller does

    @property
    def prefilled(self) -> int:
        """Tokens of prompts computed so far, those of copied beginnings not counted."""
        return self._reader.count

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._waiting or self._done or any(self._live))

    def submit(self, request: Request, *, on_text: OnText | None = None, row: str = "") -> int:
        """Put a request in the queue: its number. UserError for one that cannot be answered."""
        check(request, vocab_size=self.module.c.vocab_size, capacity=self.limit, row=row)
        if len(request.source) > self.source_length or (self.source_length > 0) != bool(request.source):
            raise UserError(
                f"the source has {len(request.source)} tokens, of 1 to {self.source_length} for this engine"
            )
        if request.constraint is not None and self.ahead:
            raise UserError("constrained texts need an engine without speculative decoding (ahead=0)")
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
        source, done, together = (1,) * min(1, self.source_length), 0, self._reader.together
        for number, part in enumerate(self._reader.parts):
            count, other = min(part, self.limit - 2), number * (together + 1)
            # Two that are twins, so a beginning is kept and copied, and then as many others as are read together.
            for tokens in ([other] * 2, range(other + 1, other + 1 + together)) if count > done else ():
                for token in tokens:
                    ids = (token % self.tokenizer.vocab_size,) * (count + 1)
                    self.submit(Request(ids, 1, temperature=0.0, source=source))
                for _ in self.run():
                    pass
            done = part
        self._reader.forget()
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
        while self._waiting and (free := [slot for slot, live in enumerate(self._live) if live is None]):
            group = self._reader.next([live.request for live in self._waiting], free)
            self.slots = self._reader.read(group, self.slots)
            for one in group:
                live = self._waiting.popleft()
                self.slots = self.programs.place(self.slots, np.int32(one.slot), self._row(live.request))
                self._live[one.slot] = live

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
