"""Models that judge a whole text, in and out: reward models and classifiers as transformers' ...ForSequenceClassification.

There a decoder's last token that is no padding is read by the matrix `score`, without a bias. The output head is left out.
Encoders have their own classes, whose heads are rows of their families.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.interop.mapping import Row, Slot, linear

# model_types with such a class.
SCORED = (
    "bloom", "falcon", "gemma", "gemma2", "glm", "glm4", "gpt2", "gpt_neox", "gpt_oss", "llama", "mistral", "mixtral", "opt", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip
LANGUAGE_HEAD = re.compile(r"^(head|head_bias|head_transform|head_norm|output_projection)(/|$)")
CRITIC = re.compile(r"^value/")


def judges(c: ConfigDict) -> bool:
    """Whether a run's model judges whole texts, rather than writes them."""
    return c.objective.name in ("reward", "classify")


def outputs(theirs: Mapping[str, Any]) -> list[str]:
    """The names of what a ...ForSequenceClassification with this config.json says of a text; none: it is of another class."""
    if not str((theirs.get("architectures") or [""])[0]).endswith("ForSequenceClassification"):
        return []
    names = theirs.get("id2label") or {}
    count = len(names) or theirs.get("num_labels") or 2  # transformers' default
    return [str(names.get(str(i), f"LABEL_{i}")) for i in range(count)]


def judging(c: ConfigDict, names: list[str]) -> ConfigDict:
    """The config of a run whose model writes, as that of a decoder which judges: a reward model, or a classifier of `names`."""
    made = c.copy_and_resolve_references()
    with made.unlocked():
        made.data.format = "conversations"
        if len(names) == 1:
            made.objective.name, made.model.value_head = "reward", True
        else:
            made.objective.name, made.model.classes = "classify", len(names)
            made.objective.classify.labels = tuple(names)
        made.model = body(made)
        made.model.value_head, made.model.classes = len(names) == 1, len(names) if len(names) > 1 else 0
    return made


def body(c: ConfigDict) -> ConfigDict:
    """The settings under `model` without the heads that transformers has no place for in a model of this kind.

    A model that writes loses its critic, one that judges its output head; a decoder's own score is in `rows`.
    """
    model: ConfigDict = c.model.copy_and_resolve_references()
    with model.unlocked():
        model.value_head = False
        if judges(c):
            model.tie_embeddings, model.head_transform = True, False
            model.bias = tuple(part for part in model.bias if part != "head")
            if model.direction == "causal":
                model.classes = 0
    return model


def left_out(c: ConfigDict, path: str) -> bool:
    """Whether a parameter of the run is not exported."""
    return bool(LANGUAGE_HEAD.search(path) if judges(c) else CRITIC.search(path))


def rows(c: ConfigDict) -> Iterator[Row]:
    """The score of a decoder that judges, (outputs, D)."""
    if not judges(c) or c.model.direction != "causal":
        return
    D = c.model.width
    if c.objective.name == "classify":
        yield from linear("classifier", None, (D,), (c.model.classes,), "score")
        return
    slots = Slot("value/kernel", None, (D,)), Slot("value/bias", None, ())
    yield Row(
        slots,
        ("score.weight",),
        lambda a: [a[0].reshape(D), np.zeros((), a[0].dtype)],
        lambda a: [a[0].reshape(1, D)],
        shapes=((1, D),),
    )


def described(c: ConfigDict, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model that judges: its class, and the names of its outputs.

    Raises UserError when transformers has no such class for its type.
    """
    if not judges(c):
        return dict(theirs)
    said = dict(theirs)
    if c.model.direction == "causal":
        if theirs["model_type"] not in SCORED:
            raise UserError(
                f"transformers has no class of {theirs['model_type']} models that judges texts; give --family, of "
                f"{', '.join(SCORED)}"
            )
        kind = re.sub(r"(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", theirs["architectures"][0])
        said |= {"architectures": [kind]}
    names = list(c.objective.classify.labels) if c.objective.name == "classify" else []
    names = names or ["LABEL_0"]
    said["id2label"] = {str(i): name for i, name in enumerate(names)}
    said["label2id"] = {name: i for i, name in enumerate(names)}
    said["problem_type"] = "single_label_classification" if len(names) > 1 else "regression"
    return said
