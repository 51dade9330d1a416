"""XLM (Conneau & Lample 2019): a post-norm encoder with language embeddings, bidirectional or causal.

Sinusoidal positions are stored in their files like learned ones, and are read as such. Differences that their forward
pass makes: a causal XLM does not mask padding on the left, and adds no language embedding unless it is given languages.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.fields import choose, field, only, require_same
from llmjax.interop.mapping import Family, Row, linear, norm, same, tied
from llmjax.model.layers import mlp_width


def read_config(theirs: Mapping[str, Any]) -> ConfigDict:
    """config.json -> `config.model`."""
    c = config.base().model
    only(theirs, "asm", False)
    only(theirs, "is_encoder", True)
    architecture = field(theirs, "architectures")[0]
    head = choose("architectures", architecture, {"XLMWithLMHeadModel": True, "XLMModel": False})
    languages = field(theirs, "n_langs", default=1)

    c.vocab_size = field(theirs, "vocab_size", "n_words")
    c.layers = field(theirs, "n_layers", "num_hidden_layers")
    c.width = field(theirs, "emb_dim", "hidden_size")
    c.heads = field(theirs, "n_heads", "num_attention_heads")
    c.mlp_width = 4 * c.width
    c.activation = "gelu" if field(theirs, "gelu_activation", default=True) else "relu"
    c.direction = "causal" if field(theirs, "causal", default=False) else "bidirectional"
    c.position = "learned"
    c.max_length = field(theirs, "max_position_embeddings", default=512)
    c.languages = languages if languages > 1 and field(theirs, "use_lang_emb", default=True) else 0
    c.norm = "layer"
    c.norm_place = "post"
    c.norm_epsilon = float(field(theirs, "layer_norm_eps", default=1e-12))
    c.embedding_norm = True
    c.final_norm = False
    c.dropout = c.embedding_dropout = float(field(theirs, "dropout", default=0.1))
    c.attention_dropout = float(field(theirs, "attention_dropout", default=0.1))
    c.bias = ("qkv", "out", "mlp", "norm", "head") if head else ("qkv", "out", "mlp", "norm")
    c.tie_embeddings = bool(field(theirs, "tie_word_embeddings", default=True)) or not head
    return c


def write_config(c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> config.json. UserError if an XLM cannot be that."""
    theirs = {
        "architectures": ["XLMWithLMHeadModel" if "head" in c.bias else "XLMModel"],
        "model_type": "xlm",
        "vocab_size": c.vocab_size,
        "n_layers": c.layers,
        "emb_dim": c.width,
        "n_heads": c.heads,
        "gelu_activation": c.activation == "gelu",
        "causal": c.direction == "causal",
        "sinusoidal_embeddings": False,
        "max_position_embeddings": c.max_length,
        "n_langs": max(1, c.languages),
        "use_lang_emb": c.languages > 0,
        "layer_norm_eps": c.norm_epsilon,
        "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "tie_word_embeddings": c.tie_embeddings,
    }
    require_same(c, read_config(theirs), "xlm")
    return theirs


def rows(c: ConfigDict) -> Iterable[Row]:
    """Every tensor of a checkpoint, with the head if `c` has its bias."""
    D, F, H, K = c.width, mlp_width(c), c.heads, config.head_size(c)
    head = "head" in c.bias
    body = "transformer." if head else ""
    yield same("embedding", None, (c.vocab_size, D), f"{body}embeddings.weight")
    yield same("position_embedding", None, (c.max_length, D), f"{body}position_embeddings.weight")
    if c.languages:
        yield same("language_embedding", None, (c.languages, D), f"{body}lang_embeddings.weight")
    yield from norm("embedding_norm", None, D, f"{body}layer_norm_emb")
    for i in range(c.layers):
        for part, name in (("query", "q_lin"), ("key", "k_lin"), ("value", "v_lin")):
            yield from linear(f"layers/attention/{part}", i, (D,), (H, K), f"{body}attentions.{i}.{name}", bias=True)
        yield from linear("layers/attention/out", i, (H, K), (D,), f"{body}attentions.{i}.out_lin", bias=True)
        yield from norm("layers/attention_norm", i, D, f"{body}layer_norm1.{i}")
        yield from linear("layers/mlp/up", i, (D,), (F,), f"{body}ffns.{i}.lin1", bias=True)
        yield from linear("layers/mlp/down", i, (F,), (D,), f"{body}ffns.{i}.lin2", bias=True)
        yield from norm("layers/mlp_norm", i, D, f"{body}layer_norm2.{i}")
    if head:
        yield same("head_bias", None, (c.vocab_size,), "pred_layer.proj.bias")
        name = "pred_layer.proj"
        if c.tie_embeddings:
            yield tied(f"{name}.weight", f"{body}embeddings.weight")
        else:
            yield from linear("head", None, (D,), (c.vocab_size,), name)


FAMILIES = (Family(("xlm",), read_config, write_config, rows, (r"position_ids$",)),)
