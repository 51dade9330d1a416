"""GGUF files of Llama- and Gemma-shaped models, as llama.cpp and its kin use them, read like a Hugging Face folder.

The `gguf` package reads and dequantizes. Here the metadata becomes a config.json and a tokenizer.json, tensors get the
names they have at Hugging Face, and what llama.cpp's converter did to them is undone: queries and keys of `llama` files
have the two halves of each head's rotation interleaved, Gemma's norms have 1 added.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmjax.errors import UserError
from llmjax.interop import tokenizer_json
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
BLOCK_BYTES = 1 << 26  # dequantized at a time


def open_file(path: Path) -> "GgufFile":
    """Read the metadata of a GGUF file. Raises UserError if it is missing, damaged or of another architecture."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        import gguf
    except ImportError as error:
        raise UserError("reading GGUF files needs the package `gguf`: pip install 'llmjax[hf]'") from error
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package raises whatever numpy does when a file ends too soon
        raise UserError(f"{path} is no complete GGUF file ({error}): get it again") from error
    try:
        return GgufFile(reader, metadata)
    except UserError as error:
        raise UserError(f"{path} cannot be imported: {error}") from error


class GgufFile:
    """A `tensors.Source` with the config and the tokenizer of the same file."""

    def __init__(self, reader: Any, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self._architecture = str(metadata.get("general.architecture"))
        if self._architecture not in ARCHITECTURES:
            raise UserError(f"its architecture is {self._architecture!r}; known are {', '.join(sorted(ARCHITECTURES))}")
        if self._metadata.get(f"{self._architecture}.expert_count"):
            raise UserError("it has experts; of sparse models the safetensors can be imported")
        self._stored = {}
        for tensor in reader.tensors:
            if tensor.name != ROPE_FACTORS:
                self._stored[_their_name(tensor.name, self._architecture)] = tensor
        self._factors = next((t for t in reader.tensors if t.name == ROPE_FACTORS), None)
        self.tensors = {
            name: Tensor(_dtype(tensor), tuple(int(size) for size in reversed(tensor.shape)))
            for name, tensor in self._stored.items()
        }
        self.config = self._config()

    def read(self, name: str) -> np.ndarray:
        """A tensor under its Hugging Face name: dequantized to float32, or as stored if it is bfloat16."""
        import gguf

        tensor, wanted = self._stored[name], self.tensors[name]
        if wanted.dtype == ml_dtypes.bfloat16:
            array = np.array(tensor.data).reshape(-1).view(ml_dtypes.bfloat16)
        else:
            # By rows, because dequantizing takes several times the memory of what comes out.
            flat = np.empty((len(tensor.data), math.prod(wanted.shape) // len(tensor.data)), wanted.dtype)
            rows = max(1, BLOCK_BYTES // (flat.shape[1] * flat.itemsize))
            for start in range(0, len(flat), rows):
                try:
                    part = gguf.quants.dequantize(tensor.data[start : start + rows], tensor.tensor_type)
                except NotImplementedError as error:
                    raise UserError(
                        f"its tensor {tensor.name} is stored as {tensor.tensor_type.name}, which the package `gguf` "
                        "cannot unpack: get the file in another type, or the model's safetensors"
                    ) from error
                flat[start : start + rows] = part.reshape(-1, flat.shape[1])
            array = flat
        array = array.reshape(wanted.shape)
        if self._architecture == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            array = deinterleave(array, heads)
        if self._architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array - np.float32(1)
        return array

    def _config(self) -> dict[str, Any]:
        arch = self._architecture
        has = self._metadata
        model_type, class_name = ARCHITECTURES[arch]
        config: dict[str, Any] = {"model_type": model_type, "architectures": [class_name]}
        for key, name in KEYS.items():
            if f"{arch}.{key}" in has:
                value = has[f"{arch}.{key}"]
                # Floats are stored with 32 bits: 1e-5 came out as 9.999999747378752e-06.
                config[name] = float(str(np.float32(value))) if isinstance(value, float) else value
        lacking = [key for key in KEYS if KEYS[key] not in config and key not in OPTIONAL]
        if lacking:
            raise UserError(f"its metadata lacks {', '.join(f'{arch}.{key}' for key in lacking)}")
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        if uneven := [name for name, value in config.items() if isinstance(value, list) and name != "architectures"]:
            raise UserError(f"its layers differ in {', '.join(uneven)}, which is not supported")
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        self._check_metadata(config["head_dim"])
        config["vocab_size"] = self.tensors["model.embed_tokens.weight"].shape[0]
        config["tie_word_embeddings"] = "lm_head.weight" not in self.tensors
        config["torch_dtype"] = "float32"
        if arch == "llama":
            config["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in self.tensors
        if scaling := self._rope_scaling():
            config["rope_scaling"] = scaling
        if arch.startswith("gemma"):
            self._add_gemma(config)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            config[f"{name}_token_id"] = has.get(f"tokenizer.ggml.{key}_token_id")
        ends = [config["eos_token_id"], has.get("tokenizer.ggml.eot_token_id"), has.get("tokenizer.ggml.eom_token_id")]
        if len(known := [end for end in dict.fromkeys(ends) if end is not None]) > 1:
            config["eos_token_id"] = known
        return config

    def _check_metadata(self, head_dim: int) -> None:
        """Raise UserError for a key under the architecture's name that is not understood, or says what no family does."""
        start = f"{self._architecture}."
        own = {key.removeprefix(start): value for key, value in self._metadata.items() if key.startswith(start)}
        for key in ("attention.value_length", "rope.dimension_count"):
            if own.get(key, head_dim) != head_dim:
                raise UserError(f"its metadata has {start}{key}={own[key]}; supported: the size of a head, {head_dim}")
        known = {*KEYS, *OTHER_KEYS, *(GEMMA_KEYS if self._architecture.startswith("gemma") else ())}
        left = {f"{start}{key}": value for key, value in own.items() if key not in known and value != 0}
        refuse_unknown("its metadata", left, "import the model's safetensors instead")

    def _add_gemma(self, config: dict[str, Any]) -> None:
        arch, has = self._architecture, self._metadata
        large = config["num_hidden_layers"] == LAYERS_27B[arch]
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
        )
        config["sliding_window"] = self._need(f"{arch}.attention.sliding_window")
        period = has.get(f"{arch}.attention.sliding_window_pattern", WINDOW_PERIODS[arch])
        config["layer_types"] = [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention"
            for i in range(config["num_hidden_layers"])
        ]
        config["hidden_activation"] = "gelu_pytorch_tanh"
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):  # left out, they are the architecture's
            if f"{arch}.{name}" in has:
                config[name] = has[f"{arch}.{name}"]
        if arch == "gemma3":
            config["rope_local_base_freq"] = has.get(f"{arch}.rope.freq_base_swa", GEMMA3_LOCAL_BASE)

    def _need(self, key: str) -> Any:
        if key not in self._metadata:
            raise UserError(f"its metadata lacks {key}")
        return self._metadata[key]

    def _rope_scaling(self) -> dict[str, Any] | None:
        arch, has = self._architecture, self._metadata
        if self._factors is not None:
            base, size = has.get(f"{arch}.rope.freq_base", 10_000.0), self._need(f"{arch}.rope.dimension_count")
            return llama3_scaling(np.asarray(self._factors.data, np.float64), base=base, size=size)
        kind = has.get(f"{arch}.rope.scaling.type", "none")
        if kind == "none" or float(factor := has.get(f"{arch}.rope.scaling.factor", 1.0)) == 1.0:
            return None
        if kind not in ("linear", "yarn"):
            raise UserError(f"its rotary positions are stretched in the way {kind!r}; known are linear and yarn")
        scaling = {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._need(f"{arch}.rope.scaling.original_context_length")
        return scaling

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json."""
        return tokenizer_json.from_gguf(self._metadata, gemma=self._architecture.startswith("gemma"))


def deinterleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the outputs of queries and keys, (out, in) or (out,).

    It rotates neighbouring pairs where Hugging Face rotates the first half of a head with the second.
    """
    paired = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)


def llama3_scaling(factors: np.ndarray, *, base: float, size: int) -> dict[str, Any]:
    """The settings of Llama 3's rotary scaling that divide the frequencies by these factors.

    Only the largest factor is read from them; the others settings are those of all published models, and it is checked
    that they give the same factors.
    """
    factor = float(factors.max())
    turns = 8192 / (2 * math.pi * base ** (np.arange(0, size, 2) / size))
    keep = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - keep) / factor + keep)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(f"its rotary frequencies are divided by factors ({ROPE_FACTORS}) that are not Llama 3's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _their_name(name: str, architecture: str) -> str:
    """The Hugging Face name of a tensor; one that is not known keeps its own, and is reported as not known."""
    if name in OUTER:
        return OUTER[name]
    inner = GEMMA_INNER if architecture.startswith("gemma") else INNER
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, kind = rest.rpartition(".")
    if name.startswith("blk.") and part in inner:
        return f"model.layers.{block}.{inner[part]}.{kind}"
    return name


def _dtype(tensor: Any) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if tensor.tensor_type.name == "BF16" else np.dtype(np.float32)
