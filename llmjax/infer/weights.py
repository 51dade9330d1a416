"""Weights for decoding: arrays for each layer, and matrices as stored, in tiles or in int8.

A step of decoding reads every matrix once for a few rows, so the speed of memory decides.
"tiles": a kernel (D, F) becomes (F / TILE, D, TILE), so that a product is a batch of small ones, each with its tile in
cache. On CPU this is 1.5 times as fast as the plain product for 2 to 8 rows, as fast for 1, and no better for 32.
"int8": weights become signed bytes with one float32 scale for each output channel, rounded to nearest (weight-only
quantization). They take a quarter of the memory, and the product converts the bytes as it reads them.
Adapters of several trainings are side by side (`served`), and each row of a batch uses its own.
The modules do not know these formats: `computing` makes Linear maps look for them.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict, FrozenConfigDict

from llmjax.errors import UserError
from llmjax.infer.unstacked import unstack, unstacked_module
from llmjax.model import adapters, blockwise, transformer
from llmjax.model.layers import Linear, dtype_of
from llmjax.model.moe import Weights
from llmjax.startup import mapped
from llmjax.startup.cache import key_of
from llmjax.startup.compiled import Store, environment

TILE = 64
TILED_ROWS = 64  # for more rows the tiles are joined again, which costs one copy of the matrix
FORMATS = ("stored", "tiles", "int8")
A, B, GAIN = (
    "adapters_a",
    "adapters_b",
    "adapters_gain",
)  # (S, I, R), (S, R, O) and (S, O) of S adapters of a linear map
EXPERTS = ("up", "gate", "down")  # maps that are stacks of matrices in a sparse layer


def choose(*, platform: str, devices: int, rows: int) -> str:
    """The format for so many rows a step on so many devices: tiles where measurements show that they are faster."""
    return "tiles" if platform == "cpu" and devices == 1 and rows <= 12 else "stored"


def prepare(
    module: transformer.Transformer, params: Any, format: str, *, store: Store | None = None
) -> tuple[transformer.Transformer, dict[str, Any]]:
    """The module and the parameters to decode with. The given parameters are not changed.

    A head that is tied to the embedding gets its own matrix where its format differs from the embedding's. `store` keeps
    the arrays for the next start, if it knows which parameters these are.

    Raises UserError for a format that is not in `FORMATS`.
    """
    if format not in FORMATS:
        raise UserError(f"weights={format!r} must be one of {', '.join(FORMATS)}")
    if format == "stored":
        return unstacked_module(module), _prepared(module, params, format)
    apart = unstacked_module(untied_module(module))
    key = key_of(store.weights, format, environment()) if store and store.weights else ""
    where = jax.tree.map(lambda leaf: leaf.sharding, params["embedding"])
    if store and key and (changed := mapped.read(store.cache, key, where)) is not None:
        return apart, {**params, **changed}
    own = _prepared(*untied(module, params), format)
    if store and key:
        changed = {name: tree for name, tree in own.items() if isinstance(tree, tuple) or name == "head"}
        mapped.write(store.cache, key, changed)
    return apart, own


def untied(module: transformer.Transformer, params: Any) -> tuple[transformer.Transformer, Any]:
    """The same model with a head that is not tied to the embedding."""
    if not module.c.tie_embeddings:
        return module, params
    return untied_module(module), {**params, "head": {"kernel": params["embedding"].T}}


def untied_module(module: transformer.Transformer) -> transformer.Transformer:
    """The module of `untied`."""
    c = ConfigDict(module.c.to_dict())
    c.tie_embeddings = False
    return module.clone(c=FrozenConfigDict(c))


@functools.partial(jax.jit, static_argnames=("module", "format"))
def _prepared(module: transformer.Transformer, params: Any, format: str) -> dict[str, Any]:
    params = unstack(module.c, with_served(module.c, params))
    if format == "stored":
        return params
    change = _tiled if format == "tiles" else quantized
    stacks = {name: tree for name, tree in params.items() if isinstance(tree, tuple)}
    stacks = {name: tuple(_each_kernel(layer, change) for layer in tree) for name, tree in stacks.items()}
    return {**params, **stacks, "head": _each_kernel({"head": params["head"]}, change)["head"]}


def with_served(c: ConfigDict, params: Any) -> Any:
    """The parameters with their adapters, if they have any, as `served` makes them."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, own in adapters.linear_maps(params).items():
        for name in own.keys() & set(adapters.ARRAYS):
            del flat[f"{path}/{name}"]
        for name, array in served(c.adapter, path, own).items():
            flat[f"{path}/{name}"] = jnp.expand_dims(array, -2 if name == GAIN else -3)
    return traverse_util.unflatten_dict(flat, sep="/")


def served(adapter: ConfigDict, path: str, own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """An adapter as decoding uses it: A, s B, and DoRA's factor of each output, all float32.

    Args:
        adapter: its settings, `model.adapter`.
        own: the arrays of a linear map, adapter and kernel.
    """
    s = adapters.scale_of(adapter)
    made = {A: own["lora_a"], B: own["lora_b"] * s}
    if "magnitude" in own:
        matrix = adapters.matrix_of(path, own)
        made[GAIN] = adapters.gain(matrix, own["lora_a"], own["lora_b"], own["magnitude"], s)
    return made


def _each_kernel(tree: Any, change: Any, name: str = "") -> Any:
    """The tree with `change(name, parameters)` in place of the parameters of each linear map."""
    if not isinstance(tree, dict):
        return tree
    if "kernel" in tree and name in LINEAR and tree["kernel"].ndim in LINEAR[name]:
        return change(name, tree)
    return {key: _each_kernel(part, change, key) for key, part in tree.items()}


# Name of a linear map -> how many dimensions its kernel may have.
LINEAR = {
    **dict.fromkeys(("query", "key", "value"), (3,)),  # D H K
    **dict.fromkeys(("head", "state", "before", "after"), (2,)),
    **dict.fromkeys(EXPERTS, (2, 3)),  # D F, or E D F of a stack of experts
    "out": (2, 3),  # H K D, of recurrent mixers R D
    "input": (2, 3),  # D R, or D I R
}


def _matrix(name: str, kernel: jax.Array) -> jax.Array:
    """The kernel as (inputs, outputs)."""
    return kernel.reshape(-1, kernel.shape[-1]) if name == "out" else kernel.reshape(kernel.shape[0], -1)


def _tiled(name: str, own: dict[str, jax.Array]) -> dict[str, jax.Array]:
    if _is_stack(name, own):  # few rows read each of its matrices
        return own
    matrix_DF = _matrix(name, own["kernel"])
    padded_DF = jnp.pad(matrix_DF, ((0, 0), (0, -matrix_DF.shape[1] % TILE)))
    tiles = padded_DF.reshape(matrix_DF.shape[0], -1, TILE).swapaxes(0, 1)
    return {**{key: value for key, value in own.items() if key != "kernel"}, "tiles": tiles}


def _is_stack(name: str, own: dict[str, jax.Array]) -> bool:
    return name in EXPERTS and own["kernel"].ndim == 3


def quantized(name: str, own: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The parameters of a linear map with an int8 kernel and a scale for each output: kernel = int8 x scale.

    Scales are (outputs,), of a stack of experts (E, F).
    """
    kernel = own["kernel"].astype(jnp.float32)
    stack = _is_stack(name, own)
    inputs = (1,) if stack else tuple(range(kernel.ndim - 1)) if name == "out" else (0,)
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=inputs, keepdims=True) / 127, 1e-30)
    rounded = jnp.round(kernel / scale).astype(jnp.int8)
    return {**own, "kernel": rounded, "scale": scale[:, 0] if stack else scale.reshape(-1)}


def dequantized(module: transformer.Transformer, params: Any) -> Any:
    """The parameters rounded as int8 rounds them, for measuring the loss. They stay stacked."""
    if module.c.tie_embeddings:
        raise UserError("dequantized needs a module with an untied head: see `untied`")

    def there_and_back(name: str, own: dict[str, jax.Array]) -> dict[str, jax.Array]:
        low = quantized(name, own)
        if _is_stack(name, own):
            return {**low, "kernel": _expanded(low["kernel"], low.pop("scale"), own["kernel"].dtype)}
        outputs = own["kernel"].shape[-1:] if name == "out" else own["kernel"].shape[1:]
        scale = jnp.broadcast_to(low.pop("scale").reshape(outputs), own["kernel"].shape)
        return {**low, "kernel": (low["kernel"] * scale).astype(own["kernel"].dtype)}

    apart = unstack(module.c, params)
    stacks = {name: tree for name, tree in apart.items() if isinstance(tree, tuple)}
    stack = {
        name: jax.tree.map(lambda *x: jnp.stack(x), *(_each_kernel(layer, there_and_back) for layer in tree))
        for name, tree in stacks.items()
    }
    return {**params, **stack, "head": _each_kernel({"head": params["head"]}, there_and_back)["head"]}


@contextmanager
def computing(adapter_B: jax.Array | None = None) -> Iterator[None]:
    """Trace with linear maps that read the formats of this file.

    Args:
        adapter_B: int32, the adapter of each row of the batch; None: the first one.
    """
    with nn.intercept_methods(functools.partial(_intercept, adapter_B)):
        yield


def _intercept(adapter_B: jax.Array | None, call: Any, arguments: Any, more: Any, context: Any) -> Any:
    module = context.module
    if isinstance(module, Linear) and context.method_name == "__call__":
        own = module.variables.get("params", {})
        if "tiles" in own or "scale" in own or A in own:
            return _product(module, own, *arguments, adapter_B=adapter_B)
    made = call(*arguments, **more)
    if isinstance(module, Weights) and "scale" in (own := module.variables.get("params", {})):
        made["kernel"] = _expanded(made["kernel"], own["scale"], dtype_of(module.c.dtype))
    return made


def _expanded(kernel_EDF: jax.Array, scale_EF: jax.Array, dtype: Any) -> jax.Array:
    """The matrices of int8 ones, while their layer computes."""
    return (kernel_EDF * scale_EF[:, None]).astype(dtype)


def _product(module: Linear, own: Any, x: jax.Array, *, adapter_B: jax.Array | None) -> jax.Array:
    dtype = dtype_of(module.c.dtype)
    batch = x.shape[: x.ndim - module.inputs]
    rows = x.astype(dtype).reshape(math.prod(batch), -1)
    outputs = math.prod(module.features)
    if "tiles" in own:
        y = _tiled_product(rows, own["tiles"].astype(dtype))[:, :outputs]
    elif "scale" in own:
        y = (rows @ own["kernel"].astype(dtype).reshape(rows.shape[1], -1)) * own["scale"].astype(dtype)[None]
    else:
        kernel = _kernel(module, own)
        y = rows @ kernel.astype(dtype).reshape(rows.shape[1], -1)
    if A in own:
        x_BLI, y_BLO = rows.reshape(batch[0], -1, rows.shape[1]), y.reshape(batch[0], -1, outputs)
        y = _adapted(x_BLI, y_BLO, own, jnp.zeros(batch[0], jnp.int32) if adapter_B is None else adapter_B)
    y = y.reshape(*batch, *module.features)
    if module.bias:
        y = y + jnp.expand_dims(own["bias"].astype(dtype), range(y.ndim - own["bias"].ndim))
    return y


def _kernel(module: Linear, own: Any) -> jax.Array:
    """The kernel of a linear map, which may be in few bits (model/blockwise.py)."""
    if "kernel" in own:
        return own["kernel"]
    codes = next(own[name] for name in blockwise.CODES.values() if name in own)
    return blockwise.dequantize(codes, own[blockwise.SCALE], module.inputs - 1 - codes.ndim)


def _adapted(x_BLI: jax.Array, y_BLO: jax.Array, own: Any, adapter_B: jax.Array) -> jax.Array:
    """What a linear map returns, with what each row's adapter adds."""
    a, b = (own[name].astype(x_BLI.dtype) for name in (A, B))
    a, b = (a[0], b[0]) if len(a) == 1 else (a[adapter_B], b[adapter_B])
    y_BLO = y_BLO + (x_BLI @ a) @ b
    return y_BLO * own[GAIN][adapter_B].astype(y_BLO.dtype)[:, None] if GAIN in own else y_BLO


def _tiled_product(rows_RD: jax.Array, tiles: jax.Array) -> jax.Array:
    count, D, _ = tiles.shape
    if rows_RD.shape[0] > TILED_ROWS:
        return rows_RD @ tiles.swapaxes(0, 1).reshape(D, -1)
    copies = jnp.broadcast_to(rows_RD[None], (count, *rows_RD.shape))
    y = jax.lax.dot_general(copies, tiles, (((2,), (1,)), ((0,), (0,))))
    return y.swapaxes(0, 1).reshape(rows_RD.shape[0], -1)
