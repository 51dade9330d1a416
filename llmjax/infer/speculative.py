"""Speculative decoding (Leviathan et al. 2023; Chen et al. 2023): several tokens a step, from exactly the same distribution.

A cheap guess drafts A tokens, and the model reads them all at once. A draft is accepted with probability min(1, p/q),
where p is the model's distribution and q the draft's. At the first rejected draft a token is drawn from the positive part
of p - q. After A accepted drafts one more token is drawn from p. The result has the distribution p for any q (a test of
`accept` shows it by chi-square), and at temperature 0 the tokens are the same. Penalties, biases and truncation are part
of both p and q.

Drafts come from a smaller model with the same vocabulary, or from prompt lookup: the tokens that followed the last place
in the text with the same last few tokens, with all of q on each. Rejected tokens leave keys behind that later tokens
overwrite. Layers with a window or a state cannot be rewound, so the model reads the accepted tokens again there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.infer.sample import penalized, probabilities
from llmjax.infer.slots import Slots, advance, ends
from llmjax.infer.weights import computing
from llmjax.model.transformer import Transformer

GRAM = 3  # the most tokens that prompt lookup compares


def can_rewind(module: Transformer) -> bool:
    """Whether the cache of a model can be rewound, because every layer attends to everything."""
    return set(module.c.pattern) <= {"global", "nope"}


def step(
    modules: tuple[Transformer, ...], params: tuple[Any, ...], slots: Slots, *, ahead: int
) -> tuple[Slots, jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step for every slot: (slots, tokens_LB, their nats in the distribution sampled from, logits_LBV, given_LB),
    L = ahead + 1."""
    module, caches = modules[0], slots.caches
    if len(modules) > 1:
        drafts_LB, drafted_LBV, draft_cache = _draft(modules[1], params[1], slots, ahead=ahead)
        caches = (caches[0], draft_cache)
    else:
        drafts_LB, drafted_LBV = look_up(slots.history_BM, slots.position_B, ahead=ahead), None
    fed_LB = jnp.concatenate([slots.token_B[None], drafts_LB])
    logits_BLV, cache = _read(module, params[0], fed_LB, slots, slots.active_B[None] & jnp.ones_like(fed_LB, bool))
    logits_LBV = logits_BLV.swapaxes(0, 1)
    wanted_LBV = jnp.stack([_distribution(slots, logits_LBV[i], drafts_LB[:i]) for i in range(ahead + 1)])
    keys_LB = [jax.vmap(jax.random.fold_in)(slots.key_B, slots.position_B + i) for i in range(ahead + 1)]
    tokens_LB, count_B = accept(wanted_LBV, drafts_LB, drafted_LBV, keys_LB)
    sampled_LB = jnp.log(jnp.take_along_axis(wanted_LBV, tokens_LB[..., None], axis=-1)[..., 0])
    given_LB = jnp.arange(ahead + 1)[:, None] < jnp.minimum(count_B, slots.left_B)[None]
    ended_LB = jnp.stack([ends(slots, token_B) for token_B in tokens_LB])
    before_LB = jnp.cumsum(ended_LB, axis=0) - ended_LB  # how many ends are before this token
    given_LB &= slots.active_B[None] & (before_LB == 0)
    if not can_rewind(module):  # read again the token that was fed, and all given tokens but the last
        kept_LB = given_LB & jnp.ones_like(given_LB)
        _, cache = _read(module, params[0], fed_LB, slots, kept_LB)
    slots = dataclasses.replace(slots, caches=(cache, *caches[1:]))
    return advance(slots, tokens_LB, given_LB), tokens_LB, sampled_LB, logits_LBV, given_LB


def accept(
    wanted_LBV: jax.Array, drafts_LB: jax.Array, drafted_LBV: jax.Array | None, keys_LB: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The resulting tokens_LB, and how many of each row count: 1 to A + 1.

    Args:
        wanted_LBV: the model's distribution of each of the L = A + 1 tokens, given the drafts before it.
        drafts_LB: the A drafted tokens.
        drafted_LBV: the distributions they were drawn from; None: each was certain.
        keys_LB: for each token a random key for each row.
    """
    ahead, count = drafts_LB.shape
    tokens, kept = [], []
    for i in range(ahead + 1):
        wanted_BV = wanted_LBV[i]
        rest_BV = wanted_BV
        if i < ahead:
            one_BV = jax.nn.one_hot(drafts_LB[i], wanted_BV.shape[-1], dtype=wanted_BV.dtype)
            drafted_BV = one_BV if drafted_LBV is None else drafted_LBV[i]
            p_B, q_B = (jnp.sum(one_BV * x, axis=-1) for x in (wanted_BV, drafted_BV))
            uniform_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys_LB[i])
            kept.append(uniform_B * q_B < p_B)
            rest_BV = jnp.maximum(wanted_BV - drafted_BV, 0.0)
            # Where both are equal up to rounding no draft is rejected, but the rest must not be empty.
            rest_BV = jnp.where(jnp.sum(rest_BV, axis=-1, keepdims=True) > 0, rest_BV, wanted_BV)
        tokens.append(jax.vmap(jax.random.categorical)(keys_LB[i], jnp.log(rest_BV)))
    kept_LB = jnp.cumprod(jnp.stack(kept), axis=0)
    accepted_B = jnp.sum(kept_LB, axis=0)
    places_L1 = jnp.arange(ahead + 1)[:, None]
    padded_LB = jnp.concatenate([drafts_LB, jnp.zeros((1, count), drafts_LB.dtype)])
    tokens_LB = jnp.where(places_L1 < accepted_B[None], padded_LB, jnp.stack(tokens))
    return tokens_LB.astype(jnp.int32), accepted_B + 1


def look_up(history_BM: jax.Array, position_B: jax.Array, *, ahead: int) -> jax.Array:
    """drafts_LB: the tokens after the last place that has as many as possible of the last GRAM tokens."""
    M = history_BM.shape[1]
    at_BM = jnp.broadcast_to(jnp.arange(M)[None], history_BM.shape)
    same_BM = at_BM < position_B[:, None]
    length_BM = jnp.zeros_like(history_BM)
    for n in range(GRAM):
        own_B1 = jnp.take_along_axis(history_BM, jnp.maximum(position_B - n, 0)[:, None], axis=1)
        there_BM = jnp.take_along_axis(history_BM, jnp.maximum(at_BM - n, 0), axis=1)
        same_BM &= (there_BM == own_B1) & (at_BM >= n)
        length_BM += same_BM
    best_B = jnp.argmax(length_BM * M + at_BM * (length_BM > 0), axis=1)
    next_BA = jnp.minimum(best_B[:, None] + 1 + jnp.arange(ahead)[None], position_B[:, None])
    return jnp.take_along_axis(history_BM, next_BA, axis=1).T


def _draft(module: Transformer, params: Any, slots: Slots, *, ahead: int) -> tuple[jax.Array, jax.Array, Any]:
    """Tokens of the draft model, the distributions they were drawn from, and its cache with all of them."""
    cache, token_B = slots.caches[1], slots.token_B
    drafts: list[jax.Array] = []
    drafted = []
    none_AB = jnp.zeros((0, token_B.shape[0]), jnp.int32)
    for i in range(ahead + 1):  # the last draft is only read, in case all are accepted
        with computing():
            made: Any = module.apply(
                {"params": params},
                token_B[:, None],
                positions_BL=slots.position_B[:, None] + i,
                segments_BL=slots.active_B.astype(jnp.int32)[:, None],
                cache=cache,
            )
        logits_BLV, cache = made
        if i == ahead:
            break
        drafts_LB = jnp.stack(drafts) if drafts else none_AB
        drafted.append(_distribution(slots, logits_BLV[:, 0], drafts_LB))
        keys = jax.vmap(lambda key, at: jax.random.fold_in(jax.random.fold_in(key, at), 2))(
            slots.key_B, slots.position_B + i
        )
        token_B = jax.vmap(jax.random.categorical)(keys, jnp.log(drafted[-1])).astype(jnp.int32)
        drafts.append(token_B)
    return jnp.stack(drafts), jnp.stack(drafted), cache


def _distribution(slots: Slots, logits_BV: jax.Array, before_LB: jax.Array) -> jax.Array:
    """The distribution of the next token after these tokens."""
    rows_B, counts_BV = jnp.arange(logits_BV.shape[0]), slots.counts_BV
    for token_B in before_LB:
        counts_BV = counts_BV.at[rows_B, token_B].add(1)
    wanted_BV = penalized(logits_BV + slots.bias_BV, slots.sampling, slots.seen_BV, counts_BV)
    return probabilities(wanted_BV, slots.sampling)


def _read(module: Transformer, params: Any, fed_LB: jax.Array, slots: Slots, valid_LB: jax.Array) -> tuple[Any, Any]:
    with computing(slots.adapter_B):
        made: Any = module.apply(
            {"params": params},
            fed_LB.T,
            positions_BL=slots.position_B[:, None] + jnp.arange(fed_LB.shape[0])[None],
            segments_BL=valid_LB.T.astype(jnp.int32),
            cache=slots.caches[0],
        )
    return made
