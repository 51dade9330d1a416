"""The engine: requests wait, get one of a fixed number of slots, are written a few tokens at a time, and leave.

    engine = Engine(module, params, tokenizer, slots=8, length=1024)
    number = engine.submit(Request(ids=tuple(ids), max_new_tokens=64))
    while engine.busy:
        for event in engine.step(): print(event.number, event.piece, event.finish)

Requests join and leave between calls of one compiled program, so nobody waits for the longest text of a batch, and what
a request gets does not depend on what else is being written. Recurrent layers keep a state and local attention its
window, in the same slots. `scheduler.py` decides who is read and written when; here is what computes.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer import speculative, weights
from llmjax.infer.constrained import Forms
from llmjax.infer.prefixes import ALIGN, KeptPrefixes, Prefixes, SlotPrefixes
from llmjax.infer.request import Completion, Event, Request, sampling_row
from llmjax.infer.sample import settings
from llmjax.infer.scheduler import Action, Copy, Keep, Place, Read, Restore, Scheduler
from llmjax.infer.slots import Row, Slots, stop_row
from llmjax.infer.steps import Written, programs
from llmjax.model.transformer import Transformer
from llmjax.parallel import mesh as meshes
from llmjax.startup import compiled, timings
from llmjax.startup.compiled import Store


class Engine:
    """See the module. Not for several threads: one of them calls it."""

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
        store: Store | None = None,
    ) -> None:
        """
        Args:
            module, params: the model; `params` is {"embedding": ..., ...}, and stays the caller's.
            slots: texts written at a time, rounded up to what the mesh's axes for rows divide.
            length: tokens of prompt and text together, rounded up to a multiple of ALIGN.
            source_length: of an encoder-decoder's sources.
            steps: tokens a slot at most between two looks at stop strings, arrivals and cancellations.
            parts: lengths, multiples of ALIGN, in which prompts are read; see `Scheduler`.
            beginnings: of prompts that begin alike, the beginning is computed once. Models with windows or recurrent
                states keep so many of them; others find them in the slots. 0: each prompt is computed by itself.
            likeliest: for each token so many of the likeliest ids are reported.
            ahead: tokens drafted a step (speculative decoding); 0: none.
            draft: the model that drafts, of the same vocabulary; None: the text itself is looked up.
            form: of the weights: see `weights.FORMS`, or auto.
            mesh, context: where the parameters live, and what to trace under (`placement.active`).
            store: where programs, and these parameters as they are prepared, are kept between starts.

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
        self.module, self.tokenizer, self.ahead = module, tokenizer, ahead
        self.source_length, self._context, self._mesh = source_length, context, mesh
        models = ((module, params), *([draft] if draft else []))
        self._modules = tuple(one for one, _ in models)
        self._places = [jax.tree.map(_sharding, own) for _, own in models]
        if form == "auto":
            devices = len(jax.tree.leaves(self._places[0])[0].device_set)
            form = weights.choose(platform=jax.default_backend(), devices=devices, rows=self.count * (ahead + 1))
        self._form, self.version = form, 0
        self._shapes = [jax.tree.map(_shape, own) for _, own in models]
        self.params: tuple[Any, ...] = ()
        self._read_params: tuple[Any, ...] = ()
        prepared = self._prepare([own for _, own in models], store)
        self._compile(prepared, most=steps, top=likeliest, store=store)
        self._kept: dict[bytes, Any] = {}  # copies of slots' caches
        self._forms = Forms(tokenizer, c.vocab_size)
        self._scheduler = Scheduler(
            tokenizer, self._forms, slots=self.count, capacity=self.capacity, steps=steps, parts=sorted({ALIGN, *parts}),
            ways=ways, prefixes=self._prefixes(beginnings), source_length=source_length,
        )  # fmt: skip
        self._whole = True  # whether the last step came to its end
        V = c.vocab_size
        allowed_V = np.arange(V) < tokenizer.vocab_size
        allowed_V[[i for i in tokenizer.unsampled_ids if i < V]] = False
        self._bias_V = np.where(allowed_V, 0.0, -np.inf).astype(np.float32)
        self._unseen_V = np.zeros(V, bool)
        self._all_BW = np.full((self.count, -(-V // 32)), 2**32 - 1, np.uint32)

    def _prefixes(self, beginnings: int) -> Prefixes:
        if not beginnings:
            return Prefixes()
        return SlotPrefixes(self.count) if speculative.forgets(self.module) else KeptPrefixes(beginnings)

    # ------------------------------------------------------------------ weights and programs

    def _prepare(self, own: Sequence[Any], store: Store | None = None) -> tuple[Transformer, ...]:
        """Take parameters, of the model and maybe of the draft model: the modules that read them as prepared.

        `store` says which parameters those of the model are; of a draft model nothing does.
        """
        stores = (store, None)
        with self._context(), timings.phase("prepare the weights"):
            placed = [jax.tree.map(jax.device_put, one, where) for one, where in zip(own, self._places, strict=False)]
            prepared = [
                weights.prepare(module, params, self._form, store=kept_in)
                for module, params, kept_in in zip(self._modules, placed, stores, strict=False)
            ]
        self.params = (*(params for _, params in prepared), *self.params[len(own) :])
        # Prompts are read with the caller's parameters: tiles are for few rows. int8 must be the same model throughout.
        read = self.params if self._form == "int8" else placed
        self._read_params = (*read[: len(own)], *self._read_params[len(own) :])
        return tuple(one for one, _ in prepared)

    def _compile(self, prepared: tuple[Transformer, ...], *, most: int, top: int, store: Store | None) -> None:
        """The programs, which compile when they are first called, and empty slots."""
        with self._context():
            self.programs = programs(
                prepared,
                prepared if self._form == "int8" else self._modules,
                count=self.count,
                length=self.capacity + (ALIGN * -(-(self.ahead + 1) // ALIGN) if self.ahead else 0),
                source_length=self.source_length,
                most=most,
                top=top,
                ahead=self.ahead,
                mesh=self._mesh,
                store=store,
                types=compiled.described((self.params, self._read_params)) if store else "",
            )
        self.slots = self._empty()

    def _empty(self) -> Slots:
        """Empty slots where the parameters are: what is put somewhere and what is not make different programs."""
        with self._context():
            slots = self.programs.init()
        return slots if self._mesh is not None else jax.device_put(slots, jax.tree.leaves(self._places[0])[0])

    def load(self, params: Any, *, version: int = 0, draft: Any = None) -> None:
        """Go on with other parameters of the same model, wherever they are. No program is compiled again.

        What was computed of prompts is forgotten. The engine must be idle. It reads the arrays themselves until the next
        call, as those that it was made with: do not donate them meanwhile.

        Args:
            version: a number by which the caller knows them; kept as `version`.
            draft: parameters of the draft model; None: as they are.

        Raises UserError when texts are on their way, or the parameters are another model's.
        """
        if self.busy:
            raise UserError("texts are on their way: let them end, or cancel them, before you load other parameters")
        own = (params,) if draft is None else (params, draft)
        if len(own) > len(self._modules):
            raise UserError("this engine has no draft model")
        for new, shapes in zip(own, self._shapes, strict=False):
            if jax.tree.map(_shape, new) != shapes:
                raise UserError("these parameters are another model's: their names, shapes or types differ")
        self._prepare(own)
        self._scheduler.prefixes.forget()
        self._kept.clear()
        self.version = version

    def warm_up(self) -> int:
        """Compile everything that requests can need: how many programs there are. The engine must be idle.

        Nothing is compiled afterwards (on a mesh `programs.compiled()` may still grow, by entries for the same programs).
        """
        assert not self.busy
        s, none = self._scheduler, np.zeros(self.count, bool)
        with self._context():
            for size in (part for part in s.parts if part <= self.capacity):
                for rows in {s.ways, s.together}:
                    for sources in self._no_sources():
                        self._do(Read(rows, size, [], [], [], sources))
            self._do(Place(0, Request((self.tokenizer.start_id,), source=(1,) * min(1, self.source_length))))
            if isinstance(s.prefixes, SlotPrefixes):
                self._do(Copy(0, 0))
            elif isinstance(s.prefixes, KeptPrefixes):
                self._do(Keep(0, b"", ()))
                self._do(Restore(b"", 0))
                del self._kept[b""]
            self._decode(none, none.astype(np.int32), None)
        return self.programs.compiled()

    def _no_sources(self) -> tuple[Sequence[Sequence[int]] | None, ...]:
        return ((), None) if self.source_length else (None,)

    # ------------------------------------------------------------------ what a caller does

    @property
    def prefilled(self) -> int:
        """Tokens of prompts computed so far, those of copied beginnings not counted."""
        return self._scheduler.prefilled

    @property
    def written(self) -> int:
        """Tokens written so far."""
        return self._scheduler.written

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return self._scheduler.busy

    def submit(self, request: Request | Mapping[str, Any], *, name: str = "the prompt") -> int:
        """Put a request, or its fields, in the queue: its number.

        Raises UserError for one that this engine cannot answer; `name` is what the prompt is called then.
        """
        request = request if isinstance(request, Request) else Request.parse(request)
        V = self.module.c.vocab_size
        if max(request.ids) >= V:
            raise UserError(f"{name} must have ids from 0 to {V - 1}")
        if len(request.ids) + request.max_new_tokens > self.limit:
            raise UserError(
                f"{name} has {len(request.ids)} tokens (<bos> included), which with max_new_tokens="
                f"{request.max_new_tokens} is more than the {self.limit} that a slot of the engine holds: "
                "shorten the prompt or lower max_new_tokens, or give the engine a larger length (infer.length)"
            )
        if len(request.source) > self.source_length or (self.source_length > 0) != bool(request.source):
            raise UserError(
                f"the source has {len(request.source)} tokens, of 1 to {self.source_length} for this engine"
            )
        if request.source and max(request.source) >= V:
            raise UserError(f"the source must have ids from 0 to {V - 1}")
        if wrong := [i for i in request.logit_bias if i >= V]:
            raise UserError(f"logit_bias has the id {wrong[0]}: ids are from 0 to {V - 1}")
        if -np.inf in request.logit_bias.values() and not np.isfinite(self._biased(request)).any():
            raise UserError("logit_bias forbids every token: leave one that may be written")
        if request.form is not None and self.ahead:
            raise UserError("texts of a given form need an engine without speculative decoding: set infer.ahead to 0")
        stop_row((*self.tokenizer.eos_ids, *request.stop_ids))
        return self._scheduler.submit(request)

    def cancel(self, number: int) -> bool:
        """End a request where it is; its last event comes with the next `step`. False if it is not on its way."""
        return self._scheduler.cancel(number)

    def step(self) -> list[Event]:
        """Admit who waits, write up to `steps` tokens in every slot, and tell what has become of whom.

        A request that cannot go on ends with an event that says why; the others do not notice. A step that is
        interrupted may have come to any point: the next one begins the texts in slots anew, which gives the same tokens.
        """
        s = self._scheduler
        if not self._whole:
            s.restart()
            self._kept.clear()
            self.slots = self._empty()
        self._whole = False
        events = s.events()  # of those that were cancelled, whose slots are free now
        with self._context(), timings.phase("read prompts and write"):
            for action in s.reads():
                self._do(action)
            limit_B = s.limits()
            if limit_B.any():
                s.take(self._decode(s.keep(), limit_B, s.words(self._all_BW.shape[1])))
        self._whole = True
        return events + s.events()

    def run(self) -> Iterator[tuple[int, Completion]]:
        """Step until nothing is left to do: (number, completion) of each that ends."""
        while self.busy:
            yield from ((event.number, event.completion) for event in self.step() if event.completion is not None)

    # ------------------------------------------------------------------ what it computes

    def _do(self, action: Action) -> None:
        """What the scheduler asks for, on the device."""
        run, slots = self.programs, self.slots
        match action:
            case Read():
                self.slots = run.prefill(self._read_params, slots, *self._part(action))
            case Place(slot, request):
                self.slots = run.place(slots, np.int32(slot), self._row(request))
            case Copy(source, slot):
                self.slots = run.copy_row(slots, np.int32(source), np.int32(slot))
            case Keep(slot, key, drop):
                self._kept[key] = run.take_row(slots.caches, np.int32(slot))
                for one in drop:
                    self._kept.pop(one, None)
            case Restore(key, slot):
                self.slots = run.put_row(slots, np.int32(slot), self._kept[key])

    def _part(self, part: Read) -> tuple[Any, ...]:
        """The arrays of a call of `prefill`."""
        rows_R = np.full(part.rows, self.count, np.int32)
        tokens_RL = np.zeros((part.rows, part.size), np.int32)
        starts_R, counts_R = np.zeros(part.rows, np.int32), np.zeros(part.rows, np.int32)
        rows_R[: len(part.slots)], starts_R[: len(part.slots)] = part.slots, part.starts
        for row, ids in enumerate(part.tokens):
            counts_R[row] = len(ids)
            tokens_RL[row, : len(ids)] = ids
        source = None
        if part.sources is not None:
            source = {name: np.zeros((part.rows, self.source_length), np.int32) for name in ("tokens", "segments")}
            for row, ids in enumerate(part.sources):
                source["tokens"][row, : len(ids)], source["segments"][row, : len(ids)] = ids, 1
        return rows_R, tokens_RL, starts_R, counts_R, source

    def _decode(self, keep_B: np.ndarray, limit_B: np.ndarray, words_BW: np.ndarray | None) -> Written:
        """One call of the decoding program: what it wrote."""
        words, constrained = (self._all_BW, False) if words_BW is None else (words_BW, True)
        eager = np.bool_(self._scheduler.eager)
        self.slots, written = self.programs.decode(
            self.params, self.slots, keep_B, limit_B, words, np.bool_(constrained), eager
        )
        found: Written = jax.device_get(written)
        return found

    def _biased(self, request: Request) -> np.ndarray:
        bias_V = self._bias_V
        if request.logit_bias:
            bias_V = bias_V.copy()
            for i, bias in request.logit_bias.items():
                bias_V[i] += bias
        return bias_V

    def _row(self, request: Request) -> Row:
        ids, seen_V = request.ids, self._unseen_V
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
            seed=np.uint32(request.seed),
            number=np.int32(request.number),
            sampling=settings(1, **sampling_row(request)),
            stop_S=stop_row((*self.tokenizer.eos_ids, *request.stop_ids)),
            bias_V=self._biased(request),
            seen_V=seen_V,
            history_M=history_M,
        )


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}"


def _sharding(leaf: Any) -> Any:
    """Where a parameter is; what is on no device yet goes to the default one."""
    return leaf.sharding if isinstance(leaf, jax.Array) else jax.sharding.SingleDeviceSharding(jax.devices()[0])
