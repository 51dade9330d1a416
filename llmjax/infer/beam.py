"""Beam search: the likeliest texts that keeping a few candidates at every length finds."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.request import prompt_ids
from llmjax.model.block import unstacked
from llmjax.model.cache import init_cache
from llmjax.model.transformer import Transformer

NEVER = -1e30  # the log-probability of a candidate that there is not


@dataclass(frozen=True)
class Found:
    """A text that beam search found."""

    text: str
    tokens: tuple[int, ...]  # a final <eos> included
    log_probability: float  # nats of all tokens together
    finish: str  # "eos" or "length"


def search(
    module: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    beams: int = 4,
    max_new_tokens: int = 64,
    length_penalty: float = 1.0,
) -> list[Found]:
    """The `beams` likeliest continuations found, best first.

    At every length the candidates that are likeliest together with all their next tokens go on; one that has ended keeps
    its place with what it has. At the end they are ordered by log-probability / length ** length_penalty (Wu et al.
    2016 without its constant). Ids that are never sampled are none here either.

    Raises UserError for settings out of range and a prompt that leaves no room.
    """
    if beams < 1 or max_new_tokens < 1:
        raise UserError(f"beams={beams} and max_new_tokens={max_new_tokens} must be at least 1")
    c = module.c
    ids = prompt_ids(tokenizer, [prompt], vocab_size=c.vocab_size)[0]
    if c.position == "learned" and len(ids) + max_new_tokens > c.max_length:
        raise UserError(
            f"the prompt has {len(ids)} tokens, which with max_new_tokens={max_new_tokens} is more than the model's "
            f"{c.max_length} learned positions: shorten the prompt or lower max_new_tokens"
        )
    length = 1 << (len(ids) + max_new_tokens - 1).bit_length()
    padded_BL = np.zeros((1, 1 << max(len(ids) - 1, 1).bit_length()), np.int32)
    padded_BL[0, : len(ids) - 1] = ids[:-1]
    # Without a slice of the stack in every step; see `unstacked`.
    params = jax.jit(functools.partial(unstacked, c))(params)
    cache = _start(
        module, params, padded_BL, np.int32(len(ids) - 1), beams=beams, length=max(length, padded_BL.shape[1])
    )
    allowed_V = np.arange(c.vocab_size) < tokenizer.vocab_size
    allowed_V[[i for i in tokenizer.unsampled_ids if i < c.vocab_size]] = False
    ends = np.array(tokenizer.eos_ids or (-1,), np.int32)

    token_B = np.full(beams, ids[-1], np.int32)
    score_B = np.array([0.0] + [NEVER] * (beams - 1), np.float32)  # all are the same at first: one goes on
    ended_B = np.zeros(beams, bool)
    texts: list[tuple[int, ...]] = [()] * beams
    for i in range(max_new_tokens):
        position = np.int32(len(ids) - 1 + i)
        made = _step(module, params, cache, token_B, position, score_B, ended_B, allowed_V)
        cache, (token_B, parent_B, score_B) = made[0], map(np.asarray, made[1:])
        before = ended_B[parent_B]
        texts = [
            texts[parent] if over else (*texts[parent], int(token))
            for parent, over, token in zip(parent_B, before, token_B, strict=True)
        ]
        ended_B = before | np.isin(token_B, ends)
        if ended_B.all():
            break
    found = []
    for tokens, score, ended in zip(texts, score_B.tolist(), ended_B, strict=True):
        if score > NEVER / 2:
            text = tokenizer.decode(tokens[:-1] if ended else tokens)
            found.append(Found(text, tokens, score, "eos" if ended else "length"))
    return sorted(found, key=lambda one: -one.log_probability / len(one.tokens) ** length_penalty)


@functools.partial(jax.jit, static_argnames=("module", "beams", "length"))
def _start(module: Transformer, params: Any, tokens_BL: jax.Array, count: jax.Array, *, beams: int, length: int) -> Any:
    cache = init_cache(module.c, batch=1, length=length)
    cache = {**cache, "layers": unstacked(module.c, cache["layers"])}
    segments_BL = (jnp.arange(tokens_BL.shape[1])[None] < count).astype(jnp.int32)
    made: Any = module.apply({"params": params}, tokens_BL, segments_BL=segments_BL, cache=cache, output="hidden")
    return jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), made[1])


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
    """The caches of the candidates that go on, their tokens, whose continuation they are, and their log-probabilities."""
    count = token_B.shape[0]
    positions_BL = jnp.broadcast_to(position, (count, 1))
    made: Any = module.apply({"params": params}, token_B[:, None], positions_BL=positions_BL, cache=cache)
    log_p_BV = jnp.where(allowed_V[None], jax.nn.log_softmax(made[0][:, 0]), NEVER)
    first_V = jnp.arange(log_p_BV.shape[1]) == 0
    log_p_BV = jnp.where(ended_B[:, None], jnp.where(first_V, 0.0, NEVER)[None], log_p_BV)  # itself, once
    score_B, best_B = jax.lax.top_k((score_B[:, None] + log_p_BV).reshape(-1), count)
    parent_B, token_B = best_B // log_p_BV.shape[1], best_B % log_p_BV.shape[1]
    cache = jax.tree.map(lambda x: jnp.take(x, parent_B, axis=0), made[1])
    return cache, token_B.astype(jnp.int32), parent_B, score_B
