"""DeepSeek V2 and V3 (DeepSeek-AI 2024): latent attention, and many small experts beside shared ones.

V2 chooses experts by a softmax, V3 by a sigmoid and a bias that balances them.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.experts import expert_rows, fused_expert_rows
from llmjax.interop.families.gpt import head
from llmjax.interop.families.llama import SILU, SIZES
from llmjax.interop.fields import (
    Entry,
    Theirs,
    constants,
    field,
    fixed,
    ignored,
    mapping,
    number,
    only,
    settings,
    typed,
)
from llmjax.interop.fused import concatenated, reordered
from llmjax.interop.mapping import Arrays, Family, Row, Slot, linear, norm, same
from llmjax.interop.rope import rope, temperature
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots, sparse_layers

BIAS_RATE = 0.001  # of the bias that balances experts; no config.json says it


def _head_size() -> Entry:
    """A head's queries and keys have a part that is rotated and one that is not."""
    name = "qk_nope_head_dim"

    def read(c: ConfigDict, theirs: Theirs) -> None:
        only(theirs, "num_key_value_heads", c.heads)
        c.kv_heads = c.heads
        c.head_size = typed(name, theirs.get(name, 128), int) + c.latent.rotary_size

    def write(c: ConfigDict) -> dict[str, Any]:
        return {name: c.head_size - c.latent.rotary_size, "num_key_value_heads": c.heads}

    return Entry((name, "num_key_value_heads"), read, write)


def _rope() -> Entry:
    """YaRN that may also scale the scores (mscale_all_dim), and cosines and sines by another factor (mscale)."""
    one = rope()

    def read(c: ConfigDict, theirs: Theirs) -> None:
        one.read(c, theirs)
        said = mapping(theirs, "rope_scaling") or mapping(theirs, "rope_parameters")
        if c.rotary_scaling == "yarn" and said.get("mscale_all_dim"):
            scale = temperature(c.rotary_factor, number(said, "mscale_all_dim"))
            c.attention_scale = c.head_size**-0.5 * scale * scale

    def write(c: ConfigDict) -> dict[str, Any]:
        said = one.write(c)
        scale = math.sqrt(c.attention_scale * c.head_size**0.5)
        if c.rotary_scaling == "yarn" and not math.isclose(scale, 1.0):
            slope = temperature(c.rotary_factor) - 1.0
            own = said["rope_scaling"].pop("attention_factor", temperature(c.rotary_factor))
            said["rope_scaling"] |= {
                "mscale": round((own * scale - 1) / slope, 12),
                "mscale_all_dim": round((scale - 1) / slope, 12),
            }
        return said

    return Entry(one.names, read, write)


def _choice() -> Entry:
    """V2 chooses among all experts, whatever n_group says, or among those of the groups with the best expert."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        only(theirs, "topk_method", "greedy", "group_limited_greedy")
        if theirs.get("topk_method", "greedy") == "greedy":
            c.moe.groups = c.moe.active_groups = 1

    def write(c: ConfigDict) -> dict[str, Any]:
        return {"topk_method": "greedy" if c.moe.groups == 1 else "group_limited_greedy"}

    return Entry(("topk_method",), read, write)


COMMON = (
    *(e for e in SIZES if not {"rms_norm_eps", "head_dim", "num_key_value_heads"} & set(e.names)),
    SILU,
    settings(norm_epsilon=1e-6),
    field("kv_lora_rank", "latent.kv_rank", 512),
    field("q_lora_rank", "latent.query_rank", 1536, null=0),
    field("qk_rope_head_dim", "latent.rotary_size", 64),
    field("v_head_dim", "latent.value_size", 128),
    _head_size(),
    _rope(),
    field("n_routed_experts", "moe.experts"),
    field("n_shared_experts", "moe.shared"),
    field("num_experts_per_tok", "moe.active"),
    field("moe_intermediate_size", "moe.width"),
    field("first_k_dense_replace", "moe.first"),
    field("routed_scaling_factor", "moe.scale"),
    field("n_group", "moe.groups", 1),
    field("topk_group", "moe.active_groups", 1),
    fixed("moe_layer_freq", 1),
    fixed("rms_norm_eps", 1e-6),  # of the inner norms it is this always
    fixed("attention_bias", False),
    fixed("mlp_bias", False),
    ignored("head_dim qk_head_dim aux_loss_alpha seq_aux ep_size num_nextn_predict_layers"),
)
V2 = (
    constants(architectures=["DeepseekV2ForCausalLM"]),
    *COMMON,
    settings(**{"moe.normalize": False}),
    fixed("norm_topk_prob", False),
    _choice(),
    fixed("scoring_func", "softmax"),
)
V3 = (
    constants(architectures=["DeepseekV3ForCausalLM"]),
    *COMMON,
    settings(**{"moe.score": "sigmoid", "moe.bias_rate": BIAS_RATE, "moe.group_score": 2}),
    field("norm_topk_prob", "moe.normalize", True),
    fixed("topk_method", "noaux_tc"),
    fixed("scoring_func", "sigmoid"),
    fixed("rope_interleave", True),
)


def _rotated_first(c: ConfigDict) -> np.ndarray:
    """The dimensions of their heads in our order: the rotated ones, of neighbouring pairs the first halves, come first."""
    size, rotated = config.head_size(c), c.latent.rotary_size
    return np.concatenate([np.arange(size - rotated, size).reshape(-1, 2).T.reshape(-1), np.arange(size - rotated)])


def _keys_and_values(attention: str, n: int, c: ConfigDict, theirs: str) -> Iterator[Row]:
    own, H = c.latent, c.heads
    plain = config.head_size(c) - own.rotary_size
    order = np.arange(own.kv_rank + own.rotary_size)
    order[own.kv_rank :] = order[own.kv_rank :].reshape(-1, 2).T.reshape(-1)
    parts = {f"{attention}/latent_down": (own.kv_rank,), f"{attention}/rotary_key": (own.rotary_size,)}
    for row in concatenated(parts, n, (c.width,), f"{theirs}.kv_a_proj_with_mqa"):
        yield reordered(row, order, outputs=True)
    yield from norm(f"{attention}/latent_norm", n, own.kv_rank, f"{theirs}.kv_a_layernorm", bias=False)

    def split(a: Arrays) -> Arrays:
        by_head = a[0].T.reshape(own.kv_rank, H, plain + own.value_size)
        return [np.ascontiguousarray(x) for x in np.split(by_head, [plain], axis=-1)]

    def join(a: Arrays) -> Arrays:
        return [np.ascontiguousarray(np.concatenate(a, axis=-1).reshape(own.kv_rank, -1).T)]

    yield Row(
        (
            Slot(f"{attention}/key/kernel", n, (own.kv_rank, H, plain)),
            Slot(f"{attention}/value/kernel", n, (own.kv_rank, H, own.value_size)),
        ),
        (f"{theirs}.kv_b_proj.weight",),
        split,
        join,
        shapes=((H * (plain + own.value_size), own.kv_rank),),
    )


def rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of a checkpoint."""
    D, H, K, F, E = c.width, c.heads, config.head_size(c), mlp_width(c), c.moe.experts
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    for i, ((prefix, n), sparse) in enumerate(zip(layer_slots(c), sparse_layers(c), strict=True)):
        layer, attention, there = f"model.layers.{i}", f"{prefix}/attention", f"model.layers.{i}.self_attn"
        yield from norm(f"{prefix}/attention_norm", n, D, f"{layer}.input_layernorm", bias=False)
        yield from norm(f"{prefix}/mlp_norm", n, D, f"{layer}.post_attention_layernorm", bias=False)
        inputs, name = c.latent.query_rank or D, "q_b_proj" if c.latent.query_rank else "q_proj"
        if c.latent.query_rank:
            yield from linear(f"{attention}/query_down", n, (D,), (inputs,), f"{there}.q_a_proj")
            yield from norm(f"{attention}/query_norm", n, inputs, f"{there}.q_a_layernorm", bias=False)
        for row in linear(f"{attention}/query", n, (inputs,), (H, K), f"{there}.{name}"):
            yield reordered(row, _rotated_first(c))
        yield from _keys_and_values(attention, n, c, there)
        yield from linear(f"{attention}/out", n, (H, c.latent.value_size), (D,), f"{there}.o_proj")
        mlps = {f"{prefix}/mlp": (f"{layer}.mlp", F)}
        if sparse:
            yield from expert_rows(EXPERTS, c, f"{prefix}/moe", n, layer)
            if c.moe.bias_rate:
                yield same(f"{prefix}/moe/expert_bias", n, (E,), f"{layer}.mlp.gate.e_score_correction_bias")
            width = c.moe.shared * (c.moe.width or F)
            mlps = {f"{prefix}/moe/shared": (f"{layer}.mlp.shared_experts", width)} if width else {}
        for ours, (theirs, width) in mlps.items():
            for part, size, features in (("gate", D, width), ("up", D, width), ("down", width, D)):
                yield from linear(f"{ours}/{part}", n, (size,), (features,), f"{theirs}.{part}_proj")
    yield from norm("final_norm", None, D, "model.norm", bias=False)
    yield from head(c, "lm_head", "model.embed_tokens")


EXPERTS = "mlp gate_proj down_proj up_proj"


def _family(model_type: str, entries: tuple[Entry, ...]) -> Family:
    return Family(
        (model_type,),
        entries,
        rows,
        # Layer 61 of V3 predicts further tokens in training alone. transformers leaves it out too.
        ignored=(r"rotary_emb\.inv_freq$", r"^model\.layers\.61\."),
        renames=((r"^(?=(embed_tokens|layers|norm)\.)", "model."),),
        other_rows=functools.partial(fused_expert_rows, EXPERTS),
    )


FAMILIES: tuple[Family, ...] = (_family("deepseek_v2", V2), _family("deepseek_v3", V3))
