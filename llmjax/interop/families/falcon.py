"""Falcon (Almazrouei et al. 2023) in its layouts: 7B, 40B and 180B, 11B, and the RW models."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.interop.families.gpt import BIASED, LAYER_NORM, head
from llmjax.interop.fields import ACTIVATIONS, Entry, Theirs, constants, field, flag, typed
from llmjax.interop.fused import fused_groups, sizes
from llmjax.interop.mapping import Family, Row, linear, norm, same
from llmjax.interop.rope import rope
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots


def _layout() -> Entry:
    """Parallel or serial blocks, their norms, and the heads of keys.

    7B: one norm for attention and MLP in parallel, multi-query. 40B, 180B: two norms, grouped queries. 11B: one norm,
    grouped queries. RW: serial, multi-head.
    """

    def read(c: ConfigDict, theirs: Theirs) -> None:
        new, parallel = flag(theirs, "new_decoder_architecture"), flag(theirs, "parallel_attn", True)
        norms = theirs.get("num_ln_in_parallel_attn") or (2 if new else 1)
        if norms not in (1, 2) or (norms == 2 and parallel and not new) or (new and not parallel):
            raise UserError(
                f"config.json has num_ln_in_parallel_attn={norms}, new_decoder_architecture={new}, parallel_attn={parallel}; "
                "supported: two norms with the new architecture, one with either, and serial blocks with the old one"
            )
        c.head_size = c.width // c.heads
        if new:
            c.kv_heads = typed("num_kv_heads", theirs.get("num_kv_heads", theirs.get("n_head_kv", c.heads)), int)
        else:
            c.kv_heads = 1 if flag(theirs, "multi_query", True) else c.heads
        c.block = "parallel" if parallel else "serial"
        c.shared_norm = norms == 1

    def write(c: ConfigDict) -> dict[str, Any]:
        parallel = c.block == "parallel"
        new = parallel and not (c.shared_norm and c.kv_heads in (1, c.heads))
        return {
            "num_kv_heads": c.kv_heads if new else c.heads,
            "new_decoder_architecture": new,
            "multi_query": c.kv_heads == 1,
            "parallel_attn": parallel,
            "num_ln_in_parallel_attn": (1 if c.shared_norm else 2) if new else None,
        }

    names = ("new_decoder_architecture", "parallel_attn", "num_ln_in_parallel_attn", "num_kv_heads", "n_head_kv")
    return Entry((*names, "multi_query"), read, write)


def _positions() -> Entry:
    """Rotary, or in RW ALiBi, whose biases are added before the scores are divided by sqrt(K) and rounded to bfloat16."""
    rotary = rope()

    def read(c: ConfigDict, theirs: Theirs) -> None:
        if flag(theirs, "alibi"):
            c.position, c.alibi_scale, c.alibi_rounded = "alibi", c.head_size**-0.5, True
        else:
            rotary.read(c, theirs)

    def write(c: ConfigDict) -> dict[str, Any]:
        alibi = c.position == "alibi"
        return {"alibi": alibi} | ({} if alibi else rotary.write(c))

    return Entry(("alibi", *rotary.names), read, write)


FALCON = (
    constants(architectures=["FalconForCausalLM"]),
    LAYER_NORM,
    field("vocab_size", "vocab_size"),
    field("num_hidden_layers", "layers", also=("n_layer",)),
    field("hidden_size", "width", also=("n_embed",)),
    field("num_attention_heads", "heads", also=("n_head",)),
    _layout(),
    field("bias", "bias", ("norm",), table={True: BIASED, False: ("norm",)}),
    field("max_position_embeddings", "max_length", 2048),
    field("ffn_hidden_size", "mlp_width", lambda c: 4 * c.width),
    field("activation", "activation", "gelu", table=ACTIVATIONS),
    field("layer_norm_epsilon", "norm_epsilon", 1e-5),
    field("tie_word_embeddings", "tie_embeddings", True),
    field("hidden_dropout", "dropout", 0.0),
    field("attention_dropout", "attention_dropout", 0.0),
    field("initializer_range", "init_std", 0.02),
    _positions(),
)


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
        FALCON,
        falcon_rows,
        ignored=(r"\.rotary_emb\.inv_freq$", r"\.maybe_rotary\.inv_freq$"),
        renames=((r"^(?=(word_embeddings|h|ln_f)\.)", "transformer."),),
    ),
)
