"""Attention over sequences whose positions are divided among the devices of the mesh axis `context`.

Queries, and everything else that is done position by position, stay where they are. "gather": every device gathers the
keys and values of all positions, which the compiler does by itself. "ring": keys and values go round, one device's at a
time, and a running softmax adds up what each of them gives, so that no device ever holds all of them (Liu et al. 2023).

A causal model's last positions see everything and its first ones nearly nothing, so devices with pieces in order would
wait for the last. Where the mask is such a pattern, each device works on two pieces, one from either end: device i of C
on pieces i and 2 C - 1 - i. Then every step of the ring is half a block for all of them, and the other half is left out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.model.attention import Attend
from llmjax.model.views import View

AXIS = "context"
ALL = slice(None)


def attention(c: ConfigDict, mesh: Mesh) -> Attend | None:
    """The ring, where the config asks for it and the mesh divides positions: the `attend` of a `Transformer`."""
    return ring if mesh.shape[AXIS] > 1 and c.parallel.context == "ring" else None


def ring(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    view: View,
    *,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    bias_BHLM: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`attention.reference` over a mesh whose axis `context` divides L and M, one device's keys and values at a time.

    Raises UserError when the axis does not divide the sequence, or with dropout of the attention's weights.
    """
    mesh, length = jax.sharding.get_abstract_mesh(), q_BLHK.shape[1]
    if AXIS not in mesh.axis_names:
        raise UserError("this network's attention is a ring of devices: call it inside `placement.active(mesh, c)`")
    ways = mesh.shape[AXIS]
    if dropout is not None:
        raise UserError("parallel.context=ring has no dropout of attention weights: set model.attention_dropout=0")
    if length % ways or k_BMGK.shape[1] % ways:
        raise UserError(
            f"the mesh axis context={ways} does not divide the {length} positions of a row: choose another "
            "train.sequence_length or size of context"
        )
    along = PartitionSpec(None, AXIS)
    # Each device is told its number: the compiler takes no part of a derivative that has no operand but `axis_index`.
    arguments: list[Any] = [jnp.arange(ways), q_BLHK, k_BMGK, v_BMGK, sinks_H]
    where = [PartitionSpec(AXIS), *[along] * 3, PartitionSpec()]
    band = None
    if view.pattern is not None and bias_BHLM is None:
        halves = view.pattern.causal and length % (2 * ways) == 0
        band = Band(view.pattern.causal, view.pattern.window, halves)
        arguments += [view.pattern.queries_BL, view.pattern.keys_BM]
        where += [along] * 2
    else:
        arguments.append(view.mask())
        where.append(along)
        if bias_BHLM is not None:
            arguments.append(bias_BHLM)
            where.append(PartitionSpec(None, None, AXIS if bias_BHLM.shape[2] > 1 else None))
    body = functools.partial(
        _on_device, ways=ways, band=band, scale=scale or q_BLHK.shape[3] ** -0.5, soft_cap=soft_cap
    )
    run = jax.shard_map(body, in_specs=tuple(where), out_specs=along, axis_names={AXIS}, check_vma=False)
    return run(*arguments)


class Band(NamedTuple):
    """What of a `views.Pattern` is known while tracing. `halves`: each device works on a piece from either end."""

    causal: bool
    window: int
    halves: bool


class Sums(NamedTuple):
    """A softmax on its way, for queries (B, G, H/G, L): the largest score, the sum of weights, of weighted values."""

    largest: jax.Array
    weight: jax.Array
    total: jax.Array


def _on_device(
    number: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks_H: jax.Array | None,
    *rest: jax.Array,
    ways: int,
    band: Band | None,
    scale: float,
    soft_cap: float,
) -> jax.Array:
    """One device's queries, while the keys and values of all devices pass by.

    Args:
        number: (1,), the device's place in the ring.
        sinks_H: see `attention.softmax`.
        rest: with a band the segments of queries and keys, else the mask and maybe a bias, of this device's queries.
    """
    (B, L, H, K), G = q.shape, k.shape[2]
    here, halves = number[0], band is not None and band.halves
    if band is not None:  # segments are small: every device has those of the whole row
        rest = tuple(jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in rest)
    if halves:
        q, k, v = (_to_both_ends(x, ways) for x in (q, k, v))
    q = q.reshape(B, L, G, H // G, K)

    def look(sums: Sums, k: jax.Array, v: jax.Array, device: jax.Array, rows: slice, columns: slice) -> Sums:
        """The sums with what some of the queries see of some of a device's keys."""
        if band is None:
            mask, bias = _slices(rest, device * k.shape[1], k.shape[1])
        else:
            own, theirs = (_positions(d, x.shape[1], ways, halves) for d, x in ((here, q), (device, k)))
            mask, bias = _band_mask(rest, own[rows], theirs[columns], band), None
        scores = jnp.einsum("blgrk,bmgk->bgrlm", q[:, rows], k[:, columns], preferred_element_type=jnp.float32) * scale
        if soft_cap:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if bias is not None:
            scores = scores + bias.reshape(bias.shape[0], G, H // G, *bias.shape[2:])
        before = Sums(*(x[:, :, :, rows] for x in sums))
        after = _add(before, scores, mask[:, None, None], v[:, columns])
        return Sums(*(x.at[:, :, :, rows].set(new) for x, new in zip(sums, after, strict=True)))

    def step(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        k, v, sums = carry
        device = (here - turn) % ways  # whose keys these are
        if halves:
            low, high = slice(0, k.shape[1] // 2), slice(L // 2, L)
            which = jnp.where(device == here, 0, jnp.where(device < here, 1, 2))
            sums = jax.lax.switch(
                which,
                [
                    lambda: look(sums, k, v, device, ALL, ALL),
                    lambda: look(sums, k, v, device, ALL, low),  # all queries come after its first piece
                    lambda: look(sums, k, v, device, high, ALL),  # the second piece's come after both
                ],
            )
        else:
            sums = look(sums, k, v, device, ALL, ALL)
        k, v = (jax.lax.ppermute(x, AXIS, [(i, (i + 1) % ways) for i in range(ways)]) for x in (k, v))
        return (k, v, sums), None

    none = jnp.zeros((B, G, H // G, L), jnp.float32)
    start = Sums(none - 1e30, none, jnp.zeros((B, G, H // G, L, K), jnp.float32))
    if sinks_H is not None:  # a first key that every query sees, whose value is zero
        sinks = none + sinks_H.reshape(1, G, H // G, 1)
        largest = jax.lax.stop_gradient(sinks)
        start = start._replace(largest=largest, weight=jnp.exp(sinks - largest))
    (_, _, sums), _ = jax.lax.scan(jax.checkpoint(step), (k, v, start), jnp.arange(ways))
    # A query that sees nothing is padding; it gets zeros.
    y = sums.total / jnp.maximum(sums.weight, 1e-30)[..., None]
    y = y.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K).astype(v.dtype)
    return _from_both_ends(y, ways) if halves else y


def _add(before: Sums, scores: jax.Array, mask: jax.Array, v_BMGK: jax.Array) -> Sums:
    """The softmax with some more keys: their scores (B, G, H/G, L, M), and which of them count."""
    scores = jnp.where(mask, scores, -1e30)
    # What is subtracted cancels. Its derivative would ask where the maximum was, of scores computed anew.
    largest = jnp.maximum(before.largest, jax.lax.stop_gradient(jnp.max(scores, axis=-1)))
    shrink, e = jnp.exp(before.largest - largest), jnp.where(mask, jnp.exp(scores - largest[..., None]), 0.0)
    y = jnp.einsum("bgrlm,bmgk->bgrlk", e.astype(v_BMGK.dtype), v_BMGK, preferred_element_type=jnp.float32)
    return Sums(largest, before.weight * shrink + jnp.sum(e, axis=-1), before.total * shrink[..., None] + y)


def _slices(rest: Sequence[jax.Array], start: jax.Array, count: int) -> tuple[jax.Array, jax.Array | None]:
    """The mask, and the bias if there is one, for some keys from `start` on."""
    parts = [jax.lax.dynamic_slice_in_dim(x, start, count, axis=x.ndim - 1) for x in rest]
    return parts[0], parts[1] if len(parts) > 1 else None


def _positions(device: jax.Array, count: int, ways: int, halves: bool) -> jax.Array:
    """The places in the row of what a device works on, (count,)."""
    if not halves:
        return device * count + jnp.arange(count)
    piece = jnp.arange(count // 2)
    return jnp.concatenate([device * (count // 2) + piece, (2 * ways - 1 - device) * (count // 2) + piece])


def _band_mask(segments: Sequence[jax.Array], own_L: jax.Array, theirs_M: jax.Array, band: Band) -> jax.Array:
    """mask_BLM between queries and keys at these places of the row, whose segments are those of queries and keys."""
    segments_BL, segments_BM = (jnp.take(x, at, axis=1) for x, at in zip(segments, (own_L, theirs_M), strict=True))
    mask_BLM = segments_BL[:, :, None] == segments_BM[:, None, :]
    distance_LM = own_L[:, None] - theirs_M[None, :]
    if band.causal:
        mask_BLM &= (distance_LM >= 0)[None]
    if band.window:
        mask_BLM &= (jnp.abs(distance_LM) < band.window)[None]
    return mask_BLM


def _owners(ways: int) -> tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]:
    """(from, to) of the first and of the second halves of contiguous parts, when pieces i and 2 C - 1 - i go to device i.

    Even devices get their low piece among the first halves, odd ones among the second.
    """
    owner = [min(piece, 2 * ways - 1 - piece) for piece in range(2 * ways)]
    return [(d, owner[2 * d]) for d in range(ways)], [(d, owner[2 * d + 1]) for d in range(ways)]


def _to_both_ends(x_BLK: jax.Array, ways: int) -> jax.Array:
    """From contiguous parts (dimension 1) to one piece from either end on each device."""
    first, second = jnp.split(x_BLK, 2, axis=1)
    to_first, to_second = _owners(ways)
    first, second = jax.lax.ppermute(first, AXIS, to_first), jax.lax.ppermute(second, AXIS, to_second)
    even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.where(even, jnp.concatenate([first, second], axis=1), jnp.concatenate([second, first], axis=1))


def _from_both_ends(x_BLK: jax.Array, ways: int) -> jax.Array:
    """The inverse of `_to_both_ends`."""
    low, high = jnp.split(x_BLK, 2, axis=1)
    even = jax.lax.axis_index(AXIS) % 2 == 0
    first, second = jnp.where(even, low, high), jnp.where(even, high, low)
    back_first, back_second = ([(to, source) for source, to in pairs] for pairs in _owners(ways))
    first, second = jax.lax.ppermute(first, AXIS, back_first), jax.lax.ppermute(second, AXIS, back_second)
    return jnp.concatenate([first, second], axis=1)
