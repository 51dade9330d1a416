"""Command R7B (Cohere 2024): attention and MLP in parallel, and every fourth layer sees everything, without positions.

The other layers have a window and rotate neighbouring pairs of dimensions.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.families.gpt import head
from llmjax.interop.families.llama import SILU, SIZES, decoder, windows
from llmjax.interop.fields import constants, field, fixed, ignored, settings
from llmjax.interop.fused import neighbours
from llmjax.interop.mapping import Family, Row, linear, norm, same
from llmjax.interop.rope import rope
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots

COHERE2 = (
    constants(architectures=["Cohere2ForCausalLM"]),
    settings(norm="layer", block="parallel", shared_norm=True),
    *(entry for entry in SIZES if "rms_norm_eps" not in entry.names),
    SILU,
    field("layer_norm_eps", "norm_epsilon", 1e-5),
    field("logit_scale", "logit_scale", 0.0625),
    field("attention_bias", "bias", (), table={False: (), True: ("qkv", "out")}),
    windows("some", periodic=True, full="nope"),
    rope(),
    fixed("use_qk_norm", False),
    fixed("use_parallel_block", True),
    fixed("use_gated_activation", True),
    fixed("position_embedding_type", "rope_gptj"),
    fixed("rotary_pct", 1.0),
    ignored("order_of_interleaved_layers layer_switch use_embedding_sharing use_parallel_embedding"),
)


def rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of a checkpoint."""
    D, H, G, K, F = c.width, c.heads, c.kv_heads or c.heads, config.head_size(c), mlp_width(c)
    bias = "qkv" in c.bias
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer, attention = f"model.layers.{i}", f"{prefix}/attention"
        yield from norm(f"{prefix}/attention_norm", n, D, f"{layer}.input_layernorm", bias=False)
        for ours, theirs, heads in (("query", "q_proj", H), ("key", "k_proj", G)):
            for row in linear(f"{attention}/{ours}", n, (D,), (heads, K), f"{layer}.self_attn.{theirs}", bias=bias):
                yield neighbours(row, c)
        yield from linear(f"{attention}/value", n, (D,), (G, K), f"{layer}.self_attn.v_proj", bias=bias)
        yield from linear(f"{attention}/out", n, (H, K), (D,), f"{layer}.self_attn.o_proj", bias=bias)
        for name, inputs, outputs in (("gate", D, F), ("up", D, F), ("down", F, D)):
            yield from linear(f"{prefix}/mlp/{name}", n, (inputs,), (outputs,), f"{layer}.mlp.{name}_proj")
    yield from norm("final_norm", None, D, "model.norm", bias=False)
    yield from head(c, "lm_head", "model.embed_tokens")


FAMILIES: tuple[Family, ...] = (
    decoder("cohere2", COHERE2, rows, sliding_window=4096, sliding_window_pattern=4, tie_word_embeddings=True),
)
