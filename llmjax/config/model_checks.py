"""Which settings of the model contradict each other, or make no sense together, and what to set instead.

Each function yields the messages for one part of `config.model`. The first message is raised (`checks.check`), so a
check may rely on those before it.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

ATTENTION = ("global", "local", "nope")
RECURRENT = ("rnn", "lstm", "rglru", "mamba2", "conv")
BIASES = ("qkv", "out", "mlp", "norm", "head", "router")
RELATIVE = ("alibi", "t5", "xlnet")  # positions that are added to the attention scores
KERNELS = {  # what an attention kernel can do beyond masks and scales
    "reference": ("attention_soft_cap", "position", "attention_dropout", "attention_sinks"),
    "dot_product": ("position",),
    "blocked": (),
    "cudnn": (),  # its bias would have no gradient
    "splash": ("attention_soft_cap", "attention_sinks"),
}


def beyond_scores(model: ConfigDict) -> dict[str, bool]:
    """The settings that not every attention kernel can do, and whether the model has them."""
    return {
        "attention_soft_cap": model.attention_soft_cap > 0,
        "position": model.position in RELATIVE,
        "attention_dropout": model.attention_dropout > 0,
        "attention_sinks": model.attention_sinks,
    }


def bounded_positions(model: ConfigDict) -> str:
    """The kind of positions that end at `model.max_length`, for messages; "": they do not end there.

    Beyond it longrope has other factors, with which the tokens before would be others too.
    """
    if model.position == "rotary" and model.rotary_scaling == "longrope":
        return "longrope"
    return "learned" if model.position == "learned" else ""


def head_size(model: ConfigDict) -> int:
    """K, the size of one attention head."""
    return model.head_size or model.width // model.heads


def _parts(c: ConfigDict) -> Iterator[str]:
    m = c.model
    for key in ("branch_scale", "embedding_scale", "logit_scale"):
        if m[key] == 0:
            yield f"model.{key}=0 would erase what it scales; 1 leaves it as it is"
    unknown = [part for part in m.bias if part not in BIASES]
    if unknown:
        yield f"model.bias has {unknown[:1]}; its parts are {', '.join(BIASES)}"


def _pattern(c: ConfigDict) -> Iterator[str]:
    m = c.model
    kinds = (*ATTENTION, *RECURRENT)
    unknown = [kind for kind in m.pattern if kind not in kinds]
    if not m.pattern:
        yield f"model.pattern is empty: give at least one of {', '.join(kinds)}"
    if unknown:
        yield f"model.pattern has {unknown[:1]}; its kinds of layers are {', '.join(kinds)}"
    if "nope" in m.pattern and m.position != "rotary":
        yield (
            f"model.pattern has nope, layers without rotary positions, and model.position={m.position}: set it to rotary, "
            "or the layers to global"
        )
    recurrent = next((kind for kind in m.pattern if kind in RECURRENT), "")
    if recurrent and m.direction == "bidirectional":
        yield f"{recurrent} layers read from left to right: set model.direction=causal, or model.pattern to attention only"
    if recurrent and m.encoder_layers > 0:
        yield f"{recurrent} layers do not look at an encoder: set model.encoder_layers=0, or model.pattern to attention only"
    if m.block == "parallel" and m.mlp == "none":
        yield "model.block=parallel has nothing beside the attention with model.mlp=none: set model.block=serial"
    if m.block == "parallel" and m.norm_place != "pre":
        yield (
            f"model.block=parallel has one sum for both branches, which model.norm_place={m.norm_place} does not know: "
            "set model.norm_place=pre, or model.block=serial"
        )
    if m.block == "parallel" and m.encoder_layers > 0:
        yield (
            "model.block=parallel has no place for the attention to an encoder: set model.block=serial or "
            "model.encoder_layers=0"
        )


def _attention(c: ConfigDict) -> Iterator[str]:
    m = c.model
    if not m.head_size and m.width % m.heads != 0:
        yield f"model.width={m.width} is not a multiple of model.heads={m.heads}; change one or set model.head_size"
    if m.kv_heads > 0 and m.heads % m.kv_heads != 0:
        yield f"model.kv_heads={m.kv_heads} must divide model.heads={m.heads}"
    for key, needed in beyond_scores(m).items():
        able = [name for name, can in KERNELS.items() if key in can]
        if needed and m.attention != "auto" and m.attention not in able:
            yield (
                f"model.attention={m.attention} cannot do model.{key}={m[key]}: set model.attention to auto or "
                f"{' or '.join(able)}"
            )
    if m.attention == "cudnn" and m.dtype != "bfloat16":
        yield f"model.attention=cudnn computes in bfloat16: set model.dtype, which is {m.dtype}, or model.attention=dot_product"
    if m.attention == "cudnn" and (head_size(m) % 8 != 0 or head_size(m) > 128):
        yield (
            f"model.attention=cudnn has heads of a multiple of 8 up to 128, not {head_size(m)}: change model.head_size, or set "
            "model.attention=dot_product"
        )
    if m.two_stream and m.position != "xlnet":
        yield (
            f"model.two_stream asks about places, which model.position={m.position} tells only from what stands there: set "
            "model.position=xlnet"
        )
    for wrong, what in (
        (m.encoder_layers > 0, "an encoder (model.encoder_layers)"),
        (m.ahead > 1, "several heads (model.ahead)"),
        (m.norm == "batch", "batch norm (model.norm), whose statistics would mix both streams"),
        (m.moe.experts > 0, "sparse layers (model.moe.experts), whose balance would count tokens twice"),
        (any(kind in RECURRENT for kind in m.pattern), "recurrent layers (model.pattern), which have one order only"),
    ):
        if m.two_stream and wrong:
            yield f"model.two_stream does not go with {what}: switch one of them off"


def _latent(c: ConfigDict) -> Iterator[str]:
    m, own = c.model, c.model.latent
    if not own.kv_rank:
        return
    size = head_size(m)
    if own.rotary_size % 2 or own.rotary_size >= size:
        yield f"model.latent.rotary_size={own.rotary_size} must be even and below the size of a head, {size}"
    if own.value_size > size:
        yield f"model.latent.value_size={own.value_size} must be at most the size of a head, {size}"
    for wrong, what in (
        (
            m.kv_heads not in (0, m.heads),
            f"model.kv_heads={m.kv_heads}, because all heads share one vector: set it to 0",
        ),
        (m.position != "rotary", f"model.position={m.position}: set it to rotary"),
        (m.qk_norm, "model.qk_norm: set it to false"),
        (bool({"qkv", "out"} & set(m.bias)), "biases of attention: leave qkv and out out of model.bias"),
        (m.encoder_layers > 0, "an encoder: set model.encoder_layers=0"),
    ):
        if wrong:
            yield f"model.latent does not go with {what}"


def _positions(c: ConfigDict) -> Iterator[str]:
    m = c.model
    size = head_size(m)
    if m.position == "rotary":
        if size % 2 == 1:
            yield f"rotary positions need an even head size, not {size}"
        rotated = int(size * m.rotary_fraction) // 2 * 2
        if rotated < 2:
            yield f"model.rotary_fraction={m.rotary_fraction} of a head of {size} is not one pair of dimensions: raise it"
        scaling = m.rotary_scaling
        if scaling not in ("none", "longrope") and m.rotary_factor <= 1:
            yield f"model.rotary_scaling={scaling} needs model.rotary_factor above 1, not {m.rotary_factor}"
        if scaling in ("yarn", "llama3", "longrope") and m.rotary_original_length < 1:
            yield f"model.rotary_scaling={scaling} needs model.rotary_original_length, the length of the first training"
        if scaling in ("yarn", "llama3") and m.rotary_slow >= m.rotary_fast:
            yield f"model.rotary_slow={m.rotary_slow} must be below model.rotary_fast={m.rotary_fast}"
        for key in ("rotary_short_factors", "rotary_long_factors") if scaling == "longrope" else ():
            given = m[key]
            if len(given) != rotated // 2 or not all(isinstance(x, int | float) and x > 0 for x in given):
                yield (
                    f"model.{key} has {len(given)} numbers; model.rotary_scaling=longrope needs {rotated // 2} above 0, one for "
                    "each rotated pair"
                )
        if scaling == "ntk" and rotated < 4:
            yield f"model.rotary_scaling=ntk needs two rotated pairs, not {rotated // 2}"
    if m.rotary_scaling != "none" and m.position != "rotary":
        yield f"model.rotary_scaling={m.rotary_scaling} has no effect on model.position={m.position}: set it to none"
    if m.alibi_rounded and (m.position != "alibi" or m.direction != "causal"):
        yield "model.alibi_rounded is a detail of model.position=alibi with model.direction=causal: set it to false"
    if m.position == "t5":
        both = m.direction == "bidirectional" or m.encoder_layers > 0
        exact = m.relative_buckets // (4 if both else 2)
        if exact < 1:
            yield (
                f"model.relative_buckets={m.relative_buckets} is too few: {4 if both else 2} are needed, "
                f"{'half of them for either side' if both else 'half of them for far tokens'}"
            )
        if m.relative_max_distance <= exact:
            yield (
                f"model.relative_max_distance={m.relative_max_distance} must be above {exact}, the distances that have a "
                "bucket each"
            )
    if m.position == "xlnet" and m.encoder_layers > 0:
        yield "model.position=xlnet is for one stack: set model.encoder_layers=0, or another position such as t5"


def _norms(c: ConfigDict) -> Iterator[str]:
    m = c.model
    if m.norm == "none" and m.norm_place != "pre":
        yield f"model.norm_place={m.norm_place} places norms that model.norm=none does not have: set model.norm_place=pre"
    if m.norm == "none" and m.embedding_norm:
        yield "model.embedding_norm has no effect with model.norm=none: set it to false"
    if m.norm == "batch" and m.ahead > 1:
        yield (
            "model.norm=batch keeps one set of statistics, and the heads of model.ahead would share it: set "
            "model.norm=layer or rms"
        )
    if m.norm == "batch" and m.head_transform:
        yield "model.norm=batch does not go with model.head_transform, which sees chosen tokens only: set model.norm=layer"


def _stacks(c: ConfigDict) -> Iterator[str]:
    m = c.model
    if m.encoder_layers > 0 and m.direction == "bidirectional":
        yield (
            "model.direction is the decoder's, and an encoder is bidirectional anyway: set model.direction=causal, or "
            "model.encoder_layers=0 for a bidirectional model alone"
        )
    if m.ahead > 1 and m.encoder_layers > 0:
        yield "model.ahead=2 or more predicts from one stack: set model.encoder_layers=0 or model.ahead=1"
    if m.ahead > 1 and m.direction == "bidirectional":
        yield "model.ahead=2 or more predicts what comes next, which bidirectional models see: set model.direction=causal"
    for key in (
        ("pooler", "classes") if c.objective.name != "classify" else ()
    ):  # which reads causal models at the last token
        if bool(m[key]) and m.direction == "causal" and not m.encoder_layers:
            yield (
                f"model.{key} reads the first token, which sees nothing but itself in a causal model: set "
                f"model.direction=bidirectional, or model.{key}={'false' if key == 'pooler' else 0}"
            )


def _sparse(c: ConfigDict) -> Iterator[str]:
    m, moe = c.model, c.model.moe
    if not moe.experts:
        return
    if m.mlp == "none":
        yield "model.moe.experts are the MLPs of sparse layers: set model.mlp=dense"
    if moe.active > moe.experts:
        yield f"model.moe.active={moe.active} must be at most model.moe.experts={moe.experts}"
    if m.quantization != "none":
        yield (
            f"model.quantization={m.quantization} does not reach experts, which are most of a sparse model's products: set it "
            "to none"
        )
    if moe.first + moe.every > m.layers:
        yield (
            f"model.moe.first={moe.first} and model.moe.every={moe.every} leave no sparse layer among {m.layers}: lower one "
            "of them, or set model.moe.experts=0"
        )
    wrong = [i for i in moe.dense if not isinstance(i, int) or not 0 <= i < m.layers]
    if wrong:
        yield f"model.moe.dense has {wrong[0]!r}; its numbers are those of layers, from 0 to {m.layers - 1}"
    elif not any(i not in moe.dense for i in range(moe.first + moe.every - 1, m.layers, max(moe.every, 1))):
        yield f"model.moe.dense={moe.dense} leaves no sparse layer among {m.layers}: remove one that would be sparse"
    if moe.experts % moe.groups:
        yield f"model.moe.groups={moe.groups} must divide model.moe.experts={moe.experts}"
    elif moe.active_groups > moe.groups:
        yield f"model.moe.active_groups={moe.active_groups} must be at most model.moe.groups={moe.groups}"
    elif moe.active > moe.active_groups * moe.experts // moe.groups:
        yield (
            f"model.moe.active={moe.active} is more than the experts in model.moe.active_groups={moe.active_groups} groups: "
            "lower it, or raise that"
        )
    elif moe.group_score > moe.experts // moe.groups:
        yield f"model.moe.group_score={moe.group_score} is more than the {moe.experts // moe.groups} experts of a group"
    if moe.normalize and moe.active == 1:
        yield (
            "model.moe.normalize makes the score of a single active expert 1 whatever the router says, which then learns "
            "nothing: set model.moe.normalize=false"
        )
    if moe.scale == 0:
        yield "model.moe.scale=0 would erase the experts' output; 1 leaves it as it is"


def _recurrent(c: ConfigDict) -> Iterator[str]:
    m, r = c.model, c.model.recurrent
    heads = r.heads or m.heads
    for kind, width in (("rglru", r.width or m.width), ("mamba2", r.width or 2 * m.width)):
        if kind in m.pattern and width % heads != 0:
            yield (
                f"{kind}'s width of {width} is not a multiple of its {heads} heads: set model.recurrent.heads or "
                "model.recurrent.width"
            )
    if "mamba2" in m.pattern and heads % r.groups != 0:
        yield f"model.recurrent.groups={r.groups} must divide mamba2's {heads} heads (model.recurrent.heads, or model.heads)"


def _initialisation(c: ConfigDict) -> Iterator[str]:
    m = c.model
    recurrent = next((kind for kind in m.pattern if kind in RECURRENT), "")
    if m.init == "t_fixup" and m.norm != "none":
        yield (
            f"model.init=t_fixup is what replaces norms and warm-up: set model.norm=none, not {m.norm}, and "
            'schedule.warmup="0 steps"'
        )
    for init in ("t_fixup", "deepnorm"):
        if m.init == init and recurrent:
            yield (
                f"model.init={init} has factors for attention and MLPs, not for {recurrent}: set model.pattern to attention "
                "only, or another model.init"
            )
    if m.init == "deepnorm" and (m.norm_place != "post" or m.norm == "none"):
        yield (
            "model.init=deepnorm scales the residual stream up for a norm after each sum: set model.norm_place=post, and a "
            "norm"
        )


def _transferred(c: ConfigDict) -> Iterator[str]:
    """What the table of muP and CompleteP (model/parametrization.py) has no row for."""
    m = c.model
    if m.init not in ("mup", "completep"):
        return
    if m.embedding_width not in (0, m.width):
        yield f"model.init={m.init} wants embeddings as wide as the model: set model.embedding_width=0"
    for kind in ("rglru", "mamba2"):
        if kind in m.pattern:
            yield f"model.init={m.init} has no rule for the gates of {kind}: set another model.init or model.pattern"
    if c.optimizer.name == "sgd":
        yield (
            f"model.init={m.init} has the learning rates of Adam-like optimizers: set optimizer.name to adamw, lion, "
            "adafactor or muon"
        )
    if m.init == "completep" and m.encoder_layers:
        yield "model.init=completep has one depth, and an encoder-decoder has two: set model.init=mup"
    if m.init == "completep" and m.norm_place == "post":
        yield (
            "model.init=completep divides what branches add, which a norm after the sum would undo: set "
            "model.norm_place=pre, sandwich or after"
        )


PARTS = (
    _parts,
    _pattern,
    _attention,
    _latent,
    _positions,
    _norms,
    _stacks,
    _sparse,
    _recurrent,
    _initialisation,
    _transferred,
)
