"""Log-likelihoods of continuations given contexts, for multiple-choice tasks, rolling perplexity and judges.

Requests with a common beginning share a row (`trees.py`), so that the beginning is computed once. The output head, the
larger part of a small model with a large vocabulary, is computed at the scored places only. Batches have few shapes.
The longest come first, so that too little memory shows at once. Results are fetched late, so that the device does not
wait for the host.

Letters beside the project's: `P` parts of a batch, one for each device that holds rows, `Q` scored places of a part.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config.model_checks import ATTENTION
from llmjax.errors import UserError
from llmjax.eval.trees import Row, build_rows, choose_lengths
from llmjax.infer.language_model import LanguageModel
from llmjax.model.count import active_matrices
from llmjax.model.stacks import layer_stacks
from llmjax.objectives import OBJECTIVES, chunks
from llmjax.objectives.losses import cross_entropy, predictions_of
from llmjax.parallel import placement
from llmjax.parallel.mesh import row_ways
from llmjax.train.step import batch_shardings

LONGEST_ROW = 2048  # tokens; longer trees save little, and their masks grow with the square
BATCH_TOKENS = {"cpu": 4096}
OTHER_BATCH_TOKENS = 32_768
# Compiling one more program costs about as much as so many floating-point operations: a second or two.
COMPILE_WORTH = {"cpu": 4e10}
OTHER_COMPILE_WORTH = 1e15
CHUNK_FLOATS = 2**23  # logits in memory at a time
IN_FLIGHT = 4  # batches whose results have not been fetched
SOFTMAX_WORTH = 200.0  # operations of a matrix product that take as long as the mask and softmax of one score


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is."""

    sum: float  # of its tokens' log-probabilities, nats
    greedy: bool  # whether each token was the likeliest


@dataclass(frozen=True)
class ScoringRequest:
    """Token ids to score, and the context before them. Neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


def context_length(c: ConfigDict) -> int:
    """The most tokens that a model reads: `model.max_length`, as exported models declare it."""
    return int(c.model.max_length)


def shares_contexts(c: ConfigDict) -> bool:
    """Whether a model of these settings (`config.model`) can read trees. Recurrent layers read a row from left to right."""
    recurrent = any(kind not in ATTENTION for stack in layer_stacks(c) for kind, _ in stack.kinds)
    return not (recurrent or c.encoder_layers or drops_tokens(c))


def drops_tokens(c: ConfigDict) -> bool:
    """Whether full experts drop tokens, so that a token depends on the others in its row."""
    return bool(c.moe.experts) and c.moe.dispatch == "capacity"


def score_requests(
    model: LanguageModel,
    requests: Sequence[ScoringRequest],
    *,
    max_length: int = 0,
    batch_tokens: int = 0,
    share: bool = True,
    on_scored: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of every request, in order.

    Requests longer than the model reads lose tokens on the left, as in lm-evaluation-harness: the last `max_length` + 1
    tokens count, and the very last of them is never an input.

    Args:
        max_length: tokens of a model's input; 0: `model.max_length`.
        batch_tokens: of a batch; 0: by the platform.
        share: compute common beginnings once where the architecture allows it. The sums change by float rounding.
        on_scored: called with the number of requests that have been scored.

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
        cost=(lambda before, _: float(before)) if drops_tokens(c) else cost,
        longest=max([LONGEST_ROW, *map(len, inputs)]),
        branches=share and shares_contexts(c),
    )
    worth = COMPILE_WORTH.get(platform, OTHER_COMPILE_WORTH) / c.layers
    lengths = choose_lengths([len(row.tokens) for row in rows], cost=cost, shape_cost=worth)
    budget = batch_tokens or BATCH_TOKENS.get(platform, OTHER_BATCH_TOKENS)
    sharding, block = batch_shardings(model.mesh), logits_block(c.vocab_size)
    found: list[Likelihood | None] = [None] * len(requests)
    pending: deque[tuple[jax.Array, jax.Array, list[_Span]]] = deque()
    done = 0

    def fetch() -> None:
        nonlocal done
        nats, right, spans = pending.popleft()
        nats_PQ, right_PQ = np.asarray(nats, np.float64), np.asarray(right)
        for span in spans:
            own = (span.part, slice(span.start, span.stop))
            found[span.request] = Likelihood(-float(nats_PQ[own].sum()), bool(right_PQ[own].all()))
        done += len(spans)
        if on_scored is not None:
            on_scored(done)

    for made in _batches(rows, requests, lengths=lengths, budget=budget, ways=row_ways(model.mesh)):
        count = -(-max(len(part) for batch in made for part in batch.places) // block) * block
        for batch in made:
            arrays = jax.device_put(batch.arrays(count), sharding)
            with placement.active(model.mesh, model.config):
                nats_PQ, right_PQ = _score(model.module, model.params, arrays, count // block)
            pending.append((nats_PQ, right_PQ, batch.spans))
            while len(pending) > IN_FLIGHT:
                fetch()
    while pending:
        fetch()
    assert all(item is not None for item in found)
    return [item for item in found if item is not None]


def layer_cost(c: ConfigDict) -> Callable[[int, int], float]:
    """Operations of one layer for so many new tokens behind others in a row; the softmax's count more, as they are slow."""
    per_token = 2.0 * (active_matrices(c) - c.vocab_size * c.width) / c.layers
    per_pair = c.heads * (4.0 * config.head_size(c) + SOFTMAX_WORTH)

    def cost(before: int, new: int) -> float:
        return new * per_token + per_pair * (before * new + new * new / 2)

    return cost


def logits_block(vocab_size: int) -> int:
    """Scored places whose logits a device computes at a time: a power of two from 16 to 256."""
    return int(2 ** np.clip(np.floor(np.log2(CHUNK_FLOATS / vocab_size)), 4, 8))


def _check(model: LanguageModel, requests: Sequence[ScoringRequest], limit: int) -> None:
    name = model.config.objective.name
    if not OBJECTIVES[name].reads_left_to_right:
        raise UserError(
            f"tasks need a model that predicts text from left to right, which objective.name={name} does not"
        )
    c = model.config.model
    if (kind := config.bounded_positions(c)) and limit > c.max_length:
        raise UserError(f"a length of {limit} is more than the model's {c.max_length} {kind} positions: lower it")
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


@dataclass(frozen=True)
class _Span:
    """Where the continuation of a request is scored: the places `start` to `stop` of a part."""

    request: int
    part: int
    start: int
    stop: int


@dataclass
class _Batch:
    """A batch of rows, divided into parts, and the places of each part that are scored."""

    inputs: dict[str, np.ndarray]  # (B, L)
    places: list[list[int]]  # for each part, indices into its flattened tokens
    targets: list[list[int]]  # for each part, the ids that should follow there
    spans: list[_Span]

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """The inputs with places_PQ and targets_PQ, Q = count; place 0 fills what is left."""

        def padded(parts: list[list[int]]) -> np.ndarray:
            return np.array([[*part, *[0] * (count - len(part))] for part in parts], np.int32)

        return {**self.inputs, "places": padded(self.places), "targets": padded(self.targets)}


def _batches(
    rows: Sequence[Row], requests: Sequence[ScoringRequest], *, lengths: Sequence[int], budget: int, ways: int
) -> Iterator[list[_Batch]]:
    """The batches of each length, the longest first; `budget`: tokens of a batch."""
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(next(length for length in lengths if len(row.tokens) <= length), []).append(row)
    for length in sorted(by_length, reverse=True):
        here = by_length[length]
        most = max(budget // length // ways, 1) * ways
        size = -(-len(here) // (-(-len(here) // most) * ways)) * ways
        yield [
            _batch(here[start : start + size], requests, size=size, length=length, ways=ways)
            for start in range(0, len(here), size)
        ]


def _batch(rows: Sequence[Row], requests: Sequence[ScoringRequest], *, size: int, length: int, ways: int) -> _Batch:
    names = ("tokens", "positions", "until", "segments")
    inputs = {name: np.zeros((size, length), np.int32) for name in names}
    inputs["until"] += length  # padding sees itself, so that no softmax is over nothing
    batch = _Batch(inputs, [[] for _ in range(ways)], [[] for _ in range(ways)], [])
    for i, row in enumerate(rows):
        part, first = divmod(i, size // ways)
        here = (i, slice(0, len(row.tokens)))
        inputs["tokens"][here], inputs["positions"][here] = row.tokens, row.positions
        inputs["until"][here], inputs["segments"][here] = row.until, 1
        for number, path in row.paths:
            continuation = requests[number].continuation
            start = len(batch.places[part])
            batch.places[part] += (first * length + path[len(path) - len(continuation) :]).tolist()
            batch.targets[part] += list(continuation)
            batch.spans.append(_Span(number, part, start, start + len(continuation)))
    return batch


@functools.partial(jax.jit, static_argnums=(0, 3))
def _score(module: Any, params: Any, batch: dict[str, jax.Array], count: int) -> tuple[jax.Array, jax.Array]:
    """nats_PQ of the targets, and right_PQ, whether each is the likeliest; the logits in so many chunks."""
    tree = {"until_BL": batch["until"]} if shares_contexts(module.c) else {}
    hidden_BLD = module.apply(
        {"params": params}, batch["tokens"], positions_BL=batch["positions"], segments_BL=batch["segments"],
        output="hidden", **tree,
    )  # fmt: skip
    P, D = batch["places"].shape[0], hidden_BLD.shape[-1]
    hidden_PQD = jnp.take_along_axis(hidden_BLD.reshape(P, -1, D), batch["places"][:, :, None], axis=1)
    predictions = predictions_of(module, params, hidden_PQD, batch["targets"], jnp.ones_like(batch["targets"]))

    def measure(logits_PQV: jax.Array, targets_PQ: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(logits_PQV, targets_PQ)[0], jnp.argmax(logits_PQV, axis=-1) == targets_PQ

    nats_PQ, right_PQ = chunks.token_values(measure, predictions, count)
    return nats_PQ, right_PQ
