"""Beam search: of the continuations of a prompt, the likeliest that keeping a few candidates finds.

    search = BeamSearch(module, params, tokenizer, beams=4, length=256)
    number = search.submit(Request(ids=tuple(ids), max_new_tokens=64))
    while search.busy:
        for event in search.step(): print(event.number, event.piece, event.finish)

A request is submitted and answered as by an `Engine`, but one at a time, and its text comes whole.
"""

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import config
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.request import CONSTRAINTS, Completion, Event, Request, check_fits, writable
from llmjax.infer.unstacked import unstack
from llmjax.infer.weights import prepare
from llmjax.model.cache import init_cache
from llmjax.model.transformer import Transformer
from llmjax.parallel import mesh as meshes

NEVER = -1e30  # the log-probability of a candidate that does not exist
REFUSED = ("adapter", "stop", "logit_bias", "repetition_penalty", "frequency_penalty", "presence_penalty", *CONSTRAINTS)


class BeamSearch:
    """Answers requests one after the other. The settings of random sampling have no effect."""

    count = 1  # requests at a time

    def __init__(
        self,
        module: Transformer,
        params: Any,
        tokenizer: Tokenizer,
        *,
        beams: int,
        length_penalty: float = 1.0,
        length: int = 1024,
        source_length: int = 0,
        mesh: jax.sharding.Mesh | None = None,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """
        Args:
            beams: candidates that are kept at every length.
            length_penalty: the best candidate has the largest log-probability / tokens ** length_penalty. 0: no penalty;
                larger values prefer longer texts (Wu et al. 2016, without their constant).
            length: tokens of prompt and text together.
            source_length: of an encoder-decoder's sources.
            mesh, context: see `Engine`.
        """
        self.tokenizer, self.beams, self.length_penalty = tokenizer, beams, length_penalty
        self.source_length, self._context = source_length, context
        self._ways = 1 if mesh is None else meshes.row_ways(mesh)
        self._length = 1 << (length - 1).bit_length()
        self.limit = min(length, module.c.max_length) if config.bounded_positions(module.c) else length
        with context():
            self._module, self._params = prepare(module, params, "stored")
        self._waiting: OrderedDict[int, Request] = OrderedDict()
        self._numbers = 0

    @property
    def busy(self) -> bool:
        """Whether a request waits for its answer."""
        return bool(self._waiting)

    def submit(self, request: Request, *, name: str = "the prompt") -> int:
        """Put a request in the queue: its number.

        Raises UserError for one that cannot be answered; `name` is what the message calls the prompt.
        """
        check_fits(request, self._module.c, limit=self.limit, source_length=self.source_length, name=name)
        plain = Request(request.ids)
        if wrong := [field for field in REFUSED if getattr(request, field) != getattr(plain, field)]:
            raise UserError(f"beam search knows no {wrong[0]}: leave it out, or set generate.beams to 1")
        number, self._numbers = self._numbers, self._numbers + 1
        self._waiting[number] = request
        return number

    def step(self) -> list[Event]:
        """Answer the request that has waited longest."""
        number, request = next(iter(self._waiting.items()))
        with self._context():
            found = self._answer(request)
        del self._waiting[number]
        zeros = (0.0,) * len(found.tokens)
        return [Event(number, found.text, found.tokens, found.log_probabilities, zeros, found.finish, "", found)]

    def _answer(self, request: Request) -> Completion:
        ids, tokenizer, V = request.ids, self.tokenizer, self._module.c.vocab_size
        allowed_V = writable(tokenizer, V)
        ends = np.array([*tokenizer.eos_ids, *request.stop_ids], np.int32)
        rows = -(-self.beams // self._ways) * self._ways
        cache = self._read(request, rows=rows)
        token_B = np.full(rows, ids[-1], np.int32)
        score_B = np.array([0.0] + [NEVER] * (rows - 1), np.float32)  # all rows are equal: one goes on
        ended_B = np.zeros(rows, bool)
        texts: list[tuple[int, ...]] = [()] * rows
        nats: list[tuple[float, ...]] = [()] * rows
        for i in range(request.max_new_tokens):
            position, before_B = np.int32(len(ids) - 1 + i), score_B
            made = _step(self._module, self._params, cache, token_B, position, score_B, ended_B, allowed_V)
            cache, (token_B, parent_B, score_B) = made[0], map(np.array, made[1:])
            score_B[self.beams :] = NEVER  # rows that only fill the mesh
            over_B, rises_B = ended_B[parent_B], (score_B - before_B[parent_B]).tolist()
            grown = list(zip(parent_B.tolist(), over_B, token_B.tolist(), rises_B, strict=True))
            texts = [texts[parent] if over else (*texts[parent], token) for parent, over, token, _ in grown]
            nats = [nats[parent] if over else (*nats[parent], rise) for parent, over, _, rise in grown]
            ended_B = over_B | np.isin(token_B, ends)
            if ended_B[: self.beams].all():
                break
        lengths_B = np.array([len(text) for text in texts])
        best = int(np.argmax(np.where(score_B > NEVER / 2, score_B / lengths_B**self.length_penalty, NEVER)))
        tokens, finish = texts[best], "length"
        if ended_B[best]:
            finish = "eos" if tokens[-1] in tokenizer.eos_ids else "stop"
        shown = tokens[:-1] if ended_B[best] else tokens
        prompt, text = (tokenizer.decode([t for t in part if t < tokenizer.vocab_size]) for part in (ids, shown))
        return Completion(prompt, text, finish, tokens, nats[best], sampled_log_probabilities=(0.0,) * len(tokens))

    def _read(self, request: Request, *, rows: int) -> Any:
        """The cache of the prompt without its last token, once for each row."""
        count = len(request.ids) - 1
        tokens_BL = np.zeros((self._ways, min(1 << max(count, 1).bit_length(), self._length)), np.int32)
        tokens_BL[:, :count] = request.ids[:-1]
        source = None
        if self.source_length:
            source = {name: np.zeros((self._ways, self.source_length), np.int32) for name in ("tokens", "segments")}
            source["tokens"][:, : len(request.source)] = request.source
            source["segments"][:, : len(request.source)] = 1
        return _start(self._module, self._params, tokens_BL, np.int32(count), source, rows=rows, length=self._length)


@functools.partial(jax.jit, static_argnames=("module", "rows", "length"))
def _start(
    module: Transformer, params: Any, tokens_BL: jax.Array, count: jax.Array, source: Any, *, rows: int, length: int
) -> Any:
    B, L = tokens_BL.shape
    cache = init_cache(module.c, batch=B, length=length, source_length=source["tokens"].shape[1] if source else 0)
    cache = {**cache, "layers": unstack(module.c, cache["layers"])}
    segments_BL = jnp.broadcast_to(jnp.arange(L) < count, (B, L)).astype(jnp.int32)
    made: Any = module.apply(
        {"params": params}, tokens_BL, segments_BL=segments_BL, source=source, cache=cache, output="hidden"
    )
    return jax.tree.map(lambda x: jnp.repeat(x[:1], rows, axis=0), made[1])


@functools.partial(jax.jit, static_argnames="module", donate_argnames="cache")
def _step(
    module: Transformer,
    params: Any,
    cache: Any,
    token_B: jax.Array,
    position: jax.Array,
    score_B: jax.Array,
    ended_B: jax.Array,
    allowed_V: jax.Array,
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """The best candidates one token later: their caches, tokens, parents and log-probabilities.

    A candidate that has ended competes with itself, unchanged.
    """
    B = token_B.shape[0]
    positions_BL = jnp.broadcast_to(position, (B, 1))
    made: Any = module.apply({"params": params}, token_B[:, None], positions_BL=positions_BL, cache=cache)
    nats_BV = jnp.where(allowed_V[None], jax.nn.log_softmax(made[0][:, 0]), NEVER)
    itself_V = jnp.where(jnp.arange(nats_BV.shape[1]) == 0, 0.0, NEVER)
    nats_BV = jnp.where(ended_B[:, None], itself_V[None], nats_BV)
    score_B, best_B = jax.lax.top_k((score_B[:, None] + nats_BV).reshape(-1), B)
    parent_B, token_B = best_B // nats_BV.shape[1], best_B % nats_BV.shape[1]
    cache = jax.tree.map(lambda x: jnp.take(x, parent_B, axis=0), made[1])
    return cache, token_B.astype(jnp.int32), parent_B, score_B
