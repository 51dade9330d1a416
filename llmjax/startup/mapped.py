"""Trees of arrays in a file that is mapped into memory: the arrays are neither read nor copied.

The bytes are: the length of a description (8 bytes, lowest first); the description (JSON: the tree, with type, shape and
place of each array); and the arrays, each at a multiple of ALIGN, so that jax on CPU uses them in place.
"""

import json
import math
from typing import Any

import jax
import numpy as np

from llmjax.startup.cache import Cache

KIND = "weights"  # of the cache's entries
ALIGN = 64  # bytes


def read(cache: Cache, key: str, where: Any, *, like: Any = None) -> Any:
    """The arrays of an entry, on CPU in place; None: there is no entry, or its arrays are others.

    Args:
        where: the sharding of all arrays, or a tree of shardings.
        like: a tree with the shapes and dtypes that the arrays must have.
    """
    content = cache.read(KIND, key)
    if content is None:
        return None
    tree = from_bytes(content)
    if like is not None and _types(tree) != _types(like):
        return None
    return jax.device_put(tree, where)


def write(cache: Cache, key: str, tree: Any) -> None:
    """Keep a tree of arrays. Does nothing if this process does not have all parts of them."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        cache.write(KIND, key, to_bytes(jax.tree.map(np.asarray, tree)))


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (tuple(x.shape), str(x.dtype)), tree)


def to_bytes(tree: Any) -> list[Any]:
    """The bytes of a tree of dicts, tuples and arrays, in parts that follow each other."""
    arrays: list[np.ndarray] = []
    end = 0

    def describe(node: Any) -> Any:
        nonlocal end
        if isinstance(node, dict):
            return {key: describe(child) for key, child in node.items()}
        if isinstance(node, tuple):
            return [describe(child) for child in node]
        array = np.asarray(node, order="C")
        arrays.append(array)
        start, end = end, end + -(-array.nbytes // ALIGN) * ALIGN
        return f"{array.dtype.name} {start} {' '.join(map(str, array.shape))}".rstrip()

    described = json.dumps(describe(tree)).encode()
    described += b" " * (-(8 + len(described)) % ALIGN)
    parts: list[Any] = [len(described).to_bytes(8, "little"), described]
    for array in arrays:
        parts += [array.reshape(-1).view(np.uint8), bytes(-array.nbytes % ALIGN)]
    return parts


def from_bytes(content: np.ndarray) -> Any:
    """The tree in the bytes (uint8); its arrays are views."""
    length = int.from_bytes(content[:8].tobytes(), "little")
    described = json.loads(content[8 : 8 + length].tobytes())
    data = content[8 + length :]

    def tree(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: tree(child) for key, child in node.items()}
        if isinstance(node, list):
            return tuple(tree(child) for child in node)
        name, start, *shape = node.split(" ")
        kind, sizes = dtype(name), [int(n) for n in shape]
        size = kind.itemsize * math.prod(sizes)
        return data[int(start) : int(start) + size].view(kind).reshape(sizes)

    return tree(described)


def dtype(name: str) -> np.dtype:
    """NumPy's type of that name, or that of ml_dtypes, such as bfloat16."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
