"""Phi 3, 3.5 and 4 (Abdin et al. 2024): Llama's network with fused tensors, and perhaps a window in all layers."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.families.gpt import head
from llmjax.interop.families.llama import SILU, SIZES, biases, decoder, windows
from llmjax.interop.fields import constants, field, fixed
from llmjax.interop.fused import concatenated
from llmjax.interop.mapping import Family, Row, linear, norm, same
from llmjax.interop.rope import rope
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots

PHI3 = (
    # Without a null the class has a padding id that smaller vocabularies lack.
    constants(architectures=["Phi3ForCausalLM"], pad_token_id=None),
    *SIZES,
    SILU,
    biases(),
    windows("all"),
    fixed("full_attn_mod", 1),
    fixed("interpolate_factor", 1),
    field("resid_pdrop", "dropout", 0.0),
    field("embd_pdrop", "embedding_dropout", 0.0),
    rope(fraction_name="partial_rotary_factor"),
)


def rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of a checkpoint."""
    D, H, G, K, F = c.width, c.heads, c.kv_heads or c.heads, config.head_size(c), mlp_width(c)
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer, attention = f"model.layers.{i}", f"{prefix}/attention"
        yield from norm(f"{prefix}/attention_norm", n, D, f"{layer}.input_layernorm", bias=False)
        heads = {f"{attention}/query": (H, K), f"{attention}/key": (G, K), f"{attention}/value": (G, K)}
        yield from concatenated(heads, n, (D,), f"{layer}.self_attn.qkv_proj")
        yield from linear(f"{attention}/out", n, (H, K), (D,), f"{layer}.self_attn.o_proj")
        yield from norm(f"{prefix}/mlp_norm", n, D, f"{layer}.post_attention_layernorm", bias=False)
        halves = {f"{prefix}/mlp/gate": (F,), f"{prefix}/mlp/up": (F,)}
        yield from concatenated(halves, n, (D,), f"{layer}.mlp.gate_up_proj")
        yield from linear(f"{prefix}/mlp/down", n, (F,), (D,), f"{layer}.mlp.down_proj")
    yield from norm("final_norm", None, D, "model.norm", bias=False)
    yield from head(c, "lm_head", "model.embed_tokens")


FAMILIES: tuple[Family, ...] = (decoder("phi3", PHI3, rows, rms_norm_eps=1e-5),)
