"""XLM (Conneau & Lample 2019): a post-norm encoder with language embeddings, bidirectional or causal.

Sinusoidal positions are stored in their files like learned ones, and are read as such. Differences that their forward
pass makes: a causal XLM does not mask padding on the left, and adds no language embedding unless it is given languages.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.families.gpt import BIASED
from llmjax.interop.fields import (
    Entry,
    Theirs,
    choose,
    constants,
    field,
    fixed,
    flag,
    ignored,
    put,
    settings,
)
from llmjax.interop.mapping import Family, Row, linear, norm, same, tied
from llmjax.model.layers import mlp_width


def head_or_body(head: str, body: str, bias: tuple[str, ...]) -> Entry:
    """The architecture: with a head, which has a bias and may be tied, or the body alone; `bias`: the body's."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        with_head = choose("architectures", theirs["architectures"][0], {head: True, body: False})
        c.bias = (*bias, "head") if with_head else bias
        c.tie_embeddings = flag(theirs, "tie_word_embeddings", True) or not with_head

    def write(c: ConfigDict) -> dict[str, Any]:
        with_head = "head" in c.bias
        return {"architectures": [head if with_head else body], "tie_word_embeddings": c.tie_embeddings}

    return Entry(("architectures", "tie_word_embeddings"), read, write, ("architectures",))


ENTRIES = (
    settings(position="learned", norm="layer", norm_place="post", embedding_norm=True, final_norm=False),
    field("vocab_size", "vocab_size", also=("n_words",)),
    field("n_layers", "layers", also=("num_hidden_layers",)),
    field("emb_dim", "width", also=("hidden_size",)),
    field("n_heads", "heads", also=("num_attention_heads",)),
    settings(mlp_width=lambda c: 4 * c.width),
    field("gelu_activation", "activation", "gelu", table={True: "gelu", False: "relu"}),
    field("causal", "direction", "bidirectional", table={False: "bidirectional", True: "causal"}),
    field("max_position_embeddings", "max_length", 512),
    field("n_langs", "languages", 0, to_ours=lambda n: n if n > 1 else 0, to_theirs=lambda n: max(n, 1)),
    Entry(
        ("use_lang_emb",),
        lambda c, theirs: put(c, "languages", c.languages if flag(theirs, "use_lang_emb", True) else 0),
        lambda c: {"use_lang_emb": c.languages > 0},
    ),
    field("layer_norm_eps", "norm_epsilon", 1e-12),
    field("dropout", "dropout", 0.1),
    settings(embedding_dropout=lambda c: c.dropout),
    field("attention_dropout", "attention_dropout", 0.1),
    head_or_body("XLMWithLMHeadModel", "XLMModel", BIASED),
    fixed("asm", False),
    fixed("is_encoder", True),
    constants(sinusoidal_embeddings=False),  # they are stored like learned ones
    ignored(
        "embed_init_std init_std lang_id lang2id id2lang bos_index eos_index pad_index unk_index mask_index start_n_top "
        "end_n_top amp bptt batch_size clip_grad_norm encoder_only fp16 group_by_size lg_sampling_factor max_batch_size "
        "max_vocab min_count mono_dataset sample_alpha same_enc_dec save_periodic share_inout_emb tokens_per_batch "
        "word_blank word_dropout word_keep word_mask word_mask_keep_rand word_pred word_rand word_shuffle"
    ),
)


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


FAMILIES = (Family(("xlm",), ENTRIES, rows, ignored=(r"position_ids$",)),)
