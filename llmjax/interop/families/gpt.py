"""GPT-2 (Radford et al. 2019), GPT-NeoX and Pythia (Black et al. 2022), and BLOOM (Le Scao et al. 2022)."""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from llmjax.interop.fields import (
    ACTIVATIONS,
    MULTI_HEAD,
    constants,
    field,
    fixed,
    ignored,
    settings,
)
from llmjax.interop.fused import fused_groups, fused_thirds, sizes
from llmjax.interop.mapping import Family, Row, Slot, linear, norm, same, tied
from llmjax.interop.rope import rope
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots

LAYER_NORM = settings(norm="layer", norm_place="pre")
BIASED = ("qkv", "out", "mlp", "norm")
GPT2 = (
    constants(architectures=["GPT2LMHeadModel"]),
    LAYER_NORM,
    settings(bias=BIASED, position="learned"),
    field("vocab_size", "vocab_size"),
    field("n_layer", "layers", also=("num_hidden_layers",)),
    field("n_embd", "width", also=("hidden_size",)),
    field("n_head", "heads", also=("num_attention_heads",)),
    MULTI_HEAD,
    field("n_positions", "max_length", also=("n_ctx", "max_position_embeddings")),
    field("n_inner", "mlp_width", lambda c: 4 * c.width),
    field("activation_function", "activation", "gelu_tanh", table=ACTIVATIONS),
    field("layer_norm_epsilon", "norm_epsilon", 1e-5),
    field(
        "scale_attn_weights",
        "attention_scale",
        0.0,
        kind=bool,
        to_ours=lambda scaled: 0.0 if scaled else 1.0,
        to_theirs=lambda scale: scale != 1.0,
    ),
    field("tie_word_embeddings", "tie_embeddings", True),
    field("resid_pdrop", "dropout", 0.1),
    field("embd_pdrop", "embedding_dropout", 0.1),
    field("attn_pdrop", "attention_dropout", 0.1),
    field("initializer_range", "init_std", 0.02),
    fixed("add_cross_attention", False),
    fixed("scale_attn_by_inverse_layer_idx", False),
    ignored("reorder_and_upcast_attn n_special predict_special_tokens"),
)


NEOX = (
    constants(architectures=["GPTNeoXForCausalLM"]),
    LAYER_NORM,
    settings(shared_norm=False),
    field("vocab_size", "vocab_size"),
    field("num_hidden_layers", "layers"),
    field("hidden_size", "width"),
    field("num_attention_heads", "heads"),
    MULTI_HEAD,
    field("max_position_embeddings", "max_length", 2048),
    field("intermediate_size", "mlp_width"),
    field("hidden_act", "activation", "gelu", table=ACTIVATIONS),
    field("use_parallel_residual", "block", "parallel", table={True: "parallel", False: "serial"}),
    field("attention_bias", "bias", BIASED, table={True: BIASED, False: ("mlp", "norm")}),
    field("layer_norm_eps", "norm_epsilon", 1e-5),
    field("tie_word_embeddings", "tie_embeddings", False),
    field("hidden_dropout", "dropout", 0.0),
    field("attention_dropout", "attention_dropout", 0.0),
    field("initializer_range", "init_std", 0.02),
    rope(fraction=0.25, base_name="rotary_emb_base", fraction_name="rotary_pct"),
    ignored("attention_probs_dropout_prob hidden_dropout_prob"),
)
BLOOM = (
    constants(architectures=["BloomForCausalLM"]),
    LAYER_NORM,
    settings(bias=BIASED, position="alibi", embedding_norm=True, activation="gelu_tanh"),
    field("vocab_size", "vocab_size"),
    field("n_layer", "layers", also=("num_hidden_layers",)),
    field("hidden_size", "width", also=("n_embed",)),
    field("n_head", "heads", also=("num_attention_heads",)),
    MULTI_HEAD,
    settings(mlp_width=lambda c: 4 * c.width),
    field("seq_length", "max_length", 2048),  # only the default size of the cache
    field("layer_norm_epsilon", "norm_epsilon", 1e-5),
    field("tie_word_embeddings", "tie_embeddings", True),
    field("hidden_dropout", "dropout", 0.0),
    field("attention_dropout", "attention_dropout", 0.0),
    field("initializer_range", "init_std", 0.02),
    fixed("apply_residual_connection_post_layernorm", False),
    ignored(
        "n_inner offset_alibi slow_but_exact attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion "
        "skip_bias_add skip_bias_add_qkv"
    ),
)


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
        GPT2,
        gpt2_rows,
        ignored=(r"\.attn\.(bias|masked_bias)$",),
        renames=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
    ),
    Family(
        ("gpt_neox",),
        NEOX,
        neox_rows,
        ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
        renames=((r"^(?=(embed_in|layers|final_layer_norm)\.)", "gpt_neox."),),
    ),
    Family(
        ("bloom",),
        BLOOM,
        bloom_rows,
        renames=((r"^(?=(word_embeddings|word_embeddings_layernorm|h|ln_f)\.)", "transformer."),),
    ),
)
