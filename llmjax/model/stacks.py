"""Which layers are stacked and scanned together, and where each layer's arrays are.

Equal layers share one scan over arrays with the layers in front. A model whose layers repeat a pattern of several kinds is
scanned over repetitions of that pattern. There are up to three stacks: `first` (dense layers before the sparse ones),
`layers`, and `last` (what is left when the pattern does not divide the layers).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

# The path of a parameter of a layer; "ahead" are the blocks of multi-token prediction.
IN_LAYERS = re.compile(r"(encoder/)?(first|layers|last|ahead)/")
Kind = tuple[str, bool]  # what mixes tokens, and whether the MLP is sparse


@dataclass(frozen=True)
class Stack:
    """Layers `start` to `start + repeats * len(kinds)`: `repeats` times the pattern `kinds`."""

    name: str  # first, layers or last
    kinds: tuple[Kind, ...]
    repeats: int
    start: int


def layer_stacks(c: ConfigDict, *, encoder: bool = False) -> list[Stack]:
    """The stacks of the decoder (or the only stack of blocks), or of the encoder, in their order."""
    count, first = (c.encoder_layers if encoder else c.layers), c.moe.first
    pattern = ("global",) if encoder else c.pattern

    def kind(layer: int) -> Kind:
        sparse = c.moe.experts > 0 and layer >= first and (layer - first + 1) % c.moe.every == 0
        return pattern[layer % len(pattern)], sparse and layer not in c.moe.dense

    kinds = [kind(layer) for layer in range(count)]
    first = min(first, count) if c.moe.experts else 0
    rest_kinds = kinds[first:]
    period = next(p for p in range(1, count + 2) if rest_kinds[p:] == rest_kinds[: max(len(rest_kinds) - p, 0)])
    repeats = (count - first) // period
    rest = first + repeats * period
    parts = [
        ("first", kinds[:first], 1, 0),
        ("layers", kinds[first : first + period], repeats, first),
        ("last", kinds[rest:], 1, rest),
    ]
    found = []
    for name, part, times, start in parts:
        if part and times:
            same = len(set(part)) == 1  # then every layer is a repetition of its own
            found.append(Stack(name, (part[0],) if same else tuple(part), times * len(part) if same else times, start))
    return found


def sparse_layers(c: ConfigDict) -> list[bool]:
    """Which layers have experts."""
    return [sparse for stack in layer_stacks(c) for _ in range(stack.repeats) for _, sparse in stack.kinds]


def layer_slots(c: ConfigDict, *, encoder: bool = False) -> list[tuple[str, int]]:
    """Where the parameters of layer i are: (path, index in its stack), such as ("layers", 3) or ("encoder/layers/1", 0)."""
    base = "encoder/" if encoder else ""
    return [
        (f"{base}{stack.name}/{place}" if len(stack.kinds) > 1 else f"{base}{stack.name}", repeat)
        for stack in layer_stacks(c, encoder=encoder)
        for repeat in range(stack.repeats)
        for place in range(len(stack.kinds))
    ]


def per_layer(c: ConfigDict, make: Callable[[str], Any]) -> dict[str, Any]:
    """A tree by stack, and by place in its pattern if that has several kinds: `make(kind)` with the layers in front."""

    def repeated(kind: str, repeats: int) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (repeats, *x.shape)), make(kind))

    return {
        stack.name: {str(i): repeated(kind, stack.repeats) for i, (kind, _) in enumerate(stack.kinds)}
        if len(stack.kinds) > 1
        else repeated(stack.kinds[0][0], stack.repeats)
        for stack in layer_stacks(c)
    }
