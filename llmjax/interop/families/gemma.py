"""Gemma 1 to 3 (Gemma Team 2024, 2025): Llama's tensors with scaled embeddings and zero-centred norms.

From 2 on norms also stand after each branch, some layers have a window, and scores and logits may have soft caps.
"""

from llmjax.interop.families.llama import biases, family, windows
from llmjax.interop.fields import GATED_ACTIVATIONS, field, fixed, settings
from llmjax.interop.mapping import Family
from llmjax.interop.rope import rope_by_kind

GEMMA = (
    fixed("use_bidirectional_attention", False),
    settings(norm_zero_centered=True, embedding_scale=lambda c: float(c.width) ** 0.5),
)
SANDWICH = (
    settings(norm_place="sandwich"),
    field(
        "query_pre_attn_scalar",
        "attention_scale",
        to_ours=lambda scalar: scalar**-0.5,
        to_theirs=lambda scale: round(scale**-2),
    ),
    field("final_logit_softcapping", "logit_soft_cap", 0.0, null=0.0),
)
GELU = field("hidden_activation", "activation", "geglu_tanh", also=("hidden_act",), table=GATED_ACTIVATIONS)
# Published files of Gemma 1 say "gelu" and mean its approximation, as the first release of the class took it.
GELU_ALWAYS_APPROXIMATE = field(
    "hidden_act",
    "activation",
    "geglu_tanh",
    also=("hidden_activation",),
    table={"gelu_pytorch_tanh": "geglu_tanh", **GATED_ACTIVATIONS, "gelu": "geglu_tanh"},
)
GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True}


FAMILIES: tuple[Family, ...] = (
    family(
        "gemma",
        "Gemma",
        biases(attention="asked"),
        windows("none"),
        GEMMA,
        defaults={**GEMMA_DEFAULTS, "num_key_value_heads": 16},
        activation=GELU_ALWAYS_APPROXIMATE,
    ),
    family(
        "gemma2",
        "Gemma2",
        biases(attention="asked"),
        windows("some", periodic=True),
        GEMMA,
        SANDWICH,
        field("attn_logit_softcapping", "attention_soft_cap", 0.0, null=0.0),
        defaults={
            **GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
        },
        activation=GELU,
    ),
    # The text part of published Gemma 3 models says only what differs from the 2B model that the class describes.
    family(
        "gemma3_text gemma3",
        "Gemma3",
        biases(attention="asked"),
        settings(qk_norm=True),
        windows("some", periodic=True),
        rope_by_kind(local_name="rope_local_base_freq"),
        GEMMA,
        SANDWICH,
        fixed("attn_logit_softcapping", None),  # there is such a field, which the model never looks at
        defaults={
            **GEMMA_DEFAULTS,
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        activation=GELU,
        inner={"gemma3": "text_config"},
    ),
)
