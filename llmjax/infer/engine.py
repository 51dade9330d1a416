"""The engine: continuous batching of requests in a fixed number of slots.

    engine = Engine(module, params, tokenizer, slots=8, length=1024)
    number = engine.submit(Request(ids=tuple(ids), max_new_tokens=64))
    while engine.busy:
        for event in engine.step(): print(event.number, event.piece, event.finish)

Requests join and leave between calls of one compiled program, so no text waits for the longest of a batch, and the
answer to a request does not depend on the others. The slots hold the caches of attention, the windows of local attention
and the states of recurrent layers. `scheduler.py` decides which prompts are read and which texts are written. This file
computes them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llmjax import config
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer import speculative, weights
from llmjax.infer.adapters import Adapter, Named, inserted
from llmjax.infer.constrained import Constraints, Job
from llmjax.infer.prefixes import ALIGN, KeptPrefixes, Prefixes, SlotPrefixes
from llmjax.infer.request import Completion, Event, Request, check_fits, sampling_row, writable
from llmjax.infer.sample import settings
from llmjax.infer.scheduler import Action, Copy, Keep, Place, Read, Restore, Scheduler
from llmjax.infer.slots import Row, Slots, stop_row
from llmjax.infer.steps import Written, programs
from llmjax.model.adapters import linear_maps
from llmjax.model.transformer import Transformer
from llmjax.parallel import mesh as meshes
from llmjax.startup import compiled, malloc, timings
from llmjax.startup.compiled import Store

LARGE = 1 << 28  # bytes of parameters whose arrays malloc would keep in pieces


class Engine:
    """See the module. Only one thread may call an engine."""

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
        chunks: Sequence[int] = (16, 32, 64, 128, 256),
        prefixes: int = 4,
        likeliest: int = 0,
        ahead: int = 0,
        draft: tuple[Transformer, Any] | None = None,
        weight_format: str = "auto",
        mesh: jax.sharding.Mesh | None = None,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        store: Store | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        adapter_rank: int = 0,
        adapter_slots: int = 0,
    ) -> None:
        """
        Args:
            module, params: the model; `params` is {"embedding": ..., ...} and remains the caller's.
            slots: texts written at a time, rounded up to a multiple of the devices that rows are divided over.
            length: tokens of prompt and text together, rounded up to a multiple of ALIGN.
            source_length: tokens of an encoder-decoder's source.
            steps: the most tokens of a slot between two checks of stop strings, new requests and cancellations.
            chunks: lengths, multiples of ALIGN, in which prompts are read; see `Scheduler`.
            prefixes: a common prefix of prompts is computed once. Models with windows or recurrent states keep so many
                of them; others find them in the slots. 0: each prompt is computed alone.
            likeliest: report so many of the likeliest ids for each token.
            ahead: tokens drafted in a step (speculative decoding); 0: none.
            draft: the model that drafts, with the same vocabulary; None: prompt lookup.
            weight_format: one of `weights.FORMATS`, or auto.
            mesh, context: where the parameters are, and the context for tracing (`placement.active`).
            store: keeps the programs and the prepared parameters between starts.
            adapters: by name, for requests that name one; see `load_adapter`.
            adapter_rank, adapter_slots: the largest rank, and how many there may be; 0: as those given.

        Raises UserError for settings that contradict each other.
        """
        c = module.c
        if c.direction == "bidirectional":
            raise UserError("model.direction=bidirectional cannot write from left to right")
        if slots < 1 or steps < 1 or ahead < 0:
            raise UserError(f"slots={slots} and steps={steps} must be at least 1, and ahead={ahead} at least 0")
        if bool(c.encoder_layers) != bool(source_length):
            raise UserError("source_length must be given for encoder-decoders, and only for them")
        if any(size % ALIGN or size < ALIGN for size in chunks) or not chunks:
            raise UserError(f"chunks={tuple(chunks)} must be multiples of {ALIGN}")
        if draft is not None and not ahead:
            raise UserError("a draft model drafts nothing with ahead=0: set ahead, for instance to 4")
        if ahead and c.encoder_layers:
            raise UserError("speculative decoding does not support encoder-decoders: set ahead to 0")
        if draft is not None and draft[0].c.vocab_size != c.vocab_size:
            raise UserError(f"the draft model has {draft[0].c.vocab_size} ids and the model {c.vocab_size}")
        if draft is not None and not speculative.can_rewind(draft[0]):
            raise UserError("the draft model must attend to everything in every layer (model.pattern=('global',))")
        ways = 1 if mesh is None else meshes.row_ways(mesh)
        self.count = -(-slots // ways) * ways
        self.capacity = -(-length // ALIGN) * ALIGN
        if config.bounded_positions(c):
            self.limit = min(self.capacity, c.max_length)
        else:
            self.limit = self.capacity
        self.module, self.tokenizer, self.ahead = module, tokenizer, ahead
        self.source_length, self._context, self._mesh = source_length, context, mesh
        models = ((module, params), *([draft] if draft else []))
        self._modules = tuple(one for one, _ in models)
        self._places = [jax.tree.map(_sharding, own) for _, own in models]
        if weight_format == "auto":
            devices = len(jax.tree.leaves(self._places[0])[0].device_set)
            weight_format = weights.choose(
                platform=jax.default_backend(), devices=devices, rows=self.count * (ahead + 1)
            )
        self._weight_format, self.version = weight_format, 0
        self._named = Named(adapters or {}, rank=adapter_rank, count=adapter_slots)
        if adapters and linear_maps(params):
            raise UserError(
                "this model has adapters of its own, beside which there can be no others: export it, which merges them, and "
                "import it again"
            )
        self._shapes = [jax.tree.map(_shape, own) for _, own in models]
        self.params: tuple[Any, ...] = ()
        self._read_params: tuple[Any, ...] = ()
        prepared = self._prepare([own for _, own in models], store)
        self._compile(prepared, most=steps, top=likeliest, store=store)
        self._kept: dict[bytes, Any] = {}  # copies of the caches of slots
        self._constraints = Constraints(tokenizer, c.vocab_size)
        self._scheduler = Scheduler(
            tokenizer, self._constraints, slots=self.count, capacity=self.capacity, steps=steps, chunks=sorted({ALIGN, *chunks}),
            ways=ways, prefixes=self._prefixes(prefixes), source_length=source_length,
        )  # fmt: skip
        self._whole = True  # whether the last step was not interrupted
        V = c.vocab_size
        self._bias_V = np.where(writable(tokenizer, V), 0.0, -np.inf).astype(np.float32)
        self._unseen_V = np.zeros(V, bool)
        self._all_BW = np.full((self.count, -(-V // 32)), 2**32 - 1, np.uint32)

    def _prefixes(self, beginnings: int) -> Prefixes:
        if not beginnings:
            return Prefixes()
        return SlotPrefixes(self.count) if speculative.can_rewind(self.module) else KeptPrefixes(beginnings)

    # ------------------------------------------------------------------ weights and programs

    def _prepare(self, own: Sequence[Any], store: Store | None = None) -> tuple[Transformer, ...]:
        """Prepare the parameters of the model, and maybe of a draft model, for decoding: the modules that read them.

        `store` knows the parameters of the model only.
        """
        stores = (store, None)
        with self._context(), timings.phase("prepare the weights"):
            placed = [jax.tree.map(jax.device_put, one, where) for one, where in zip(own, self._places, strict=False)]
            prepared = [
                weights.prepare(module, params, self._weight_format, store=kept_in)
                for module, params, kept_in in zip(self._modules, placed, stores, strict=False)
            ]
        self.params = (*(params for _, params in prepared), *self.params[len(own) :])
        # Prompts are read with the caller's parameters, as tiles are for few rows. With int8 all must be the same model.
        read = self.params if self._weight_format == "int8" else placed
        self._read_params = (*read[: len(own)], *self._read_params[len(own) :])
        self._plain = self.params[0], self._read_params[0]
        self._own = placed[0]
        self._insert_adapters()
        return tuple(one for one, _ in prepared)

    def _insert_adapters(self) -> None:
        """Put the adapters' arrays into the parameters, for decoding and for reading prompts."""
        if not self._named.count:
            return
        where = jax.tree.leaves(self._places[0])[0]
        if self._mesh is not None:
            where = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        stacks = self._named.stacks(self._own)
        trees = []
        for tree in self._plain:
            for path, arrays in stacks.items():
                tree = inserted(tree, path.split("/"), arrays)
            trees.append(jax.tree.map(lambda x: jax.device_put(x, where) if isinstance(x, np.ndarray) else x, tree))
        self.params, self._read_params = (trees[0], *self.params[1:]), (trees[1], *self._read_params[1:])

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        """Add an adapter, or put it in the place of the one of this name. No program is compiled again.

        Raises UserError for one that does not fit (`Named.put`), and while a request is being answered with that name.
        """
        self._check_unused(name)
        self._named.put(name, adapter)
        self._insert_adapters()

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter. Raises UserError while a request is being answered with it, and for an unknown name."""
        self._check_unused(name)
        self._named.drop(name)
        self._insert_adapters()

    def _check_unused(self, name: str) -> None:
        if name in self._scheduler.adapters:
            raise UserError(f"requests are being answered with the adapter {name}: wait for them, or cancel them")

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(sorted(self._named.numbers))

    def _compile(self, prepared: tuple[Transformer, ...], *, most: int, top: int, store: Store | None) -> None:
        """Make the programs, which compile at their first call, and empty slots."""
        with self._context():
            self.programs = programs(
                prepared,
                prepared if self._weight_format == "int8" else self._modules,
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
        """Empty slots, on the device of the parameters. Arrays with and without a device make different programs."""
        with self._context():
            slots = self.programs.init()
        return slots if self._mesh is not None else jax.device_put(slots, jax.tree.leaves(self._places[0])[0])

    def load(self, params: Any, *, version: int = 0, draft: Any = None) -> None:
        """Go on with other parameters of the same model, on any devices. No program is compiled again.

        The engine must be idle. It drops its prefixes. It reads these arrays until the next `load` or `release`, so do not
        donate them before.

        Args:
            version: the caller's number of these parameters, kept as `version`.
            draft: parameters of the draft model; None: do not change them.

        Raises UserError while texts are being written, and for parameters of another model.
        """
        if self.busy:
            raise UserError("texts are being written: wait for them, or cancel them, before you load other parameters")
        own = (params,) if draft is None else (params, draft)
        if len(own) > len(self._modules):
            raise UserError("this engine has no draft model")
        for new, shapes in zip(own, self._shapes, strict=False):
            if jax.tree.map(_shape, new) != shapes:
                raise UserError("these parameters are of another model: their names, shapes or types differ")
        self._prepare(own)
        self._scheduler.prefixes.forget()
        self._kept.clear()
        self.version = version

    def release(self) -> None:
        """Give back the memory of the model's parameters, in all forms in which the engine keeps them, until the next `load`.

        The engine must be idle, and without adapters by name.
        """
        assert not self.busy and not self._named.count
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params[0]) if not leaf.is_deleted())
        self.params, self._read_params = (None, *self.params[1:]), (None, *self._read_params[1:])
        self._plain, self._own = (None, None), None
        if size > LARGE:
            malloc.give_back_freed()

    def warm_up(self) -> int:
        """Compile all programs that requests can need: how many there are. The engine must be idle.

        Nothing is compiled afterwards. On a mesh `programs.compiled()` may still grow, by entries for the same programs.
        """
        assert not self.busy
        s, none = self._scheduler, np.zeros(self.count, bool)
        with self._context():
            for size in (size for size in s.chunks if size <= self.capacity):
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
        """How many tokens of prompts were computed, without those of copied prefixes."""
        return self._scheduler.prefilled

    @property
    def written(self) -> int:
        """How many tokens were written."""
        return self._scheduler.written

    @property
    def busy(self) -> bool:
        """Whether `step` has work or events."""
        return self._scheduler.busy

    def submit(self, request: Request | Mapping[str, Any], *, name: str = "the prompt") -> int:
        """Put a request, or its fields, in the queue: its number.

        Raises UserError for one that this engine cannot answer; `name` is what the message calls the prompt.
        """
        request = request if isinstance(request, Request) else Request.parse(request)
        check_fits(request, self.module.c, limit=self.limit, source_length=self.source_length, name=name)
        if -np.inf in request.logit_bias.values() and not np.isfinite(self._biased(request)).any():
            raise UserError("logit_bias forbids every token: allow at least one")
        if request.constraint is not None and self.ahead:
            raise UserError("constrained decoding needs an engine without speculative decoding: set infer.ahead to 0")
        stop_row((*self.tokenizer.eos_ids, *request.stop_ids))
        self._named.number(request.adapter)
        return self._scheduler.submit(request, salt=self._named.salt(request.adapter))

    def compile(self, constraint: tuple[str, str]) -> Job:
        """Compile a constraint (`Request.constraint`) beside the engine. Any thread may ask.

        The future of the job raises UserError for one that cannot be used. The engine keeps what was compiled, so that a
        request with it waits no longer.
        """
        return self._constraints.start(constraint)

    def cancel(self, number: int) -> bool:
        """End a request now: its last event comes with the next `step`. False if it has ended, or is not known."""
        return self._scheduler.cancel(number)

    def step(self, between: Callable[[], None] | None = None) -> list[Event]:
        """Admit waiting requests, write up to `steps` tokens in each slot, and return the news of all requests.

        Args:
            between: called after each chunk of prompts, when the device has read it. It may cancel requests, whose prompts
                are then read no further.

        A request that cannot go on ends with an event that says why, without effect on others. After an interrupted step,
        which may have stopped anywhere, the next one begins all texts in slots again, which gives the same tokens.
        """
        s = self._scheduler
        if not self._whole:
            s.restart()
            self._kept.clear()
            self.slots = self._empty()
        self._whole = False
        events = s.events()  # of cancelled requests, whose slots become free
        with self._context(), timings.phase("read prompts and write"):
            for action in s.reads():
                self._do(action)
                if between is not None and isinstance(action, Read):
                    jax.block_until_ready(self.slots)  # or all chunks would wait for the device already
                    between()
            limit_B = s.limits()
            if limit_B.any():
                s.take(self._decode(s.keep(), limit_B, s.words(self._all_BW.shape[1])))
        self._whole = True
        return events + s.events()

    def run(self) -> Iterator[tuple[int, Completion]]:
        """Step until nothing is left to do: (number, completion) of each request that ends."""
        while self.busy:
            yield from ((event.number, event.completion) for event in self.step() if event.completion is not None)

    # ------------------------------------------------------------------ what it computes

    def _do(self, action: Action) -> None:
        """Do an action of the scheduler on the device."""
        run, slots = self.programs, self.slots
        match action:
            case Read():
                self.slots = run.prefill(self._read_params, slots, *self._arguments(action))
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

    def _arguments(self, chunk: Read) -> tuple[Any, ...]:
        """The arguments of a call of `prefill`."""
        rows_R = np.full(chunk.rows, self.count, np.int32)
        tokens_RL = np.zeros((chunk.rows, chunk.size), np.int32)
        starts_R, counts_R = np.zeros(chunk.rows, np.int32), np.zeros(chunk.rows, np.int32)
        rows_R[: len(chunk.slots)], starts_R[: len(chunk.slots)] = chunk.slots, chunk.starts
        for row, ids in enumerate(chunk.tokens):
            counts_R[row] = len(ids)
            tokens_RL[row, : len(ids)] = ids
        adapters_R = np.zeros(chunk.rows, np.int32)
        for row, slot in enumerate(chunk.slots):
            live = self._scheduler.slots[slot]
            adapters_R[row] = self._named.number(live.request.adapter) if live is not None else 0
        source = None
        if chunk.sources is not None:
            source = {name: np.zeros((chunk.rows, self.source_length), np.int32) for name in ("tokens", "segments")}
            for row, ids in enumerate(chunk.sources):
                source["tokens"][row, : len(ids)], source["segments"][row, : len(ids)] = ids, 1
        return rows_R, tokens_RL, starts_R, counts_R, adapters_R, source

    def _decode(self, keep_B: np.ndarray, limit_B: np.ndarray, words_BW: np.ndarray | None) -> Written:
        """One call of the decoding program: the tokens it wrote."""
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
            adapter=np.int32(self._named.number(request.adapter)),
            sampling=settings(1, **sampling_row(request)),
            stop_J=stop_row((*self.tokenizer.eos_ids, *request.stop_ids)),
            bias_V=self._biased(request),
            seen_V=seen_V,
            history_M=history_M,
        )


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}"


def _sharding(leaf: Any) -> Any:
    """Where a parameter is. One that is on no device yet goes to the default device."""
    return leaf.sharding if isinstance(leaf, jax.Array) else jax.sharding.SingleDeviceSharding(jax.devices()[0])
