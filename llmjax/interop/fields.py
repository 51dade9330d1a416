"""Reading the fields of their config.json, and the check that what was written there says the same as what we have."""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.errors import UserError
from llmjax.model.layers import mlp_width

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
    "dtype",
    "param_dtype",
    "remat",
    "scan_unroll",
    "attention",
    "vocab_multiple",
    "moe.balance_loss",
    "moe.balance_over",
    "moe.z_loss",
    "moe.jitter",
)


# The fields of config.json that are numbers, and those where null is a value too: "as many as heads", "none".
NUMBERS = frozenset(
    [
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "d_ff",
        "d_kv",
        "d_model",
        "decoder_sparse_step",
        "dropout",
        "dropout_rate",
        "emb_dim",
        "embd_pdrop",
        "ffn_dim",
        "ffn_hidden_size",
        "hidden_dropout",
        "hidden_dropout_prob",
        "hidden_size",
        "init_std",
        "initializer_range",
        "intermediate_size",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "layerdrop",
        "max_position_embeddings",
        "moe_intermediate_size",
        "n_ctx",
        "n_embd",
        "n_embed",
        "n_head",
        "n_heads",
        "n_langs",
        "n_layer",
        "n_layers",
        "n_positions",
        "n_token",
        "n_words",
        "num_attention_heads",
        "num_decoder_layers",
        "num_experts",
        "num_experts_per_tok",
        "num_heads",
        "num_hidden_layers",
        "num_layers",
        "num_local_experts",
        "query_pre_attn_scalar",
        "relative_attention_max_distance",
        "relative_attention_num_buckets",
        "resid_pdrop",
        "rms_norm_eps",
        "rope_local_base_freq",
        "rope_theta",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "seq_length",
        "sliding_window_pattern",
        "type_vocab_size",
        "vocab_size",
        "word_embed_proj_dim",
    ]
)
NULLABLE = frozenset(
    [
        "attn_logit_softcapping",
        "d_inner",
        "final_logit_softcapping",
        "head_dim",
        "max_window_layers",
        "n_head_kv",
        "n_inner",
        "num_key_value_heads",
        "num_kv_heads",
        "sliding_window",
    ]
)


def with_numbers(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json without those that should be numbers and are null, which say nothing.

    Raises UserError for a text or a list where a number belongs.
    """
    found = {}
    for name, value in theirs.items():
        if name in NUMBERS | NULLABLE and not isinstance(value, int | float | None):
            raise UserError(f"config.json has {name}={value!r}, which is no number")
        if value is not None or name not in NUMBERS:
            found[name] = with_numbers(value) if name == "text_config" and isinstance(value, dict) else value
    return found


def field(theirs: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The value of the first of these names (a field and its older spellings) that is there and not null.

    config.json leaves out what equals the default of its model type: give that as `default`. Without one a missing
    field is a UserError.
    """
    for name in names:
        if theirs.get(name) is not None:
            return theirs[name]
    if default is None:
        raise UserError(f"config.json lacks {' or '.join(names)}; add it as in the model type's published configs")
    return default


def only(theirs: Mapping[str, Any], name: str, *values: Any) -> None:
    """Raise UserError unless a field is missing, null or one of these values."""
    given = theirs.get(name)
    if given is not None and given not in values:
        raise UserError(f"config.json has {name}={given!r}; supported: {' or '.join(map(repr, values))}")


def choose(name: str, given: Any, table: Mapping[Any, Any]) -> Any:
    """The row of a table from their values to ours. UserError names the field, the value and the table's keys."""
    if given not in table:
        raise UserError(f"config.json has {name}={given!r}; supported: {', '.join(map(repr, table))}")
    return table[given]


def meaning(c: ConfigDict) -> dict[str, Any]:
    """The settings of `config.model` on which a forward pass depends, with defaults such as kv_heads=0 resolved."""
    said = {k: v for k, v in config.flatten(c.to_dict()).items() if k not in NOT_EXPORTED}
    said |= {"kv_heads": c.kv_heads or c.heads, "head_size": config.head_size(c), "mlp_width": mlp_width(c)}
    said |= {
        "embedding_width": c.embedding_width or c.width,
        "attention_scale": c.attention_scale or said["head_size"] ** -0.5,
    }
    said |= {"bias": tuple(sorted(part for part in c.bias if part != "norm" or c.norm != "rms"))}  # rms has none
    said |= {"moe.width": c.moe.width or mlp_width(c)}
    kinds = {c.pattern[i % len(c.pattern)] for i in range(c.layers)}
    said["pattern"] = tuple(c.pattern[i % len(c.pattern)] for i in range(c.layers))
    idle = {
        "rotary_": c.position != "rotary",
        "rotary_factor": c.rotary_scaling == "none",
        "rotary_original_length": c.rotary_scaling not in ("llama3", "yarn"),
        "rotary_slow": c.rotary_scaling not in ("llama3", "yarn"),
        "rotary_fast": c.rotary_scaling not in ("llama3", "yarn"),
        "rotary_local_base": "local" not in kinds,
        "alibi_": c.position != "alibi",
        "relative_": c.position != "t5",
        "position_offset": c.position != "learned",
        "max_length": c.position != "learned",  # otherwise only the default size of a cache
        "window": "local" not in kinds,
        "moe.": c.moe.experts == 0,
        "moe.capacity_factor": c.moe.dispatch != "capacity",
        "recurrent.": not kinds - {"global", "local"},
        "shared_norm": c.block != "parallel",
        "norm_zero_centered": c.norm == "none",
        "norm_epsilon": c.norm == "none",
        "activation": c.mlp == "none" and not c.head_transform,
        "mlp_width": c.mlp == "none",
    }
    return {k: v for k, v in said.items() if not any(off and k.startswith(prefix) for prefix, off in idle.items())}


def require_same(ours: ConfigDict, again: ConfigDict, family: str) -> None:
    """Raise UserError unless the model that a family's config.json describes (`again`) is the one to be written."""
    mine, theirs = meaning(ours), meaning(again)

    def differs(a: Any, b: Any) -> bool:
        return not math.isclose(a, b, rel_tol=1e-12) if isinstance(a, float) and isinstance(b, float) else bool(a != b)

    keys = [k for k in sorted(mine.keys() | theirs.keys()) if differs(mine.get(k), theirs.get(k))]
    if keys:
        said = "; ".join(f"model.{k}={mine.get(k)!r}, there {theirs.get(k)!r}" for k in keys)
        raise UserError(
            f"a {family} checkpoint cannot say this model: {said}. Change these or export as another family"
        )
