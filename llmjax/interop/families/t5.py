"""T5 (Raffel et al. 2020), T5 v1.1 and Flan-T5 (gated, with a head of their own), mT5: encoder-decoders, or the encoder alone.

What is exported is called T5; an mT5 is a T5 v1.1 under another name. The head of the first T5 is the embedding and its
logits are divided by sqrt(width). From v1.1 on the head is a matrix of its own. Such a model may be saved without it
when it equals the embedding, which is then read twice.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.fields import choose, field, only, require_same
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


def read_config(theirs: Mapping[str, Any]) -> ConfigDict:
    """config.json -> `config.model`."""
    c = config.base().model
    only(theirs, "is_decoder", False)
    names = {f"{prefix}{name}": name for prefix in ("", "M") for name in (SEQ2SEQ, ENCODER, "T5Model")}
    names |= {"T5WithLMHeadModel": SEQ2SEQ}  # the name in the first files
    encoder = choose("architectures", field(theirs, "architectures")[0], names) == ENCODER
    mt5 = theirs.get("model_type") == "mt5"

    c.vocab_size = field(theirs, "vocab_size")
    c.width = field(theirs, "d_model", "hidden_size")
    c.heads = field(theirs, "num_heads", "num_attention_heads")
    c.head_size = field(theirs, "d_kv", "head_dim", default=64)
    c.mlp_width = field(theirs, "d_ff")
    c.activation = choose(
        "feed_forward_proj",
        field(theirs, "feed_forward_proj", default="gated-gelu" if mt5 else "relu"),
        ACTIVATIONS,
    )
    encoder_layers = field(theirs, "num_layers", "num_hidden_layers")
    if encoder:
        c.layers, c.direction = encoder_layers, "bidirectional"
    else:
        c.layers, c.encoder_layers = field(theirs, "num_decoder_layers", default=encoder_layers), encoder_layers
        # Their loader may write that heads are tied which are not; whether the logits are scaled tells.
        scaled = theirs.get("scale_decoder_outputs")
        if scaled is None:
            scaled = not mt5 and theirs.get("tie_word_embeddings") is not False
        c.tie_embeddings = bool(scaled)
        c.logit_scale = c.width**-0.5 if scaled else 1.0
    c.position = "t5"
    c.relative_buckets = field(theirs, "relative_attention_num_buckets", default=32)
    c.relative_max_distance = field(theirs, "relative_attention_max_distance", default=128)
    c.attention_scale = 1.0  # part of how the kernels are initialised
    c.norm = "rms"
    c.norm_epsilon = float(field(theirs, "layer_norm_epsilon", default=1e-6))
    c.dropout = c.embedding_dropout = c.attention_dropout = float(field(theirs, "dropout_rate", default=0.1))
    c.init = "t5"
    return c


def write_config(c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> config.json. UserError if a T5 cannot be that."""
    encoder = c.direction == "bidirectional" and not c.encoder_layers
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    theirs = {
        "architectures": [ENCODER if encoder else SEQ2SEQ],
        "model_type": "t5",
        "is_encoder_decoder": not encoder,
        "vocab_size": c.vocab_size,
        "d_model": c.width,
        "num_heads": c.heads,
        "d_kv": config.head_size(c),
        "d_ff": mlp_width(c),
        "num_layers": c.layers if encoder else c.encoder_layers,
        "num_decoder_layers": c.layers,
        "feed_forward_proj": activations.get(c.activation, c.activation),
        "relative_attention_num_buckets": c.relative_buckets,
        "relative_attention_max_distance": c.relative_max_distance,
        "layer_norm_epsilon": c.norm_epsilon,
        "dropout_rate": c.dropout,
        "tie_word_embeddings": c.tie_embeddings,
        "scale_decoder_outputs": c.tie_embeddings,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    require_same(c, read_config(theirs), "t5")
    return theirs


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
        read_config,
        write_config,
        rows,
        (r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",),  # made, never used
        other_rows=embedding_as_head,
    ),
)
