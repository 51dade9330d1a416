"""Rows of tensors that are several parameters here: queries, keys and values, or gate and up."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.mapping import Arrays, Row, Slot
from llmjax.model.positions import rotary_size


def sizes(c: ConfigDict) -> tuple[int, int, int, int]:
    """D, H, G, K: width, heads, key and value heads, head size."""
    return c.width, c.heads, c.kv_heads or c.heads, config.head_size(c)


def fused_groups(path: str, layer: int, c: ConfigDict, theirs: str, *, bias: bool) -> list[Row]:
    """query, key and value of `path` from one `nn.Linear` whose outputs go by groups: (G, H/G queries + key + value, K).

    With as many groups as heads these are (query, key, value) of each head (GPT-NeoX, BLOOM); with one group all
    queries and then the key and the value (Falcon-7B).
    """
    _, H, G, K = sizes(c)
    share = H // G

    def split(a_OI: np.ndarray) -> list[np.ndarray]:
        a_GRKI = a_OI.reshape(G, share + 2, K, *a_OI.shape[1:])
        return [a_GRKI[:, :share].reshape(H, K, *a_OI.shape[1:]), a_GRKI[:, share], a_GRKI[:, share + 1]]

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        query, key, value = parts
        grouped = query.reshape(G, share, K, *query.shape[2:])
        joined = np.concatenate([grouped, key[:, None], value[:, None]], axis=1)
        return joined.reshape(-1, *query.shape[2:])

    return _fused(path, layer, c, theirs, split, join, bias=bias, transposed=False)


def fused_thirds(path: str, layer: int, c: ConfigDict, theirs: str) -> list[Row]:
    """query, key and value of `path` from GPT-2's `Conv1D`, (in, out): all queries, then all keys, then all values."""
    _, H, _, K = sizes(c)

    def split(a_OI: np.ndarray) -> list[np.ndarray]:
        return list(a_OI.reshape(3, H, K, *a_OI.shape[1:]))

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(parts).reshape(-1, *parts[0].shape[2:])

    return _fused(path, layer, c, theirs, split, join, bias=True, transposed=True)


def _fused(
    path: str,
    layer: int,
    c: ConfigDict,
    theirs: str,
    split: Callable[[np.ndarray], list[np.ndarray]],
    join: Callable[[Sequence[np.ndarray]], np.ndarray],
    *,
    bias: bool,
    transposed: bool,
) -> list[Row]:
    """The rows of a kernel and perhaps a bias; split and join work on the outputs, the first dimension."""
    D, H, G, K = sizes(c)
    out = (H + 2 * G) * K
    heads = {"query": H, "key": G, "value": G}
    rows = [
        Row(
            tuple(Slot(f"{path}/{name}/kernel", layer, (D, n, K)) for name, n in heads.items()),
            (f"{theirs}.weight",),
            lambda a: [np.ascontiguousarray(np.moveaxis(x, -1, 0)) for x in split(a[0].T if transposed else a[0])],
            lambda a: [_oriented(join([np.moveaxis(x, 0, -1) for x in a]), transposed)],
            shapes=((D, out) if transposed else (out, D),),
        )
    ]
    if bias:
        rows.append(
            Row(
                tuple(Slot(f"{path}/{name}/bias", layer, (n, K)) for name, n in heads.items()),
                (f"{theirs}.bias",),
                lambda a: [np.ascontiguousarray(x) for x in split(a[0])],
                lambda a: [join(a)],
                shapes=((out,),),
            )
        )
    return rows


def _oriented(a_OI: np.ndarray, transposed: bool) -> np.ndarray:
    return np.ascontiguousarray(a_OI.T if transposed else a_OI)


def concatenated(
    parts: Mapping[str, tuple[int, ...]],
    layer: int | None,
    inputs: tuple[int, ...],
    theirs: str,
    *,
    bias: bool = False,
) -> list[Row]:
    """Several linear maps of the same input from one `nn.Linear` whose outputs are theirs, one map after another.

    parts: path -> features.
    """
    sizes = [math.prod(features) for features in parts.values()]
    cuts, total, flat = np.cumsum(sizes)[:-1], sum(sizes), math.prod(inputs)

    def split(a: Arrays) -> Arrays:
        shares = zip(np.split(a[0], cuts), parts.values(), strict=True)
        return [np.ascontiguousarray(share.T).reshape(inputs + features) for share, features in shares]

    def join(a: Arrays) -> Arrays:
        return [np.ascontiguousarray(np.concatenate([x.reshape(flat, -1).T for x in a]))]

    rows = [
        Row(
            tuple(Slot(f"{path}/kernel", layer, inputs + features) for path, features in parts.items()),
            (f"{theirs}.weight",),
            split,
            join,
            shapes=((total, flat),),
        )
    ]
    if bias:
        rows.append(
            Row(
                tuple(Slot(f"{path}/bias", layer, features) for path, features in parts.items()),
                (f"{theirs}.bias",),
                lambda a: [x.reshape(f) for x, f in zip(np.split(a[0], cuts), parts.values(), strict=True)],
                lambda a: [np.concatenate([x.reshape(-1) for x in a])],
                shapes=((total,),),
            )
        )
    return rows


def reordered(row: Row, order: np.ndarray, *, outputs: bool = False) -> Row:
    """The same row where ours[..., i] is theirs[..., order[i]] of a head, the last dimension of the row's parameters.

    outputs: the order is that of the tensor's outputs, its first dimension.
    """
    back = np.argsort(order)
    if outputs:
        return dataclasses.replace(
            row,
            to_ours=lambda a: row.to_ours([a[0][order]]),
            to_theirs=lambda a: [x[back] for x in row.to_theirs(a)],
        )
    return dataclasses.replace(
        row,
        to_ours=lambda a: [np.ascontiguousarray(x[..., order]) for x in row.to_ours(a)],
        to_theirs=lambda a: row.to_theirs([x[..., back] for x in a]),
    )


def neighbours(row: Row, c: ConfigDict) -> Row:
    """The same row where theirs rotates neighbouring dimensions of each head together; here the halves go together."""
    order = np.arange(config.head_size(c))
    rotated = rotary_size(c)
    order[:rotated] = order[:rotated].reshape(-1, 2).T.reshape(-1)
    return reordered(row, order)
