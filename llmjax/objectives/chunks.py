"""Losses by chunks of tokens, so that the logits of all tokens never exist at once.

The logits of B x L tokens over V ids are the largest array of a step with a large vocabulary: 16 GiB in float32 for 8
rows of 4,096 tokens and 128k ids. Here each device takes its tokens in n chunks, one after another. For each it computes
logits, loss and at once the gradients of the hidden states and the head, so the backward pass computes no logits again.
The plain form in losses.py is the oracle.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from llmjax.model.head import Head, gathered
from llmjax.model.per_device import divided

Loss = Callable[[jax.Array, jax.Array, ConfigDict], tuple[jax.Array, jax.Array]]


def split_chunks(x_BL: jax.Array, chunks: int) -> jax.Array:
    """(B, L, ...) -> (chunks, B, L / chunks, ...), padded with zeros. Chunk i has the tokens i, i + chunks, ...

    Tokens that are divided over devices along the row stay where they are.
    """
    length = x_BL.shape[1]
    x_BL = jnp.pad(x_BL, ((0, 0), (0, -length % chunks), *((0, 0),) * (x_BL.ndim - 2)))
    return jnp.moveaxis(x_BL.reshape(x_BL.shape[0], -1, chunks, *x_BL.shape[2:]), 2, 0)


def join_chunks(parts: jax.Array, length: int) -> jax.Array:
    """The inverse of `split_chunks` for rows of that length."""
    x_BL = jnp.moveaxis(parts, 0, 2)
    return x_BL.reshape(x_BL.shape[0], -1, *x_BL.shape[3:])[:, :length]


def token_values(function: Callable[..., Any], predictions: Any, chunks: int) -> Any:
    """function(logits_BLV, targets) -> arrays (B, L), computed chunk by chunk; targets are (B, L, ...) arrays or trees of them.

    The backward pass makes each chunk's logits again, so they are never there for all tokens at once.
    """
    if chunks == 1:
        return function(predictions.logits, predictions.targets)
    hidden_BLD, head = predictions.hidden, predictions.head
    params = gathered(head.c, predictions.head_params)
    parts = jax.tree.map(lambda x: split_chunks(x, chunks), (hidden_BLD, predictions.targets))
    of_chunk = jax.checkpoint(lambda part: function(head.apply({"params": params}, part[0]), part[1]))
    values = jax.lax.map(of_chunk, parts)
    return jax.tree.map(lambda value: join_chunks(value, hidden_BLD.shape[1]), values)


def sums(loss: Loss, predictions: Any, c: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """The two sums over tokens of loss(logits_BLV, targets_BL, c), times the weights, in `c.loss_chunks` chunks.

    Only the first has a gradient, with respect to the hidden states and the head.
    """
    arguments = predictions.hidden, predictions.head_params, predictions.targets, predictions.weights
    objective, nats = _sums(loss, c, predictions.head, *arguments)
    return objective, jax.lax.stop_gradient(nats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(
    loss: Loss,
    c: ConfigDict,
    head: Head,
    hidden_BLD: jax.Array,
    params: Any,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _run(loss, c, head, hidden_BLD, params, targets_BL, weights_BL, differentiate=False)[0]


def _forward(loss, c, head, hidden_BLD, params, targets_BL, weights_BL):  # type: ignore[no-untyped-def]
    return _run(loss, c, head, hidden_BLD, params, targets_BL, weights_BL, differentiate=True)


def _backward(loss, c, head, gradients, cotangents):  # type: ignore[no-untyped-def]
    dhidden_BLD, dparams = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return dhidden_BLD, dparams, None, None


_sums.defvjp(_forward, _backward)


def _run(
    loss: Loss,
    c: ConfigDict,
    head: Head,
    hidden_BLD: jax.Array,
    params: Any,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    differentiate: bool,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """The sums, and the gradients of the first with respect to the hidden states and the parameters, if asked for.

    Each device adds up over its own tokens. The head is gathered once before the loop and its gradient added up over
    devices once after it; the compiler would do both for every chunk.
    """
    axes = divided("BLV", (*weights_BL.shape, 1))  # with V, which has the axes that L can do without
    region, rows = axes["B"] + axes["L"], [axes["B"] or None, axes["L"] or None]
    types = jax.tree.map(lambda p: p.dtype, params)

    def local(hidden_BLD: jax.Array, params: Any, targets_BL: jax.Array, weights_BL: jax.Array) -> Any:
        def summed(hidden_BLD: jax.Array, params: Any, targets_BL: jax.Array, weights_BL: jax.Array) -> Any:
            logits_BLV: Any = head.apply({"params": params}, hidden_BLD)
            loss_BL, nats_BL = loss(logits_BLV, targets_BL, c)
            return jnp.sum(loss_BL * weights_BL), jnp.sum(nats_BL * weights_BL)

        def add(total: Any, part: Any) -> Any:
            if differentiate:
                make = jax.value_and_grad(summed, argnums=(0, 1), has_aux=True)
                (objective, nats), (dhidden_BLD, dparams) = make(part[0], params, *part[1:])
            else:
                objective, nats = summed(part[0], params, *part[1:])
                dhidden_BLD, dparams = jnp.zeros_like(part[0]), ()
            return jax.tree.map(lambda t, new: t + new.astype(t.dtype), total, (objective, nats, dparams)), dhidden_BLD

        zero = jnp.zeros(())
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params if differentiate else ())
        parts = tuple(split_chunks(x, c.loss_chunks) for x in (hidden_BLD, targets_BL, weights_BL))
        (objective, nats, dparams), dhidden = jax.lax.scan(add, (zero, zero, zeros), parts)
        # A leading dimension of one per device: the compiler does the sum over it, and places the result.
        return jax.tree.map(lambda x: x[None], (objective, nats, dparams)), join_chunks(dhidden, hidden_BLD.shape[1])

    arguments = hidden_BLD, gathered(head.c, params), targets_BL, weights_BL
    if not region:
        made, dhidden_BLD = local(*arguments)
    else:
        rules = [(letter, _without(axes, region)) for letter, axes in nn.get_logical_axis_rules()]
        run = jax.shard_map(
            local,
            in_specs=(PartitionSpec(*rows, None), PartitionSpec(), PartitionSpec(*rows), PartitionSpec(*rows)),
            out_specs=(PartitionSpec(region), PartitionSpec(*rows, None)),
            axis_names=set(region),
            check_vma=False,
        )
        with nn.logical_axis_rules(rules):
            made, dhidden_BLD = run(*arguments)
    objective, nats, dparams = jax.tree.map(lambda x: jnp.sum(x, axis=0), made)
    if not differentiate:
        return (objective, nats), None
    return (objective, nats), (dhidden_BLD, jax.tree.map(lambda g, dtype: g.astype(dtype), dparams, types))


def _without(entry: Any, region: tuple[str, ...]) -> Any:
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return tuple(name for name in names if name not in region) or None
