"""What a changed setting means for a run that exists.

*identity*: the run is another one and starts from its beginning. *continuable*: a training goes on from its last
checkpoint with the new value. *irrelevant*: the setting says how the work is done, not what comes out. Every setting
that a training depends on has a class here, either itself or through its group.
"""

from collections.abc import Mapping
from typing import Any

from llmjax.config.settings import base
from llmjax.config.values import flatten, parse_duration

IDENTITY, CONTINUABLE, IRRELEVANT = "identity", "continuable", "irrelevant"

CLASSES: dict[str, tuple[str, ...]] = {
    IDENTITY: (
        "data", "model", "model.adapter", "model.latent", "model.moe", "model.recurrent", "prepare", "seed", "tokenizer", "eval", "generate", "name",
        "objective.infill_rate", "objective.infill_suffix_first", "objective.mask_rate", "objective.mask_split",
        "objective.modes", "objective.name", "objective.predict_share", "objective.recurrence", "objective.span_length",
        "objective.policy", "objective.preference", "objective.classify", "objective.distill", "objective.unpaired", "objective.reward", "objective.whole_words", "optimizer.freeze", "optimizer.name", "optimizer.train", "train.batch_ramp", "train.batch_size", "train.batch_start",
        "rollout", "train.init_from", "train.sequence_length",
    ),
    CONTINUABLE: (
        "model.adapter.dropout", "model.attention_dropout", "model.dropout", "model.dropout_shape", "model.dtype", "model.embedding_dropout",
        "model.layer_drop", "model.moe.balance_loss", "model.moe.balance_over", "model.moe.capacity_factor",
        "model.moe.dispatch", "model.moe.jitter", "model.moe.z_loss", "model.quantization", "model.recurrent.chunk", "objective.focal",
        "objective.l1", "objective.l2", "objective.label_smoothing", "objective.loss_chunks", "objective.vocab_size", "objective.z_loss",
        "optimizer.beta1", "optimizer.beta2", "optimizer.clip_norm", "optimizer.epsilon", "optimizer.layer_decay", "optimizer.learning_rate",
        "optimizer.muon_learning_rate", "optimizer.muon_momentum", "optimizer.rates", "optimizer.weight_decay", "rollout.slots", "schedule.by",
        "schedule.decay", "schedule.drop_at", "schedule.drop_factor", "schedule.final", "schedule.name",
        "schedule.warmup", "train.duration", "train.ema", "train.max_bad_steps", "train.micro_batches",
        "train.rewind.factor", "train.rewind.limit", "train.rewind.patience", "train.rewind.skip", "train.rewind.steps",
        "train.rewind.window",
    ),
    IRRELEVANT: (
        "data.rejected_percent", "model.attention", "model.barriers", "model.remat", "model.scan_unroll", "prepare.engine", "prepare.keep_work",
        "prepare.memory_bytes", "prepare.spark_master", "prepare.workers", "train.eval_batches", "train.eval_every", "train.eval_first",
        "train.device_price", "train.executable", "train.hunt_nan", "train.inherit_model", "train.log_every", "train.noise_scale", "train.tensorboard",
    ),
}  # fmt: skip
_CLASS = {key: name for name, keys in CLASSES.items() for key in keys}


def class_of(key: str) -> str:
    """The class of a setting, or of anything else that a stage depends on, such as the files that it reads."""
    while key not in _CLASS and "." in key:
        key = key.rpartition(".")[0]
    return _CLASS.get(key, IDENTITY)


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ and matter: dotted key -> (before, after).

    A key that one side lacks is newer than that side, which had the default.
    """
    defaults = flatten(base().to_dict())
    found = {}
    for key in sorted(before.keys() | after.keys()):
        old, new = (_plain(side.get(key, defaults.get(key))) for side in (before, after))
        if old != new and class_of(key) != IRRELEVANT:
            found[key] = (old, new)
    return found


def makes_another(differences: Mapping[str, tuple[Any, Any]], after: Mapping[str, Any]) -> list[str]:
    """The keys of `changed` that make another training, which cannot go on."""
    keys = [key for key in differences if class_of(key) == IDENTITY]
    # Percentages of the duration move with it, and with them batches that were seen already.
    past = [after["train.batch_ramp"], *(stage.partition(":")[0] for stage in after.get("data.mixture", ()))]
    moves = any(unit == "%" and amount for amount, unit in map(parse_duration, past)) or after.get("data.max_epochs")
    return keys + ["train.duration"] * bool("train.duration" in differences and moves and "train.duration" not in keys)


def described(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """The first three entries of `changed`, in words."""
    told = [
        f"{key} changed" if " " in key else f"{key} changed from {old!r} to {new!r}"
        for key, (old, new) in differences.items()
    ]
    return ", ".join(told[:3]) + (f" and {len(told) - 3} more settings" if len(told) > 3 else "")


def _plain(value: Any) -> Any:
    """The value as JSON keeps it."""
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
