"""The language in which a family says which fields of config.json are which settings of `config.model`.

A family's table is a tuple of entries. An entry says both directions, so that nothing is said twice: `read_fields`
makes `config.model` of a config.json, and `write_fields` the reverse. What no entry names and `HARMLESS` does not list
is an error, because a setting that is not understood would make another model without a word.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.config.model_checks import ATTENTION, BIASES
from llmjax.config.ranges import RANGE_OF
from llmjax.errors import UserError
from llmjax.model.init import residual_scale
from llmjax.model.layers import mlp_width
from llmjax.model.parametrization import attention_scale, branch_scale, logit_scale
from llmjax.model.stacks import sparse_layers

Theirs = Mapping[str, Any]
Default = Any  # a value, or a function of the settings that were read before
ABSENT: Any = object()
REQUIRED: Any = object()
REMOVE = "remove what does not change the network from the file"

# Fields of any model type that do not change what the network computes: names, versions, training, generation.
HARMLESS = frozenset(
    """
    model_type architectures transformers_version _name_or_path name_or_path auto_map torch_dtype dtype use_cache
    cache_implementation tokenizer_class prefix gradient_checkpointing pretraining_tp initializer_factor
    _attn_implementation _attn_implementation_autoset attn_implementation use_flash_attn unsloth_version unsloth_fixed
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id begin_suppress_tokens suppress_tokens bad_words_ids task_specific_params
    id2label label2id num_labels problem_type finetuning_task classifier_dropout return_dict output_hidden_states
    output_attentions output_router_logits output_scores output_past return_dict_in_generate torchscript use_bfloat16
    pruned_heads chunk_size_feed_forward tie_encoder_decoder remove_invalid_values is_decoder
    is_encoder_decoder max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_return_sequences exponential_decay_length_penalty summary_activation
    summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type summary_use_proj
    """.split()  # noqa: SIM905
)
# What never reaches a config.json: how a model is initialised and regularised, and how fast it is computed.
NOT_EXPORTED = (
    "dropout",
    "embedding_dropout",
    "attention_dropout",
    "layer_drop",
    "dropout_shape",
    "init",
    "init_std",
    "mup_base_width",
    "mup_base_layers",
    "mup_depth_power",
    "dtype",
    "param_dtype",
    "remat",
    "barriers",
    "scan_unroll",
    "attention",
    "vocab_multiple",
    "moe.balance_loss",
    "moe.balance_over",
    "moe.z_loss",
    "moe.jitter",
)
ACTIVATIONS = {  # their names -> ours; of those that share one of ours the first is written
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # the same polynomial, multiplied out otherwise
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
GATED_ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "relu": "reglu",
}


@dataclass(frozen=True)
class Entry:
    """Fields of config.json and settings of `config.model` that say the same.

    names: the fields that `read` looks at.
    read: sets the settings; the names are there with values that are not null, or missing.
    write: the fields of the settings.
    required: the names of which one must be there.
    nullable: the names for which null is a value of its own, and not the same as missing.
    """

    names: tuple[str, ...]
    read: Callable[[ConfigDict, Theirs], None] = lambda c, theirs: None
    write: Callable[[ConfigDict], dict[str, Any]] = lambda c: {}
    required: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()


def field(
    name: str,
    ours: str,
    default: Default = REQUIRED,
    *,
    also: tuple[str, ...] = (),
    null: Default = ABSENT,
    table: Mapping[Any, Any] | None = None,
    kind: type | None = None,
    to_ours: Callable[[Any], Any] = lambda value: value,
    to_theirs: Callable[[Any], Any] = lambda value: value,
) -> Entry:
    """One field that is one setting.

    Args:
        ours: the setting, such as "layers" or "moe.experts".
        default: the setting where the field is missing or null; REQUIRED: it must be there.
        also: older spellings of the field, which are read and not written.
        null: the setting where the field is null, if that says something of its own; written as null.
        table: their values -> ours, for the values that are supported.
        kind: int, float or bool, the type of their value; None: the setting's.
    """
    own_kind = kind or type(get(config.base().model, ours))
    names: dict[Any, Any] = {value: there for there, value in reversed(list((table or {}).items()))}

    def read(c: ConfigDict, theirs: Theirs) -> None:
        used = next((n for n in (name, *also) if theirs.get(n) is not None), name)
        given = theirs.get(used)
        if given is None:
            value = null if null is not ABSENT and name in theirs else default
            value = value(c) if callable(value) else value
        elif table is not None:
            value = choose(used, given, table)
        else:
            value = to_ours(typed(used, given, own_kind))
            allowed = RANGE_OF.get(f"model.{ours}")
            if allowed is not None and value not in allowed:
                raise UserError(
                    f"config.json has {used}={given!r}, which makes model.{ours}={value}; it must be {allowed}"
                )
        put(c, ours, value)

    def write(c: ConfigDict) -> dict[str, Any]:
        value = get(c, ours)
        if null is not ABSENT and not callable(null) and value == null:
            return {name: None}
        if table is not None and value not in names:
            raise UserError(f"model.{ours}={value!r} has no name as {name}; it can be {', '.join(map(repr, names))}")
        return {name: names[value] if table is not None else to_theirs(value)}

    return Entry(
        (name, *also),
        read,
        write,
        required=(name, *also) if default is REQUIRED else (),
        nullable=(name,) if null is not ABSENT else (),
    )


def fixed(name: str, *values: Any) -> Entry:
    """A field that must be missing, null or one of these values, or functions of settings: the network has no other."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        only(theirs, name, *(value(c) if callable(value) else value for value in values))

    return Entry((name,), read)


def settings(**values: Default) -> Entry:
    """Settings that every model of the type has and its config.json does not say."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        for name, value in values.items():
            put(c, name, value(c) if callable(value) else value)

    return Entry((), read)


def constants(**values: Any) -> Entry:
    """Fields that are written as they are, and not read."""
    return Entry(tuple(values), write=lambda c: dict(values))


def ignored(names: str) -> Entry:
    """Fields of a model type, separated by spaces, that do not change what its network computes."""
    return Entry(tuple(names.split()))


# As many heads of keys as of queries, which divide the width.
MULTI_HEAD = settings(kv_heads=lambda c: c.heads, head_size=lambda c: c.width // c.heads)


def read_fields(entries: Iterable[Entry], theirs: Theirs, *, defaults: Theirs | None = None) -> ConfigDict:
    """config.json -> `config.model`.

    Args:
        defaults: what the model type has where its config.json says nothing.

    Raises UserError that names every field that is missing or not understood, or one whose value is not supported.
    """
    entries = tuple(entries)
    nullable = {name for entry in entries for name in entry.nullable}
    said = {**(defaults or {}), **{k: v for k, v in theirs.items() if v is not None or k in nullable}}
    wanted = [entry.required for entry in entries if entry.required]
    lacking = [" or ".join(names) for names in wanted if all(said.get(name) is None for name in names)]
    if lacking:
        raise UserError(f"config.json lacks {', '.join(lacking)}; add them as in the model type's published configs")
    known = HARMLESS.union(*(entry.names for entry in entries))
    refuse_unknown("config.json", {k: v for k, v in said.items() if k not in known})
    c = config.base().model
    for entry in entries:
        try:
            entry.read(c, said)
        except UserError:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:  # values of strangers
            there = ", ".join(f"{name}={said[name]!r}" for name in entry.names if name in said)
            raise UserError(
                f"config.json has {there or 'values'} that cannot be ({error}): get the file again"
            ) from error
    return c


def refuse_unknown(where: str, left: Mapping[str, Any], advice: str = REMOVE) -> None:
    """UserError that names the fields which nothing reads, but those that are null or switched off."""
    unknown = [f"{name}={value!r}" for name, value in left.items() if value is not None and value is not False]
    if unknown:
        raise UserError(
            f"{where} has {', '.join(unknown)}, which is not understood here for this type of model, so that what is "
            f"imported might compute something else: {advice}"
        )


def write_fields(entries: Iterable[Entry], c: ConfigDict) -> dict[str, Any]:
    """`config.model` -> config.json, without model_type. UserError for a setting that it cannot say."""
    c = resolved(c)
    theirs: dict[str, Any] = {}
    for entry in entries:
        theirs |= entry.write(c)
    return theirs


def get(c: ConfigDict, key: str) -> Any:
    """The setting of a dotted key."""
    for part in key.split("."):
        c = c[part]
    return c


def put(c: ConfigDict, key: str, value: Any) -> None:
    """Set the setting of a dotted key, a whole number where a float belongs made a float."""
    *parents, last = key.split(".")
    for part in parents:
        c = c[part]
    c[last] = float(value) if isinstance(c[last], float) else value


def typed(name: str, value: Any, kind: type, *, where: str = "config.json") -> Any:
    """The value of a field, of this type. UserError for text, lists and whatever else is none."""
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{where} has {name}={value!r}, which is neither true nor false")
        return value
    if kind not in (int, float):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} has {name}={value!r}, which is no number")
    if not math.isfinite(value):
        raise UserError(f"{where} has {name}={value!r}, which is no finite number")
    if kind is int and value != int(value):
        raise UserError(f"{where} has {name}={value!r}, which is no whole number")
    return kind(value)


def flag(theirs: Theirs, name: str, default: bool = False, *, where: str = "config.json") -> bool:
    """A field that is true or false. UserError if it is something else."""
    value = theirs.get(name)
    return default if value is None else typed(name, value, bool, where=where)


def number(theirs: Theirs, name: str, default: float | None = None, *, where: str = "config.json") -> Any:
    """A number, whole or not. UserError if it is something else, or missing without a default."""
    value = theirs.get(name, default)
    if value is None:
        raise UserError(f"{where} lacks {name}; add it as in the model type's published configs")
    return typed(name, value, type(value) if type(value) is int else float, where=where)


def mapping(theirs: Theirs, name: str, *, where: str = "config.json") -> dict[str, Any]:
    """A field that holds fields, without those that are null; {} if it is missing. UserError if it is something else."""
    value = theirs.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} has {name}={value!r}, which is no object with fields")
    return {key: inner for key, inner in value.items() if inner is not None}


def only(theirs: Theirs, name: str, *values: Any) -> None:
    """Raise UserError unless a field is missing, null or one of these values."""
    given = theirs.get(name)
    if given is not None and given not in values:
        raise UserError(f"config.json has {name}={given!r}; supported: {' or '.join(map(repr, values))}")


def choose(name: str, given: Any, table: Mapping[Any, Any]) -> Any:
    """The row of a table from their values to ours. UserError names the field, the value and the table's keys."""
    if not isinstance(given, str | int | float) or given not in table:
        raise UserError(f"config.json has {name}={given!r}; supported: {', '.join(map(repr, table))}")
    return table[given]


def resolved(c: ConfigDict) -> ConfigDict:
    """The same model with sizes of 0 and with scales that `init` decides replaced by what they mean."""
    c = c.copy_and_resolve_references()
    c.kv_heads, c.head_size, c.mlp_width = c.kv_heads or c.heads, config.head_size(c), mlp_width(c)
    c.embedding_width, c.moe.width = c.embedding_width or c.width, c.moe.width or c.mlp_width
    c.recurrent.heads = c.recurrent.heads or c.heads
    c.recurrent.width = c.recurrent.width or (2 if "mamba2" in c.pattern else 1) * c.width
    none = {"norm": c.norm == "rms", "router": c.moe.experts == 0}  # parts that have no bias, whatever c.bias says
    c.bias = tuple(part for part in BIASES if part in c.bias and not none.get(part))
    c.attention_scale, c.logit_scale, c.residual_scale = attention_scale(c), logit_scale(c), residual_scale(c)
    c.branch_scale = branch_scale(c)
    c.init = config.base().model.init
    return c


def meaning(c: ConfigDict) -> dict[str, Any]:
    """The settings of `config.model` on which a forward pass depends, with defaults such as kv_heads=0 resolved."""
    c = resolved(c)
    said = {k: v for k, v in config.flatten(c.to_dict()).items() if k not in NOT_EXPORTED}
    kinds = {c.pattern[i % len(c.pattern)] for i in range(c.layers)}
    said["pattern"] = tuple(c.pattern[i % len(c.pattern)] for i in range(c.layers))
    said["moe.layers"] = sparse_layers(c)  # what these say
    for name in ("moe.first", "moe.every", "moe.dense"):
        del said[name]
    idle = {
        "rotary_": c.position != "rotary",
        "rotary_factor": c.rotary_scaling == "none",
        "rotary_original_length": c.rotary_scaling not in ("llama3", "yarn", "longrope"),
        "rotary_attention_factor": c.rotary_scaling not in ("yarn", "longrope"),
        "rotary_short_factors": c.rotary_scaling != "longrope",
        "rotary_long_factors": c.rotary_scaling != "longrope",
        "rotary_truncate": c.rotary_scaling != "yarn",
        "latent.": c.latent.kv_rank == 0,
        "rotary_fraction": c.latent.kv_rank > 0,
        "rotary_slow": c.rotary_scaling not in ("llama3", "yarn"),
        "rotary_fast": c.rotary_scaling not in ("llama3", "yarn"),
        "rotary_local_base": "local" not in kinds,
        "alibi_": c.position != "alibi",
        "relative_": c.position != "t5",
        "position_offset": c.position != "learned",
        "max_length": c.position != "learned",  # otherwise only the default size of a cache
        "window": "local" not in kinds,
        "moe.": c.moe.experts == 0,
        **dict.fromkeys(("moe.active_groups", "moe.group_score"), c.moe.groups == 1),
        "moe.capacity_factor": c.moe.dispatch != "capacity",
        "recurrent.": not kinds - set(ATTENTION),
        **dict.fromkeys(("recurrent.state_size", "recurrent.groups", "recurrent.chunk"), "mamba2" not in kinds),
        **dict.fromkeys(("heads", "kv_heads", "head_size", "attention_", "qk_norm"), not kinds & set(ATTENTION)),
        "shared_norm": c.block != "parallel",
        "qk_norm_over": not c.qk_norm,
        "norm_zero_centered": c.norm == "none",
        "norm_epsilon": c.norm == "none",
        "activation": c.mlp == "none" and not c.head_transform,
        "mlp_width": c.mlp == "none",
    }
    return {k: v for k, v in said.items() if not any(off and k.startswith(prefix) for prefix, off in idle.items())}


def require_same(ours: ConfigDict, again: ConfigDict, family: str, *, unsaid: Iterable[str] = ()) -> None:
    """Raise UserError unless the model that a family's config.json describes (`again`) is the one to be written.

    `unsaid`: settings that the family's tensors say and its config.json does not.
    """
    mine, theirs = meaning(ours), meaning(again)

    def differs(a: Any, b: Any) -> bool:
        return not math.isclose(a, b, rel_tol=1e-12) if isinstance(a, float) and isinstance(b, float) else bool(a != b)

    keys = [k for k in sorted((mine.keys() | theirs.keys()) - set(unsaid)) if differs(mine.get(k), theirs.get(k))]
    if keys:
        said = "; ".join(f"model.{k}={mine.get(k)!r}, there {theirs.get(k)!r}" for k in keys)
        raise UserError(
            f"a {family} checkpoint cannot say this model: {said}. Change these or export as another family"
        )
