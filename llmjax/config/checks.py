"""Which values a setting may have, and which settings contradict each other."""

import difflib
import re

from ml_collections import ConfigDict

from llmjax.config.model_checks import check_model
from llmjax.config.objective_checks import check_objective
from llmjax.config.parallel_checks import check_parallel
from llmjax.config.ranges import check_ranges
from llmjax.config.values import duration, flatten, parse_duration
from llmjax.errors import UserError

DURATIONS = (
    "train.duration",
    "train.batch_ramp",
    "train.eval_every",
    "checkpoint.every",
    "checkpoint.keep_every",
    "schedule.warmup",
    "schedule.decay",
    "schedule.drop_at",
)
CHOICES: dict[str, tuple[str, ...]] = {
    "prepare.html": ("main", "all", "raw"),
    "prepare.normal_form": ("NFC", "NFKC", "none"),
    "prepare.emoji": ("names", "remove", "keep"),
    "prepare.words": ("spacy_compat", "unicode"),
    "prepare.near_keep": ("first", "longest"),
    "prepare.route": ("source", "language"),
    "prepare.engine": ("local", "spark"),
    "tokenizer.kind": ("bpe", "unigram", "char", "byte"),
    "model.activation": ("gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh", "reglu"),
    "model.block": ("serial", "parallel"),
    "model.mlp": ("dense", "none"),
    "model.norm": ("rms", "layer", "batch", "none"),
    "model.norm_place": ("pre", "post", "sandwich"),
    "model.direction": ("causal", "bidirectional"),
    "model.position": ("rotary", "learned", "sinusoidal", "alibi", "t5", "xlnet", "none"),
    "model.rotary_scaling": ("none", "linear", "ntk", "yarn", "llama3"),
    "model.init": ("gpt2", "xavier", "lecun", "t5", "t_fixup", "mup", "orthogonal", "deepnorm"),
    "model.dropout_shape": ("constant", "linear"),
    "model.moe.score": ("softmax", "sigmoid"),
    "model.moe.dispatch": ("dropless", "capacity"),
    "model.moe.balance_over": ("batch", "row", "layers"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.quantization": ("none", "int8", "fp8"),
    "model.remat": ("none", "full", "selective"),
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
    ),
    "parallel.context": ("gather", "ring"),
    "optimizer.name": ("adamw", "muon", "adafactor", "lion", "sgd"),
    "schedule.by": ("steps", "tokens"),
    "eval.runner": ("auto", "harness"),
    "infer.weights": ("auto", "stored", "tiles", "int8"),
    "schedule.name": ("constant", "step", "exponential", "cosine", "linear", "inverse_sqrt", "wsd"),
}


def check(c: ConfigDict) -> None:
    """Raise UserError for values that are out of range or contradict each other."""
    flat = flatten(c.to_dict())
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            near = difflib.get_close_matches(str(flat[key]), choices, n=1)
            raise UserError(
                f"{key}={flat[key]!r} is not known{f', did you mean {near[0]}?' if near else ';'} it can be {', '.join(choices)}"
            )
    check_ranges(flat)
    m, t = c.model, c.train

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    try:
        re.compile(c.optimizer.train)
    except re.error as error:
        raise UserError(f"optimizer.train={c.optimizer.train!r} is no regular expression: {error}") from error
    check_model(c)
    check_objective(c)
    check_parallel(c)
    require(
        t.batch_size % t.micro_batches == 0,
        f"train.micro_batches={t.micro_batches} must divide train.batch_size={t.batch_size}",
    )
    require(
        not parse_duration(t.batch_ramp)[0] or t.batch_start < t.batch_size,
        f"train.batch_ramp={t.batch_ramp!r} grows batches from train.batch_start={t.batch_start} to train.batch_size="
        f"{t.batch_size}: lower batch_start, or set train.batch_ramp='0 steps'",
    )
    require(
        m.position != "learned" or t.sequence_length <= m.max_length,
        f"train.sequence_length={t.sequence_length} is more than the {m.max_length} learned positions; raise model.max_length",
    )
    require(
        not t.rewind.factor or t.rewind.factor > 1,
        f"train.rewind.factor={t.rewind.factor} must be above 1, so that the usual loss is not high, or 0 for never",
    )
    require(
        not t.rewind.factor or not parse_duration(t.batch_ramp)[0],
        f"train.rewind.factor={t.rewind.factor} skips batches, which during train.batch_ramp={t.batch_ramp!r} would be of "
        "other sizes: set one of them to 0",
    )
    budget, unit = parse_duration(t.duration)
    require(unit != "second" or budget > 0, f"train.duration={t.duration!r} must be above 0")
    require(
        unit != "second" or not (parse_duration(t.batch_ramp)[0] or t.executable),
        f"train.duration={t.duration!r} is measured with one step of the full size, compiled here: give steps or tokens, or "
        "set train.batch_ramp='0 steps' and train.executable=''",
    )
    require(
        c.tokenizer.kind not in ("bpe", "unigram") or bool(c.tokenizer.path) or c.tokenizer.vocab_size >= 260,
        f"tokenizer.vocab_size={c.tokenizer.vocab_size} must be at least 260: the 256 bytes and the 4 special tokens are "
        "pieces too",
    )
    window = c.eval.sequence_length or t.sequence_length
    require(
        c.eval.stride <= window,
        f"eval.stride={c.eval.stride} would leave tokens out between windows of {window}: set it to at most {window}, "
        "or to 0 for half a window",
    )
    require(
        m.position != "learned" or window <= m.max_length,
        f"eval.sequence_length={window} is more than the model's {m.max_length} learned positions: lower it",
    )
    require(
        all(isinstance(k, int) and 1 <= k <= c.eval.samples for k in c.eval.pass_at),
        f"eval.pass_at={c.eval.pass_at} must be whole numbers from 1 to eval.samples={c.eval.samples}",
    )
    for key in DURATIONS:
        for value in flat[key] if isinstance(flat[key], tuple) else (flat[key],):
            if key != "train.duration":
                duration(value, tokens_per_step=1, tokens_per_epoch=1, total_steps=1)
            elif unit != "second":
                duration(value, tokens_per_step=1, tokens_per_epoch=1)
    require(bool(c.data.sources), "data.sources is empty: give 'stdlib', files or folders")
