"""The published models in the words of their own `config.json`: (class of transformers, keys, values by size).

Independent of configs/models/, so that `parameter_counts.py` compares two descriptions of the same model.
"""

from typing import Any

Model = tuple[str, dict[str, Any], str, dict[str, tuple]]  # class, common keys, keys that differ, their values by size

DENSE = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size"
SWITCH = "num_layers d_model num_heads d_ff num_experts"

MODELS: dict[str, Model] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 50257},
        "n_layer n_embd n_head",
        {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20), "xl": (48, 1600, 25)},
    ),
    "llama": (
        "LlamaForCausalLM",
        {},
        f"{DENSE} vocab_size tie_word_embeddings",
        {
            "llama1-7b": (32, 4096, 32, 32, 11008, 32000, False),
            "llama1-13b": (40, 5120, 40, 40, 13824, 32000, False),
            "llama1-33b": (60, 6656, 52, 52, 17920, 32000, False),
            "llama1-65b": (80, 8192, 64, 64, 22016, 32000, False),
            "llama2-7b": (32, 4096, 32, 32, 11008, 32000, False),
            "llama2-13b": (40, 5120, 40, 40, 13824, 32000, False),
            "llama2-70b": (80, 8192, 64, 8, 28672, 32000, False),
            "llama3-8b": (32, 4096, 32, 8, 14336, 128256, False),
            "llama3-70b": (80, 8192, 64, 8, 28672, 128256, False),
            "llama3.1-8b": (32, 4096, 32, 8, 14336, 128256, False),
            "llama3.1-70b": (80, 8192, 64, 8, 28672, 128256, False),
            "llama3.1-405b": (126, 16384, 128, 8, 53248, 128256, False),
            "llama3.2-1b": (16, 2048, 32, 8, 8192, 128256, True),
            "llama3.2-3b": (28, 3072, 24, 8, 8192, 128256, True),
        },
    ),
    "mistral": (
        "MistralForCausalLM",
        {"vocab_size": 32000, "tie_word_embeddings": False, "sliding_window": 4096},
        DENSE,
        {"7b": (32, 4096, 32, 8, 14336)},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {"vocab_size": 32000, "tie_word_embeddings": False, "num_local_experts": 8},
        DENSE,
        {"8x7b": (32, 4096, 32, 8, 14336), "8x22b": (56, 6144, 48, 8, 16384)},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {},
        f"{DENSE} vocab_size tie_word_embeddings",
        {
            "0.5b": (24, 896, 14, 2, 4864, 151936, True),
            "1.5b": (28, 1536, 12, 2, 8960, 151936, True),
            "3b": (36, 2048, 16, 2, 11008, 151936, True),
            "7b": (28, 3584, 28, 4, 18944, 152064, False),
            "14b": (48, 5120, 40, 8, 13824, 152064, False),
            "32b": (64, 5120, 40, 8, 27648, 152064, False),
            "72b": (80, 8192, 64, 8, 29568, 152064, False),
        },
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {"vocab_size": 151936, "head_dim": 128},
        f"{DENSE} tie_word_embeddings",
        {
            "0.6b": (28, 1024, 16, 8, 3072, True),
            "1.7b": (28, 2048, 16, 8, 6144, True),
            "4b": (36, 2560, 32, 8, 9728, True),
            "8b": (36, 4096, 32, 8, 12288, False),
            "14b": (40, 5120, 40, 8, 17408, False),
            "32b": (64, 5120, 64, 8, 25600, False),
        },
    ),
    "qwen3 moe": (
        "Qwen3MoeForCausalLM",
        {
            "vocab_size": 151936,
            "head_dim": 128,
            "tie_word_embeddings": False,
            "num_experts": 128,
            "mlp_only_layers": [],
        },
        f"{DENSE} moe_intermediate_size",
        {"30b-a3b": (48, 2048, 32, 4, 6144, 768), "235b-a22b": (94, 4096, 64, 4, 12288, 1536)},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"vocab_size": 256000},
        f"{DENSE} head_dim",
        {
            "2b": (26, 2304, 8, 4, 9216, 256),
            "9b": (42, 3584, 16, 8, 14336, 256),
            "27b": (46, 4608, 32, 16, 36864, 128),
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {},
        f"{DENSE} head_dim vocab_size",
        {
            "270m": (18, 640, 4, 1, 2048, 256, 262144),
            "1b": (26, 1152, 4, 1, 6912, 256, 262144),
            "4b": (34, 2560, 8, 4, 10240, 256, 262208),
            "12b": (48, 3840, 16, 8, 15360, 256, 262208),
            "27b": (62, 5376, 32, 16, 21504, 128, 262208),
        },
    ),
    "phi": (
        "PhiForCausalLM",
        {"vocab_size": 51200, "tie_word_embeddings": False},
        "num_hidden_layers hidden_size num_attention_heads intermediate_size partial_rotary_factor",
        {
            "phi-1": (24, 2048, 32, 8192, 0.5),
            "phi-1.5": (24, 2048, 32, 8192, 0.5),
            "phi-2": (32, 2560, 32, 10240, 0.4),
        },
    ),
    "falcon": (
        "FalconForCausalLM",
        {},
        "num_hidden_layers hidden_size num_attention_heads num_kv_heads vocab_size"
        " new_decoder_architecture multi_query parallel_attn alibi bias tie_word_embeddings",
        {
            "rw-1b": (24, 2048, 32, 32, 50304, False, False, False, True, True, True),
            "7b": (32, 4544, 71, 1, 65024, False, True, True, False, False, True),
            "40b": (60, 8192, 128, 8, 65024, True, True, True, False, False, True),
            "180b": (80, 14848, 232, 8, 65024, True, True, True, False, False, False),
        },
    ),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 50272, "max_position_embeddings": 2048},
        "num_hidden_layers hidden_size num_attention_heads ffn_dim word_embed_proj_dim do_layer_norm_before",
        {
            "125m": (12, 768, 12, 3072, 768, True),
            "350m": (24, 1024, 16, 4096, 512, False),
            "1.3b": (24, 2048, 32, 8192, 2048, True),
            "2.7b": (32, 2560, 32, 10240, 2560, True),
            "6.7b": (32, 4096, 32, 16384, 4096, True),
            "13b": (40, 5120, 40, 20480, 5120, True),
            "30b": (48, 7168, 56, 28672, 7168, True),
            "66b": (64, 9216, 72, 36864, 9216, True),
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        {"vocab_size": 250880},
        "n_layer hidden_size n_head",
        {
            "560m": (24, 1024, 16),
            "1b1": (24, 1536, 16),
            "1b7": (24, 2048, 16),
            "3b": (30, 2560, 32),
            "7b1": (30, 4096, 32),
            "176b": (70, 14336, 112),
        },
    ),
    "neox": (
        "GPTNeoXForCausalLM",
        {"rotary_pct": 0.25, "tie_word_embeddings": False},
        "num_hidden_layers hidden_size num_attention_heads intermediate_size vocab_size",
        {
            "pythia-14m": (6, 128, 4, 512, 50304),
            "pythia-31m": (6, 256, 8, 1024, 50304),
            "pythia-70m": (6, 512, 8, 2048, 50304),
            "pythia-160m": (12, 768, 12, 3072, 50304),
            "pythia-410m": (24, 1024, 16, 4096, 50304),
            "pythia-1b": (16, 2048, 8, 8192, 50304),
            "pythia-1.4b": (24, 2048, 16, 8192, 50304),
            "pythia-2.8b": (32, 2560, 32, 10240, 50304),
            "pythia-6.9b": (32, 4096, 32, 16384, 50432),
            "pythia-12b": (36, 5120, 40, 20480, 50688),
            "neox-20b": (44, 6144, 64, 24576, 50432),
        },
    ),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        {"vocab_size": 32128, "d_kv": 64},
        f"{SWITCH} num_decoder_layers num_sparse_encoder_layers num_sparse_decoder_layers",
        {
            **{f"base-{e}": (12, 768, 12, 3072, e, 12, 6, 6) for e in (8, 16, 32, 64, 128, 256)},
            "large-128": (24, 1024, 16, 4096, 128, 24, 12, 12),
        },
    ),
    "bert": (
        "BertForPreTraining",
        {"vocab_size": 30522},
        "num_hidden_layers hidden_size num_attention_heads intermediate_size",
        {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)},
    ),
    "roberta": (
        "RobertaForMaskedLM",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        "num_hidden_layers hidden_size num_attention_heads intermediate_size",
        {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)},
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        {"vocab_size": 32000},
        "n_layer d_model n_head d_inner",
        {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)},
    ),
    "xlm": (
        "XLMWithLMHeadModel",
        {"max_position_embeddings": 512},
        "n_layers emb_dim n_heads vocab_size n_langs use_lang_emb causal",
        {
            "mlm-17": (16, 1280, 16, 200000, 17, False, False),
            "mlm-100": (16, 1280, 16, 200000, 100, False, False),
            "mlm-en": (12, 2048, 16, 30145, 1, False, False),
            "clm-enfr": (6, 1024, 8, 64139, 2, True, False),
            "mlm-enfr": (6, 1024, 8, 64139, 2, True, False),
            "tlm-15": (12, 1024, 8, 95000, 15, True, False),
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 32128},
        "num_layers d_model num_heads d_kv d_ff feed_forward_proj tie_word_embeddings",
        {
            "small": (6, 512, 8, 64, 2048, "relu", True),
            "base": (12, 768, 12, 64, 3072, "relu", True),
            "large": (24, 1024, 16, 64, 4096, "relu", True),
            "3b": (24, 1024, 32, 128, 16384, "relu", True),
            "11b": (24, 1024, 128, 128, 65536, "relu", True),
            "v1.1-small": (8, 512, 6, 64, 1024, "gated-gelu", False),
            "v1.1-base": (12, 768, 12, 64, 2048, "gated-gelu", False),
            "v1.1-large": (24, 1024, 16, 64, 2816, "gated-gelu", False),
            "v1.1-xl": (24, 2048, 32, 64, 5120, "gated-gelu", False),
            "v1.1-xxl": (24, 4096, 64, 64, 10240, "gated-gelu", False),
        },
    ),
    "griffin": (
        "RecurrentGemmaForCausalLM",
        {"vocab_size": 256000, "num_key_value_heads": 1},
        "num_hidden_layers hidden_size num_attention_heads intermediate_size lru_width",
        {"recurrentgemma-2b": (26, 2560, 10, 15360, 2560), "recurrentgemma-9b": (38, 4096, 16, 24576, 4096)},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {"vocab_size": 50288, "head_dim": 64, "n_groups": 1, "state_size": 128, "tie_word_embeddings": True},
        "num_hidden_layers hidden_size num_heads",
        {
            "130m": (24, 768, 24),
            "370m": (48, 1024, 32),
            "780m": (48, 1536, 48),
            "1.3b": (48, 2048, 64),
            "2.7b": (64, 2560, 80),
        },
    ),
}


def count(family: str, size: str) -> int:
    """Parameters of a published model as `transformers` builds it, without memory for any (tied ones count once).

    Raises ImportError where transformers or torch is not installed.
    """
    import torch
    import transformers

    name, common, keys, sizes = MODELS[family]
    cls = getattr(transformers, name)
    settings = {**common, **dict(zip(keys.split(), sizes[size], strict=True))}
    config = cls.config_class(**settings)
    with torch.device("meta"):
        found = cls(config).num_parameters()
    if name.startswith("T5") and not settings["tie_word_embeddings"]:  # that class ties what the published files do not
        found += settings["vocab_size"] * settings["d_model"]
    return found


def find(family: str, size: str) -> str | None:
    """The key of `MODELS` that has this size of a family of configs/models/, if any."""
    return next((key for key, model in MODELS.items() if key.split()[0] == family and size in model[3]), None)
