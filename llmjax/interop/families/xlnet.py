"""XLNet (Yang et al. 2019): two streams, relative positions with two biases, relative segments, memory.

Their `perm_mask` and `target_mapping` are our `orders_BL` and `queries`; their `mems` are our memory. Relative segments
make no difference while all tokens are of one type, so that leaving `types_BL` out equals leaving out `token_type_ids`.
Theirs lets every token see all of the memory; ours hides the memory of padding and of other documents.
"""

from collections.abc import Iterable

import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.families.xlm import head_or_body
from llmjax.interop.fields import (
    ACTIVATIONS,
    constants,
    field,
    fixed,
    ignored,
    settings,
)
from llmjax.interop.mapping import Family, Row, Slot, linear, norm, same, tied
from llmjax.model.layers import mlp_width

ENTRIES = (
    settings(two_stream=True, position="xlnet", norm="layer", norm_place="post", final_norm=False),
    settings(types=2),  # of which only "the same" and "another" are told apart
    field("vocab_size", "vocab_size", also=("n_token",)),
    field("n_layer", "layers", also=("num_hidden_layers",)),
    field("d_model", "width", also=("hidden_size",)),
    field("n_head", "heads", also=("num_attention_heads",)),
    fixed("d_head", lambda c: c.width // c.heads),
    field("d_inner", "mlp_width", lambda c: 4 * c.width),
    field("ff_activation", "activation", "gelu", table=ACTIVATIONS),
    field("attn_type", "direction", "bidirectional", table={"bi": "bidirectional", "uni": "causal"}),
    field("layer_norm_eps", "norm_epsilon", 1e-12),
    field("dropout", "dropout", 0.1),
    settings(embedding_dropout=lambda c: c.dropout, attention_dropout=lambda c: c.dropout),
    head_or_body("XLNetLMHeadModel", "XLNetModel", ("mlp", "norm")),
    fixed("bi_data", False),
    fixed("same_length", False),
    fixed("untie_r", True),
    fixed("clamp_len", -1, 0),  # distances are not clamped
    constants(mem_len=None),  # all of the memory that is given is kept
    ignored("initializer_range reuse_len use_mems_eval use_mems_train start_n_top end_n_top"),
)


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


FAMILIES = (Family(("xlnet",), ENTRIES, rows),)
