"""What a model computes from given tokens: the log-probability of each, and one vector for a text.

Batches have few shapes: lengths are powers of two, and rows are one or ROWS. A caller that shares the device computes them one at a
time, does other work between them, and compiles the program of a new shape in another thread meanwhile.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import UserError
from llmjax.infer.generate import round_up
from llmjax.infer.language_model import LanguageModel
from llmjax.model.transformer import Transformer
from llmjax.objectives import chunks
from llmjax.objectives.losses import predictions_of
from llmjax.parallel import placement

T = TypeVar("T")
Batch = list[tuple[int, T]]  # numbers of rows, each with what was computed
ROWS = 8
SHORTEST = 32  # tokens of a batch's rows
CHUNK_TOKENS = 256  # tokens of a batch whose logits are in memory at a time


class TokenScores(NamedTuple):
    """The log-probabilities (nats) of the tokens of a text after its first, with the likeliest ids at each place."""

    nats_L: np.ndarray  # float32
    likeliest_LK: np.ndarray  # int32, the likeliest first
    likeliest_nats_LK: np.ndarray  # float32


@dataclass(frozen=True)
class Part(Generic[T]):
    """A batch that is still to be computed.

    Args:
        compile: makes its program, if there is none yet. It computes nothing, so any thread may call it.
        compute: what the batch has; it compiles too if that was not done.
    """

    compile: Callable[[], None]
    compute: Callable[[], Batch[T]]


def token_scores(model: LanguageModel, rows: Sequence[Sequence[int]], *, likeliest: int = 1) -> list[TokenScores]:
    """The scores of each row of ids; a row of one token has none. Raises UserError as `_check` does."""
    return in_order(part.compute() for part in parts_of_scores(model, rows, likeliest=likeliest))


def parts_of_scores(
    model: LanguageModel, rows: Sequence[Sequence[int]], *, likeliest: int = 1
) -> list[Part[TokenScores]]:
    """The parts of `token_scores`."""
    _check(model, rows)

    def part(numbers: list[int], tokens_BL: np.ndarray, segments_BL: np.ndarray) -> Part[TokenScores]:
        targets_BL = np.pad(tokens_BL[:, 1:], ((0, 0), (0, 1)))
        pieces = -(-tokens_BL.size // CHUNK_TOKENS)

        def read(made: Any) -> Batch[TokenScores]:
            arrays = [np.asarray(one) for one in made]
            return [
                (number, TokenScores(*(one[row, : len(rows[number]) - 1] for one in arrays)))
                for row, number in enumerate(numbers)
            ]

        return _part(model, _scores, tokens_BL, segments_BL, targets_BL, read=read, parts=pieces, top=likeliest)

    return [part(*batch) for batch in _batches(rows)]


def embed(model: LanguageModel, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Vectors (rows, width) float32 of length 1: the mean of the last layer's states over a row's tokens."""
    found = in_order(part.compute() for part in parts_of_vectors(model, rows))
    return np.array(found, np.float32).reshape(len(rows), model.config.model.width)


def parts_of_vectors(model: LanguageModel, rows: Sequence[Sequence[int]]) -> list[Part[np.ndarray]]:
    """The parts of `embed`."""
    _check(model, rows)

    def part(numbers: list[int], tokens_BL: np.ndarray, segments_BL: np.ndarray) -> Part[np.ndarray]:
        def read(vectors_BD: Any) -> Batch[np.ndarray]:
            return list(zip(numbers, np.asarray(vectors_BD), strict=False))  # without the rows that are padding

        return _part(model, _means, tokens_BL, segments_BL, read=read)

    return [part(*batch) for batch in _batches(rows)]


def _part(
    model: LanguageModel, program: Any, *arrays: np.ndarray, read: Callable[[Any], Batch[T]], **settings: int
) -> Part[T]:
    """A batch of these arrays, whose results `read` sorts by rows.

    A call of a jitted function takes the program that its `lower` and `compile` made for the same shapes.
    """

    def within(call: Callable[..., Any]) -> Any:
        with placement.active(model.mesh, model.config):
            return call(model.module, model.params, *arrays, **settings)

    def compile_it() -> None:
        within(program.lower).compile()

    return Part(compile_it, lambda: read(within(program)))


def in_order(batches: Iterable[Batch[T]]) -> list[T]:
    """What batches have, by the numbers of the rows."""
    return [one for _, one in sorted(itertools.chain.from_iterable(batches), key=lambda pair: pair[0])]


def _check(model: LanguageModel, rows: Sequence[Sequence[int]]) -> None:
    """Raise UserError for a row that is empty, too long for the model, or has ids that it does not know."""
    c = model.config.model
    if c.encoder_layers:
        raise UserError("an encoder-decoder gives no scores or vectors of single texts")
    for number, row in enumerate(rows):
        if not 1 <= len(row) <= c.max_length:
            raise UserError(f"text {number} has {len(row)} tokens, and the model reads from 1 to {c.max_length}")
        if min(row) < 0 or max(row) >= c.vocab_size:
            raise UserError(f"text {number} has ids that are not from 0 to {c.vocab_size - 1}")


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Numbers of rows of similar length, tokens_BL, and segments_BL, which are 0 for padding."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    size = 1 if len(rows) == 1 else ROWS
    for first in range(0, len(order), size):
        numbers = order[first : first + size]
        length = round_up(max(len(rows[number]) for number in numbers), least=SHORTEST)
        tokens_BL, segments_BL = (np.zeros((size, length), np.int32) for _ in range(2))
        for row, number in enumerate(numbers):
            ids = rows[number]
            tokens_BL[row, : len(ids)], segments_BL[row, : len(ids)] = ids, 1
        yield numbers, tokens_BL, segments_BL


@functools.partial(jax.jit, static_argnames=("module", "parts", "top"))
def _scores(
    module: Transformer,
    params: Any,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    targets_BL: jax.Array,
    *,
    parts: int,
    top: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    hidden_BLD: Any = module.apply({"params": params}, tokens_BL, segments_BL=segments_BL, output="hidden")
    predictions = predictions_of(module, params, hidden_BLD, targets_BL, jnp.ones(targets_BL.shape))

    def measure(logits_BLV: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        total_BL1 = jax.nn.logsumexp(logits_BLV, axis=-1, keepdims=True)
        nats_BLV = logits_BLV - total_BL1
        values, ids = jax.lax.top_k(nats_BLV, top)
        return jnp.take_along_axis(nats_BLV, targets_BL[..., None], axis=-1)[..., 0], ids, values

    found: tuple[jax.Array, jax.Array, jax.Array] = chunks.token_values(measure, predictions, parts)
    return found


@functools.partial(jax.jit, static_argnames="module")
def _means(module: Transformer, params: Any, tokens_BL: jax.Array, segments_BL: jax.Array) -> jax.Array:
    hidden_BLD: Any = module.apply({"params": params}, tokens_BL, segments_BL=segments_BL, output="hidden")
    real_BL1 = (segments_BL > 0).astype(jnp.float32)[..., None]
    mean_BD = jnp.sum(hidden_BLD.astype(jnp.float32) * real_BL1, axis=1) / jnp.sum(real_BL1, axis=1)
    return mean_BD / jnp.maximum(jnp.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)
