"""XLNet (Yang et al. 2019): two streams, relative positions with two biases, relative segments, memory.

Their `perm_mask` and `target_mapping` are our `orders_BL` and `queries`; their `mems` are our memory. Relative segments
make no difference while all tokens are of one type, so that leaving `types_BL` out equals leaving out `token_type_ids`.
Theirs lets every token see all of the memory; ours hides the memory of padding and of other documents.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.errors import UserError
from llmjax.interop.fields import choose, field, only, require_same
from llmjax.interop.mapping import Family, Row, Slot, linear, norm, same, tied
from llmjax.model.layers import mlp_width

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}


def read_config(theirs: Mapping[str, Any]) -> ConfigDict:
    """config.json -> `config.model`."""
    c = config.base().model
    only(theirs, "bi_data", False)
    only(theirs, "same_length", False)
    only(theirs, "attn_type", "bi", "uni")
    if field(theirs, "clamp_len", default=-1) > 0:
        raise UserError(f"config.json has clamp_len={theirs['clamp_len']!r}; supported: -1 (distances are not clamped)")
    architecture = field(theirs, "architectures")[0]
    head = choose("architectures", architecture, {"XLNetLMHeadModel": True, "XLNetModel": False})

    c.vocab_size = field(theirs, "vocab_size", "n_token")
    c.layers = field(theirs, "n_layer", "num_hidden_layers")
    c.width = field(theirs, "d_model", "hidden_size")
    c.heads = field(theirs, "n_head", "num_attention_heads")
    c.mlp_width = field(theirs, "d_inner", default=4 * c.width)
    c.activation = choose("ff_activation", field(theirs, "ff_activation", default="gelu"), ACTIVATIONS)
    only(theirs, "d_head", c.width // c.heads)
    c.direction = "causal" if theirs.get("attn_type") == "uni" else "bidirectional"
    c.two_stream = True
    c.position = "xlnet"
    c.types = 2  # of which only "the same" and "another" are told apart
    c.norm = "layer"
    c.norm_place = "post"
    c.norm_epsilon = float(field(theirs, "layer_norm_eps", default=1e-12))
    c.final_norm = False
    c.dropout = c.embedding_dropout = c.attention_dropout = float(field(theirs, "dropout", default=0.1))
    c.bias = ("mlp", "norm", "head") if head else ("mlp", "norm")
    c.tie_embeddings = bool(field(theirs, "tie_word_embeddings", default=True)) or not head
    return c


def write_config(c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> config.json. UserError if an XLNet cannot be that."""
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    theirs = {
        "architectures": ["XLNetLMHeadModel" if "head" in c.bias else "XLNetModel"],
        "model_type": "xlnet",
        "vocab_size": c.vocab_size,
        "n_layer": c.layers,
        "d_model": c.width,
        "n_head": c.heads,
        "d_inner": mlp_width(c),
        "ff_activation": activations.get(c.activation, c.activation),
        "attn_type": "uni" if c.direction == "causal" else "bi",
        "bi_data": False,
        "clamp_len": -1,
        "same_length": False,
        "mem_len": None,  # whatever memory is given is kept
        "layer_norm_eps": c.norm_epsilon,
        "dropout": c.dropout,
        "tie_word_embeddings": c.tie_embeddings,
    }
    require_same(c, read_config(theirs), "xlnet")
    return theirs


def rows(c: ConfigDict) -> Iterable[Row]:
    """Every tensor of a checkpoint, with the head if `c` has its bias. Theirs keep the heads' dimensions apart, as ours do."""
    D, F, H, K = c.width, mlp_width(c), c.heads, config.head_size(c)
    head = "head" in c.bias
    body = "transformer." if head else ""
    yield same("embedding", None, (c.vocab_size, D), f"{body}word_embedding.weight")
    yield same("query_embedding", None, (D,), f"{body}mask_emb", theirs_shape=(1, 1, D))
    for i in range(c.layers):
        ours, theirs = "layers/attention", f"{body}layer.{i}.rel_attn"
        for part, name in (("query", "q"), ("key", "k"), ("value", "v"), ("position", "r")):
            yield same(f"{ours}/{part}/kernel", i, (D, H, K), f"{theirs}.{name}", theirs_shape=(D, H, K))
        yield Row(  # theirs is (D, H, K)
            (Slot(f"{ours}/out/kernel", i, (H, K, D)),),
            (f"{theirs}.o",),
            lambda a: [np.ascontiguousarray(a[0].transpose(1, 2, 0))],
            lambda a: [np.ascontiguousarray(a[0].transpose(2, 0, 1))],
            shapes=((D, H, K),),
        )
        for part, name in (("content_bias", "r_w_bias"), ("position_bias", "r_r_bias"), ("type_bias", "r_s_bias")):
            yield same(f"{ours}/{part}", i, (H, K), f"{theirs}.{name}", theirs_shape=(H, K))
        yield same(f"{ours}/type_embedding", i, (2, H, K), f"{theirs}.seg_embed")
        yield from norm("layers/attention_norm", i, D, f"{theirs}.layer_norm")
        yield from linear("layers/mlp/up", i, (D,), (F,), f"{body}layer.{i}.ff.layer_1", bias=True)
        yield from linear("layers/mlp/down", i, (F,), (D,), f"{body}layer.{i}.ff.layer_2", bias=True)
        yield from norm("layers/mlp_norm", i, D, f"{body}layer.{i}.ff.layer_norm")
    if head:
        yield same("head_bias", None, (c.vocab_size,), "lm_loss.bias")
        name = "lm_loss"
        if c.tie_embeddings:
            yield tied(f"{name}.weight", f"{body}word_embedding.weight")
        else:
            yield from linear("head", None, (D,), (c.vocab_size,), name)


FAMILIES = (Family(("xlnet",), read_config, write_config, rows),)
