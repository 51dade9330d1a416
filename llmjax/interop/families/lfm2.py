"""LFM2 (Liquid AI 2025): gated short convolutions and layers of attention, whose queries and keys are normalised."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.families.gpt import head
from llmjax.interop.families.llama import SIZES, set_pattern
from llmjax.interop.families.mamba2 import convolution
from llmjax.interop.fields import Entry, Theirs, choose, constants, field, fixed, flag, number, settings, typed
from llmjax.interop.fused import concatenated
from llmjax.interop.mapping import Family, Row, linear, norm, same
from llmjax.interop.rope import rope
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots

KINDS = {"conv": "conv", "full_attention": "global"}
OTHER_NAMES = ("intermediate_size", "rms_norm_eps", "head_dim", "attention_dropout")  # of SIZES


def _pattern() -> Entry:
    """Which layers are convolutions: layer_types, or all that full_attn_idxs does not list."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        listed = theirs.get("full_attn_idxs")
        by_index = ["full_attention" if listed is None or i in listed else "conv" for i in range(c.layers)]
        set_pattern(c, [choose("layer_types", name, KINDS) for name in theirs.get("layer_types") or by_index])

    def write(c: ConfigDict) -> dict[str, Any]:
        names = {ours: theirs for theirs, ours in KINDS.items()}
        return {
            "layer_types": [names.get(kind, kind) for kind in (c.pattern[i % len(c.pattern)] for i in range(c.layers))]
        }

    return Entry(("layer_types", "full_attn_idxs"), read, write)


def _mlp_width() -> Entry:
    """The MLP's width: as the file says, or 2/3 of that, times a factor, rounded up to a multiple."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        name = "block_ff_dim" if theirs.get("block_ff_dim") is not None else "intermediate_size"
        width = typed(name, theirs[name], int)
        if flag(theirs, "block_auto_adjust_ff_dim", True):
            multiple = typed("block_multiple_of", theirs.get("block_multiple_of", 256), int)
            width = int(number(theirs, "block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
            width = -(-width // multiple) * multiple
        c.mlp_width = width

    def write(c: ConfigDict) -> dict[str, Any]:
        return {"intermediate_size": c.mlp_width, "block_auto_adjust_ff_dim": False}

    adjusted = ("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of")
    return Entry(("intermediate_size", "block_ff_dim", *adjusted), read, write)


LFM2 = (
    constants(architectures=["Lfm2ForCausalLM"]),
    *(entry for entry in SIZES if not set(entry.names) & set(OTHER_NAMES)),
    settings(qk_norm=True, head_size=lambda c: c.width // c.heads, **{"recurrent.width": lambda c: c.width}),
    _pattern(),
    _mlp_width(),
    field("norm_eps", "norm_epsilon", 1e-5),
    field("conv_L_cache", "recurrent.conv_width", 3),
    fixed("conv_bias", False),
    rope(),
)


def rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of a checkpoint."""
    D, H, G, K, F = c.width, c.heads, c.kv_heads or c.heads, config.head_size(c), mlp_width(c)
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer, convolves = f"model.layers.{i}", c.pattern[i % len(c.pattern)] == "conv"
        before = "recurrent_norm" if convolves else "attention_norm"
        yield from norm(f"{prefix}/{before}", n, D, f"{layer}.operator_norm", bias=False)
        yield from norm(f"{prefix}/mlp_norm", n, D, f"{layer}.ffn_norm", bias=False)
        if convolves:
            mixer, there = f"{prefix}/conv", f"{layer}.conv"
            parts = {f"{mixer}/{name}": (D,) for name in ("before", "after", "input")}
            yield from concatenated(parts, n, (D,), f"{there}.in_proj")
            yield from convolution({f"{mixer}/conv": D}, n, c.recurrent.conv_width, f"{there}.conv", bias=False)
            yield from linear(f"{mixer}/out", n, (D,), (D,), f"{there}.out_proj")
        else:
            attention, there = f"{prefix}/attention", f"{layer}.self_attn"
            for ours, name, heads in (("query", "q_proj", H), ("key", "k_proj", G), ("value", "v_proj", G)):
                yield from linear(f"{attention}/{ours}", n, (D,), (heads, K), f"{there}.{name}")
            yield from linear(f"{attention}/out", n, (H, K), (D,), f"{there}.out_proj")
            for ours, name in (("query_norm", "q_layernorm"), ("key_norm", "k_layernorm")):
                yield same(f"{attention}/{ours}/scale", n, (K,), f"{there}.{name}.weight")
        for ours, name, inputs, outputs in (("gate", "w1", D, F), ("up", "w3", D, F), ("down", "w2", F, D)):
            yield from linear(f"{prefix}/mlp/{ours}", n, (inputs,), (outputs,), f"{layer}.feed_forward.{name}")
    yield from norm("final_norm", None, D, "model.embedding_norm", bias=False)
    yield from head(c, "lm_head", "model.embed_tokens")


FAMILIES: tuple[Family, ...] = (
    Family(
        ("lfm2",),
        LFM2,
        rows,
        defaults={
            "tie_word_embeddings": True,
            "max_position_embeddings": 128_000,
            "num_key_value_heads": 8,
            "rope_theta": 1e6,
        },
        renames=((r"^(?=(embed_tokens|layers|embedding_norm)\.)", "model."),),
    ),
)
