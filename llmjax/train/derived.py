"""Parameters that follow from those of a checkpoint: kernels in few bits, what those stand for, and an untied head."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.model import blockwise

Read = Callable[[Any], Any]  # abstract parameters (nested) -> parameters
FEW_BITS = (*blockwise.CODES.values(), blockwise.SCALE)


def source_of(name: str, available: Collection[str]) -> str:
    """The parameter that one of this path is made from; the path itself where it is read as it is; "": there is none."""
    path, _, last = name.rpartition("/")
    if name in available:
        return name
    if last in FEW_BITS and f"{path}/kernel" in available:
        return f"{path}/kernel"
    if last == "kernel":
        return next((f"{path}/{code}" for code in blockwise.CODES.values() if f"{path}/{code}" in available), "") or (
            "embedding" if name == "head/kernel" and "embedding" in available else ""
        )
    return ""


def read(abstract: Any, available: Collection[str], read: Read, *, form: str = "stored", kernels: Any = ()) -> Any:
    """Parameters by `read`, or made from those that it reads, one linear map at a time.

    Args:
        abstract: shapes, types and maybe shardings; what is neither available nor follows from anything is left to `read`.
        available: paths that `read` knows.
        form, kernels: kernels of these linear maps are rounded as this format of `blockwise` rounds them.
    """
    wanted = traverse_util.flatten_dict(abstract, sep="/")
    sources = {name: source_of(name, available) or name for name in wanted}
    direct = {name: leaf for name, leaf in wanted.items() if sources[name] == name}
    found = _flat(read, direct) if direct else {}
    for path in kernels:
        if (name := f"{path}/kernel") in found:
            found[name] = _rounded(found[name], form, blockwise.axis_of(f"{path}/", found[name].ndim))
    for path in {name.rpartition("/")[0] for name in wanted if name not in found}:
        own = {name: leaf for name, leaf in wanted.items() if name.rpartition("/")[0] == path and name not in found}
        found |= _made(path, own, {sources[name] for name in own}, read)
    return traverse_util.unflatten_dict({name: found[name] for name in wanted}, sep="/")


def _made(path: str, own: Mapping[str, Any], sources: set[str], read: Read) -> dict[str, Any]:
    """The parameters of one linear map, from its kernel, from that in few bits, or from the embedding."""
    (source,) = sources
    if source == "embedding":
        like = own["head/kernel"]
        turned = jax.ShapeDtypeStruct(like.shape[::-1], like.dtype, sharding=_turned(like.sharding))
        return {"head/kernel": _jitted(lambda x: x.T, like)(_flat(read, {source: turned})[source])}
    if source.endswith("/kernel"):
        name = next(name for name in own if not name.endswith(blockwise.SCALE))
        codes, scale = own[name], own[f"{path}/{blockwise.SCALE}"]
        form, axis, shape = name.rpartition("_")[2], blockwise.axis_of(f"{path}/", codes.ndim), list(codes.shape)
        shape[axis] *= 2 if form == "nf4" else 1
        kernel = jax.ShapeDtypeStruct(tuple(shape), "float32", sharding=codes.sharding)
        quantize = _jitted(lambda x: blockwise.quantize(x, form, axis), (codes, scale))
        made = quantize(_flat(read, {source: kernel})[source])
        return {name: made[0], f"{path}/{blockwise.SCALE}": made[1]}
    kernel = own[f"{path}/kernel"]
    form, axis = source.rpartition("_")[2], blockwise.axis_of(f"{path}/", kernel.ndim)
    whole = None if kernel.sharding is None else NamedSharding(kernel.sharding.mesh, PartitionSpec())
    like = jax.eval_shape(lambda x: blockwise.quantize(x, form, axis), kernel)
    parts = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for name, x in zip((source, f"{path}/{blockwise.SCALE}"), like, strict=True)}  # fmt: skip
    codes, scale = _flat(read, parts).values()
    return {f"{path}/kernel": _jitted(lambda c, s: blockwise.dequantize(c, s, axis).astype(kernel.dtype), kernel)(codes, scale)}  # fmt: skip


def _flat(read: Read, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`read` of flat abstract parameters, flat and in their order."""
    found = traverse_util.flatten_dict(read(traverse_util.unflatten_dict(dict(wanted), sep="/")), sep="/")
    return {name: found[name] for name in wanted}


def _jitted(function: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """The function, whose results are where `like` says."""
    places = jax.tree.map(lambda x: x.sharding, like)
    if any(place is None for place in jax.tree.leaves(places, is_leaf=lambda x: x is None)):
        return jax.jit(function)
    return jax.jit(function, out_shardings=places)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(kernel: jax.Array, form: str, axis: int) -> jax.Array:
    return blockwise.dequantize(*blockwise.quantize(kernel, form, axis), axis).astype(kernel.dtype)


def _turned(sharding: Any) -> Any:
    """The sharding of a transposed matrix."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[::-1])) if isinstance(sharding, NamedSharding) else sharding  # fmt: skip
