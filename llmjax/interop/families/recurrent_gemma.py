"""RecurrentGemma (Botev et al. 2024), Griffin's network: two recurrent layers, then one of local attention, repeated."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.families.gemma import GELU
from llmjax.interop.families.gpt import head
from llmjax.interop.families.llama import SIZES, set_pattern
from llmjax.interop.families.mamba2 import convolution
from llmjax.interop.fields import Entry, Theirs, choose, constants, field, fixed, ignored, settings
from llmjax.interop.mapping import Family, Row, linear, norm, same
from llmjax.interop.rope import rope
from llmjax.model import rglru
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots

KINDS = {"recurrent": "rglru", "attention": "local"}


def _pattern() -> Entry:
    """Which layers are recurrent: block_types, repeated."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        usual = ("recurrent", "recurrent", "attention")
        types = theirs.get("block_types") or theirs.get("_block_types") or usual  # as published, with an underscore
        kinds = [choose("block_types", name, KINDS) for name in types]
        set_pattern(c, [kinds[i % len(kinds)] for i in range(c.layers)])

    def write(c: ConfigDict) -> dict[str, Any]:
        names = {ours: theirs for theirs, ours in KINDS.items()}
        return {"block_types": [names.get(kind, kind) for kind in c.pattern]}

    return Entry(("block_types", "_block_types"), read, write)


RECURRENT_GEMMA = (
    constants(architectures=["RecurrentGemmaForCausalLM"]),
    *SIZES,
    GELU,
    # Half of what the field says is the width of the gate and of the other branch.
    field("intermediate_size", "mlp_width", to_ours=lambda size: size // 2, to_theirs=lambda width: 2 * width),
    # Their factor is a bfloat16.
    settings(
        norm_zero_centered=True,
        embedding_scale=lambda c: float(ml_dtypes.bfloat16(c.width**0.5)),
        head_size=lambda c: c.width // c.heads,
    ),
    _pattern(),
    field("attention_window_size", "window", 2048),
    field("lru_width", "recurrent.width", 0),
    field("conv1d_width", "recurrent.conv_width", 4),
    field("attention_bias", "bias", ("out", "mlp"), table={False: ("out", "mlp"), True: ("qkv", "out", "mlp")}),
    field("logits_soft_cap", "logit_soft_cap", 30.0),
    rope(fraction=0.5, fraction_name="partial_rotary_factor"),
    fixed("head_dim", lambda c: c.width // c.heads),
    ignored("w_init_variance_scale final_w_init_variance_scale max_position_embeddings"),
)


def rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of a checkpoint."""
    D, H, G, K = c.width, c.heads, c.kv_heads or c.heads, config.head_size(c)
    F, R, blocks = mlp_width(c), rglru.width(c), c.recurrent.heads or c.heads
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        recurrent = c.pattern[i % len(c.pattern)] == "rglru"
        layer, there = f"model.layers.{i}", f"model.layers.{i}.temporal_block"
        before = "recurrent_norm" if recurrent else "attention_norm"
        yield from norm(f"{prefix}/{before}", n, D, f"{layer}.temporal_pre_norm", bias=False)
        yield from norm(f"{prefix}/mlp_norm", n, D, f"{layer}.channel_pre_norm", bias=False)
        if recurrent:
            mixer = f"{prefix}/rglru"
            yield from linear(f"{mixer}/gate", n, (D,), (R,), f"{there}.linear_y", bias=True)
            yield from linear(f"{mixer}/input", n, (D,), (R,), f"{there}.linear_x", bias=True)
            yield from linear(f"{mixer}/out", n, (R,), (D,), f"{there}.linear_out", bias=True)
            yield from convolution({f"{mixer}/conv": R}, n, c.recurrent.conv_width, f"{there}.conv_1d")
            yield same(f"{mixer}/Lambda", n, (R,), f"{there}.rg_lru.recurrent_param")
            for ours, name in (("input_gate", "input_gate"), ("recurrence_gate", "recurrent_gate")):
                size = (blocks, R // blocks)
                kernel = (*size, size[1])
                gate = f"{there}.rg_lru.{name}"
                yield same(f"{mixer}/{ours}/kernel", n, kernel, f"{gate}_weight", theirs_shape=kernel)
                yield same(f"{mixer}/{ours}/bias", n, size, f"{gate}_bias", theirs_shape=size)
        else:
            attention, bias = f"{prefix}/attention", "qkv" in c.bias
            for ours, name, heads in (("query", "q_proj", H), ("key", "k_proj", G), ("value", "v_proj", G)):
                yield from linear(f"{attention}/{ours}", n, (D,), (heads, K), f"{there}.{name}", bias=bias)
            yield from linear(f"{attention}/out", n, (H, K), (D,), f"{there}.o_proj", bias=True)
        for name, inputs, outputs in (("gate", D, F), ("up", D, F), ("down", F, D)):
            yield from linear(
                f"{prefix}/mlp/{name}", n, (inputs,), (outputs,), f"{layer}.mlp_block.{name}_proj", bias=True
            )
    yield from norm("final_norm", None, D, "model.final_norm", bias=False)
    yield from head(c, "lm_head", "model.embed_tokens")


FAMILIES: tuple[Family, ...] = (
    Family(
        ("recurrent_gemma",),
        RECURRENT_GEMMA,
        rows,
        defaults={"tie_word_embeddings": True, "max_position_embeddings": 8192},
        ignored=(r"\.normalizer$", r"rotary_emb\.inv_freq$"),
        renames=((r"^(?=(embed_tokens|layers|final_norm)\.)", "model."),),
    ),
)
