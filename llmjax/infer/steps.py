"""The programs of an engine: prefill a chunk of a prompt, and decode a few tokens for every slot.

Each compiles once for the shapes of an engine. The first step of decoding is fed the last token of the prompt, so only
one program samples. Caches are written in place: the slots are donated, and each layer has its own arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.infer import speculative
from llmjax.infer.sample import penalized, sample
from llmjax.infer.slots import Slots, advance, copy_row, empty, place, put_row, shardings, take_row
from llmjax.infer.unstacked import one_by_one, restack, unstack
from llmjax.infer.weights import computing
from llmjax.model.transformer import Transformer
from llmjax.startup.compiled import Store, named


class Written(NamedTuple):
    """The tokens that a call of `decode` wrote: (T, B) for T steps. Entries that are not `given` have no meaning."""

    token: jax.Array  # int32
    log_probability: jax.Array  # float32, nats in the model's own distribution
    sampled_log_probability: jax.Array  # float32, nats in the distribution sampled from
    given: jax.Array  # bool
    likeliest: jax.Array  # int32 (T, B, top)
    likeliest_log_probability: jax.Array  # float32 (T, B, top)


def prefill(
    modules: tuple[Transformer, ...],
    params: tuple[Any, ...],
    slots: Slots,
    rows_R: jax.Array,
    tokens_RL: jax.Array,
    starts_R: jax.Array,
    counts_R: jax.Array,
    adapters_R: jax.Array,
    source: dict[str, jax.Array] | None,
) -> Slots:
    """The slots with `counts` more tokens in the caches of some rows, from position `starts` on.

    A row with the number of no slot is padding. Logits are not computed. Parameters may be stacked, so that one layer is
    compiled in place of all: with many tokens the copies of a scan do not matter.
    """
    at_RL = jnp.arange(tokens_RL.shape[1])[None]
    segments_RL = (at_RL < counts_R[:, None]).astype(jnp.int32)
    caches = []
    for module, own, cache in zip(modules, params, slots.caches, strict=True):
        apart = module.run_layers is one_by_one  # then the parameters are unstacked too
        row = jax.tree.map(lambda x: x.at[rows_R].get(mode="clip"), cache)
        row = row if apart else {**row, "layers": restack(module.c, row["layers"])}
        with computing(adapters_R):
            made: Any = module.apply(
                {"params": own},
                tokens_RL,
                positions_BL=starts_R[:, None] + at_RL,
                segments_BL=segments_RL,
                source=source,
                cache=row,
                output="hidden",
            )
        row = made[1] if apart else {**made[1], "layers": unstack(module.c, made[1]["layers"])}
        caches.append(jax.tree.map(lambda x, new: x.at[rows_R].set(new, mode="drop"), cache, row))
    return dataclasses.replace(slots, caches=tuple(caches))


def decode(
    modules: tuple[Transformer, ...],
    params: tuple[Any, ...],
    slots: Slots,
    keep_B: jax.Array,
    limit_B: jax.Array,
    words_BW: jax.Array,
    constrained: jax.Array,
    eager: jax.Array,
    *,
    most: int,
    top: int,
    ahead: int,
) -> tuple[Slots, Written]:
    """Write up to `limit` tokens in every active slot; with drafts, up to `limit` times ahead + 1.

    Args:
        keep_B: bool, false for slots whose text has ended for another reason than an id or its length.
        limit_B: int32, steps of each slot. A slot that has taken its steps does not change while others go on.
        words_BW: uint32, the bits of the ids that may come next. The first step reads them if `constrained`. A slot with
            a constraint has a limit of one step.
        eager: bool, stop as soon as a slot is free.
        most: the largest number of steps. The results have most * (ahead + 1) rows.
        top: how many of the likeliest ids are reported.
        ahead: tokens that are drafted before each step.
    """
    slots = dataclasses.replace(slots, active_B=slots.active_B & keep_B)
    count, places = slots.token_B.shape[0], most * (ahead + 1)
    active_B = slots.active_B
    written = Written(
        jnp.zeros((places, count), jnp.int32),
        jnp.zeros((places, count), jnp.float32),
        jnp.zeros((places, count), jnp.float32),
        jnp.zeros((places, count), bool),
        jnp.zeros((places, count, top), jnp.int32),
        jnp.zeros((places, count, top), jnp.float32),
    )

    def going(carry: tuple[jax.Array, Slots, Written]) -> jax.Array:
        step, slots, _ = carry
        freed = jnp.any(active_B & ~slots.active_B)
        return jnp.any(slots.active_B & (step < limit_B)) & ~(eager & freed)

    def one(carry: tuple[jax.Array, Slots, Written]) -> tuple[jax.Array, Slots, Written]:
        step, slots, written = carry
        rest_B = slots.active_B & (step >= limit_B)
        slots = dataclasses.replace(slots, active_B=slots.active_B & ~rest_B)
        if ahead:
            slots, tokens_LB, sampled_LB, logits_LBV, given_LB = speculative.step(modules, params, slots, ahead=ahead)
        else:
            masked = constrained & (step == 0)
            slots, tokens_LB, sampled_LB, logits_LBV, given_LB = _one_token(
                modules[0], params[0], slots, words_BW, masked
            )
        slots = dataclasses.replace(slots, active_B=slots.active_B | rest_B)
        nats_LB, *likeliest = _log_probabilities(logits_LBV, tokens_LB, top)
        found = Written(tokens_LB, nats_LB, sampled_LB, given_LB, *likeliest)
        at = step * (ahead + 1)
        written = Written(
            *(jax.lax.dynamic_update_slice_in_dim(old, new, at, 0) for old, new in zip(written, found, strict=True))
        )
        return step + 1, slots, written

    _, slots, written = jax.lax.while_loop(going, one, (jnp.int32(0), slots, written))
    return slots, written


def _one_token(
    module: Transformer, params: Any, slots: Slots, words_BW: jax.Array, constrained: jax.Array
) -> tuple[Slots, jax.Array, jax.Array, jax.Array, jax.Array]:
    with computing(slots.adapter_B):
        made: Any = module.apply(
            {"params": params},
            slots.token_B[:, None],
            positions_BL=slots.position_B[:, None],
            segments_BL=slots.active_B.astype(jnp.int32)[:, None],
            cache=slots.caches[0],
        )
    logits_BLV, cache = made
    logits_BV = logits_BLV[:, 0]
    wanted_BV = penalized(logits_BV + slots.bias_BV, slots.sampling, slots.seen_BV, slots.counts_BV)
    wanted_BV = jax.lax.cond(constrained, lambda: _masked(wanted_BV, words_BW), lambda: wanted_BV)
    keys = jax.vmap(jax.random.fold_in)(slots.key_B, slots.position_B)
    token_B, sampled_B = sample(wanted_BV, keys, slots.sampling)
    given_B = slots.active_B
    slots = dataclasses.replace(slots, caches=(cache, *slots.caches[1:]))
    slots = advance(slots, token_B[None], given_B[None])
    return slots, token_B[None], sampled_B[None], logits_BV[None], given_B[None]


def _masked(logits_BV: jax.Array, words_BW: jax.Array) -> jax.Array:
    """The logits with -inf where the bit of a token is not set."""
    bits = (words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    allowed_BV = bits.reshape(words_BW.shape[0], -1)[:, : logits_BV.shape[1]] > 0
    return jnp.where(allowed_BV, logits_BV, -jnp.inf)


def _log_probabilities(logits_LBV: jax.Array, tokens_LB: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    total_LB = jax.nn.logsumexp(logits_LBV, axis=-1)
    chosen_LB = jnp.take_along_axis(logits_LBV, tokens_LB[..., None], axis=-1)[..., 0]
    values, ids = jax.lax.top_k(logits_LBV, top) if top else (logits_LBV[..., :0], tokens_LB[..., None][..., :0])
    return chosen_LB - total_LB, ids, values - total_LB[..., None]


class Programs(NamedTuple):
    """The compiled functions of an engine. Equal engines share them."""

    init: Callable[..., Slots]
    prefill: Callable[..., Slots]
    decode: Callable[..., tuple[Slots, Written]]
    place: Callable[..., Slots]
    copy_row: Callable[..., Slots]
    take_row: Callable[..., Any]
    put_row: Callable[..., Slots]

    def compiled(self) -> int:
        """How many programs have been compiled."""
        functions: tuple[Any, ...] = self
        return sum(function._cache_size() for function in functions)


@functools.lru_cache(maxsize=32)
def programs(
    modules: tuple[Transformer, ...],
    readers: tuple[Transformer, ...],
    *,
    count: int,
    length: int,
    source_length: int = 0,
    most: int = 8,
    top: int = 0,
    ahead: int = 0,
    mesh: Mesh | None = None,
    store: Store | None = None,
    types: str = "",
) -> Programs:
    """The programs for so many slots. On a mesh the slots stay where `slots.shardings` puts them.

    Args:
        modules: the model and maybe a draft model, as they decode.
        readers: the same modules as they read prompts, with parameters of another format.
        store: keeps the programs between starts.
        types: of the parameters (`compiled.described`), for `store`.
    """
    history = ahead > 0 and len(modules) == 1
    make = functools.partial(empty, modules, count=count, length=length, source_length=source_length, history=history)
    where: Any = None if mesh is None else shardings(jax.eval_shape(make), mesh)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    step = functools.partial(decode, modules, most=most, top=top, ahead=ahead)
    fill = functools.partial(prefill, readers)
    kept: dict[str, Any] = {} if mesh is None else {"out_shardings": where}
    both: dict[str, Any] = {} if mesh is None else {"out_shardings": (where, whole)}
    donated: dict[str, Any] = {"donate_argnames": "slots"}
    made = Programs(
        init=jax.jit(make, **kept),
        prefill=jax.jit(fill, **donated, **kept),
        decode=jax.jit(step, **donated, **both),
        place=jax.jit(place, **donated, **kept),
        copy_row=jax.jit(copy_row, **donated, **kept),
        take_row=jax.jit(lambda caches, slot: take_row(caches, slot)),
        put_row=jax.jit(put_row, **donated, **kept),
    )
    if store is None:
        return made
    closed = (*map(named, (*modules, *readers)), count, length, source_length, most, top, ahead, types)
    return Programs(*(store.keep(function, name, *closed) for name, function in made._asdict().items()))
