"""GPT-2 (Radford et al. 2019), GPT-NeoX and Pythia (Black et al. 2022), and BLOOM (Le Scao et al. 2022)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from llmjax.interop.fields import choose, field, only, require_same
from llmjax.interop.fused import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    fused_groups,
    fused_thirds,
    sizes,
    start,
)
from llmjax.interop.mapping import Family, Row, Slot, linear, norm, same, tied
from llmjax.interop.rope import plain, read_rope, write_rope
from llmjax.model.block import layer_slots
from llmjax.model.layers import mlp_width


def read_gpt2(theirs: Mapping[str, Any]) -> ConfigDict:
    """GPT-2's config.json -> `config.model`."""
    c = start(theirs)
    only(theirs, "add_cross_attention", False)
    only(theirs, "scale_attn_by_inverse_layer_idx", False)
    c.vocab_size = field(theirs, "vocab_size")
    c.layers = field(theirs, "n_layer", "num_hidden_layers")
    c.width = field(theirs, "n_embd", "hidden_size")
    c.heads = field(theirs, "n_head", "num_attention_heads")
    c.kv_heads, c.head_size = c.heads, c.width // c.heads
    c.max_length = field(theirs, "n_positions", "n_ctx", "max_position_embeddings")
    c.mlp_width = field(theirs, "n_inner", default=4 * c.width)
    c.activation = choose("activation_function", theirs.get("activation_function", "gelu_new"), ACTIVATIONS)
    c.position = "learned"
    c.bias = ("qkv", "out", "mlp", "norm")
    c.norm_epsilon = float(field(theirs, "layer_norm_epsilon", default=1e-5))
    c.attention_scale = 0.0 if theirs.get("scale_attn_weights", True) else 1.0
    c.tie_embeddings = bool(theirs.get("tie_word_embeddings", True))
    c.dropout = float(theirs.get("resid_pdrop", 0.1))
    c.embedding_dropout = float(theirs.get("embd_pdrop", 0.1))
    c.attention_dropout = float(theirs.get("attn_pdrop", 0.1))
    c.init_std = float(theirs.get("initializer_range", 0.02))
    return c


def write_gpt2(c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> GPT-2's config.json."""
    theirs = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_layer": c.layers,
        "n_embd": c.width,
        "n_head": c.heads,
        "n_positions": c.max_length,
        "n_inner": mlp_width(c),
        "activation_function": ACTIVATION_NAMES.get(c.activation, c.activation),
        "layer_norm_epsilon": c.norm_epsilon,
        "scale_attn_weights": c.attention_scale != 1.0,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.embedding_dropout,
        "attn_pdrop": c.attention_dropout,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": c.param_dtype,
        "use_cache": True,
    }
    require_same(c, read_gpt2(theirs), "gpt2")
    return theirs


def conv1d(path: str, layer: int, inputs: tuple[int, ...], features: tuple[int, ...], theirs: str) -> list[Row]:
    """GPT-2's `Conv1D`, an `nn.Linear` stored as (in, out)."""
    flat = (math.prod(inputs), math.prod(features))
    kernel = Row(
        (Slot(f"{path}/kernel", layer, inputs + features),),
        (f"{theirs}.weight",),
        lambda a: [a[0].reshape(inputs + features)],
        lambda a: [a[0].reshape(flat)],
        shapes=(flat,),
    )
    return [kernel, same(f"{path}/bias", layer, features, f"{theirs}.bias")]


def gpt2_rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of GPT-2."""
    D, H, _, K = sizes(c)
    F, V = mlp_width(c), c.vocab_size
    yield same("embedding", None, (V, D), "transformer.wte.weight")
    yield same("position_embedding", None, (c.max_length, D), "transformer.wpe.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer = f"transformer.h.{i}"
        yield from norm(f"{prefix}/attention_norm", n, D, f"{layer}.ln_1")
        yield from fused_thirds(f"{prefix}/attention", n, c, f"{layer}.attn.c_attn")
        yield from conv1d(f"{prefix}/attention/out", n, (H, K), (D,), f"{layer}.attn.c_proj")
        yield from norm(f"{prefix}/mlp_norm", n, D, f"{layer}.ln_2")
        yield from conv1d(f"{prefix}/mlp/up", n, (D,), (F,), f"{layer}.mlp.c_fc")
        yield from conv1d(f"{prefix}/mlp/down", n, (F,), (D,), f"{layer}.mlp.c_proj")
    yield from norm("final_norm", None, D, "transformer.ln_f")
    yield from head(c, "lm_head", "transformer.wte")


def head(c: ConfigDict, theirs: str, embedding: str, *, bias: bool = False) -> Iterator[Row]:
    """The output head, or where it is tied the tensor that may repeat the embedding; with `bias` also the bias of the logits."""
    if c.tie_embeddings:
        yield tied(f"{theirs}.weight", f"{embedding}.weight")
    else:
        yield from linear("head", None, (c.width,), (c.vocab_size,), theirs)
    if bias:
        yield same("head_bias", None, (c.vocab_size,), f"{theirs}.bias")


def read_neox(theirs: Mapping[str, Any]) -> ConfigDict:
    """GPT-NeoX's config.json -> `config.model`."""
    c = start(theirs)
    c.vocab_size = field(theirs, "vocab_size")
    c.layers = field(theirs, "num_hidden_layers")
    c.width = field(theirs, "hidden_size")
    c.heads = field(theirs, "num_attention_heads")
    c.kv_heads, c.head_size = c.heads, c.width // c.heads
    c.max_length = field(theirs, "max_position_embeddings", default=2048)
    c.mlp_width = field(theirs, "intermediate_size")
    c.activation = choose("hidden_act", theirs.get("hidden_act", "gelu"), ACTIVATIONS)
    c.block = "parallel" if theirs.get("use_parallel_residual", True) else "serial"
    c.shared_norm = False
    c.bias = ("qkv", "out", "mlp", "norm") if theirs.get("attention_bias", True) else ("mlp", "norm")
    c.norm_epsilon = float(field(theirs, "layer_norm_eps", default=1e-5))
    c.tie_embeddings = bool(theirs.get("tie_word_embeddings", False))
    c.dropout = float(theirs.get("hidden_dropout", 0.0))
    c.attention_dropout = float(theirs.get("attention_dropout", 0.0))
    c.init_std = float(theirs.get("initializer_range", 0.02))
    read_rope(c, theirs, fraction=0.25)
    return c


def write_neox(c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> GPT-NeoX's config.json."""
    rope = write_rope(c)
    theirs = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.max_length,
        "intermediate_size": mlp_width(c),
        "hidden_act": ACTIVATION_NAMES.get(c.activation, c.activation),
        "use_parallel_residual": c.block == "parallel",
        "attention_bias": "qkv" in c.bias,
        "rotary_emb_base": rope["rope_theta"],
        "rotary_pct": c.rotary_fraction,
        "rope_scaling": rope["rope_scaling"],
        "layer_norm_eps": c.norm_epsilon,
        "hidden_dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": c.param_dtype,
        "use_cache": True,
    }
    require_same(plain(c), read_neox(theirs), "gpt_neox")
    return theirs


def neox_rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of GPT-NeoX."""
    D, H, _, K = sizes(c)
    F, bias = mlp_width(c), "qkv" in c.bias
    yield same("embedding", None, (c.vocab_size, D), "gpt_neox.embed_in.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer = f"gpt_neox.layers.{i}"
        yield from norm(f"{prefix}/attention_norm", n, D, f"{layer}.input_layernorm")
        yield from norm(f"{prefix}/mlp_norm", n, D, f"{layer}.post_attention_layernorm")
        yield from fused_groups(f"{prefix}/attention", n, c, f"{layer}.attention.query_key_value", bias=bias)
        yield from linear(f"{prefix}/attention/out", n, (H, K), (D,), f"{layer}.attention.dense", bias=bias)
        yield from linear(f"{prefix}/mlp/up", n, (D,), (F,), f"{layer}.mlp.dense_h_to_4h", bias=True)
        yield from linear(f"{prefix}/mlp/down", n, (F,), (D,), f"{layer}.mlp.dense_4h_to_h", bias=True)
    yield from norm("final_norm", None, D, "gpt_neox.final_layer_norm")
    yield from head(c, "embed_out", "gpt_neox.embed_in")


def read_bloom(theirs: Mapping[str, Any]) -> ConfigDict:
    """BLOOM's config.json -> `config.model`."""
    c = start(theirs)
    only(theirs, "apply_residual_connection_post_layernorm", False)
    c.vocab_size = field(theirs, "vocab_size")
    c.layers = field(theirs, "n_layer", "num_hidden_layers")
    c.width = field(theirs, "n_embed", "hidden_size")
    c.heads = field(theirs, "n_head", "num_attention_heads")
    c.kv_heads, c.head_size = c.heads, c.width // c.heads
    c.max_length = field(theirs, "seq_length", default=2048)  # only the default size of the cache
    c.mlp_width = 4 * c.width
    c.activation = "gelu_tanh"
    c.position = "alibi"
    c.embedding_norm = True
    c.bias = ("qkv", "out", "mlp", "norm")
    c.norm_epsilon = float(field(theirs, "layer_norm_epsilon", default=1e-5))
    c.tie_embeddings = bool(theirs.get("tie_word_embeddings", True))
    c.dropout = float(theirs.get("hidden_dropout", 0.0))
    c.attention_dropout = float(theirs.get("attention_dropout", 0.0))
    c.init_std = float(theirs.get("initializer_range", 0.02))
    return c


def write_bloom(c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> BLOOM's config.json."""
    theirs = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": c.vocab_size,
        "n_layer": c.layers,
        "hidden_size": c.width,
        "n_head": c.heads,
        "seq_length": c.max_length,
        "layer_norm_epsilon": c.norm_epsilon,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": c.param_dtype,
        "use_cache": True,
    }
    require_same(c, read_bloom(theirs), "bloom")
    return theirs


def bloom_rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of BLOOM."""
    D, H, _, K = sizes(c)
    F = mlp_width(c)
    yield same("embedding", None, (c.vocab_size, D), "transformer.word_embeddings.weight")
    yield from norm("embedding_norm", None, D, "transformer.word_embeddings_layernorm")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer = f"transformer.h.{i}"
        yield from norm(f"{prefix}/attention_norm", n, D, f"{layer}.input_layernorm")
        yield from norm(f"{prefix}/mlp_norm", n, D, f"{layer}.post_attention_layernorm")
        yield from fused_groups(f"{prefix}/attention", n, c, f"{layer}.self_attention.query_key_value", bias=True)
        yield from linear(f"{prefix}/attention/out", n, (H, K), (D,), f"{layer}.self_attention.dense", bias=True)
        yield from linear(f"{prefix}/mlp/up", n, (D,), (F,), f"{layer}.mlp.dense_h_to_4h", bias=True)
        yield from linear(f"{prefix}/mlp/down", n, (F,), (D,), f"{layer}.mlp.dense_4h_to_h", bias=True)
    yield from norm("final_norm", None, D, "transformer.ln_f")
    yield from head(c, "lm_head", "transformer.word_embeddings")


FAMILIES: tuple[Family, ...] = (
    Family(
        ("gpt2",),
        read_gpt2,
        write_gpt2,
        gpt2_rows,
        ignored=(r"\.attn\.(bias|masked_bias)$",),
        renames=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
    ),
    Family(
        ("gpt_neox",),
        read_neox,
        write_neox,
        neox_rows,
        ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
        renames=((r"^(?=(embed_in|layers|final_layer_norm)\.)", "gpt_neox."),),
    ),
    Family(
        ("bloom",),
        read_bloom,
        write_bloom,
        bloom_rows,
        renames=((r"^(?=(word_embeddings|word_embeddings_layernorm|h|ln_f)\.)", "transformer."),),
    ),
)
