"""What the families of GPT-2's descent share: activations, and queries, keys and values in one tensor."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.errors import UserError
from llmjax.interop.mapping import Row, Slot

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # the same polynomial, multiplied out otherwise
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


def start(theirs: Mapping[str, Any]) -> ConfigDict:
    """The settings that read_config fills in. UserError for quantized weights."""
    if theirs.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config; supported: unquantized weights (float32, bfloat16, float16)"
        )
    c = config.base().model
    c.norm, c.norm_place = "layer", "pre"
    return c


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
