"""OPT (Zhang et al. 2022), and Phi 1, 1.5 and 2 (Gunasekar et al. 2023)."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from llmjax.interop.families.gpt import head
from llmjax.interop.fields import choose, field, only, require_same
from llmjax.interop.fused import ACTIVATION_NAMES, ACTIVATIONS, sizes, start
from llmjax.interop.mapping import Family, Row, linear, norm, same
from llmjax.interop.rope import plain, read_rope, write_rope
from llmjax.model.block import layer_slots
from llmjax.model.layers import mlp_width


def read_opt(theirs: Mapping[str, Any]) -> ConfigDict:
    """OPT's config.json -> `config.model`. The 350M model has its norms after the sums and narrower embeddings."""
    c = start(theirs)
    only(theirs, "layer_norm_elementwise_affine", True)
    c.vocab_size = field(theirs, "vocab_size")
    c.layers = field(theirs, "num_hidden_layers")
    c.width = field(theirs, "hidden_size")
    c.heads = field(theirs, "num_attention_heads")
    c.kv_heads, c.head_size = c.heads, c.width // c.heads
    c.max_length = field(theirs, "max_position_embeddings", default=2048)
    c.mlp_width = field(theirs, "ffn_dim")
    c.activation = choose("activation_function", theirs.get("activation_function", "relu"), ACTIVATIONS)
    c.position, c.position_offset = "learned", 2
    width = field(theirs, "word_embed_proj_dim", default=c.width)
    c.embedding_width = 0 if width == c.width else width
    c.norm_place = "pre" if theirs.get("do_layer_norm_before", True) else "post"
    c.final_norm = c.norm_place == "pre" and not theirs.get("_remove_final_layer_norm", False)
    c.norm_epsilon = 1e-5
    c.bias = ("qkv", "out", "mlp", "norm") if theirs.get("enable_bias", True) else ("norm",)
    c.tie_embeddings = bool(theirs.get("tie_word_embeddings", True))
    c.dropout = float(theirs.get("dropout", 0.1))
    c.attention_dropout = float(theirs.get("attention_dropout", 0.0))
    c.layer_drop = float(theirs.get("layerdrop", 0.0))
    c.init_std = float(theirs.get("init_std", 0.02))
    return c


def write_opt(c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> OPT's config.json."""
    theirs = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.max_length,
        "ffn_dim": mlp_width(c),
        "activation_function": ACTIVATION_NAMES.get(c.activation, c.activation),
        "word_embed_proj_dim": c.embedding_width or c.width,
        "do_layer_norm_before": c.norm_place == "pre",
        "_remove_final_layer_norm": c.norm_place == "pre" and not c.final_norm,
        "enable_bias": "qkv" in c.bias,
        "layer_norm_elementwise_affine": True,
        "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "layerdrop": c.layer_drop,
        "init_std": c.init_std,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": c.param_dtype,
        "use_cache": True,
    }
    require_same(c, read_opt(theirs), "opt")
    return theirs


def opt_rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of OPT."""
    D, H, _, K = sizes(c)
    F, E, bias, body = mlp_width(c), c.embedding_width or c.width, "qkv" in c.bias, "model.decoder"
    yield same("embedding", None, (c.vocab_size, E), f"{body}.embed_tokens.weight")
    yield same("position_embedding", None, (c.position_offset + c.max_length, D), f"{body}.embed_positions.weight")
    if c.embedding_width:
        yield from linear("embedding_projection", None, (E,), (D,), f"{body}.project_in")
        yield from linear("output_projection", None, (D,), (E,), f"{body}.project_out")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer, attention = f"{body}.layers.{i}", f"{prefix}/attention"
        yield from norm(f"{prefix}/attention_norm", n, D, f"{layer}.self_attn_layer_norm")
        yield from norm(f"{prefix}/mlp_norm", n, D, f"{layer}.final_layer_norm")
        for ours, there in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            yield from linear(f"{attention}/{ours}", n, (D,), (H, K), f"{layer}.self_attn.{there}", bias=bias)
        yield from linear(f"{attention}/out", n, (H, K), (D,), f"{layer}.self_attn.out_proj", bias=bias)
        yield from linear(f"{prefix}/mlp/up", n, (D,), (F,), f"{layer}.fc1", bias=bias)
        yield from linear(f"{prefix}/mlp/down", n, (F,), (D,), f"{layer}.fc2", bias=bias)
    if c.final_norm:
        yield from norm("final_norm", None, D, f"{body}.final_layer_norm")
    yield from head(c, "lm_head", f"{body}.embed_tokens")


def read_phi(theirs: Mapping[str, Any]) -> ConfigDict:
    """Phi's config.json -> `config.model`."""
    c = start(theirs)
    only(theirs, "qk_layernorm", False)
    c.vocab_size = field(theirs, "vocab_size")
    c.layers = field(theirs, "num_hidden_layers")
    c.width = field(theirs, "hidden_size")
    c.heads = field(theirs, "num_attention_heads")
    c.kv_heads = field(theirs, "num_key_value_heads", default=c.heads)
    c.head_size = field(theirs, "head_dim", default=c.width // c.heads)
    c.max_length = field(theirs, "max_position_embeddings", default=2048)
    c.mlp_width = field(theirs, "intermediate_size")
    c.activation = choose("hidden_act", theirs.get("hidden_act", "gelu_new"), ACTIVATIONS)
    c.block, c.shared_norm = "parallel", True
    c.bias = ("qkv", "out", "mlp", "norm", "head")
    c.norm_epsilon = float(field(theirs, "layer_norm_eps", default=1e-5))
    c.tie_embeddings = bool(theirs.get("tie_word_embeddings", False))
    c.dropout = float(theirs.get("resid_pdrop", 0.0))
    c.embedding_dropout = float(theirs.get("embd_pdrop", 0.0))
    c.attention_dropout = float(theirs.get("attention_dropout") or 0.0)
    c.init_std = float(theirs.get("initializer_range", 0.02))
    read_rope(c, theirs, fraction=0.5)
    return c


def write_phi(c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> Phi's config.json."""
    theirs = {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads or c.heads,
        "max_position_embeddings": c.max_length,
        "intermediate_size": mlp_width(c),
        "hidden_act": ACTIVATION_NAMES.get(c.activation, c.activation),
        "partial_rotary_factor": c.rotary_fraction,
        "qk_layernorm": False,
        "layer_norm_eps": c.norm_epsilon,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.embedding_dropout,
        "attention_dropout": c.attention_dropout,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": c.param_dtype,
        "use_cache": True,
        **write_rope(c),
    }
    require_same(plain(c), read_phi(theirs), "phi")
    return theirs


def phi_rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of Phi."""
    D, H, G, K = sizes(c)
    F = mlp_width(c)
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer, attention = f"model.layers.{i}", f"{prefix}/attention"
        yield from norm(f"{prefix}/attention_norm", n, D, f"{layer}.input_layernorm")
        for ours, there, heads in (("query", "q_proj", H), ("key", "k_proj", G), ("value", "v_proj", G)):
            yield from linear(f"{attention}/{ours}", n, (D,), (heads, K), f"{layer}.self_attn.{there}", bias=True)
        yield from linear(f"{attention}/out", n, (H, K), (D,), f"{layer}.self_attn.dense", bias=True)
        yield from linear(f"{prefix}/mlp/up", n, (D,), (F,), f"{layer}.mlp.fc1", bias=True)
        yield from linear(f"{prefix}/mlp/down", n, (F,), (D,), f"{layer}.mlp.fc2", bias=True)
    yield from norm("final_norm", None, D, "model.final_layernorm")
    yield from head(c, "lm_head", "model.embed_tokens", bias=True)


FAMILIES: tuple[Family, ...] = (
    Family(("opt",), read_opt, write_opt, opt_rows, renames=((r"^(?=decoder\.)", "model."),)),
    Family(
        ("phi",),
        read_phi,
        write_phi,
        phi_rows,
        ignored=(r"rotary_emb\.inv_freq$",),
        renames=((r"^(?=(embed_tokens|layers|final_layernorm)\.)", "model."),),
    ),
)
