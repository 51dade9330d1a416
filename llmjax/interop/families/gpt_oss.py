"""gpt-oss (OpenAI 2025): sparse layers, of which every other has a window, attention sinks, a clamped gate, biases.

Published files have the experts' matrices in MXFP4 (`interop/dequantize.py`). What is written has them whole.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.families.gpt import head
from llmjax.interop.families.llama import SIZES, decoder, windows, written_balance
from llmjax.interop.fields import constants, field, fixed, ignored, settings
from llmjax.interop.mapping import Family, Row, Slot, linear, norm, same
from llmjax.interop.rope import rope
from llmjax.model.layers import CLAMP, mlp_width
from llmjax.model.stacks import layer_slots

ALWAYS = ("mlp", "router")
GPT_OSS = (
    constants(architectures=["GptOssForCausalLM"], pad_token_id=None),
    *SIZES,
    fixed("hidden_act", "silu"),
    fixed("swiglu_alpha", 1.702),
    fixed("swiglu_limit", CLAMP),
    settings(activation="swiglu_clamped", attention_sinks=True),
    field("attention_bias", "bias", ("qkv", "out", *ALWAYS), table={True: ("qkv", "out", *ALWAYS), False: ALWAYS}),
    windows("some", periodic=True),
    field("num_local_experts", "moe.experts", 128, also=("num_experts",)),
    field("num_experts_per_tok", "moe.active", 4, also=("experts_per_token",)),
    replace(
        field("router_aux_loss_coef", "moe.balance_loss", 0.001),
        write=lambda c: {"router_aux_loss_coef": written_balance(c)},
    ),
    settings(**{"moe.z_loss": 0.0, "moe.balance_over": "layers"}),
    rope(base=150_000.0),
    ignored("initial_context_length"),
)
YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of a checkpoint."""
    D, H, G, K, E = c.width, c.heads, c.kv_heads or c.heads, config.head_size(c), c.moe.experts
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer, attention, there = f"model.layers.{i}", f"{prefix}/attention", f"model.layers.{i}.self_attn"
        yield from norm(f"{prefix}/attention_norm", n, D, f"{layer}.input_layernorm", bias=False)
        yield from norm(f"{prefix}/mlp_norm", n, D, f"{layer}.post_attention_layernorm", bias=False)
        for ours, theirs, heads in (("query", "q_proj", H), ("key", "k_proj", G), ("value", "v_proj", G)):
            yield from linear(f"{attention}/{ours}", n, (D,), (heads, K), f"{there}.{theirs}", bias="qkv" in c.bias)
        yield from linear(f"{attention}/out", n, (H, K), (D,), f"{there}.o_proj", bias="out" in c.bias)
        yield same(f"{attention}/sinks", n, (H,), f"{there}.sinks")
        yield from linear(f"{prefix}/moe/router", n, (D,), (E,), f"{layer}.mlp.router", bias=True)
        yield from _expert_rows(c, f"{prefix}/moe", n, f"{layer}.mlp.experts")
    yield from norm("final_norm", None, D, "model.norm", bias=False)
    yield from head(c, "lm_head", "model.embed_tokens")


def _expert_rows(c: ConfigDict, path: str, n: int, theirs: str) -> Iterator[Row]:
    """All experts in one tensor, (E, inputs, outputs); outputs of the gate and of `up` take turns."""
    D, F, E = c.width, c.moe.width or mlp_width(c), c.moe.experts
    for kind, shape, there in (("kernel", (E, D), "gate_up_proj"), ("bias", (E,), "gate_up_proj_bias")):
        yield Row(
            (Slot(f"{path}/gate/{kind}", n, (*shape, F)), Slot(f"{path}/up/{kind}", n, (*shape, F))),
            (f"{theirs}.{there}",),
            lambda a: [np.ascontiguousarray(a[0][..., start::2]) for start in (0, 1)],
            lambda a: [np.stack(a, axis=-1).reshape(*a[0].shape[:-1], -1)],
            shapes=((*shape, 2 * F),),
        )
    yield same(f"{path}/down/kernel", n, (E, F, D), f"{theirs}.down_proj", theirs_shape=(E, F, D))
    yield same(f"{path}/down/bias", n, (E, D), f"{theirs}.down_proj_bias", theirs_shape=(E, D))


FAMILIES: tuple[Family, ...] = (
    decoder(
        "gpt_oss",
        GPT_OSS,
        rows,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
        sliding_window=128,
        sliding_window_pattern=2,
        rope_parameters=YARN,
    ),
)
