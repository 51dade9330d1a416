"""Log-likelihoods of continuations given contexts: what multiple-choice tasks, rolling perplexity and judges ask for.

Contexts are computed once for all that continues them (`rows.py`); hidden states are gathered where something is
scored before the output head, which is the larger part of a small model with a large vocabulary; batches have few
shapes, the longest come first so that too little memory is noticed at once, and results are fetched late so that the
device does not wait for the host.
"""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config.model_checks import ATTENTION
from llmjax.errors import UserError
from llmjax.eval.rows import Row, build_rows, choose_lengths
from llmjax.infer.language_model import LanguageModel
from llmjax.model.count import active_matrices
from llmjax.model.stacks import layer_stacks
from llmjax.objectives import OBJECTIVES, chunks
from llmjax.objectives.losses import cross_entropy, predictions_of
from llmjax.parallel import placement
from llmjax.parallel.mesh import row_ways
from llmjax.train.step import batch_shardings

LONGEST_ROW = 2048  # longer trees save little and their masks grow with the square
BATCH_TOKENS = {"cpu": 4096}
OTHER_BATCH_TOKENS = 32_768
# Floating point operations that compiling one more program is worth: a second or two of each machine.
COMPILE_WORTH = {"cpu": 4e10}
OTHER_COMPILE_WORTH = 1e15
CHUNK_FLOATS = 2**23  # of the logits that exist at a time
IN_FLIGHT = 4  # batches whose results have not been fetched
SOFTMAX_WORTH = 200.0  # operations of a matrix product that take as long as mask and softmax of one score


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: the sum of its tokens' log-probabilities (nats), and whether each was the likeliest."""

    sum: float
    greedy: bool


@dataclass(frozen=True)
class Request:
    """Token ids: what is scored, after what. Neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


def context_length(c: ConfigDict) -> int:
    """Tokens that a model reads at most: `model.max_length`, which is what exported models declare."""
    return int(c.model.max_length)


def shares_contexts(c: ConfigDict) -> bool:
    """Whether a model of these settings (`config.model`) can read trees: recurrent layers read a row from left to right."""
    recurrent = any(kind not in ATTENTION for stack in layer_stacks(c) for kind, _ in stack.kinds)
    return not (recurrent or c.encoder_layers or minds_company(c))


def minds_company(c: ConfigDict) -> bool:
    """Whether what else is in a row changes what a token becomes: experts that run full drop tokens."""
    return bool(c.moe.experts) and c.moe.dispatch == "capacity"


def score_continuations(
    model: LanguageModel,
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    max_length: int = 0,
    batch_tokens: int = 0,
    share: bool = True,
    on_scored: Callable[[int], None] | None = None,
) -> list[list[Likelihood]]:
    """The likelihood of each continuation of each context: groups of (context ids, [continuation ids, ...]).

    See `score_requests` for the arguments and errors.
    """
    requests = [Request(context, continuation) for context, ways in groups for continuation in ways]
    more: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens, "share": share}
    found = iter(score_requests(model, requests, on_scored=on_scored, **more))
    return [[next(found) for _ in ways] for _, ways in groups]


def score_requests(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    max_length: int = 0,
    batch_tokens: int = 0,
    share: bool = True,
    on_scored: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of every request, in their order.

    What is longer than the model reads loses tokens on the left, as in lm-evaluation-harness: the last
    `max_length` + 1 tokens count, of which the very last is never an input.

    Args:
        max_length: tokens of a model's input; 0: `model.max_length`.
        batch_tokens: of a batch; 0: by the platform.
        share: compute common beginnings once, where the architecture allows it. The sums change by float rounding.
        on_scored: told how many requests have been scored.

    Raises:
        UserError: for a model that does not predict text from left to right, an empty context or continuation, a
            continuation longer than `max_length`, ids out of the vocabulary, or more than its learned positions.
    """
    c = model.config.model
    limit = max_length or context_length(model.config)
    _check(model, requests, limit)
    inputs = [[*r.context, *r.continuation][-(limit + 1) :][:-1] for r in requests]
    platform = model.mesh.devices.flat[0].platform
    cost = layer_cost(c)
    rows = build_rows(
        inputs,
        cost=(lambda before, _: float(before)) if minds_company(c) else cost,
        longest=max([LONGEST_ROW, *map(len, inputs)]),
        branches=share and shares_contexts(c),
    )
    worth = COMPILE_WORTH.get(platform, OTHER_COMPILE_WORTH) / c.layers
    lengths = choose_lengths([len(row.tokens) for row in rows], cost=cost, shape_cost=worth)
    budget = batch_tokens or BATCH_TOKENS.get(platform, OTHER_BATCH_TOKENS)
    ways, sharding = row_ways(model.mesh), batch_shardings(model.mesh)
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(next(length for length in lengths if len(row.tokens) <= length), []).append(row)

    found: list[Likelihood | None] = [None] * len(requests)
    pending: deque[tuple[jax.Array, jax.Array, list[tuple[int, int, int, int]]]] = deque()
    done = 0

    def fetch() -> None:
        nonlocal done
        nats, right, where = pending.popleft()
        nats_WN, right_WN = np.asarray(nats, np.float64), np.asarray(right)
        for number, way, start, stop in where:
            found[number] = Likelihood(-float(nats_WN[way, start:stop].sum()), bool(right_WN[way, start:stop].all()))
        done += len(where)
        if on_scored is not None:
            on_scored(done)

    for length in sorted(by_length, reverse=True):
        here = by_length[length]
        most = max(budget // length // ways, 1) * ways
        batches = -(-len(here) // most)
        size = -(-len(here) // (batches * ways)) * ways
        made = [
            _batch(here[start : start + size], requests, size=size, length=length, ways=ways)
            for start in range(0, len(here), size)
        ]
        block = logits_block(c.vocab_size)
        slots = -(-max(len(part) for batch in made for part in batch.slots) // block) * block
        for batch in made:
            arrays = jax.device_put(batch.arrays(slots), sharding)
            with placement.active(model.mesh, model.config):
                nats_WN, right_WN = _score(model.module, model.params, arrays, slots // block)
            pending.append((nats_WN, right_WN, batch.where))
            while len(pending) > IN_FLIGHT:
                fetch()
    while pending:
        fetch()
    assert all(item is not None for item in found)
    return [item for item in found if item is not None]


def layer_cost(c: ConfigDict) -> Callable[[int, int], float]:
    """Operations of one layer for new tokens of a row behind others, the softmax's weighed by how slow they are."""
    per_token = 2.0 * (active_matrices(c) - c.vocab_size * c.width) / c.layers
    per_pair = c.heads * (4.0 * config.head_size(c) + SOFTMAX_WORTH)

    def cost(before: int, new: int) -> float:
        return new * per_token + per_pair * (before * new + new * new / 2)

    return cost


def logits_block(vocab_size: int) -> int:
    """Scored places whose logits a device makes at a time: a power of two from 16 to 256."""
    return int(2 ** np.clip(np.floor(np.log2(CHUNK_FLOATS / vocab_size)), 4, 8))


def _check(model: LanguageModel, requests: Sequence[Request], limit: int) -> None:
    name = model.config.objective.name
    if not OBJECTIVES[name].reads_left_to_right:
        raise UserError(
            f"tasks need a model that predicts text from left to right, which objective.name={name} does not"
        )
    c = model.config.model
    if c.position == "learned" and limit > c.max_length:
        raise UserError(f"a length of {limit} is more than the model's {c.max_length} learned positions: lower it")
    for number, request in enumerate(requests):
        if not len(request.context) or not len(request.continuation):
            raise UserError(f"request {number} has no context or no continuation: give at least one token of each")
        if len(request.continuation) > limit:
            raise UserError(
                f"the continuation of request {number} has {len(request.continuation)} tokens, more than the {limit} "
                "that the model reads: cut it, or score it as a rolling text"
            )
        low = min(min(request.context), min(request.continuation))
        high = max(max(request.context), max(request.continuation))
        if low < 0 or high >= c.vocab_size:
            raise UserError(f"request {number} has ids that are not from 0 to {c.vocab_size - 1}")


@dataclass
class _Batch:
    """Arrays (B, L), and for each of W parts of the rows the places that are scored and what should be there."""

    inputs: dict[str, np.ndarray]
    slots: list[list[int]]
    answers: list[list[int]]
    where: list[tuple[int, int, int, int]]  # number of the request, part, its first slot and the one behind its last

    def arrays(self, size: int) -> dict[str, np.ndarray]:
        """The inputs with slots_WN and answers_WN, N = size; the slots that only fill are place 0."""

        def padded(parts: list[list[int]]) -> np.ndarray:
            return np.array([[*part, *[0] * (size - len(part))] for part in parts], np.int32)

        return {**self.inputs, "slots": padded(self.slots), "answers": padded(self.answers)}


def _batch(rows: Sequence[Row], requests: Sequence[Request], *, size: int, length: int, ways: int) -> _Batch:
    names = ("tokens", "positions", "until", "segments")
    inputs = {name: np.zeros((size, length), np.int32) for name in names}
    inputs["until"] += length  # padding sees itself, so that no softmax is over nothing
    slots: list[list[int]] = [[] for _ in range(ways)]
    answers: list[list[int]] = [[] for _ in range(ways)]
    where = []
    for i, row in enumerate(rows):
        part, first = divmod(i, size // ways)
        here = (i, slice(0, len(row.tokens)))
        inputs["tokens"][here], inputs["positions"][here] = row.tokens, row.positions
        inputs["until"][here], inputs["segments"][here] = row.until, 1
        for number, path in row.paths:
            answer = requests[number].continuation
            start = len(slots[part])
            slots[part] += (first * length + path[len(path) - len(answer) :]).tolist()
            answers[part] += list(answer)
            where.append((number, part, start, start + len(answer)))
    return _Batch(inputs, slots, answers, where)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _score(module: Any, params: Any, batch: dict[str, jax.Array], parts: int) -> tuple[jax.Array, jax.Array]:
    """(nats, whether the answer is the likeliest) of every slot, (W, N); the logits in so many parts."""
    tree = {"until_BL": batch["until"]} if shares_contexts(module.c) else {}
    hidden_BLD = module.apply(
        {"params": params}, batch["tokens"], positions_BL=batch["positions"], segments_BL=batch["segments"],
        output="hidden", **tree,
    )  # fmt: skip
    W, D = batch["slots"].shape[0], hidden_BLD.shape[-1]
    hidden_WND = jnp.take_along_axis(hidden_BLD.reshape(W, -1, D), batch["slots"][:, :, None], axis=1)
    predictions = predictions_of(module, params, hidden_WND, batch["answers"], jnp.ones_like(batch["answers"]))

    def measure(logits_WNV: jax.Array, answers_WN: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(logits_WNV, answers_WN)[0], jnp.argmax(logits_WNV, axis=-1) == answers_WN

    nats_WN, right_WN = chunks.token_values(measure, predictions, parts)
    return nats_WN, right_WN
