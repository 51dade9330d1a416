"""The allowed values of settings, and the check of a whole config."""

import difflib

from ml_collections import ConfigDict

from llmjax.config import model_checks, objective_checks, run_checks
from llmjax.config.ranges import check_lists, check_ranges
from llmjax.config.values import flatten
from llmjax.errors import UserError

CHOICES: dict[str, tuple[str, ...]] = {
    "prepare.html": ("main", "all", "raw"),
    "prepare.normal_form": ("NFC", "NFKC", "none"),
    "prepare.emoji": ("names", "remove", "keep"),
    "prepare.words": ("spacy_compat", "unicode"),
    "prepare.near_keep": ("first", "longest"),
    "prepare.route": ("source", "language"),
    "prepare.engine": ("local", "spark"),
    "data.format": ("text", "conversations"),
    "data.turns": ("all", "last"),
    "objective.preference.divergence": ("reverse_kl", "forward_kl", "js", "alpha"),
    "objective.unpaired.loss": ("kto", "apo_zero", "bco"),
    "objective.classify.target": ("class", "number"),
    "objective.distill.divergence": ("forward", "reverse", "js"),
    "objective.policy.loss": ("clip", "cispo", "sapo"),
    "objective.policy.level": ("token", "sequence"),
    "objective.policy.aggregate": ("constant", "token", "sequence", "sequence_sum"),
    "objective.policy.kl_estimator": ("k2", "k3", "k3_uncorrected"),
    "objective.policy.correction": ("", "token_truncate", "sequence_truncate", "token_mask"),
    "rollout.advantage": ("mean", "leave_one_out", "none", "gae"),
    "rollout.scale": ("none", "group", "batch"),
    "tokenizer.kind": ("bpe", "unigram", "char", "byte"),
    "model.activation": (
        "gelu",
        "gelu_tanh",
        "relu",
        "relu2",
        "silu",
        "swiglu",
        "geglu",
        "geglu_tanh",
        "reglu",
        "swiglu_clamped",
    ),
    "model.block": ("serial", "parallel"),
    "model.mlp": ("dense", "none"),
    "model.norm": ("rms", "layer", "batch", "none"),
    "model.norm_place": ("pre", "post", "sandwich", "after"),
    "model.qk_norm_over": ("head", "heads"),
    "model.direction": ("causal", "bidirectional"),
    "model.position": ("rotary", "learned", "sinusoidal", "alibi", "t5", "xlnet", "none"),
    "model.rotary_scaling": ("none", "linear", "ntk", "yarn", "llama3", "longrope"),
    "model.init": ("gpt2", "xavier", "lecun", "t5", "t_fixup", "mup", "completep", "orthogonal", "deepnorm"),
    "model.dropout_shape": ("constant", "linear"),
    "model.adapter.kind": ("none", "lora", "dora"),
    "model.adapter.scale": ("rank", "root"),
    "model.adapter.base_format": ("stored", "int8", "nf4"),
    "model.moe.score": ("softmax", "sigmoid"),
    "model.moe.dispatch": ("dropless", "capacity"),
    "model.moe.balance_over": ("batch", "row", "layers"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.quantization": ("none", "int8", "fp8"),
    "model.remat": (
        "none",
        "full",
        "selective",
        "minimal_with_context",
        "save_qkv_proj",
        "save_out_proj",
        "save_dot_except_mlp",
        "save_dot_with_context_except_mlp",
        "save_dot_except_mlpwi",
    ),
    "model.attention": ("auto", "reference", "dot_product", "blocked", "cudnn", "splash"),
    "objective.name": (
        "causal",
        "masked",
        "permutation",
        "translation",
        "unilm",
        "span",
        "prefix",
        "infill",
        "multi_token",
        "preference",
        "unpaired",
        "reward",
        "distill",
        "policy",
        "classify",
    ),
    "parallel.context": ("gather", "ring"),
    "optimizer.name": ("adamw", "muon", "adafactor", "lion", "sgd"),
    "schedule.by": ("steps", "tokens"),
    "eval.runner": ("auto", "harness"),
    "infer.weights": ("auto", "stored", "tiles", "int8"),
    "schedule.name": ("constant", "step", "exponential", "cosine", "linear", "inverse_sqrt", "wsd"),
}


def check(c: ConfigDict) -> None:
    """Raise UserError for the first value that is not allowed or contradicts another one."""
    flat = flatten(c.to_dict())
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            near = difflib.get_close_matches(str(flat[key]), choices, n=1)
            hint = f", did you mean {near[0]}?" if near else ";"
            raise UserError(f"{key}={flat[key]!r} is not known{hint} it can be {', '.join(choices)}")
    check_ranges(flat)
    check_lists(flat)
    for part in (*model_checks.PARTS, *objective_checks.PARTS, *run_checks.PARTS):
        for message in part(c):
            raise UserError(message)
