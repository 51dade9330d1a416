"""BERT (Devlin et al. 2018), RoBERTa (Liu et al. 2019) and XLM-RoBERTa: bidirectional post-norm encoders.

RoBERTa's positions count real tokens only and begin at the row after the padding id's (`position_offset`): with padding,
give the model `positions_BL = cumsum(mask) * mask - 1`; BERT counts every token, padding too.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.errors import UserError
from llmjax.interop.families.gpt import BIASED
from llmjax.interop.fields import (
    ACTIVATIONS,
    Entry,
    Theirs,
    choose,
    field,
    fixed,
    flag,
    ignored,
    only,
    settings,
    typed,
)
from llmjax.interop.mapping import Family, Row, Slot, linear, norm, same, tied, unused
from llmjax.model.layers import mlp_width


@dataclass(frozen=True)
class Names:
    """How one of the families calls its parts."""

    model_type: str
    classes: str  # the prefix of the architectures' names
    body: str  # the prefix of the tensors, in models with a head
    transform: str  # the head's dense layer
    transform_norm: str
    head: str  # the head's matrix where it is not tied
    head_bias: str
    pooler: str
    classifier: str
    tasks: tuple[str, ...]


BERT = Names(
    model_type="bert",
    classes="Bert",
    body="bert.",
    transform="cls.predictions.transform.dense",
    transform_norm="cls.predictions.transform.LayerNorm",
    head="cls.predictions.decoder",
    head_bias="cls.predictions.bias",
    pooler="bert.pooler.dense",
    classifier="classifier",
    tasks=("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification"),
)
ROBERTA = Names(
    model_type="roberta",
    classes="Roberta",
    body="roberta.",
    transform="lm_head.dense",
    transform_norm="lm_head.layer_norm",
    head="lm_head.decoder",
    head_bias="lm_head.bias",
    pooler="classifier.dense",
    classifier="classifier.out_proj",
    tasks=("Model", "ForMaskedLM", "ForSequenceClassification"),
)
# The same network; only its files are called otherwise. What is exported is called RoBERTa.
XLM_ROBERTA = ("xlm-roberta", "XLMRoberta")


def _architecture(names: Names) -> Entry:
    """The architecture decides which heads there are."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        tables = {prefix + task: task for prefix in (names.classes, XLM_ROBERTA[1]) for task in names.tasks}
        task = choose("architectures", theirs["architectures"][0], tables)
        c.bias = BIASED
        c.pooler = task != "ForMaskedLM"
        if task in ("ForMaskedLM", "ForPreTraining"):
            if names is not BERT:
                only(theirs, "hidden_act", "gelu")  # the head's, whatever the blocks have
            c.head_transform = True
            c.bias = (*c.bias, "head")
            c.tie_embeddings = flag(theirs, "tie_word_embeddings", True)
        if task == "ForPreTraining":
            c.classes = 2  # is the second sentence the next one
        elif task == "ForSequenceClassification":
            c.classes = len(theirs.get("id2label", {})) or typed("num_labels", theirs.get("num_labels", 2), int)

    def write(c: ConfigDict) -> dict[str, Any]:
        task = task_of(c, names)
        said = {"architectures": [names.classes + task], "tie_word_embeddings": c.tie_embeddings}
        if task == "ForSequenceClassification":
            said["id2label"] = {str(i): f"LABEL_{i}" for i in range(c.classes)}
            said["label2id"] = {f"LABEL_{i}": i for i in range(c.classes)}
        return said

    return Entry(("architectures", "tie_word_embeddings", "id2label", "num_labels"), read, write, ("architectures",))


# RoBERTa's positions begin behind the padding id's.
BEHIND_PADDING = Entry(
    ("pad_token_id",),
    lambda c, theirs: _begin_at(c, typed("pad_token_id", theirs.get("pad_token_id", 1), int) + 1),
    lambda c: {"pad_token_id": c.position_offset - 1, "max_position_embeddings": c.max_length + c.position_offset},
)


def _begin_at(c: ConfigDict, offset: int) -> None:
    c.position_offset, c.max_length = offset, c.max_length - offset


def entries(names: Names) -> tuple[Entry, ...]:
    """The fields of config.json."""
    return (
        settings(
            direction="bidirectional",
            position="learned",
            norm="layer",
            norm_place="post",
            embedding_norm=True,
            final_norm=False,
        ),
        field("vocab_size", "vocab_size"),
        field("num_hidden_layers", "layers"),
        field("hidden_size", "width"),
        field("num_attention_heads", "heads"),
        field("intermediate_size", "mlp_width"),
        field("hidden_act", "activation", "gelu", table=ACTIVATIONS),
        field("type_vocab_size", "types", 2),
        field("layer_norm_eps", "norm_epsilon", 1e-12),
        field("hidden_dropout_prob", "dropout", 0.1),
        settings(embedding_dropout=lambda c: c.dropout),
        field("attention_probs_dropout_prob", "attention_dropout", 0.1),
        field("max_position_embeddings", "max_length"),
        *(() if names is BERT else (BEHIND_PADDING,)),
        _architecture(names),
        fixed("embedding_size", lambda c: c.width),
        fixed("is_decoder", False),
        fixed("add_cross_attention", False),
        fixed("position_embedding_type", "absolute"),
        ignored(
            "initializer_range directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers "
            "pooler_size_per_head pooler_type"
        ),
    )


def task_of(c: ConfigDict, names: Names) -> str:
    """The architecture that has the heads which `c` has. UserError if none has."""
    tasks = {
        (False, True, False): "Model",
        (True, False, False): "ForMaskedLM",
        (True, True, False): "ForMaskedLM",  # its files may hold a pooler, for those who load the body
        (True, True, True): "ForPreTraining",
        (False, True, True): "ForSequenceClassification",
    }
    task = tasks.get((c.head_transform, c.pooler, c.classes > 0))
    if task not in names.tasks:
        raise UserError(
            f"no {names.model_type} architecture has model.head_transform={c.head_transform}, model.pooler={c.pooler} and "
            f"model.classes={c.classes}: ForMaskedLM has the transform, Model the pooler, ForSequenceClassification the pooler "
            "and classes"
        )
    return task


def rows(names: Names, c: ConfigDict) -> Iterable[Row]:
    """Every tensor of a checkpoint with the heads that `c` has."""
    D, F, H, K = c.width, mlp_width(c), c.heads, config.head_size(c)
    task = task_of(c, names)
    body = "" if task == "Model" else names.body
    embeddings = f"{body}embeddings"
    yield same("embedding", None, (c.vocab_size, D), f"{embeddings}.word_embeddings.weight")
    yield same(
        "position_embedding", None, (c.position_offset + c.max_length, D), f"{embeddings}.position_embeddings.weight"
    )
    yield same("type_embedding", None, (c.types, D), f"{embeddings}.token_type_embeddings.weight")
    yield from norm("embedding_norm", None, D, f"{embeddings}.LayerNorm")
    for i in range(c.layers):
        layer = f"{body}encoder.layer.{i}"
        for part in ("query", "key", "value"):
            yield from linear(f"layers/attention/{part}", i, (D,), (H, K), f"{layer}.attention.self.{part}", bias=True)
        yield from linear("layers/attention/out", i, (H, K), (D,), f"{layer}.attention.output.dense", bias=True)
        yield from norm("layers/attention_norm", i, D, f"{layer}.attention.output.LayerNorm")
        yield from linear("layers/mlp/up", i, (D,), (F,), f"{layer}.intermediate.dense", bias=True)
        yield from linear("layers/mlp/down", i, (F,), (D,), f"{layer}.output.dense", bias=True)
        yield from norm("layers/mlp_norm", i, D, f"{layer}.output.LayerNorm")
    if c.head_transform:
        yield from linear("head_transform", None, (D,), (D,), names.transform, bias=True)
        yield from norm("head_norm", None, D, names.transform_norm)
        if c.tie_embeddings:
            yield same("head_bias", None, (c.vocab_size,), names.head_bias)
            yield tied(f"{names.head}.weight", f"{embeddings}.word_embeddings.weight")
            yield tied(f"{names.head}.bias", names.head_bias)
        else:
            yield from linear("head", None, (D,), (c.vocab_size,), names.head)
            # Untied heads have two biases, of which the second is never added.
            slot = Slot("head_bias", None, (c.vocab_size,))
            yield Row((slot,), (f"{names.head}.bias", names.head_bias), lambda a: a[:1], lambda a: [a[0], a[0]])
    if c.pooler:
        pooler = names.pooler if c.classes else f"{body}pooler.dense"
        yield from linear("pooler", None, (D,), (D,), pooler, bias=True)
    if c.classes:
        classifier = "cls.seq_relationship" if task == "ForPreTraining" else names.classifier
        yield from linear("classifier", None, (D,), (c.classes,), classifier, bias=True)
    if task == "ForMaskedLM":
        # Published files often have the other heads of pretraining, which this architecture lacks.
        for name in ("cls.seq_relationship", *([] if c.pooler else [f"{body}pooler.dense"])):
            yield from (unused(f"{name}.weight"), unused(f"{name}.bias"))


def _family(names: Names, model_types: tuple[str, ...]) -> Family:
    return Family(
        model_types,
        entries(names),
        functools.partial(rows, names),
        unsaid=("pooler",),  # a masked language model's files may hold one, see `task_of`
        # Buffers of older versions, and the names of norms in files converted from TensorFlow.
        ignored=(r"embeddings\.(position_ids|token_type_ids)$",),
        renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    )


FAMILIES = (_family(BERT, ("bert",)), _family(ROBERTA, ("roberta", "xlm-roberta")))
