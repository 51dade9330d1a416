"""The variants of encoders and encoder-decoders that are compared with transformers; the first of each is stored as golden."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hf import Arrays, Case
from ml_collections import ConfigDict

from llmjax.model.transformer import build
from llmjax.model.two_stream import init_memory

# Sizes that differ from each other, so that nothing fits by accident.
BERT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
}
XLM: dict[str, Any] = {"vocab_size": 61, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 256}
XLNET: dict[str, Any] = {"vocab_size": 61, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 40, "mem_len": None}
T5: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
V1_1: dict[str, Any] = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def tensors(batch: Arrays, **names: str) -> dict[str, Any]:
    """The arrays of a batch by the names that transformers gives them, as PyTorch's integers."""
    import torch

    return {theirs: torch.tensor(batch[ours], dtype=torch.long) for theirs, ours in names.items()}


def apply(c: ConfigDict, params: Any, tokens: np.ndarray, **given: Any) -> Any:
    """Our network on a batch, jitted."""
    output = given.pop("output", "logits")
    run = jax.jit(lambda params, tokens, given: build(c).apply({"params": params}, tokens, output=output, **given))
    return run(params, jnp.asarray(tokens), jax.tree.map(jnp.asarray, given))


def first_real(batch: Arrays, rows: np.ndarray) -> np.ndarray:
    """(B, X) made of the first place of each row -> (B, L, X), zero where that place is padding (which each side sees its way)."""
    seen = np.where(batch["mask"][:, :1] == 1, np.asarray(rows), 0)
    return np.repeat(seen[:, None], batch["mask"].shape[1], axis=1)


def theirs_encoder(output: str, **names: str) -> Callable[[Any, Arrays], np.ndarray]:
    """Run an encoder and take this field of its output."""

    def run(model: Any, batch: Arrays) -> np.ndarray:
        out = model(**tensors(batch, input_ids="tokens", attention_mask="mask", **names))[output].numpy()
        return out if out.ndim == 3 else first_real(batch, out)

    return run


def ours_encoder(output: str, *, skip_padding: bool = False, **names: str) -> Callable[..., jax.Array]:
    """The same of ours. skip_padding: positions count real tokens (RoBERTa), else all."""

    def run(c: ConfigDict, params: Any, batch: Arrays) -> Any:
        given = {ours: batch[name] for ours, name in names.items()}
        if skip_padding:
            given["positions_BL"] = np.cumsum(batch["mask"], axis=1, dtype=np.int32) * batch["mask"] - 1
        out = apply(c, params, batch["tokens"], segments_BL=batch["mask"], output=output, **given)
        return out if out.ndim == 3 else first_real(batch, out)

    return run


def padded_with(pad: int, run: Callable[..., Any]) -> Callable[..., Any]:
    """Padding, and only padding, is this token: RoBERTa counts positions by that and not by the mask."""

    def padded(*args: Any) -> Any:
        *model, batch = args
        real = np.where(batch["tokens"] == pad, pad + 1, batch["tokens"])
        return run(*model, {**batch, "tokens": np.where(batch["mask"] == 1, real, pad)})

    return padded


def bert(family: str, variant: str, classes: str, task: str, **changes: Any) -> Case:
    fields, theirs, ours = BERT | changes, "logits", "logits"
    if task == "Model":
        theirs, ours = "last_hidden_state", "hidden"
    elif task == "ForSequenceClassification":
        ours = "classes"
    elif task == "ForPreTraining":
        theirs = "prediction_logits"
    run_theirs = theirs_encoder(theirs, token_type_ids="types")
    run_ours = ours_encoder(ours, skip_padding=family != "bert", types_BL="types")
    if family != "bert":
        pad = fields.get("pad_token_id", 1)
        run_theirs, run_ours = padded_with(pad, run_theirs), padded_with(pad, run_ours)
    kinds = {"types": fields.get("type_vocab_size", 2)}
    return Case(family, variant, f"{classes}Config", f"{classes}{task}", fields, run_theirs, run_ours, kinds)


def xlm(variant: str, model: str, *, causal: bool = False, **changes: Any) -> Case:
    fields = XLM | {"causal": causal} | changes
    theirs, ours = ("logits", "logits") if "LMHead" in model else ("last_hidden_state", "hidden")
    languages = fields.get("n_langs", 1)

    def causal_theirs(net: Any, batch: Arrays) -> np.ndarray:  # which does not mask padding: none is given on the left
        return theirs_encoder(theirs, langs="languages")(net, {**batch, "mask": np.ones_like(batch["mask"])})

    def causal_ours(c: ConfigDict, params: Any, batch: Arrays) -> jax.Array:
        return ours_encoder(ours, **given)(c, params, {**batch, "mask": np.ones_like(batch["mask"])})

    given: dict[str, Any] = {"languages_BL": "languages"} if languages > 1 else {}
    return Case(
        "xlm",
        variant,
        "XLMConfig",
        model,
        fields,
        causal_theirs if causal else theirs_encoder(theirs, langs="languages"),
        causal_ours if causal else ours_encoder(ours, **given),
        {"languages": languages},
    )


def factorisation(batch: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """(orders, limits): a third of the tokens, but not the first real one, come one after another behind the others.

    A place sees the tokens whose order is below its limit.
    """
    rank = np.argsort(np.argsort(batch["ranks"], axis=1, kind="stable"), axis=1)
    orders = np.maximum(rank - 2 * rank.shape[1] // 3, 0).astype(np.int32)
    orders[np.arange(len(orders)), batch["mask"].argmax(1)] = 0
    return orders, np.maximum(orders, 1)


def their_streams(batch: Arrays) -> dict[str, Any]:
    """Every place is asked for, without seeing what is there."""
    import torch

    orders, limits = factorisation(batch)
    hidden = torch.tensor(orders[:, None, :] >= limits[:, :, None], dtype=torch.float32)
    more = tensors(batch, input_ids="tokens", attention_mask="mask", token_type_ids="types")
    return {**more, "perm_mask": hidden, "target_mapping": torch.eye(orders.shape[1]).expand(*hidden.shape)}


def our_streams(batch: Arrays) -> dict[str, Any]:
    orders, limits = factorisation(batch)
    places = np.broadcast_to(np.arange(orders.shape[1], dtype=np.int32), orders.shape)
    queries = {"positions": places, "orders": limits, "segments": batch["mask"]}
    return {"orders_BL": orders, "queries": queries, "segments_BL": batch["mask"], "types_BL": batch["types"]}


def theirs_two_stream(model: Any, batch: Arrays) -> np.ndarray:
    return model(**their_streams(batch)).logits.numpy()


def ours_two_stream(c: ConfigDict, params: Any, batch: Arrays) -> jax.Array:
    return apply(c, params, batch["tokens"], **our_streams(batch))


def parts(batch: Arrays) -> tuple[Arrays, Arrays, int]:
    """Two parts of a batch, and how many places of the first count: a single token is both the memory and what sees it.

    Padding counts as tokens, since theirs sees the padding of a memory.
    """
    cut = batch["tokens"].shape[1] * 2 // 5
    batch = {**batch, "mask": np.ones_like(batch["mask"])}
    return {k: v[:, : max(cut, 1)] for k, v in batch.items()}, {k: v[:, cut:] for k, v in batch.items()}, cut


def theirs_memory(model: Any, batch: Arrays) -> np.ndarray:
    """The first part read as it is, its memory seen by the second part, which is read so and in two streams."""
    first, second, cut = parts(batch)
    one = model(**tensors(first, input_ids="tokens"), use_mems=True)
    memory = {"mems": list(one.mems), "use_mems": True}
    two = model(**tensors(second, input_ids="tokens", token_type_ids="types"), **memory)
    streams = model(**their_streams(second), **memory)
    mixed = (two.logits + 2 * streams.logits).numpy()
    return np.concatenate([one.logits[:, :cut].numpy(), mixed], axis=1)


def ours_memory(c: ConfigDict, params: Any, batch: Arrays) -> jax.Array:
    first, second, cut = parts(batch)
    memory = init_memory(c, batch=len(first["tokens"]), length=first["tokens"].shape[1])
    one, memory = apply(c, params, first["tokens"], memory=memory)
    two, _ = apply(c, params, second["tokens"], memory=memory, types_BL=second["types"])
    streams, _ = apply(c, params, second["tokens"], memory=memory, **our_streams(second))
    return jnp.concatenate([one[:, :cut], two + 2 * streams], axis=1)


def xlnet(variant: str, model: str, theirs: Any, ours: Any, **changes: Any) -> Case:
    more = {"types": 2, "ranks": 10**6}
    return Case("xlnet", variant, "XLNetConfig", model, XLNET | changes, theirs, ours, more)


def theirs_seq2seq(model: Any, batch: Arrays) -> np.ndarray:
    """Logits of the targets, which are not padded, given the padded source."""
    names = {"input_ids": "tokens", "attention_mask": "mask", "decoder_input_ids": "targets"}
    return model(**tensors(batch, **names)).logits.numpy()


def ours_seq2seq(c: ConfigDict, params: Any, batch: Arrays) -> jax.Array:
    source = {"tokens": batch["tokens"], "segments": batch["mask"]}
    return apply(c, params, batch["targets"], source=source)


def seq2seq(family: str, variant: str, classes: str, fields: dict[str, Any]) -> Case:
    model = f"{classes}ForConditionalGeneration"
    return Case(family, variant, f"{classes}Config", model, fields, theirs_seq2seq, ours_seq2seq, {"targets": 61})


HIDDEN = (theirs_encoder("last_hidden_state"), ours_encoder("hidden"))
TYPED = (theirs_encoder("logits", token_type_ids="types"), ours_encoder("logits", types_BL="types"))
UNPADDED = (
    lambda model, batch: model(**tensors(batch, input_ids="tokens")).logits.numpy(),
    lambda c, params, batch: apply(c, params, batch["tokens"]),
)

ENCODERS: tuple[Case, ...] = (
    bert("bert", "masked", "Bert", "ForMaskedLM"),
    bert("bert", "pretraining", "Bert", "ForPreTraining", hidden_act="gelu_new"),
    bert("bert", "body", "Bert", "Model", hidden_act="relu", type_vocab_size=3),
    bert("bert", "classes", "Bert", "ForSequenceClassification", num_labels=5, layer_norm_eps=1e-2),
    bert("bert", "untied", "Bert", "ForMaskedLM", tie_word_embeddings=False),
    bert("roberta", "masked", "Roberta", "ForMaskedLM"),
    bert("roberta", "body", "Roberta", "Model", type_vocab_size=1, pad_token_id=4),
    bert("roberta", "classes", "Roberta", "ForSequenceClassification", num_labels=3),
    bert("xlm-roberta", "masked", "XLMRoberta", "ForMaskedLM", type_vocab_size=1),
    xlm("languages", "XLMWithLMHeadModel", n_langs=3),
    xlm("sinusoidal", "XLMWithLMHeadModel", sinusoidal_embeddings=True, tie_word_embeddings=False),
    xlm("causal", "XLMWithLMHeadModel", causal=True, gelu_activation=False, n_langs=2),
    xlm("body", "XLMModel", n_langs=3),
    xlnet("two_stream", "XLNetLMHeadModel", theirs_two_stream, ours_two_stream),
    xlnet("content", "XLNetLMHeadModel", *TYPED, tie_word_embeddings=False, ff_activation="relu"),
    xlnet("memory", "XLNetLMHeadModel", theirs_memory, ours_memory),
    xlnet("causal", "XLNetLMHeadModel", *UNPADDED, attn_type="uni"),
    xlnet("body", "XLNetModel", *HIDDEN),
    seq2seq("t5", "first", "T5", T5),
    seq2seq("t5", "gated", "T5", V1_1),
    seq2seq(
        "t5", "few_buckets", "T5", V1_1 | {"relative_attention_num_buckets": 10, "relative_attention_max_distance": 20}
    ),
    Case("t5", "encoder", "T5Config", "T5EncoderModel", T5, *HIDDEN),
    seq2seq("mt5", "gated", "MT5", T5 | {"feed_forward_proj": "gated-gelu"}),
)
