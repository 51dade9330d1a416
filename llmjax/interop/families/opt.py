"""OPT (Zhang et al. 2022), and Phi 1, 1.5 and 2 (Gunasekar et al. 2023)."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from llmjax.interop.families.gpt import BIASED, LAYER_NORM, head
from llmjax.interop.fields import (
    ACTIVATIONS,
    MULTI_HEAD,
    constants,
    field,
    fixed,
    ignored,
    settings,
)
from llmjax.interop.fused import sizes
from llmjax.interop.mapping import Family, Row, linear, norm, same
from llmjax.interop.rope import rope
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots

OPT = (
    constants(architectures=["OPTForCausalLM"]),
    settings(norm="layer", norm_epsilon=1e-5, position="learned", position_offset=2),
    field("vocab_size", "vocab_size"),
    field("num_hidden_layers", "layers"),
    field("hidden_size", "width"),
    field("num_attention_heads", "heads"),
    MULTI_HEAD,
    field("max_position_embeddings", "max_length", 2048),
    field("ffn_dim", "mlp_width"),
    field("activation_function", "activation", "relu", table=ACTIVATIONS),
    # The 350M model has narrower embeddings, its norms after the sums, and none at the end.
    field("word_embed_proj_dim", "embedding_width", 0),
    settings(embedding_width=lambda c: 0 if c.embedding_width == c.width else c.embedding_width),
    field("do_layer_norm_before", "norm_place", "pre", table={True: "pre", False: "post"}),
    field("_remove_final_layer_norm", "final_norm", True, table={False: True, True: False}),
    settings(final_norm=lambda c: c.final_norm and c.norm_place == "pre"),
    field("enable_bias", "bias", BIASED, table={True: BIASED, False: ("norm",)}),
    field("tie_word_embeddings", "tie_embeddings", True),
    field("dropout", "dropout", 0.1),
    field("attention_dropout", "attention_dropout", 0.0),
    field("layerdrop", "layer_drop", 0.0),
    field("init_std", "init_std", 0.02),
    fixed("layer_norm_elementwise_affine", True),
    ignored("activation_dropout"),
)


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


PHI = (
    constants(architectures=["PhiForCausalLM"]),
    LAYER_NORM,
    settings(block="parallel", shared_norm=True, bias=(*BIASED, "head")),
    field("vocab_size", "vocab_size"),
    field("num_hidden_layers", "layers"),
    field("hidden_size", "width"),
    field("num_attention_heads", "heads"),
    field("num_key_value_heads", "kv_heads", lambda c: c.heads),
    field("head_dim", "head_size", lambda c: c.width // c.heads),
    field("max_position_embeddings", "max_length", 2048),
    field("intermediate_size", "mlp_width"),
    field("hidden_act", "activation", "gelu_tanh", table=ACTIVATIONS),
    field("layer_norm_eps", "norm_epsilon", 1e-5),
    field("tie_word_embeddings", "tie_embeddings", False),
    field("resid_pdrop", "dropout", 0.0),
    field("embd_pdrop", "embedding_dropout", 0.0),
    field("attention_dropout", "attention_dropout", 0.0),
    field("initializer_range", "init_std", 0.02),
    rope(fraction=0.5, fraction_name="partial_rotary_factor"),
    fixed("qk_layernorm", False),
)


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
    Family(("opt",), OPT, opt_rows, renames=((r"^(?=decoder\.)", "model."),)),
    Family(
        ("phi",),
        PHI,
        phi_rows,
        ignored=(r"rotary_emb\.inv_freq$",),
        renames=((r"^(?=(embed_tokens|layers|final_layernorm)\.)", "model."),),
    ),
)
