"""Llama (Touvron et al. 2023) and its relatives: Mistral, Mixtral, Qwen 2 and 3 (also sparse), Gemma 1 to 3.

All have rotary positions, RMS norms and gated MLPs, and the same names of tensors. They differ in biases, norms of
queries and keys, windows, experts, and Gemma in its embedding scale, zero-centred norms, soft caps and second norms.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.errors import UserError
from llmjax.interop.experts import expert_rows, fused_expert_rows, sparse_layers
from llmjax.interop.fields import choose, only, require_same
from llmjax.interop.mapping import Family, Row, linear, same, tied
from llmjax.interop.rope import plain, read_dictionary, read_rope, write_rope
from llmjax.model.block import layer_slots, sections
from llmjax.model.layers import mlp_width

GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "relu": "reglu",
}
LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}


@dataclass(frozen=True)
class Kind:
    """A model type: what sets it apart from Llama, and what its config.json may leave out."""

    model_type: str
    classes: str  # what its class names begin with
    defaults: Mapping[str, Any] = field(default_factory=dict)
    attention_bias: bool = False  # whether there is such a setting
    windows: str = "none"  # which layers have one: none, all, or some (layer_types)
    qk_norm: bool = False
    gemma: int = 0  # 1, 2 or 3
    expert_names: str = ""  # of the sparse block and of the gate's, down's and up's matrix


LLAMA = Kind("llama", "Llama", attention_bias=True)
MISTRAL = Kind("mistral", "Mistral", {"sliding_window": 4096, "num_key_value_heads": 8}, windows="all")
MIXTRAL = Kind(
    "mixtral",
    "Mixtral",
    {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    windows="all",
    expert_names="block_sparse_moe w1 w2 w3",
)
QWEN2 = Kind(
    "qwen2", "Qwen2", {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}, windows="some"
)
QWEN3 = Kind(
    "qwen3",
    "Qwen3",
    {**QWEN2.defaults, "head_dim": 128},
    attention_bias=True,
    windows="some",
    qk_norm=True,
)
QWEN3_MOE = Kind(
    "qwen3_moe",
    "Qwen3Moe",
    {"num_key_value_heads": 4, "sliding_window": 4096, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    attention_bias=True,
    windows="all",
    qk_norm=True,
    expert_names="mlp gate_proj down_proj up_proj",
)
GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
GEMMA = Kind("gemma", "Gemma", {**GEMMA_DEFAULTS, "num_key_value_heads": 16}, attention_bias=True, gemma=1)
GEMMA2 = Kind(
    "gemma2",
    "Gemma2",
    {
        **GEMMA_DEFAULTS,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
    },
    attention_bias=True,
    windows="some",
    gemma=2,
)
# The text part of published Gemma 3 models says only what differs from the 2B model that the class describes.
GEMMA3 = Kind(
    "gemma3_text",
    "Gemma3",
    {
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
    attention_bias=True,
    windows="some",
    qk_norm=True,
    gemma=3,
)


def read_config(kind: Kind, theirs: Mapping[str, Any]) -> ConfigDict:
    """config.json -> `config.model`. UserError names a field whose value is not supported."""
    if theirs.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config; supported: unquantized weights (float32, bfloat16, float16)"
        )
    if theirs.get("model_type") == "gemma3":  # text and images: the text part
        theirs = {"tie_word_embeddings": theirs.get("tie_word_embeddings", True), **(theirs.get("text_config") or {})}
    theirs = {**kind.defaults, **theirs}
    lacking = [name for name in REQUIRED if name not in theirs]
    if lacking:
        raise UserError(f"config.json lacks {', '.join(lacking)}; add them as in the model type's published configs")
    c = config.base().model
    c.vocab_size = theirs["vocab_size"]
    c.layers, c.width, c.heads = theirs["num_hidden_layers"], theirs["hidden_size"], theirs["num_attention_heads"]
    c.kv_heads = theirs.get("num_key_value_heads") or c.heads
    c.head_size = theirs.get("head_dim") or c.width // c.heads
    c.mlp_width = theirs["intermediate_size"]
    c.max_length = theirs["max_position_embeddings"]
    c.norm_epsilon = float(theirs.get("rms_norm_eps", 1e-6))
    c.tie_embeddings = bool(theirs.get("tie_word_embeddings", False))
    c.attention_dropout = float(theirs.get("attention_dropout") or 0.0)
    c.init_std = float(theirs.get("initializer_range", c.init_std))
    c.qk_norm = kind.qk_norm
    activation = theirs.get("hidden_activation") or theirs.get("hidden_act") or "silu"
    c.activation = choose("hidden_act", activation, GATED)
    c.bias = read_bias(kind, theirs)
    if kind.gemma == 3:
        read_gemma3_rope(c, theirs)
    else:
        read_rope(c, theirs)
    read_windows(kind, c, theirs)
    if kind.expert_names:
        read_experts(kind, c, theirs)
    if kind.gemma:
        read_gemma(kind, c, theirs)
    return c


REQUIRED = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


def read_bias(kind: Kind, theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that have biases."""
    if not kind.attention_bias:
        only(theirs, "attention_bias", False)
    if kind is not LLAMA:
        only(theirs, "mlp_bias", False)
    attention = ("qkv",) if kind is QWEN2 else ("qkv", "out") if theirs.get("attention_bias") else ()
    return (*attention, "mlp") if theirs.get("mlp_bias") else attention


def read_windows(kind: Kind, c: ConfigDict, theirs: Mapping[str, Any]) -> None:
    """Set pattern and window: the shortest pattern that says which layers have one."""
    types = theirs.get("layer_types")
    switched = kind in (QWEN2, QWEN3, QWEN3_MOE)  # these have a window only where this is set too
    window = theirs.get("sliding_window") if theirs.get("use_sliding_window") or not switched else None
    if kind.windows != "some":
        window = window if kind.windows == "all" else None
        kinds = ["local" if window else "global"] * c.layers
        if types and [LAYER_TYPES.get(t) for t in types] != kinds:
            raise UserError(
                f"config.json has layer_types={types}; supported for {kind.model_type}: {kinds[0]} in all layers"
            )
    elif types:
        kinds = [choose("layer_types", t, LAYER_TYPES) for t in types]
    elif kind.gemma:
        period = theirs["sliding_window_pattern"]
        kinds = ["local" if (i + 1) % period else "global" for i in range(c.layers)]
    else:
        kinds = ["local" if window and i >= theirs["max_window_layers"] else "global" for i in range(c.layers)]
    if len(kinds) != c.layers:
        raise UserError(f"config.json has {len(kinds)} layer_types for num_hidden_layers={c.layers}")
    if "local" in kinds and not window:
        raise UserError(f"config.json has layers with sliding_attention and sliding_window={window!r}; give its size")
    period = next(p for p in range(1, c.layers + 1) if all(kinds[i] == kinds[i % p] for i in range(c.layers)))
    c.pattern = tuple(kinds[:period])
    c.window = window if "local" in kinds else c.window


def read_experts(kind: Kind, c: ConfigDict, theirs: Mapping[str, Any]) -> None:
    """Set the keys of `c.moe`."""
    experts = theirs.get("num_local_experts", theirs.get("num_experts", 128))
    c.moe.experts, c.moe.active = experts, theirs["num_experts_per_tok"]
    c.moe.balance_loss, c.moe.z_loss = float(theirs.get("router_aux_loss_coef", 0.001)), 0.0
    c.moe.balance_over = "layers"
    c.moe.jitter = float(theirs.get("router_jitter_noise", 0.0))
    if kind is QWEN3_MOE:
        c.moe.width = theirs["moe_intermediate_size"]
        c.moe.normalize = bool(theirs.get("norm_topk_prob", False))
        c.moe.every = theirs.get("decoder_sparse_step") or 1
        dense = theirs.get("mlp_only_layers") or []
        if sorted(dense) != list(range(len(dense))) or (dense and c.moe.every > 1):
            raise UserError(
                f"config.json has mlp_only_layers={dense} with decoder_sparse_step={c.moe.every}; "
                "supported: the first layers, with a step of 1"
            )
        c.moe.first = len(dense)


def read_gemma(kind: Kind, c: ConfigDict, theirs: Mapping[str, Any]) -> None:
    """Set what only Gemma has."""
    only(theirs, "use_bidirectional_attention", False)
    c.norm_zero_centered = True
    c.embedding_scale = float(c.width) ** 0.5
    if kind.gemma == 1:
        # Published files say "gelu" and mean its approximation, as the first release of the class took it.
        c.activation = "geglu_tanh" if c.activation == "geglu" else c.activation
        return
    c.norm_place = "sandwich"
    c.attention_scale = float(theirs["query_pre_attn_scalar"]) ** -0.5
    c.logit_soft_cap = float(theirs.get("final_logit_softcapping") or 0.0)
    if kind.gemma == 2:
        c.attention_soft_cap = float(theirs.get("attn_logit_softcapping") or 0.0)
    else:
        only(theirs, "attn_logit_softcapping", None)  # there is such a field, which the model never looks at


def read_gemma3_rope(c: ConfigDict, theirs: Mapping[str, Any]) -> None:
    """Set the rotary keys: one base, perhaps stretched, for layers that see everything, and one for those with a window."""
    nested = theirs.get("rope_parameters") or {}
    full = {**(nested.get("full_attention") or {}), **(theirs.get("rope_scaling") or {})}
    local = nested.get("sliding_attention") or {}
    read_dictionary(c, full, theirs)
    if local.get("rope_type", "default") != "default":
        raise UserError(
            f"config.json has rope_parameters for sliding_attention of {local}; supported: rope_type 'default'"
        )
    c.position = "rotary"
    c.rotary_base = float(full.get("rope_theta", theirs["rope_theta"]))
    c.rotary_local_base = float(local.get("rope_theta", theirs["rope_local_base_freq"]))


def write_config(kind: Kind, c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> config.json. UserError, naming the settings, if a model of this type cannot be that."""
    gates = {ours: theirs for theirs, ours in reversed(GATED.items())}
    theirs = {
        "architectures": [f"{kind.classes}ForCausalLM"],
        "model_type": kind.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": mlp_width(c),
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads or c.heads,
        "head_dim": config.head_size(c),
        "max_position_embeddings": c.max_length,
        "hidden_activation" if kind.gemma > 1 else "hidden_act": gates.get(c.activation, c.activation),
        "rms_norm_eps": c.norm_epsilon,
        "initializer_range": c.init_std,
        "attention_dropout": c.attention_dropout,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": c.param_dtype,
        "use_cache": True,
        **write_rope(c),
        **written_windows(kind, c),
    }
    if kind.attention_bias:
        theirs["attention_bias"] = "out" in c.bias
    if kind is LLAMA:
        theirs["mlp_bias"] = "mlp" in c.bias
    if kind.gemma == 3:
        theirs["rope_local_base_freq"] = c.rotary_local_base or c.rotary_base
    if kind.gemma > 1:
        theirs["query_pre_attn_scalar"] = round((c.attention_scale or config.head_size(c) ** -0.5) ** -2)
        theirs["final_logit_softcapping"] = c.logit_soft_cap or None
        theirs["attn_logit_softcapping"] = c.attention_soft_cap or None
    if kind.expert_names:
        theirs |= {"num_experts_per_tok": c.moe.active, "router_aux_loss_coef": written_balance(c)}
        theirs |= {"num_local_experts" if kind is MIXTRAL else "num_experts": c.moe.experts}
    if kind is MIXTRAL:
        theirs["router_jitter_noise"] = c.moe.jitter
    if kind is QWEN3_MOE:
        theirs |= {"moe_intermediate_size": c.moe.width or mlp_width(c), "norm_topk_prob": c.moe.normalize}
        theirs |= {"decoder_sparse_step": c.moe.every, "mlp_only_layers": list(range(c.moe.first))}
    require_same(plain(c), read_config(kind, theirs), kind.model_type)
    return theirs


def written_balance(c: ConfigDict) -> float:
    """The weight of their balance loss, which is one for all layers and k at balance, that is worth ours at balance."""
    sparse = sum(section.repeats * sum(sparse for _, sparse in section.kinds) for section in sections(c))
    return float(c.moe.balance_loss * (1 if c.moe.balance_over == "layers" else sparse / c.moe.active))


def written_windows(kind: Kind, c: ConfigDict) -> dict[str, Any]:
    """The fields that say which layers have a window."""
    names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    kinds = [c.pattern[i % len(c.pattern)] for i in range(c.layers)]
    window = c.window if "local" in kinds else None
    if kind.windows == "none":
        return {}
    said = {"sliding_window": window}
    if kind in (QWEN2, QWEN3, QWEN3_MOE):
        said["use_sliding_window"] = window is not None
    if kind.windows == "some":
        said["layer_types"] = [names.get(k, k) for k in kinds]
        if not kind.gemma:
            said["max_window_layers"] = kinds.index("local") if window else c.layers
        elif c.pattern == ("local",) * (len(c.pattern) - 1) + ("global",):
            said["sliding_window_pattern"] = len(c.pattern)  # for versions that do not know layer_types
    return said


def rows(kind: Kind, c: ConfigDict) -> Iterator[Row]:
    """Every tensor of a checkpoint."""
    D, H, G, K, F = c.width, c.heads, c.kv_heads or c.heads, config.head_size(c), mlp_width(c)
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if c.norm_place == "sandwich":
        norms |= {"attention_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
        norms |= {"mlp_post_norm": "post_feedforward_layernorm"}
    for i, ((prefix, n), sparse) in enumerate(zip(layer_slots(c), sparse_layers(c), strict=True)):
        layer = f"model.layers.{i}"
        for ours, theirs in norms.items():
            yield same(f"{prefix}/{ours}/scale", n, (D,), f"{layer}.{theirs}.weight")
        attention, there, bias = f"{prefix}/attention", f"{layer}.self_attn", "qkv" in c.bias
        yield from linear(f"{attention}/query", n, (D,), (H, K), f"{there}.q_proj", bias=bias)
        yield from linear(f"{attention}/key", n, (D,), (G, K), f"{there}.k_proj", bias=bias)
        yield from linear(f"{attention}/value", n, (D,), (G, K), f"{there}.v_proj", bias=bias)
        yield from linear(f"{attention}/out", n, (H, K), (D,), f"{there}.o_proj", bias="out" in c.bias)
        if c.qk_norm:
            yield same(f"{attention}/query_norm/scale", n, (K,), f"{there}.q_norm.weight")
            yield same(f"{attention}/key_norm/scale", n, (K,), f"{there}.k_norm.weight")
        if sparse:
            yield from expert_rows(kind.expert_names, c, f"{prefix}/moe", n, layer)
            continue
        for name, inputs, outputs in (("gate", D, F), ("up", D, F), ("down", F, D)):
            bias = "mlp" in c.bias
            yield from linear(f"{prefix}/mlp/{name}", n, (inputs,), (outputs,), f"{layer}.mlp.{name}_proj", bias=bias)
    yield same("final_norm/scale", None, (D,), "model.norm.weight")
    if c.tie_embeddings:
        yield tied("lm_head.weight", "model.embed_tokens.weight")
    else:
        yield from linear("head", None, (D,), (c.vocab_size,), "lm_head")


def _family(kind: Kind, *more_types: str) -> Family:
    return Family(
        (kind.model_type, *more_types),
        functools.partial(read_config, kind),
        functools.partial(write_config, kind),
        functools.partial(rows, kind),
        ignored=(r"rotary_emb\.inv_freq$", r"^(model\.)?(vision_tower|multi_modal_projector)\."),
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(model\.)?(language_model\.)?(model\.)?(?=(embed_tokens|layers|norm)\.)", "model."),
        ),
        other_rows=functools.partial(fused_expert_rows, kind.expert_names) if kind.expert_names else lambda c: (),
    )


FAMILIES: tuple[Family, ...] = (
    *(_family(kind) for kind in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA, GEMMA2)),
    _family(GEMMA3, "gemma3"),
)
