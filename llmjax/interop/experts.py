"""Rows of sparse blocks: one tensor for each matrix of each expert, or all experts in one."""

from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from llmjax.interop.mapping import Row, Slot, linear
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots, sparse_layers


def expert_rows(names: str, c: ConfigDict, path: str, n: int, layer: str) -> Iterator[Row]:
    """A sparse block with one tensor for each expert's matrix, as published and written.

    names: of the block and of the gate's, down's and up's matrix, such as "block_sparse_moe w1 w2 w3".
    """
    D, F, E = c.width, c.moe.width or mlp_width(c), c.moe.experts
    block, gate, down, up = names.split()
    yield from linear(f"{path}/router", n, (D,), (E,), f"{layer}.{block}.gate")
    for ours, theirs, inputs, outputs in (("gate", gate, D, F), ("up", up, D, F), ("down", down, F, D)):
        yield Row(
            (Slot(f"{path}/{ours}/kernel", n, (E, inputs, outputs)),),
            tuple(f"{layer}.{block}.experts.{e}.{theirs}.weight" for e in range(E)),
            lambda a: [np.stack([x.T for x in a])],
            lambda a: [np.ascontiguousarray(x.T) for x in a[0]],
            shapes=((outputs, inputs),) * E,
        )


def fused_expert_rows(names: str, c: ConfigDict) -> Iterator[Row]:
    """Sparse blocks with one tensor for all experts, as transformers 5 holds them in memory and can be told to write."""
    D, F, E = c.width, c.moe.width or mlp_width(c), c.moe.experts
    for i, ((prefix, n), sparse) in enumerate(zip(layer_slots(c), sparse_layers(c), strict=True)):
        if not sparse:
            continue
        layer, path = f"model.layers.{i}.mlp", f"{prefix}/moe"
        if not names.startswith("mlp "):  # otherwise the router is called so in both forms
            yield from linear(f"{path}/router", n, (D,), (E,), f"{layer}.gate")
        yield Row(
            (Slot(f"{path}/gate/kernel", n, (E, D, F)), Slot(f"{path}/up/kernel", n, (E, D, F))),
            (f"{layer}.experts.gate_up_proj",),
            lambda a: [np.ascontiguousarray(half.swapaxes(1, 2)) for half in np.split(a[0], 2, axis=1)],
            lambda a: [np.concatenate([half.swapaxes(1, 2) for half in a], axis=1)],
            shapes=((E, 2 * F, D),),
        )
        yield Row(
            (Slot(f"{path}/down/kernel", n, (E, F, D)),),
            (f"{layer}.experts.down_proj",),
            lambda a: [np.ascontiguousarray(a[0].swapaxes(1, 2))],
            lambda a: [np.ascontiguousarray(a[0].swapaxes(1, 2))],
            shapes=((E, D, F),),
        )
