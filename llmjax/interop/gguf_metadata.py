"""The metadata of GGUF files and the config.json of the same models, both ways, with the names of their tensors.

The tables say what each architecture of llama.cpp that is known here is called at Hugging Face.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.interop.fields import refuse_unknown
from llmjax.interop.tensors import Tensor

# Of the metadata under the architecture's name -> config.json
KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
# What else is read under the architecture's name, or changes nothing.
OTHER_KEYS = (
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)
GEMMA_KEYS = (
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base_swa",
)
OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_INNER = {
    **INNER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"  # llama.cpp stores what Llama 3's scaling makes of the frequencies, not its settings
# Settings that no GGUF file has and llama.cpp derives from the model's size: the 27B models scale their attention by
# the width, and Gemma's windows repeat every so many layers.
LAYERS_27B = {"gemma2": 46, "gemma3": 62}
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6}
GEMMA3_LOCAL_BASE = 10_000.0


def read_config(
    has: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: np.ndarray | None = None
) -> dict[str, Any]:
    """The config.json of a GGUF file's metadata `has`.

    Args:
        tensors: what the file has, under their Hugging Face names.
        factors: what the file divides the rotary frequencies by, (head_dim / 2,).

    Raises:
        UserError: for metadata that lacks something, is not understood, or says what no family does.
    """
    arch = has["general.architecture"]
    model_type, class_name = ARCHITECTURES[arch]
    config: dict[str, Any] = {"model_type": model_type, "architectures": [class_name]}
    for key, name in KEYS.items():
        if f"{arch}.{key}" in has:
            value = has[f"{arch}.{key}"]
            config[name] = exact(value) if isinstance(value, float) else value
    lacking = [key for key in KEYS if KEYS[key] not in config and key not in OPTIONAL]
    if lacking:
        raise UserError(f"its metadata lacks {', '.join(f'{arch}.{key}' for key in lacking)}")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if uneven := [name for name, value in config.items() if isinstance(value, list) and name != "architectures"]:
        raise UserError(f"its layers differ in {', '.join(uneven)}, which is not supported")
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    _check_metadata(arch, has, config["head_dim"])
    config["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    config["torch_dtype"] = "float32"
    if arch == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in tensors
    if scaling := _rope_scaling(arch, has, factors):
        config["rope_scaling"] = scaling
    if arch.startswith("gemma"):
        _add_gemma(arch, has, config)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = has.get(f"tokenizer.ggml.{key}_token_id")
    ends = [config["eos_token_id"], has.get("tokenizer.ggml.eot_token_id"), has.get("tokenizer.ggml.eom_token_id")]
    if len(known := [end for end in dict.fromkeys(ends) if end is not None]) > 1:
        config["eos_token_id"] = known
    return config


def _check_metadata(arch: str, has: Mapping[str, Any], head_dim: int) -> None:
    """Raise UserError for a key under the architecture's name that is not understood, or says what no family does."""
    start = f"{arch}."
    own = {key.removeprefix(start): value for key, value in has.items() if key.startswith(start)}
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise UserError(f"its metadata has {start}{key}={own[key]}; supported: the size of a head, {head_dim}")
    known = {*KEYS, *OTHER_KEYS, *(GEMMA_KEYS if arch.startswith("gemma") else ())}
    left = {f"{start}{key}": value for key, value in own.items() if key not in known and value != 0}
    refuse_unknown("its metadata", left, "import the model's safetensors instead")


def _add_gemma(arch: str, has: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Add what Gemma's metadata says, and what llama.cpp derives of it."""
    large = config["num_hidden_layers"] == LAYERS_27B[arch]
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    )
    config["sliding_window"] = _need(has, f"{arch}.attention.sliding_window")
    period = has.get(f"{arch}.attention.sliding_window_pattern", WINDOW_PERIODS[arch])
    config["layer_types"] = [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(config["num_hidden_layers"])
    ]
    config["hidden_activation"] = "gelu_pytorch_tanh"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):  # left out, they are the architecture's
        if f"{arch}.{name}" in has:
            config[name] = has[f"{arch}.{name}"]
    if arch == "gemma3":
        config["rope_local_base_freq"] = has.get(f"{arch}.rope.freq_base_swa", GEMMA3_LOCAL_BASE)


def _need(has: Mapping[str, Any], key: str) -> Any:
    if key not in has:
        raise UserError(f"its metadata lacks {key}")
    return has[key]


def _rope_scaling(arch: str, has: Mapping[str, Any], factors: np.ndarray | None) -> dict[str, Any] | None:
    if factors is not None:
        base, size = has.get(f"{arch}.rope.freq_base", 10_000.0), _need(has, f"{arch}.rope.dimension_count")
        return llama3_scaling(factors, base=base, size=size)
    kind = has.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none" or (factor := exact(has.get(f"{arch}.rope.scaling.factor", 1.0))) == 1.0:
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"its rotary positions are stretched in the way {kind!r}; known are linear and yarn")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = _need(has, f"{arch}.rope.scaling.original_context_length")
    return scaling


def exact(value: float) -> float:
    """A number that was stored with 32 bits, as it was written: 1e-5 came out as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def llama3_scaling(factors: np.ndarray, *, base: float, size: int) -> dict[str, Any]:
    """The settings of Llama 3's rotary scaling that divide the frequencies by these factors.

    Only the largest factor is read from them; the others settings are those of all published models, and it is checked
    that they give the same factors.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(scaling, base=base, size=size)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(f"its rotary frequencies are divided by factors ({ROPE_FACTORS}) that are not Llama 3's")
    return scaling


def their_name(name: str, architecture: str) -> str:
    """The Hugging Face name of a tensor; one that is not known keeps its own, and is reported as not known."""
    if name in OUTER:
        return OUTER[name]
    inner = GEMMA_INNER if architecture.startswith("gemma") else INNER
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, kind = rest.rpartition(".")
    if name.startswith("blk.") and part in inner:
        return f"model.layers.{block}.{inner[part]}.{kind}"
    return name


def llama3_factors(scaling: Mapping[str, Any], *, base: float, size: int) -> np.ndarray:
    """What Llama 3's rotary scaling divides the frequencies by, (size / 2,) float32."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * base ** (np.arange(0, size, 2) / size))
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - keep) / scaling["factor"] + keep), np.float32)


def write_metadata(arch: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an architecture from the config.json of the same model, as far as it can say that."""
    said = {key: theirs[name] for key, name in KEYS.items()}
    said |= dict.fromkeys(("attention.value_length", "rope.dimension_count"), theirs["head_dim"])
    said["vocab_size"] = theirs["vocab_size"]
    scaling = theirs.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        said |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
    if scaling.get("rope_type") == "yarn":
        said["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    if arch.startswith("gemma"):
        said["attention.sliding_window"] = theirs["sliding_window"] or 0
        if (period := theirs.get("sliding_window_pattern", WINDOW_PERIODS[arch])) != WINDOW_PERIODS[arch]:
            said["attention.sliding_window_pattern"] = period
        said |= {key: theirs[key] for key in ("attn_logit_softcapping", "final_logit_softcapping") if theirs.get(key)}
    if arch == "gemma3" and theirs["rope_local_base_freq"] != GEMMA3_LOCAL_BASE:
        said["rope.freq_base_swa"] = theirs["rope_local_base_freq"]
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in said.items()}}


def gguf_name(name: str, architecture: str) -> str:
    """The name in a GGUF file of a tensor with this Hugging Face name, the reverse of `their_name`."""
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    if name in outer:
        return outer[name]
    inner = GEMMA_INNER if architecture.startswith("gemma") else INNER
    block, _, rest = name.removeprefix("model.layers.").partition(".")
    part, _, kind = rest.rpartition(".")
    here = next(ours for ours, theirs in inner.items() if theirs == part)
    return f"blk.{block}.{here}.{kind}"
