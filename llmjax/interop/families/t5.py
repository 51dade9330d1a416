"""T5 (Raffel et al. 2020), T5 v1.1 and Flan-T5 (gated, with a head of their own), mT5: encoder-decoders, or the encoder alone.

What is exported is called T5; an mT5 is a T5 v1.1 under another name. The head of the first T5 is the embedding and its
logits are divided by sqrt(width). From v1.1 on the head is a matrix of its own. Such a model may be saved without it
when it equals the embedding, which is then read twice.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.fields import (
    Entry,
    Theirs,
    choose,
    constants,
    field,
    fixed,
    flag,
    ignored,
    settings,
    typed,
)
from llmjax.interop.mapping import Arrays, Family, Row, Slot, linear, norm, same, tied
from llmjax.model.layers import GATED, mlp_width

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "gated-gelu": "geglu_tanh",
    "gated-silu": "swiglu",
    "gated-relu": "reglu",
}
ENCODER = "T5EncoderModel"
SEQ2SEQ = "T5ForConditionalGeneration"


def _stacks() -> Entry:
    """Encoder and decoder, or the encoder alone, as the architecture says; and the head."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        names = {f"{prefix}{name}": name for prefix in ("", "M") for name in (SEQ2SEQ, ENCODER, "T5Model")}
        names |= {"T5WithLMHeadModel": SEQ2SEQ}  # the name in the first files
        layers = typed("num_layers", theirs.get("num_layers", theirs.get("num_hidden_layers")), int)
        if choose("architectures", theirs["architectures"][0], names) == ENCODER:
            c.layers, c.direction = layers, "bidirectional"
            return
        c.layers, c.encoder_layers = typed("num_decoder_layers", theirs.get("num_decoder_layers", layers), int), layers
        # Their loader may write that heads are tied which are not; whether the logits are scaled tells.
        scaled = flag(theirs, "scale_decoder_outputs", flag(theirs, "tie_word_embeddings", True))
        c.tie_embeddings = scaled
        c.logit_scale = c.width**-0.5 if scaled else 1.0

    def write(c: ConfigDict) -> dict[str, Any]:
        encoder = c.direction == "bidirectional" and not c.encoder_layers
        return {
            "architectures": [ENCODER if encoder else SEQ2SEQ],
            "is_encoder_decoder": not encoder,
            "num_layers": c.layers if encoder else c.encoder_layers,
            "num_decoder_layers": c.layers,
            "tie_word_embeddings": c.tie_embeddings,
            "scale_decoder_outputs": c.tie_embeddings,
        }

    layers = ("num_layers", "num_hidden_layers")
    names = (*layers, "num_decoder_layers", "tie_word_embeddings", "scale_decoder_outputs")
    return Entry(names, read, write, layers)


ENTRIES = (
    # The scale of the scores is part of how the kernels are initialised.
    settings(position="t5", norm="rms", attention_scale=1.0, init="t5"),
    field("vocab_size", "vocab_size"),
    field("d_model", "width", also=("hidden_size",)),
    field("num_heads", "heads", also=("num_attention_heads",)),
    field("d_kv", "head_size", 64, also=("head_dim",)),
    field("d_ff", "mlp_width"),
    field("feed_forward_proj", "activation", "relu", table=ACTIVATIONS),
    _stacks(),
    Entry(("architectures",), required=("architectures",)),
    field("relative_attention_num_buckets", "relative_buckets", 32),
    field("relative_attention_max_distance", "relative_max_distance", 128),
    field("layer_norm_epsilon", "norm_epsilon", 1e-6),
    field("dropout_rate", "dropout", 0.1),
    settings(embedding_dropout=lambda c: c.dropout, attention_dropout=lambda c: c.dropout),
    fixed("is_decoder", False),
    constants(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0),
    ignored("n_positions dense_act_fn is_gated_act"),
)


def rows(c: ConfigDict) -> Iterable[Row]:
    """Every tensor of a checkpoint."""
    V, D = c.vocab_size, c.width
    yield same("embedding", None, (V, D), "shared.weight")
    for stack in ("encoder", "decoder"):  # repeated in the first files
        yield tied(f"{stack}.embed_tokens.weight", "shared.weight")
    if c.encoder_layers:
        yield from _stack(c, "encoder/", "encoder", c.encoder_layers, cross=False)
        yield from _stack(c, "", "decoder", c.layers, cross=True)
        if c.tie_embeddings:
            yield tied("lm_head.weight", "shared.weight")
        else:
            yield from linear("head", None, (D,), (V,), "lm_head")
    else:
        yield from _stack(c, "", "encoder", c.layers, cross=False)


def _stack(c: ConfigDict, ours: str, theirs: str, layers: int, *, cross: bool) -> Iterable[Row]:
    D, F, H, K = c.width, mlp_width(c), c.heads, config.head_size(c)
    first = f"{theirs}.block.0.layer.0.SelfAttention"  # its table serves all layers
    shape = (c.relative_buckets, H)
    yield same(f"{ours}relative_embedding", None, shape, f"{first}.relative_attention_bias.weight")
    yield from norm(f"{ours}final_norm", None, D, f"{theirs}.final_layer_norm", bias=False)
    attentions = [("attention", "SelfAttention"), ("cross", "EncDecAttention")][: 2 if cross else 1]
    wide = {"gate": "wi_0", "up": "wi_1"} if c.activation in GATED else {"up": "wi"}
    for i in range(layers):
        block = f"{theirs}.block.{i}.layer"
        for j, (name, attention) in enumerate(attentions):
            layer = f"{ours}layers/{name}"
            yield from norm(f"{layer}_norm", i, D, f"{block}.{j}.layer_norm", bias=False)
            for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
                yield from linear(f"{layer}/{part}", i, (D,), (H, K), f"{block}.{j}.{attention}.{letter}")
            yield from linear(f"{layer}/out", i, (H, K), (D,), f"{block}.{j}.{attention}.o")
        layer, last = f"{ours}layers/mlp", f"{block}.{len(attentions)}"
        yield from norm(f"{layer}_norm", i, D, f"{last}.layer_norm", bias=False)
        for part, name in wide.items():
            yield from linear(f"{layer}/{part}", i, (D,), (F,), f"{last}.DenseReluDense.{name}")
        yield from linear(f"{layer}/down", i, (F,), (D,), f"{last}.DenseReluDense.wo")


def embedding_as_head(c: ConfigDict) -> Iterable[Row]:
    """A head that is not scaled and not stored: the embedding, transposed."""
    if c.encoder_layers and not c.tie_embeddings:
        V, D = c.vocab_size, c.width
        yield Row((Slot("head/kernel", None, (D, V)),), ("shared.weight",), _turned, _turned, shapes=((V, D),))


def _turned(arrays: Arrays) -> Arrays:
    return [np.ascontiguousarray(arrays[0].T)]


FAMILIES = (
    Family(
        ("t5", "mt5"),
        ENTRIES,
        rows,
        variants={"mt5": {"feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False}},
        ignored=(
            r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
        ),  # made, never used
        other_rows=embedding_as_head,
    ),
)
