"""Llama (Touvron et al. 2023) and its relatives: Mistral, Mixtral, Qwen 2 and 3 (also sparse), SmolLM 3, Granite.

All have rotary positions, RMS norms and gated MLPs, and the same names of tensors. They differ in biases, norms of
queries and keys, windows, experts and scales. `gemma.py` and `olmo.py` have more of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.errors import UserError
from llmjax.interop.experts import expert_rows, fused_expert_rows
from llmjax.interop.fields import (
    GATED_ACTIVATIONS,
    Entry,
    Theirs,
    choose,
    constants,
    field,
    fixed,
    flag,
    ignored,
    only,
    settings,
    typed,
)
from llmjax.interop.mapping import Family, Row, linear, same, tied
from llmjax.interop.rope import rope
from llmjax.model.layers import mlp_width
from llmjax.model.stacks import layer_slots, sparse_layers

# The sizes, and what else every one of them has.
SIZES = (
    field("vocab_size", "vocab_size"),
    field("num_hidden_layers", "layers"),
    field("hidden_size", "width"),
    field("num_attention_heads", "heads"),
    field("intermediate_size", "mlp_width"),
    field("max_position_embeddings", "max_length"),
    field("num_key_value_heads", "kv_heads", lambda c: c.heads, null=lambda c: c.heads),
    field("head_dim", "head_size", lambda c: c.width // c.heads, null=lambda c: c.width // c.heads),
    field("rms_norm_eps", "norm_epsilon", 1e-6),
    field("tie_word_embeddings", "tie_embeddings", False),
    field("attention_dropout", "attention_dropout", 0.0),
    field("initializer_range", "init_std", 0.02),
)
SILU = field("hidden_act", "activation", "swiglu", table=GATED_ACTIVATIONS)


def biases(*, attention: str = "none", mlp: bool = False) -> Entry:
    """Which parts have biases. attention: none, qkv (always), or asked (queries, keys, values and outputs if the file says so)."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        for name, asked in (("attention_bias", attention == "asked"), ("mlp_bias", mlp)):
            if not asked:
                only(theirs, name, False)
        parts = ("qkv",) if attention == "qkv" else ("qkv", "out") if flag(theirs, "attention_bias") else ()
        c.bias = (*parts, "mlp") if flag(theirs, "mlp_bias") else parts

    def write(c: ConfigDict) -> dict[str, Any]:
        said = {"attention_bias": "out" in c.bias} if attention == "asked" else {}
        return said | ({"mlp_bias": "mlp" in c.bias} if mlp else {})

    return Entry(("attention_bias", "mlp_bias"), read, write)


def windows(which: str, *, switched: bool = False, periodic: bool = False, full: str = "global") -> Entry:
    """Which layers have a window.

    Args:
        which: none, all, or some (layer_types).
        switched: use_sliding_window must be set too.
        periodic: without layer_types, every so many layers have none; else those before max_window_layers.
        full: the kind of the layers without one.
    """

    kinds_of = {"full_attention": full, "sliding_attention": "local"}

    def read(c: ConfigDict, theirs: Theirs) -> None:
        types = theirs.get("layer_types")
        if types is not None and not isinstance(types, list):
            raise UserError(f"config.json has layer_types={types!r}, which is no list")
        window = theirs.get("sliding_window") if not switched or flag(theirs, "use_sliding_window") else None
        if which != "none" and window is not None and (window := typed("sliding_window", window, int)) < 1:
            raise UserError(
                f"config.json has sliding_window={window}; it must be at least 1, or null where there is none"
            )
        if which == "all" and window and window >= c.max_length:
            window = None  # every token is within it
        if which != "some":
            window = window if which == "all" else None
            kinds = ["local" if window else "global"] * c.layers
            if types is not None and [choose("layer_types", t, kinds_of) for t in types] != kinds:
                raise UserError(f"config.json has layer_types={types}; supported: {kinds[0]} attention in all layers")
        elif types is not None:
            kinds = [choose("layer_types", t, kinds_of) for t in types]
        elif periodic:
            period = typed("sliding_window_pattern", theirs["sliding_window_pattern"], int)
            if period < 1:
                raise UserError(f"config.json has sliding_window_pattern={period}; it must be at least 1")
            kinds = ["local" if (i + 1) % period else full for i in range(c.layers)]
        else:
            first = typed("max_window_layers", theirs["max_window_layers"], int)
            kinds = ["local" if window and i >= first else full for i in range(c.layers)]
        set_pattern(c, kinds)
        if "local" in kinds and not window:
            raise UserError(
                f"config.json has layers with sliding_attention and sliding_window={window!r}; give its size"
            )
        c.window = window if "local" in kinds else c.window

    def write(c: ConfigDict) -> dict[str, Any]:
        names = {ours: theirs for theirs, ours in kinds_of.items()}
        kinds = [c.pattern[i % len(c.pattern)] for i in range(c.layers)]
        window = c.window if "local" in kinds else None
        if which == "none":
            return {}
        said: dict[str, Any] = {"sliding_window": window} | ({"use_sliding_window": bool(window)} if switched else {})
        if which == "some":
            said["layer_types"] = [names.get(kind, kind) for kind in kinds]
            if not periodic:
                said["max_window_layers"] = kinds.index("local") if window else c.layers
            elif c.pattern == ("local",) * (len(c.pattern) - 1) + (full,):
                said["sliding_window_pattern"] = len(c.pattern)  # for versions that do not know layer_types
        return said

    names: tuple[str, ...] = {"none": (), "all": ("sliding_window",), "some": ("sliding_window", "max_window_layers")}[
        which
    ]
    names += ("use_sliding_window", "max_window_layers") if switched else ()
    names += ("sliding_window_pattern", "_sliding_window_pattern") if periodic else ()
    return Entry(("layer_types", *names), read, write, nullable=("sliding_window",) if which != "none" else ())


def set_pattern(c: ConfigDict, kinds: list[str], *, name: str = "layer_types") -> None:
    """Set the shortest pattern that repeats as these kinds of layers, which are those of the field `name`."""
    if len(kinds) != c.layers:
        raise UserError(f"config.json has {len(kinds)} {name} for num_hidden_layers={c.layers}")
    period = next(p for p in range(1, c.layers + 1) if all(kinds[i] == kinds[i % p] for i in range(c.layers)))
    c.pattern = tuple(kinds[:period])


def written_balance(c: ConfigDict) -> float:
    """The weight of their balance loss, which is one for all layers and k at balance, that is worth ours at balance."""
    sparse = sum(sparse_layers(c))
    return float(c.moe.balance_loss * (1 if c.moe.balance_over == "layers" else sparse / c.moe.active))


def experts(name: str, count: int, active: int) -> tuple[Entry, ...]:
    """Sparse layers, the number of their experts being the field `name`."""
    balance = field("router_aux_loss_coef", "moe.balance_loss", 0.001)
    return (
        field(name, "moe.experts", count, also=("num_local_experts", "num_experts")),
        field("num_experts_per_tok", "moe.active", active),
        dataclasses.replace(balance, write=lambda c: {"router_aux_loss_coef": written_balance(c)}),
        field("router_jitter_noise", "moe.jitter", 0.0),
        settings(**{"moe.z_loss": 0.0, "moe.balance_over": "layers"}),
    )


def dense_layers() -> Entry:
    """The layers without experts: all but every so many, and the ones that mlp_only_layers lists."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        c.moe.every = step = typed("decoder_sparse_step", theirs.get("decoder_sparse_step") or 1, int)
        listed = theirs.get("mlp_only_layers") or []
        if step < 1 or not isinstance(listed, list) or not all(isinstance(i, int) for i in listed):
            raise UserError(
                f"config.json has decoder_sparse_step={step}, mlp_only_layers={listed}; supported: a step of at least 1, and "
                "numbers of layers"
            )
        dense = [i for i in range(step - 1, c.layers, step) if i in listed]
        if step == 1 and dense == list(range(len(dense))):
            c.moe.first = len(dense)
        else:
            c.moe.dense = tuple(dense)

    def write(c: ConfigDict) -> dict[str, Any]:
        step = c.moe.every if c.moe.first == 0 else 1
        sparse = sparse_layers(c)
        return {
            "decoder_sparse_step": step,
            "mlp_only_layers": [i for i in range(step - 1, c.layers, step) if not sparse[i]],
        }

    return Entry(("decoder_sparse_step", "mlp_only_layers"), read, write)


def rows(c: ConfigDict, *, expert_names: str = "") -> Iterator[Row]:
    """Every tensor of a checkpoint; `expert_names` as for `experts.expert_rows`."""
    D, H, G, K, F = c.width, c.heads, c.kv_heads or c.heads, config.head_size(c), mlp_width(c)
    yield same("embedding", None, (c.vocab_size, D), "model.embed_tokens.weight")
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if c.norm_place == "sandwich":
        norms |= {"attention_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
        norms |= {"mlp_post_norm": "post_feedforward_layernorm"}
    elif c.norm_place == "after":
        norms = {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
    for i, ((prefix, n), sparse) in enumerate(zip(layer_slots(c), sparse_layers(c), strict=True)):
        layer = f"model.layers.{i}"
        for ours, theirs in norms.items():
            yield same(f"{prefix}/{ours}/scale", n, (D,), f"{layer}.{theirs}.weight")
        attention, there, bias = f"{prefix}/attention", f"{layer}.self_attn", "qkv" in c.bias
        yield from linear(f"{attention}/query", n, (D,), (H, K), f"{there}.q_proj", bias=bias)
        yield from linear(f"{attention}/key", n, (D,), (G, K), f"{there}.k_proj", bias=bias)
        yield from linear(f"{attention}/value", n, (D,), (G, K), f"{there}.v_proj", bias=bias)
        yield from linear(f"{attention}/out", n, (H, K), (D,), f"{there}.o_proj", bias="out" in c.bias)
        if c.qk_norm:
            whole = c.qk_norm_over == "heads"
            yield same(f"{attention}/query_norm/scale", n, (H * K if whole else K,), f"{there}.q_norm.weight")
            yield same(f"{attention}/key_norm/scale", n, (G * K if whole else K,), f"{there}.k_norm.weight")
        if sparse:
            yield from expert_rows(expert_names, c, f"{prefix}/moe", n, layer)
            if c.moe.shared:
                yield from _shared_rows(c, f"{prefix}/moe", n, f"{layer}.mlp.shared_expert")
            continue
        for name, inputs, outputs in (("gate", D, F), ("up", D, F), ("down", F, D)):
            bias = "mlp" in c.bias
            yield from linear(f"{prefix}/mlp/{name}", n, (inputs,), (outputs,), f"{layer}.mlp.{name}_proj", bias=bias)
    yield same("final_norm/scale", None, (D,), "model.norm.weight")
    if c.tie_embeddings:
        yield tied("lm_head.weight", "model.embed_tokens.weight")
    else:
        yield from linear("head", None, (D,), (c.vocab_size,), "lm_head")


def _shared_rows(c: ConfigDict, path: str, n: int, theirs: str) -> Iterator[Row]:
    D, F = c.width, c.moe.shared * (c.moe.width or mlp_width(c))
    for name, inputs, outputs in (("gate", D, F), ("up", D, F), ("down", F, D)):
        yield from linear(f"{path}/shared/{name}", n, (inputs,), (outputs,), f"{theirs}.{name}_proj")
    if c.moe.shared_gate:
        yield from linear(f"{path}/shared_gate", n, (D,), (1,), f"{theirs}_gate")


def family(
    model_types: str,
    classes: str,
    *entries: Entry | tuple[Entry, ...],
    defaults: dict[str, Any] | None = None,
    expert_names: str = "",
    activation: Entry = SILU,
    **more: Any,
) -> Family:
    """A model type: what sets it apart from Llama, and what its config.json may leave out.

    classes: what its class names begin with. expert_names: of the sparse block and of the gate's, down's and up's matrix.
    """
    flat = [one for entry in entries for one in (entry if isinstance(entry, tuple) else (entry,))]
    if not any("rope_theta" in entry.names for entry in flat):
        flat.append(rope())
    return Family(
        tuple(model_types.split()),
        (constants(architectures=[f"{classes}ForCausalLM"]), *SIZES, activation, *flat),
        functools.partial(rows, expert_names=expert_names),
        defaults=defaults or {},
        ignored=(r"rotary_emb\.inv_freq$", r"^(model\.)?(vision_tower|multi_modal_projector)\."),
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(model\.)?(language_model\.)?(model\.)?(?=(embed_tokens|layers|norm)\.)", "model."),
        ),
        other_rows=functools.partial(fused_expert_rows, expert_names) if expert_names else lambda c: (),
        **more,
    )


def decoder(
    model_type: str, entries: tuple[Entry, ...], rows: Callable[[ConfigDict], Iterable[Row]], **defaults: Any
) -> Family:
    """A model type with a table and rows of its own, whose tensors are named as Llama's are."""
    ignored, renames = (r"rotary_emb\.inv_freq$",), ((r"^(?=(embed_tokens|layers|norm)\.)", "model."),)
    return Family((model_type,), entries, rows, defaults=defaults, ignored=ignored, renames=renames)


def _shared_experts() -> Entry:
    """Experts that see every token, as one MLP that is so many times as wide, behind a gate of its own."""
    name = "shared_expert_intermediate_size"

    def read(c: ConfigDict, theirs: Theirs) -> None:
        width = typed(name, theirs.get(name, 5632), int)
        if width % c.moe.width:
            raise UserError(
                f"config.json has {name}={width}; supported: multiples of moe_intermediate_size={c.moe.width}"
            )
        c.moe.shared, c.moe.shared_gate = width // c.moe.width, True

    return Entry((name,), read, lambda c: {name: c.moe.shared * c.moe.width})


def _unrotated() -> Entry:
    """Layers whose queries and keys are not rotated: those with 0 in no_rope_layers, or each so-many-th."""

    def read(c: ConfigDict, theirs: Theirs) -> None:
        every = typed("no_rope_layer_interval", theirs.get("no_rope_layer_interval", 4), int)
        rotated = theirs.get("no_rope_layers")
        if every < 1 or not (rotated is None or (isinstance(rotated, list) and all(one in (0, 1) for one in rotated))):
            raise UserError(
                f"config.json has no_rope_layer_interval={every}, no_rope_layers={rotated!r}; supported: an interval of at "
                "least 1, and a list of 0 and 1"
            )
        rotated = rotated or [int((i + 1) % every != 0) for i in range(c.layers)]
        set_pattern(c, ["global" if on else "nope" for on in rotated], name="no_rope_layers")

    def write(c: ConfigDict) -> dict[str, Any]:
        return {"no_rope_layers": [int(c.pattern[i % len(c.pattern)] != "nope") for i in range(c.layers)]}

    return Entry(("no_rope_layers", "no_rope_layer_interval"), read, write)


FAMILIES: tuple[Family, ...] = (
    family("llama", "Llama", biases(attention="asked", mlp=True), windows("none")),
    family("mistral", "Mistral", biases(), windows("all"), defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    family(
        "mixtral",
        "Mixtral",
        biases(),
        windows("all"),
        experts("num_local_experts", 8, 2),
        fixed("norm_topk_prob", True),
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        expert_names="block_sparse_moe w1 w2 w3",
    ),
    family(
        "qwen2",
        "Qwen2",
        biases(attention="qkv"),
        windows("some", switched=True),
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
    family(
        "qwen3",
        "Qwen3",
        biases(attention="asked"),
        settings(qk_norm=True),
        windows("some", switched=True),
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    ),
    family(
        "qwen3_moe",
        "Qwen3Moe",
        biases(attention="asked"),
        settings(qk_norm=True),
        windows("all", switched=True),
        experts("num_experts", 128, 8),
        field("moe_intermediate_size", "moe.width", 768),
        field("norm_topk_prob", "moe.normalize", False),
        dense_layers(),
        defaults={"num_key_value_heads": 4, "sliding_window": 4096},
        expert_names="mlp gate_proj down_proj up_proj",
    ),
    family(
        "qwen2_moe",
        "Qwen2Moe",
        field("qkv_bias", "bias", ("qkv",), table={True: ("qkv",), False: ()}),
        windows("some", switched=True),
        experts("num_experts", 60, 4),
        field("moe_intermediate_size", "moe.width", 1408),
        field("norm_topk_prob", "moe.normalize", False),
        _shared_experts(),
        dense_layers(),
        defaults={"num_key_value_heads": 16, "sliding_window": 4096, "max_window_layers": 28},
        expert_names="mlp gate_proj down_proj up_proj",
    ),
    family(
        "smollm3",
        "SmolLM3",
        constants(pad_token_id=None),  # without it the class has one that smaller vocabularies lack
        biases(attention="asked", mlp=True),
        windows("none"),
        fixed("sliding_window", None),
        fixed("use_sliding_window", False),
        ignored("max_window_layers"),
        _unrotated(),
        rope(base=2e6),
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    family(
        "granite",
        "Granite",
        biases(attention="asked", mlp=True),
        windows("none"),
        field("embedding_multiplier", "embedding_scale", 1.0),
        field("residual_multiplier", "branch_scale", 1.0),
        field("attention_multiplier", "attention_scale", 1.0),
        field("logits_scaling", "logit_scale", 1.0, to_ours=lambda x: 1 / x, to_theirs=lambda x: 1 / x),
    ),
)
