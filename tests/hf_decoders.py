"""The variants of decoder-only families that are compared with transformers; the first of each is stored as golden."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hf import Case, ours_causal, theirs_causal

# Sizes that differ from each other, so that nothing fits by accident.
BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA = {**BASE, "num_key_value_heads": 2}
ORIGINAL = {"original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    **ORIGINAL,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
DEEPSEEK = {**BASE, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
DEEPSEEK |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 24}
DEEPSEEK |= {"first_k_dense_replace": 1, "num_key_value_heads": 4}
GROUPS = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
DEEPSEEK_YARN = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}
GEMMA = {**LLAMA, "head_dim": 16, "query_pre_attn_scalar": 24}
BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
GPT_OSS = {**LLAMA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {k: v for k, v in BASE.items() if k != "intermediate_size"} | {"ffn_dim": 40}
MAMBA2 = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16}
MAMBA2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
RECURRENT_GEMMA = {k: v for k, v in BASE.items() if k != "max_position_embeddings"}
RECURRENT_GEMMA |= {"num_key_value_heads": 1, "lru_width": 48, "intermediate_size": 80, "attention_window_size": 256}
FALCON = {k: v for k, v in BASE.items() if k != "intermediate_size"} | {"ffn_hidden_size": 40}


def _cases(
    family: str,
    config: str,
    model: str,
    fields: dict[str, Any],
    *,
    about: dict[str, Any] | None = None,
    **variants: dict[str, Any],
) -> tuple[Case, ...]:
    """A case for each variant, by the fields that it changes; `about` are further arguments of all cases."""
    return tuple(
        Case(family, name, config, model, fields | changes, **(about or {})) for name, changes in variants.items()
    )


def unpadded(run: Callable[..., Any]) -> Callable[..., Any]:
    """Padding is read as text: their convolution reaches from padding on the left into a text."""

    def without(*args: Any) -> Any:
        *model, batch = args
        return run(*model, {**batch, "mask": np.ones_like(batch["mask"])})

    return without


def by_long_factors(c: Any, params: Any, batch: Any) -> Any:
    """Our logits as transformers has them for texts beyond the length of the first training."""
    c = c.copy_and_resolve_references()
    c.max_length = round(c.rotary_original_length * c.rotary_factor)
    return ours_causal(c, params, batch)


LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.3, 1.5, 2.0]}
LONGROPE |= {"long_factor": [1.1, 4.0, 7.0, 11.5]}
DECODERS: tuple[Case, ...] = (
    *_cases(
        "llama",
        "LlamaConfig",
        "LlamaForCausalLM",
        LLAMA,
        llama3={"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
        multi_head={"num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
        multi_query={"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": LINEAR},
        yarn={"head_dim": 32, "rope_parameters": YARN},
        yarn_set={"head_dim": 32, "rope_parameters": {**YARN, "beta_fast": 100.0, "beta_slow": 4.0}},
    ),
    *_cases(
        "mistral",
        "MistralConfig",
        "MistralForCausalLM",
        LLAMA,
        window={"sliding_window": 5},
        no_window={"sliding_window": None, "head_dim": 16, "tie_word_embeddings": True},
    ),
    *_cases(
        "mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        LLAMA,
        top2={"num_local_experts": 4, "num_experts_per_tok": 2},
        top3_window={"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 7},
    ),
    *_cases(
        "qwen2",
        "Qwen2Config",
        "Qwen2ForCausalLM",
        LLAMA,
        plain={"tie_word_embeddings": True},
        windows={"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        yarn={"rope_parameters": YARN, "num_key_value_heads": 1},
    ),
    *_cases(
        "qwen3",
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {**LLAMA, "head_dim": 16},
        plain={"tie_word_embeddings": True},
        bias={"attention_bias": True, "rope_parameters": YARN},
        windows={
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    *_cases(
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**LLAMA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        first_dense={"mlp_only_layers": [0], "norm_topk_prob": True},
        every_second={"num_hidden_layers": 5, "decoder_sparse_step": 2},
        some_dense={"num_hidden_layers": 7, "mlp_only_layers": [1, 2, 5]},
        some_of_every_second={"num_hidden_layers": 7, "decoder_sparse_step": 2, "mlp_only_layers": [0, 3]},
        window={"use_sliding_window": True, "sliding_window": 6, "num_experts_per_tok": 1},
    ),
    *_cases(
        "gemma",
        "GemmaConfig",
        "GemmaForCausalLM",
        {k: v for k, v in GEMMA.items() if k != "query_pre_attn_scalar"},
        about={"centre": 0.0},
        multi_query={"num_key_value_heads": 1},
        grouped={"attention_bias": True},
    ),
    *_cases(
        "gemma2",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GEMMA, "sliding_window": 5},
        about={"centre": 0.0},
        caps={"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
        uneven={"num_hidden_layers": 5, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    *_cases(
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**GEMMA, "sliding_window": 5},
        about={"centre": 0.0},
        linear={"num_hidden_layers": 8, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        every_second={"num_hidden_layers": 3, "sliding_window_pattern": 2, "final_logit_softcapping": 2.0},
        all_local={"num_hidden_layers": 2, "attention_bias": True},
    ),
    *_cases(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        GPT2,
        plain={},
        untied={
            "n_inner": 40,
            "activation_function": "relu",
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
        },
    ),
    *_cases(
        "gpt_neox",
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        BASE,
        parallel={"hidden_size": 64},
        serial={"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5, "hidden_act": "gelu_new"},
        scaled={"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rotary_pct": 1.0, "tie_word_embeddings": True},
    ),
    *_cases(
        "bloom",
        "BloomConfig",
        "BloomForCausalLM",
        BLOOM,
        plain={},
        six_heads={"hidden_size": 48, "n_head": 6, "tie_word_embeddings": False},
    ),
    *_cases(
        "opt",
        "OPTConfig",
        "OPTForCausalLM",
        OPT,
        post_norm={"do_layer_norm_before": False, "word_embed_proj_dim": 24},
        pre_norm={},
        no_bias={"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"},
        no_final_norm={"_remove_final_layer_norm": True},
    ),
    *_cases(
        "phi",
        "PhiConfig",
        "PhiForCausalLM",
        BASE,
        half={},
        quarter={
            "hidden_size": 64,
            "partial_rotary_factor": 0.25,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        llama3={"hidden_size": 64, "rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}},
    ),
    *_cases(
        "falcon",
        "FalconConfig",
        "FalconForCausalLM",
        FALCON,
        grouped={"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},  # 40B, 180B
        multi_query={},  # 7B
        one_norm={"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},  # 11B
        multi_head={"multi_query": False, "tie_word_embeddings": False, "rope_parameters": LINEAR},
        serial={"parallel_attn": False, "bias": True},
    ),
    *_cases(
        "falcon_rw",
        "FalconConfig",
        "FalconForCausalLM",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        # Their eager form adds ALiBi to the scores and once more with the mask; the default, this one, only once.
        about={"attention": "sdpa"},
        sixteen_heads={"hidden_size": 64, "num_attention_heads": 16},
        six_heads={"hidden_size": 48, "num_attention_heads": 6},
        grouped={"new_decoder_architecture": True, "parallel_attn": True, "num_kv_heads": 2},
    ),
    *_cases(
        "phi3",
        "Phi3Config",
        "Phi3ForCausalLM",
        LLAMA,
        window={"sliding_window": 5},
        partial={
            "hidden_size": 64,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
        longrope_short={
            "max_position_embeddings": 2048,
            "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 256},
        },
    ),
    *_cases(
        "phi3",
        "Phi3Config",
        "Phi3ForCausalLM",
        LLAMA,
        about={"ours": by_long_factors, "importing": {"max_length": 256}},
        longrope_long={
            "hidden_size": 64,
            "max_position_embeddings": 256,
            "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 8, "partial_rotary_factor": 0.5},
        },
    ),
    *_cases(
        "starcoder2",
        "Starcoder2Config",
        "Starcoder2ForCausalLM",
        LLAMA,
        biased={},
        window={"sliding_window": 5, "use_bias": False, "num_key_value_heads": 1, "tie_word_embeddings": False},
    ),
    *_cases(
        "glm",
        "GlmConfig",
        "GlmForCausalLM",
        {**LLAMA, "head_dim": 16},
        biased={"attention_bias": True},
        multi_head={"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    *_cases(
        "glm4",
        "Glm4Config",
        "Glm4ForCausalLM",
        {**LLAMA, "head_dim": 16},
        biased={"attention_bias": True},
        multi_head={"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    *_cases(
        "mamba2",
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {**MAMBA2, "state_size": 8, "conv_kernel": 4, "chunk_size": 16, "n_groups": 1},
        plain={},
        groups={"n_groups": 2},
        tied={"num_heads": 8, "head_dim": 8, "conv_kernel": 3, "tie_word_embeddings": True},
    ),
    *_cases(
        "lfm2",
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {**LLAMA, "layer_types": ["conv", "full_attention", "conv"]},
        about={"theirs": unpadded(theirs_causal), "ours": unpadded(ours_causal)},
        hybrid={},
        indexed={
            "layer_types": None,
            "full_attn_idxs": [0, 2],
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    *_cases(
        "recurrent_gemma",
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        RECURRENT_GEMMA,
        about={"centre": 0.0, "theirs": unpadded(theirs_causal), "ours": unpadded(ours_causal)},
        griffin={"num_hidden_layers": 5, "attention_window_size": 6},
        attention={"block_types": ["attention", "recurrent"], "num_key_value_heads": 2, "attention_bias": True},
    ),
    *_cases(
        "olmo2",
        "Olmo2Config",
        "Olmo2ForCausalLM",
        LLAMA,
        plain={},
        biased={"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True},
    ),
    *_cases(
        "olmo3",
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {**LLAMA, "sliding_window": 5, "num_hidden_layers": 5},
        windows={},
        yarn={"head_dim": 32, "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}},
    ),
    *_cases(
        "gpt_oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        GPT_OSS,
        sinks={"num_hidden_layers": 5},
        all_windows={"layer_types": ["sliding_attention"] * 3, "attention_bias": False, "num_experts_per_tok": 3},
        yarn={"rope_parameters": YARN, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    *_cases(
        "granite",
        "GraniteConfig",
        "GraniteForCausalLM",
        LLAMA,
        scales={
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 1.5,
        },
        plain={"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    *_cases(
        "smollm3",
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {**LLAMA, "num_hidden_layers": 5},
        every_fourth={},
        listed={"no_rope_layers": [1, 0, 0, 1, 1], "tie_word_embeddings": False, "attention_bias": True},
    ),
    *_cases(
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        shared={"shared_expert_intermediate_size": 48},
        first_dense={"shared_expert_intermediate_size": 24, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    *_cases(
        "cohere2",
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {**LLAMA, "sliding_window": 5, "num_hidden_layers": 5},
        windows={"logit_scale": 0.5},
        biased={"attention_bias": True, "head_dim": 16, "num_hidden_layers": 3, "logit_scale": 1.5},
    ),
    *_cases(
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK, "topk_group": 1, "n_group": 1, "rope_parameters": DEEPSEEK_YARN},
        sigmoid={"q_lora_rank": 20, "routed_scaling_factor": 2.5},
        plain={"q_lora_rank": None, "rope_parameters": PLAIN, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        groups={"q_lora_rank": None, "routed_scaling_factor": 1.0, **GROUPS},
    ),
    *_cases(
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**DEEPSEEK, "topk_group": 1, "n_group": 1, "topk_method": "greedy", "norm_topk_prob": False},
        softmax={"q_lora_rank": None, "routed_scaling_factor": 1.0},
        yarn={"q_lora_rank": 20, "routed_scaling_factor": 4.0, "rope_parameters": DEEPSEEK_YARN},
        groups={"q_lora_rank": 20, "routed_scaling_factor": 1.0, "topk_method": "group_limited_greedy", **GROUPS},
    ),
)
