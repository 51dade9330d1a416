"""The ranges of numeric settings: one table with a row for every number of `base()`.

Conditions that involve several settings (a divisor, a window) are in the checks beside this file.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmjax.errors import UserError

# The library computes in float32, where larger numbers are infinite and smaller ones 0.
LARGEST, SMALLEST = 3.4e38, 1.2e-38


@dataclass(frozen=True)
class Range:
    """An interval of numbers that are finite in float32."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False  # without the lower end
    high_open: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if isinstance(value, float):
            value = 0.0 if abs(value) < SMALLEST else value
            if not abs(value) <= LARGEST:
                return False
        above = self.low < value if self.low_open else self.low <= value
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        """The range in words, after "must be"."""
        if self.low == self.high:
            return f"{self.low:g}"
        low = f"{'above' if self.low_open else 'at least'} {self.low:g}" if math.isfinite(self.low) else ""
        high = f"{'below' if self.high_open else 'at most'} {self.high:.10g}" if math.isfinite(self.high) else ""
        return " and ".join(filter(None, (low, high))) or "a finite number"


ANY = Range()
AT_LEAST_0, AT_LEAST_1, ABOVE_0 = Range(0), Range(1), Range(0, low_open=True)
SHARE = Range(0, 1)  # both ends included
SHARE_ABOVE_0, SHARE_BELOW_1 = Range(0, 1, low_open=True), Range(0, 1, high_open=True)
SHARE_INSIDE = Range(0, 1, low_open=True, high_open=True)
PERCENT = Range(0, 100, high_open=True)
SEED = Range(0, 2**32 - 1, high_open=True)  # what JAX takes, with seed + 1

RANGES: dict[Range, tuple[str, ...]] = {
    ANY: (
        "generate.frequency_penalty", "generate.length_penalty", "generate.presence_penalty", "model.alibi_scale",
        "model.branch_scale", "model.embedding_scale", "objective.policy.entropy_weight", "objective.preference.reward_shift", "objective.unpaired.reward_shift",
        "model.logit_scale", "model.moe.scale",
    ),
    AT_LEAST_0: (
        "serve.drain_seconds", "serve.first_seconds", "serve.per_key", "serve.queue", "serve.seconds",
        "checkpoint.every_seconds", "data.holdout_max_bytes", "data.max_epochs", "data.min_bytes",
        "data.mixture_temperature", "eval.context_length", "eval.limit", "eval.max_bytes", "eval.sequence_length",
        "eval.stride", "eval.temperature", "generate.temperature", "generate.top_k", "infer.ahead", "infer.cache_bytes",
        "infer.length", "objective.distill.top",
        "model.attention_scale", "model.attention_soft_cap", "model.classes", "model.embedding_width",
        "model.encoder_layers", "model.head_size", "model.kv_heads", "model.latent.kv_rank", "model.latent.query_rank", "model.languages", "model.logit_soft_cap",
        "model.mlp_width", "model.moe.balance_loss", "model.moe.bias_rate", "model.moe.experts", "model.moe.first",
        "model.moe.shared", "model.moe.width", "model.moe.z_loss", "model.position_offset", "model.recurrent.heads",
        "model.recurrent.width", "model.residual_scale", "model.rotary_attention_factor", "model.rotary_local_base", "model.rotary_original_length",
        "model.types", "model.vocab_size", "objective.focal", "objective.l1", "objective.l2", "objective.vocab_size", "objective.z_loss",
        "objective.policy.clip", "objective.policy.clip_high", "objective.policy.correction_low", "objective.policy.dual_clip",
        "objective.policy.kl_weight", "objective.policy.length", "objective.policy.temperature", "objective.policy.value_clip", "objective.policy.value_weight",
        "objective.preference.margin", "objective.unpaired.bad_weight", "objective.unpaired.good_weight", "objective.reward.centre", "rollout.kl_target", "rollout.kl_weight",
        "rollout.overlong_buffer", "rollout.resample",
        "optimizer.clip_norm", "optimizer.learning_rate", "optimizer.muon_learning_rate", "optimizer.weight_decay",
        "parallel.cpu_devices", "parallel.parts", "parallel.slices", "prepare.decontaminate_characters",
        "prepare.max_document_seconds", "prepare.perplexity_max", "prepare.workers", "schedule.drop_factor", "schedule.final", "train.device_price", "train.log_every",
        "tokenizer.add_learnt", "train.rewind.factor", "train.rewind.skip", "train.rewind.steps",
    ),
    AT_LEAST_1: (
        "serve.choices",
        "model.adapter.rank", "checkpoint.keep", "data.record_tokens", "data.shard_bytes", "eval.batch_size", "eval.samples",
        "generate.beams", "generate.max_new_tokens", "infer.slots", "infer.steps", "model.ahead", "model.heads",
        "model.latent.rotary_size", "model.latent.value_size", "model.layers",
        "rollout.kl_horizon", "rollout.pack", "rollout.samples", "rollout.slots", "rollout.tokens", "rollout.turns", "rollout.updates",
        "model.max_length", "model.moe.active", "model.moe.active_groups", "model.moe.every", "model.moe.group_score", "model.moe.groups", "model.recurrent.chunk", "model.recurrent.conv_width",
        "model.recurrent.groups", "model.recurrent.state_size", "model.relative_buckets", "model.relative_max_distance",
        "model.scan_unroll", "model.vocab_multiple", "model.width", "model.window", "objective.loss_chunks",
        "objective.recurrence", "objective.span_length", "parallel.heartbeat_seconds", "parallel.rounds", "parallel.start_seconds",
        "prepare.decontaminate_words", "prepare.max_document_bytes", "prepare.memory_bytes", "prepare.near_bands",
        "prepare.near_rows", "prepare.near_words", "prepare.substring_tokens", "tokenizer.train_bytes",
        "tokenizer.vocab_size",
        "train.batch_size", "train.batch_start", "train.eval_batches", "train.max_bad_steps", "train.micro_batches",
        "train.rewind.limit", "train.rewind.patience", "train.rewind.window", "train.sequence_length",
    ),
    ABOVE_0: (
        "serve.stall_seconds",
        "generate.repetition_penalty", "model.adapter.alpha", "objective.policy.correction_high", "objective.policy.gate_negative",
        "objective.policy.gate_positive", "objective.policy.ratio_cap", "rollout.temperature",
        "objective.preference.beta", "objective.distill.temperature", "objective.unpaired.beta", "objective.preference.temperature", "model.init_std", "model.moe.capacity_factor", "model.mup_base_layers", "model.mup_base_width",
        "model.norm_epsilon", "model.rotary_base", "model.rotary_factor", "model.rotary_fast", "model.rotary_slow",
        "optimizer.epsilon",
    ),
    SHARE: (
        "generate.min_p", "objective.distill.data_weight", "objective.preference.length_weight", "objective.distill.on_policy", "objective.infill_rate", "objective.infill_suffix_first", "prepare.language_threshold",
        "prepare.quality_min", "prepare.toxic_words_max", "prepare.toxicity_max", "rollout.discount", "rollout.trace",
    ),
    SHARE_ABOVE_0: (
        "generate.top_p", "generate.typical_p", "optimizer.layer_decay", "model.mup_depth_power", "model.rotary_fraction", "objective.preference.alpha",
        "prepare.near_jaccard",
    ),
    SHARE_BELOW_1: (
        "model.adapter.dropout", "model.attention_dropout", "model.dropout", "model.embedding_dropout", "model.layer_drop", "model.moe.jitter",
        "objective.label_smoothing", "optimizer.beta1", "optimizer.beta2", "optimizer.muon_momentum", "train.ema",
    ),
    SHARE_INSIDE: ("objective.distill.mix", "objective.mask_rate", "objective.predict_share"),
    Range(0, 100): ("data.rejected_percent",),
    PERCENT: ("data.holdout_percent", "data.holdout_tail_percent", "data.replay_percent"),
    SEED: ("seed",),
    Range(0, 0.5, high_open=True): ("objective.preference.label_smoothing",),
    Range(1, 3): ("parallel.zero",),
}  # fmt: skip
# Lists of numbers: the range of each, and whether it is whole. Every other list has texts.
LISTS: dict[str, tuple[Range, bool]] = {
    "model.moe.dense": (AT_LEAST_0, True), "eval.pass_at": (AT_LEAST_1, True), "objective.policy.never": (AT_LEAST_0, True),
    "model.rotary_short_factors": (ABOVE_0, False), "model.rotary_long_factors": (ABOVE_0, False),
    "objective.mask_split": (ANY, False), "objective.modes": (ANY, False),
}  # fmt: skip
RANGE_OF = {key: allowed for allowed, keys in RANGES.items() for key in keys}


def check_ranges(flat: Mapping[str, Any]) -> None:
    """Raise UserError for the first number outside its range; `flat`: dotted key -> value."""
    for key, allowed in RANGE_OF.items():
        if flat[key] not in allowed:
            raise UserError(f"{key}={flat[key]} must be {allowed}")


def check_lists(flat: Mapping[str, Any]) -> None:
    """Raise UserError for the first list with an element of another kind than it holds; `flat`: dotted key -> value."""
    for key, value in flat.items():
        if not isinstance(value, tuple):
            continue
        allowed, whole = LISTS.get(key, (ANY, False))
        for element in value:
            if key in LISTS:
                right = element in allowed and not (whole and isinstance(element, float))
            elif key == "parallel.rules":
                right = isinstance(element, tuple) and len(element) == 2 and isinstance(element[0], str)
            else:
                right = isinstance(element, str) or (key == "schedule.drop_at" and type(element) is int)
            if not right:
                kind = "rows (regex, axes)" if key == "parallel.rules" else "texts"
                if key in LISTS:
                    kind = f"{'whole ' * whole}numbers, each {allowed}"
                raise UserError(f"{key} has {element!r}: it is a list of {kind}")


def number(kind: type[int] | type[float], allowed: Range) -> Callable[[str], int | float]:
    """A `type` for numeric arguments of a command: argparse reports what is no number or out of range."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number") from None
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text} must be {allowed}")
        return value

    return parse
