"""Falcon (Almazrouei et al. 2023) in its layouts: 7B, 40B and 180B, 11B, and the RW models."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.interop.families.gpt import head
from llmjax.interop.fields import choose, field, require_same
from llmjax.interop.fused import ACTIVATION_NAMES, ACTIVATIONS, fused_groups, sizes, start
from llmjax.interop.mapping import Family, Row, linear, norm, same
from llmjax.interop.rope import plain, read_rope, write_rope
from llmjax.model.block import layer_slots
from llmjax.model.layers import mlp_width


def read_falcon(theirs: Mapping[str, Any]) -> ConfigDict:
    """Falcon's config.json -> `config.model`.

    7B: one norm for attention and MLP in parallel, multi-query, rotary. 40B, 180B: two norms, grouped queries.
    11B: one norm, grouped queries. RW: serial, multi-head, ALiBi, whose biases are added before the scores are divided
    by sqrt(K) and are rounded to bfloat16.
    """
    c = start(theirs)
    new = bool(theirs.get("new_decoder_architecture", False))
    parallel = bool(theirs.get("parallel_attn", True))
    norms = theirs.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if norms not in (1, 2) or (norms == 2 and parallel and not new) or (new and not parallel):
        raise UserError(
            f"config.json has num_ln_in_parallel_attn={norms}, new_decoder_architecture={new}, parallel_attn={parallel}; "
            "supported: two norms with the new architecture, one with either, and serial blocks with the old one"
        )
    c.vocab_size = field(theirs, "vocab_size")
    c.layers = field(theirs, "num_hidden_layers", "n_layer")
    c.width = field(theirs, "hidden_size", "n_embed")
    c.heads = field(theirs, "num_attention_heads", "n_head")
    c.head_size = c.width // c.heads
    if new:
        c.kv_heads = field(theirs, "num_kv_heads", "n_head_kv", default=c.heads)
    else:
        c.kv_heads = 1 if theirs.get("multi_query", True) else c.heads
    c.max_length = field(theirs, "max_position_embeddings", default=2048)
    c.mlp_width = field(theirs, "ffn_hidden_size", default=4 * c.width)
    c.activation = choose("activation", theirs.get("activation", "gelu"), ACTIVATIONS)
    c.block = "parallel" if parallel else "serial"
    c.shared_norm = norms == 1
    c.bias = ("qkv", "out", "mlp", "norm") if theirs.get("bias", False) else ("norm",)
    c.norm_epsilon = float(field(theirs, "layer_norm_epsilon", default=1e-5))
    c.tie_embeddings = bool(theirs.get("tie_word_embeddings", True))
    c.dropout = float(theirs.get("hidden_dropout") or 0.0)
    c.attention_dropout = float(theirs.get("attention_dropout") or 0.0)
    c.init_std = float(theirs.get("initializer_range", 0.02))
    if theirs.get("alibi", False):
        c.position = "alibi"
        c.alibi_scale = c.head_size**-0.5
        c.alibi_rounded = True
    else:
        read_rope(c, theirs)
    return c


def write_falcon(c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> Falcon's config.json."""
    _, H, G, _ = sizes(c)
    parallel = c.block == "parallel"
    new = parallel and not (c.shared_norm and G in (1, H))
    theirs = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": H,
        "num_kv_heads": G if new else H,
        "new_decoder_architecture": new,
        "multi_query": G == 1,
        "parallel_attn": parallel,
        "num_ln_in_parallel_attn": (1 if c.shared_norm else 2) if new else None,
        "max_position_embeddings": c.max_length,
        "ffn_hidden_size": mlp_width(c),
        "activation": ACTIVATION_NAMES.get(c.activation, c.activation),
        "bias": "qkv" in c.bias,
        "alibi": c.position == "alibi",
        "layer_norm_epsilon": c.norm_epsilon,
        "hidden_dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": c.param_dtype,
        "use_cache": True,
    }
    if c.position != "alibi":
        theirs |= write_rope(c)
    require_same(plain(c), read_falcon(theirs), "falcon")
    return theirs


def falcon_rows(c: ConfigDict) -> Iterator[Row]:
    """Every tensor of Falcon. All layouts of queries, keys and values are by groups of key and value heads."""
    D, H, _, K = sizes(c)
    F, bias = mlp_width(c), "qkv" in c.bias
    norms = {"attention_norm": "input_layernorm"}
    if c.block == "serial":
        norms["mlp_norm"] = "post_attention_layernorm"
    elif not c.shared_norm:
        norms = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}
    yield same("embedding", None, (c.vocab_size, D), "transformer.word_embeddings.weight")
    for i, (prefix, n) in enumerate(layer_slots(c)):
        layer = f"transformer.h.{i}"
        for ours, there in norms.items():
            yield from norm(f"{prefix}/{ours}", n, D, f"{layer}.{there}")
        yield from fused_groups(f"{prefix}/attention", n, c, f"{layer}.self_attention.query_key_value", bias=bias)
        yield from linear(f"{prefix}/attention/out", n, (H, K), (D,), f"{layer}.self_attention.dense", bias=bias)
        yield from linear(f"{prefix}/mlp/up", n, (D,), (F,), f"{layer}.mlp.dense_h_to_4h", bias=bias)
        yield from linear(f"{prefix}/mlp/down", n, (F,), (D,), f"{layer}.mlp.dense_4h_to_h", bias=bias)
    yield from norm("final_norm", None, D, "transformer.ln_f")
    yield from head(c, "lm_head", "transformer.word_embeddings")


FAMILIES: tuple[Family, ...] = (
    Family(
        ("falcon",),
        read_falcon,
        write_falcon,
        falcon_rows,
        ignored=(r"\.rotary_emb\.inv_freq$", r"\.maybe_rotary\.inv_freq$"),
        renames=((r"^(?=(word_embeddings|h|ln_f)\.)", "transformer."),),
    ),
)
