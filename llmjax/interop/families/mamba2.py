"""Mamba 2 (Dao & Gu 2024): layers of state space mixers alone, whose five projections are one tensor.

The norm before the output is over each group of heads, as in the paper and in transformers 5.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.interop.families.gpt import head
from llmjax.interop.fields import Entry, Theirs, constants, field, fixed, ignored, number, settings
from llmjax.interop.fused import concatenated
from llmjax.interop.mapping import Arrays, Family, Row, Slot, linear, norm, same
from llmjax.model import mamba2
from llmjax.model.stacks import layer_slots


def _inner_width() -> Entry:
    """The inner width: `expand` times the width, and as many heads of `head_dim` as it has."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        c.recurrent.width = int(number(theirs, "expand", 2) * c.width)
        size = number(theirs, "head_dim", 64)
        if c.recurrent.heads * size != c.recurrent.width:
            raise UserError(
                f"config.json has num_heads={c.recurrent.heads} and head_dim={size}, which is not expand * hidden_size, "
                f"{c.recurrent.width}"
            )

    def write(c: ConfigDict) -> dict[str, Any]:
        width = mamba2.width(c)
        return {"expand": width // c.width, "head_dim": width // mamba2.heads(c)}

    return Entry(("expand", "head_dim"), read, write)


MAMBA2 = (
    constants(architectures=["Mamba2ForCausalLM"]),
    settings(pattern=("mamba2",), mlp="none", position="none", heads=1),
    field("vocab_size", "vocab_size"),
    field("num_hidden_layers", "layers"),
    field("hidden_size", "width"),
    field("num_heads", "recurrent.heads", 128),
    field("n_groups", "recurrent.groups", 8),
    _inner_width(),
    field("state_size", "recurrent.state_size", 128),
    field("conv_kernel", "recurrent.conv_width", 4),
    field("chunk_size", "recurrent.chunk", 256),
    fixed("use_bias", False),
    field("layer_norm_epsilon", "norm_epsilon", 1e-5),
    field("tie_word_embeddings", "tie_embeddings", False),
    field("initializer_range", "init_std", 0.1),
    fixed("use_conv_bias", True),
    fixed("hidden_act", "silu", "swish"),
    fixed("rms_norm", True),
    fixed("time_step_limit", [0.0, math.inf], [0.0, {"__float__": "Infinity"}]),  # as transformers 4 and 5 write it
    ignored(
        "residual_in_fp32 rescale_prenorm_residual time_step_rank time_step_min time_step_max time_step_floor "
        "intermediate_size norm_before_gate"
    ),
)


def convolution(parts: dict[str, int], layer: int, taps: int, theirs: str, *, bias: bool = True) -> list[Row]:
    """Short convolutions, path -> channels, from one `nn.Conv1d` over the channels of all, (channels, 1, taps)."""
    total = sum(parts.values())
    cuts = np.cumsum(list(parts.values()))[:-1]

    def split(a: Arrays) -> Arrays:
        return [np.ascontiguousarray(x[:, 0].T) for x in np.split(a[0], cuts)]

    def join(a: Arrays) -> Arrays:
        return [np.ascontiguousarray(np.concatenate([x.T for x in a])[:, None])]

    kernels = tuple(Slot(f"{path}/kernel", layer, (taps, size)) for path, size in parts.items())
    found = [Row(kernels, (f"{theirs}.weight",), split, join, shapes=((total, 1, taps),))]
    if bias:
        biases = tuple(Slot(f"{path}/bias", layer, (size,)) for path, size in parts.items())
        name = (f"{theirs}.bias",)
        shapes = ((total,),)
        found.append(Row(biases, name, lambda a: np.split(a[0], cuts), lambda a: [np.concatenate(a)], shapes=shapes))
    return found


def rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of a checkpoint. Letters as in `model/mamba2.py`."""
    D, R, H, r = c.width, mamba2.width(c), mamba2.heads(c), c.recurrent
    state = 2 * r.groups * r.state_size
    yield same("embedding", None, (c.vocab_size, D), "backbone.embeddings.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        mixer, there = f"{prefix}/mamba2", f"backbone.layers.{i}.mixer"
        yield from norm(f"{prefix}/recurrent_norm", n, D, f"backbone.layers.{i}.norm", bias=False)
        parts = {f"{mixer}/gate": (R,), f"{mixer}/input": (R,), f"{mixer}/state": (state,), f"{mixer}/dt": (H,)}
        yield from concatenated(parts, n, (D,), f"{there}.in_proj")
        yield from convolution({f"{mixer}/conv": R, f"{mixer}/state_conv": state}, n, r.conv_width, f"{there}.conv1d")
        for name in ("A_log", "dt_bias", "D"):
            yield same(f"{mixer}/{name}", n, (H,), f"{there}.{name}")
        yield from norm(f"{mixer}/norm", n, R, f"{there}.norm", bias=False)
        yield from linear(f"{mixer}/out", n, (R,), (D,), f"{there}.out_proj")
    yield from norm("final_norm", None, D, "backbone.norm_f", bias=False)
    yield from head(c, "lm_head", "backbone.embeddings")


FAMILIES: tuple[Family, ...] = (
    Family(("mamba2",), MAMBA2, rows, renames=((r"^(?=(embeddings|layers|norm_f)\.)", "backbone."),)),
)
