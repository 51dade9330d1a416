"""GLM 4 (Team GLM 2024): norms before and after each branch, half of each head rotated by neighbouring pairs.

`glm` is the same without the norms after the branches.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.families.gpt import head
from llmjax.interop.families.llama import SILU, SIZES, decoder
from llmjax.interop.fields import constants, field, settings
from llmjax.interop.fused import concatenated, neighbours
from llmjax.interop.mapping import Family, Row, linear, norm, same
from llmjax.interop.rope import rope
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots

GLM = (
    # Without a null the class has a padding id that smaller vocabularies lack.
    constants(architectures=["GlmForCausalLM"], pad_token_id=None),
    *SIZES,
    SILU,
    field("attention_bias", "bias", (), table={False: (), True: ("qkv",)}),
    rope(fraction=0.5, fraction_name="partial_rotary_factor"),
)
GLM4 = (*GLM, constants(architectures=["Glm4ForCausalLM"]), settings(norm_place="sandwich"))


def rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of a checkpoint."""
    D, H, G, K, F = c.width, c.heads, c.kv_heads or c.heads, config.head_size(c), mlp_width(c)
    bias = "qkv" in c.bias
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if c.norm_place == "sandwich":
        norms |= {"attention_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm"}
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer, attention = f"model.layers.{i}", f"{prefix}/attention"
        for ours, theirs in norms.items():
            yield from norm(f"{prefix}/{ours}", n, D, f"{layer}.{theirs}", bias=False)
        for ours, theirs, heads in (("query", "q_proj", H), ("key", "k_proj", G)):
            for row in linear(f"{attention}/{ours}", n, (D,), (heads, K), f"{layer}.self_attn.{theirs}", bias=bias):
                yield neighbours(row, c)
        yield from linear(f"{attention}/value", n, (D,), (G, K), f"{layer}.self_attn.v_proj", bias=bias)
        yield from linear(f"{attention}/out", n, (H, K), (D,), f"{layer}.self_attn.o_proj")
        halves = {f"{prefix}/mlp/gate": (F,), f"{prefix}/mlp/up": (F,)}
        yield from concatenated(halves, n, (D,), f"{layer}.mlp.gate_up_proj")
        yield from linear(f"{prefix}/mlp/down", n, (F,), (D,), f"{layer}.mlp.down_proj")
    yield from norm("final_norm", None, D, "model.norm", bias=False)
    yield from head(c, "lm_head", "model.embed_tokens")


_DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07}
FAMILIES: tuple[Family, ...] = (decoder("glm", GLM, rows, **_DEFAULTS), decoder("glm4", GLM4, rows, **_DEFAULTS))
