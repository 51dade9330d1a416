"""StarCoder 2 (Lozhkov et al. 2024): LayerNorm, biases, an MLP without a gate, rotary positions, perhaps a window."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.families.gpt import BIASED, head
from llmjax.interop.families.llama import SIZES, decoder, windows
from llmjax.interop.fields import ACTIVATIONS, constants, field, fixed, ignored, settings
from llmjax.interop.mapping import Family, Row, linear, norm, same
from llmjax.interop.rope import rope
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots

STARCODER2 = (
    constants(architectures=["Starcoder2ForCausalLM"]),
    settings(norm="layer"),
    *(entry for entry in SIZES if "rms_norm_eps" not in entry.names),
    field("norm_epsilon", "norm_epsilon", 1e-5),
    field("hidden_act", "activation", "gelu_tanh", table={"gelu_pytorch_tanh": "gelu_tanh", **ACTIVATIONS}),
    field("use_bias", "bias", BIASED, table={True: BIASED, False: ("norm",)}),
    field("residual_dropout", "dropout", 0.0),
    field("embedding_dropout", "embedding_dropout", 0.0),
    windows("all"),
    fixed("mlp_type", "default"),
    fixed("norm_type", "layer_norm"),
    fixed("scale_attn_weights", True),
    # The class reads hidden_act and norm_epsilon, and takes softmaxes in float32 always.
    ignored("activation_function layer_norm_epsilon attention_softmax_in_fp32 scale_attention_softmax_in_fp32"),
    rope(),
)


def rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of a checkpoint."""
    D, H, G, K, F = c.width, c.heads, c.kv_heads or c.heads, config.head_size(c), mlp_width(c)
    bias = "qkv" in c.bias
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer, attention = f"model.layers.{i}", f"{prefix}/attention"
        yield from norm(f"{prefix}/attention_norm", n, D, f"{layer}.input_layernorm")
        for ours, there, heads in (("query", "q_proj", H), ("key", "k_proj", G), ("value", "v_proj", G)):
            yield from linear(f"{attention}/{ours}", n, (D,), (heads, K), f"{layer}.self_attn.{there}", bias=bias)
        yield from linear(f"{attention}/out", n, (H, K), (D,), f"{layer}.self_attn.o_proj", bias=bias)
        yield from norm(f"{prefix}/mlp_norm", n, D, f"{layer}.post_attention_layernorm")
        yield from linear(f"{prefix}/mlp/up", n, (D,), (F,), f"{layer}.mlp.c_fc", bias=bias)
        yield from linear(f"{prefix}/mlp/down", n, (F,), (D,), f"{layer}.mlp.c_proj", bias=bias)
    yield from norm("final_norm", None, D, "model.norm")
    yield from head(c, "lm_head", "model.embed_tokens")


FAMILIES: tuple[Family, ...] = (
    decoder(
        "starcoder2", STARCODER2, rows, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True
    ),
)
