"""Settings that contradict each other are refused with what to set instead; what is accepted can be built and trained."""

import ast
import inspect
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of, tiny_config

from llmjax import config
from llmjax.config import model_checks
from llmjax.model import attention, count, transformer
from llmjax.parallel import placement
from llmjax.train.optimizer import make_optimizer, table

MOE = {"moe__experts": 4}
BOTH_WAYS = {"direction": "bidirectional", "objective__name": "masked"}
SPAN = {"encoder_layers": 2, "objective__name": "span"}
LATENT = {"latent__kv_rank": 8, "latent__rotary_size": 4, "latent__value_size": 6}
LONGROPE = {"rotary_scaling": "longrope", "rotary_factor": 4.0, "rotary_original_length": 8}
LONGROPE |= {"rotary_short_factors": (1.0,) * 4, "rotary_long_factors": (1.0, 2.0, 4.0, 4.0)}
XLNET = {"position": "xlnet", "two_stream": True, "objective__name": "permutation"}


def named(changes):
    """Changes with whole keys: those of the model unless another room is named."""
    rooms = ("objective__", "optimizer__", "train__", "schedule__", "data__")
    return {key if key.startswith(rooms) else f"model__{key}": value for key, value in changes.items()}


def changed(changes):
    """The tiny config with changes, if it is accepted."""
    return tiny_config(**named(changes))


REFUSED = [
    # sizes
    ({"layers": 0}, "model.layers=0 must be at least 1"),
    ({"window": 0}, "model.window=0 must be at least 1"),
    ({"ahead": 0}, "model.ahead=0 must be at least 1"),
    ({"encoder_layers": -1}, "model.encoder_layers=-1 must be at least 0"),
    ({"attention_scale": -1.0}, "model.attention_scale=-1.0 must be at least 0"),
    ({"logit_scale": 0.0}, "model.logit_scale=0 would erase"),
    ({"norm_epsilon": 0.0}, "model.norm_epsilon=0.0 must be above 0"),
    ({"layer_drop": 1.0}, "model.layer_drop=1.0 must be at least 0 and below 1"),
    ({"attention_dropout": -0.1}, "model.attention_dropout=-0.1 must be"),
    ({"bias": ("qkv", "mpl")}, "model.bias has ['mpl']; its parts are qkv, out, mlp, norm, head"),
    # patterns and blocks
    ({"pattern": ()}, "model.pattern is empty"),
    ({"pattern": ("global", "lokal")}, "model.pattern has ['lokal']; its kinds of layers are global, local, nope, rnn"),
    ({"pattern": ("rglru", "local"), **BOTH_WAYS}, "rglru layers read from left to right"),
    ({"pattern": ("lstm",), **SPAN}, "lstm layers do not look at an encoder"),
    ({"block": "parallel", "mlp": "none"}, "nothing beside the attention"),
    ({"block": "parallel", "norm_place": "sandwich"}, "set model.norm_place=pre, or model.block=serial"),
    ({"block": "parallel", "norm_place": "post", "shared_norm": True}, "set model.norm_place=pre, or model.block=serial"),
    ({"block": "parallel", **SPAN}, "no place for the attention to an encoder"),
    # attention
    ({"heads": 5}, "model.width=32 is not a multiple of model.heads=5"),
    ({"kv_heads": 3}, "model.kv_heads=3 must divide model.heads=4"),
    ({"attention": "blocked", "position": "alibi"}, "blocked cannot do model.position=alibi: set model.attention to auto or reference or dot_product"),
    ({"attention": "dot_product", "attention_soft_cap": 30.0}, "cannot do model.attention_soft_cap=30.0: set model.attention to auto or reference or splash"),
    ({"attention": "dot_product", "attention_dropout": 0.1}, "cannot do model.attention_dropout=0.1"),
    ({"attention": "blocked", "position": "t5"}, "cannot do model.position=t5"),
    ({"attention": "splash", "position": "alibi"}, "splash cannot do model.position=alibi"),
    ({"attention": "cudnn", "attention_soft_cap": 30.0}, "set model.attention to auto or reference or splash"),
    ({"attention": "blocked", "attention_sinks": True}, "cannot do model.attention_sinks=True: set model.attention to auto or reference or splash"),
    ({"attention": "cudnn"}, "model.attention=cudnn computes in bfloat16"),
    ({"attention": "cudnn", "dtype": "bfloat16", "head_size": 12}, "heads of a multiple of 8 up to 128, not 12"),
    ({"attention": "splash", "objective__name": "prefix"}, "which model.attention=splash cannot"),
    ({**XLNET, "position": "rotary"}, "set model.position=xlnet"),
    ({**XLNET, **MOE}, "model.two_stream does not go with sparse layers"),
    ({**XLNET, "pattern": ("global", "rnn")}, "model.two_stream does not go with recurrent layers"),
    ({**XLNET, "norm": "batch"}, "model.two_stream does not go with batch norm"),
    ({**XLNET, "encoder_layers": 1}, "model.two_stream does not go with an encoder"),
    ({**XLNET, "ahead": 2}, "model.two_stream does not go with several heads"),
    # positions
    ({"head_size": 7}, "rotary positions need an even head size, not 7"),
    ({"rotary_fraction": 0.0}, "model.rotary_fraction=0.0 must be above 0"),
    ({"rotary_fraction": 1.5}, "model.rotary_fraction=1.5 must be above 0 and at most 1"),
    ({"rotary_fraction": 0.1}, "of a head of 8 is not one pair"),
    ({"rotary_scaling": "linear"}, "model.rotary_scaling=linear needs model.rotary_factor above 1"),
    ({"rotary_scaling": "yarn", "rotary_factor": 4.0}, "needs model.rotary_original_length"),
    ({"rotary_scaling": "llama3", "rotary_factor": 8.0, "rotary_original_length": 64, "rotary_fast": 1.0}, "must be below model.rotary_fast"),
    ({"rotary_scaling": "ntk", "rotary_factor": 2.0, "rotary_fraction": 0.25}, "needs two rotated pairs, not 1"),
    ({"rotary_scaling": "longrope"}, "model.rotary_scaling=longrope needs model.rotary_original_length"),
    ({**LONGROPE, "rotary_short_factors": (1.0,)}, "model.rotary_short_factors has 1 numbers; model.rotary_scaling=longrope needs 4 above 0"),
    ({**LONGROPE, "rotary_long_factors": (1.0, 1.0, 1.0, 0.0)}, "model.rotary_long_factors has 0.0: it is a list of numbers, each above 0"),
    ({**LONGROPE, "max_length": 8, "train__sequence_length": 16}, "train.sequence_length=16 is more than the 8 longrope positions; raise model.max_length"),
    ({"rotary_scaling": "linear", "rotary_factor": 2.0, "position": "alibi"}, "has no effect on model.position=alibi"),
    ({"pattern": ("global", "nope"), "position": "alibi"}, "has nope, layers without rotary positions"),
    ({"latent__kv_rank": 8}, "model.latent.rotary_size=64 must be even and below the size of a head, 8"),
    ({"latent__kv_rank": 8, "latent__rotary_size": 4}, "model.latent.value_size=128 must be at most the size of a head, 8"),
    ({**LATENT, "kv_heads": 1}, "model.latent does not go with model.kv_heads=1"),
    ({**LATENT, "qk_norm": True}, "model.latent does not go with model.qk_norm"),
    ({"alibi_rounded": True}, "model.alibi_rounded is a detail of model.position=alibi"),
    ({"position": "t5", "relative_buckets": 1}, "too few: 2 are needed"),
    ({"position": "t5", "relative_buckets": 3, **SPAN}, "too few: 4 are needed"),
    ({"position": "t5", "relative_max_distance": 16}, "must be above 16"),
    ({"position": "xlnet", **SPAN}, "model.position=xlnet is for one stack"),
    ({"position": "learned", "max_length": 8}, "more than the 8 learned positions"),
    ({"rotary_local_base": -1.0}, "model.rotary_local_base=-1.0 must be at least 0"),
    ({"alibi_rounded": True}, "model.alibi_rounded is a detail of model.position=alibi"),
    # norms
    ({"norm": "none", "norm_place": "post"}, "set model.norm_place=pre"),
    ({"norm": "none", "norm_place": "sandwich"}, "set model.norm_place=pre"),
    ({"norm": "none", "embedding_norm": True}, "model.embedding_norm has no effect"),
    ({"norm": "batch", "ahead": 2, "objective__name": "multi_token"}, "the heads of model.ahead would share it"),
    ({"norm": "batch", "head_transform": True}, "does not go with model.head_transform"),
    # stacks and heads
    ({**SPAN, "direction": "bidirectional"}, "an encoder is bidirectional anyway"),
    ({**SPAN, "ahead": 2}, "predicts from one stack"),
    ({**BOTH_WAYS, "ahead": 2}, "which bidirectional models see"),
    ({"pooler": True}, "model.pooler reads the first token, which sees nothing but itself"),
    ({"classes": 3}, "model.classes reads the first token"),
    # sparse layers
    ({"moe__experts": -1}, "model.moe.experts=-1 must be at least 0"),
    ({**MOE, "moe__shared": -1}, "model.moe.shared=-1 must be at least 0"),
    ({**MOE, "moe__scale": 0.0}, "model.moe.scale=0 would erase"),
    ({**MOE, "quantization": "int8"}, "model.quantization=int8 does not reach experts"),
    ({**MOE, "mlp": "none"}, "set model.mlp=dense"),
    ({**MOE, "moe__active": 5}, "model.moe.active=5 must be at most model.moe.experts=4"),
    ({**MOE, "moe__active": 0}, "model.moe.active=0 must be at least 1"),
    ({**MOE, "moe__active": 1}, "set model.moe.normalize=false"),
    ({**MOE, "moe__first": 2}, "leave no sparse layer among 2"),
    ({**MOE, "moe__every": 3}, "leave no sparse layer among 2"),
    ({**MOE, "moe__every": 0}, "model.moe.every=0 must be at least 1"),
    ({**MOE, "moe__dense": (2,)}, "model.moe.dense has 2; its numbers are those of layers, from 0 to 1"),
    ({**MOE, "moe__dense": (0, 1)}, "model.moe.dense=(0, 1) leaves no sparse layer among 2"),
    ({**MOE, "moe__groups": 3}, "model.moe.groups=3 must divide model.moe.experts=4"),
    ({**MOE, "moe__groups": 2, "moe__active_groups": 3}, "model.moe.active_groups=3 must be at most model.moe.groups=2"),
    ({**MOE, "moe__groups": 4}, "model.moe.active=2 is more than the experts in model.moe.active_groups=1 groups"),
    ({**MOE, "moe__groups": 2, "moe__group_score": 3}, "model.moe.group_score=3 is more than the 2 experts of a group"),
    ({**MOE, "moe__capacity_factor": 0.0}, "model.moe.capacity_factor=0.0 must be above 0"),
    ({**MOE, "moe__jitter": 1.0}, "model.moe.jitter=1.0"),
    # recurrent layers
    ({"pattern": ("rglru",), "recurrent__heads": 5}, "rglru's width of 32 is not a multiple of its 5 heads"),
    ({"pattern": ("mamba2",), "recurrent__heads": 5}, "mamba2's width of 64 is not a multiple of its 5 heads"),
    ({"pattern": ("mamba2",), "recurrent__groups": 3}, "model.recurrent.groups=3 must divide mamba2's 4 heads"),
    ({"recurrent__width": -1}, "model.recurrent.width=-1 must be at least 0"),
    ({"pattern": ("mamba2",), "recurrent__chunk": 0}, "model.recurrent.chunk=0 must be at least 1"),
    # initialisation
    ({"init": "t_fixup"}, "set model.norm=none, not rms"),
    ({"init": "t_fixup", "norm": "none", "pattern": ("lstm",)}, "model.init=t_fixup has factors for attention and MLPs, not for lstm"),
    ({"init": "deepnorm"}, "set model.norm_place=post"),
    ({"init": "deepnorm", "norm_place": "post", "pattern": ("mamba2",)}, "not for mamba2"),
    ({"init": "mup", "optimizer__name": "sgd"}, "set optimizer.name to adamw, lion, adafactor or muon"),
    ({"init": "completep", **SPAN}, "set model.init=mup"),
    ({"init": "completep", "norm_place": "post"}, "set model.norm_place=pre, sandwich or after"),
    ({"init": "mup", "embedding_width": 16}, "set model.embedding_width=0"),
    ({"init": "mup", "pattern": ("rglru", "local")}, "no rule for the gates of rglru"),
    ({"init": "xaver"}, "did you mean xavier?"),
    # training
    ({"optimizer__beta2": 1.0}, "optimizer.beta2=1.0 must be at least 0 and below 1"),
    ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay=-0.1 must be at least 0"),
    ({"train__batch_start": 0}, "train.batch_start=0 must be at least 1"),
    ({"train__batch_ramp": "5 steps", "train__batch_start": 8}, "lower batch_start"),
    ({"train__batch_ramp": "soon"}, "duration 'soon' is not understood"),
    ({"schedule__by": "token"}, "did you mean tokens?"),
    ({"objective__loss_chunks": 0}, "objective.loss_chunks=0 must be at least 1"),
    ({"objective__loss_chunks": 17}, "at most train.sequence_length=16"),
    ({"train__micro_batches": 3}, "train.micro_batches=3 must divide train.batch_size=8"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[", ".join(f"{k}={v}" for k, v in c.items()) for c, _ in REFUSED]
)
def test_a_contradiction_is_refused_with_its_mend(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        changed(changes)


def test_every_refusal_of_the_model_has_a_row_here():
    tree = ast.parse(inspect.getsource(model_checks))
    refusals = {node.lineno: node for node in ast.walk(tree) if isinstance(node, ast.Yield)}
    met = set()
    for changes, _ in REFUSED:
        c = tiny_config()
        for key, value in named(changes).items():
            config.set_key(c, key.replace("__", "."), value)
        for part in model_checks.PARTS:
            found = part(c)
            if next(found, None):
                met |= {n for n, node in refusals.items() if n <= found.gi_frame.f_lineno <= node.end_lineno}
                break
    assert {n: ast.unparse(refusals[n]) for n in refusals.keys() - met} == {}


ACCEPTED = [
    {"block": "parallel", "shared_norm": False, "norm": "layer"},
    {"pattern": ("rglru", "rglru", "local"), "layers": 5},
    {"norm": "none", "init": "t_fixup", "schedule__warmup": "0 steps"},
    {"init": "deepnorm", "norm_place": "post", "norm": "layer"},
    {"tie_embeddings": True, "embedding_width": 16},
    {"init": "mup", "optimizer__name": "muon"},
    {"init": "completep", "mup_depth_power": 0.5, "norm_place": "sandwich"},
    {**SPAN, "position": "t5", "pooler": True, "classes": 2},
    {**MOE, "moe__active": 1, "moe__normalize": False, "moe__dispatch": "capacity"},
    {**XLNET, "types": 2, "block": "parallel"},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=[", ".join(f"{k}={v}" for k, v in c.items()) for c in ACCEPTED])
def test_a_combination_that_makes_sense_is_accepted_and_can_be_built(changes):
    build(changed(changes))


def test_the_checks_know_what_every_attention_kernel_can_do():
    assert set(model_checks.KERNELS) == {*attention.KERNELS, *attention.BY_PATTERN}


# ---------------------------------------------------------------- whatever is accepted can be built

POOL = {  # model settings and values to draw from; others stay as they are
    "layers": (1, 3, 5), "heads": (2, 4), "kv_heads": (0, 1, 2), "head_size": (0, 16), "mlp_width": (0, 48),
    "embedding_width": (0, 16), "pattern": (("global",), ("local", "global"), ("rglru", "local"), ("mamba2",), ("lstm", "global"), ("conv", "global"), ("rnn",)),
    "window": (1, 4), "block": ("serial", "parallel"), "shared_norm": (True, False), "mlp": ("dense", "dense", "none"),
    "activation": ("gelu", "relu2", "swiglu", "geglu_tanh", "silu"), "bias": ((), ("qkv",), ("qkv", "out", "mlp", "norm", "head")),
    "norm": ("rms", "layer", "batch", "none"), "norm_place": ("pre", "post", "sandwich"), "norm_zero_centered": (True, False),
    "residual_scale": (0.0, 1.0, 1.5), "embedding_norm": (True, False), "final_norm": (True, False), "qk_norm": (True, False),
    "attention_scale": (0.0, 0.1), "attention_soft_cap": (0.0, 5.0), "attention_sinks": (False, True), "logit_soft_cap": (0.0, 5.0), "logit_scale": (1.0, 0.5),
    "position": ("rotary", "learned", "sinusoidal", "alibi", "t5", "xlnet", "none"), "rotary_fraction": (1.0, 0.5),
    "rotary_scaling": ("none", "none", "linear", "ntk", "llama3", "yarn"), "rotary_factor": (1.0, 4.0),
    "rotary_original_length": (0, 64), "rotary_local_base": (0.0, 100.0), "position_offset": (0, 2), "relative_buckets": (2, 8),
    "tie_embeddings": (True, False), "embedding_scale": (1.0, 4.0), "types": (0, 6), "languages": (0, 3),
    "head_transform": (True, False), "pooler": (True, False), "classes": (0, 3), "dropout": (0.0, 0.2), "embedding_dropout": (0.0, 0.2),
    "attention_dropout": (0.0, 0.2), "layer_drop": (0.0, 0.2), "dropout_shape": ("constant", "linear"),
    "init": ("gpt2", "xavier", "lecun", "t5", "t_fixup", "mup", "completep", "orthogonal", "deepnorm"), "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"), "remat": ("none", "full", "selective", "save_dot_except_mlpwi"), "scan_unroll": (1, 2),
    "attention": ("auto", "reference", "dot_product", "blocked"), "moe__experts": (0, 4), "moe__active": (1, 2), "moe__shared": (0, 1),
    "moe__first": (0, 1), "moe__every": (1, 2), "moe__dense": ((), (1,)), "moe__groups": (1, 2), "moe__active_groups": (1, 2), "moe__score": ("softmax", "sigmoid"), "moe__normalize": (True, False),
    "moe__dispatch": ("dropless", "capacity"), "moe__bias_rate": (0.0, 0.01), "moe__jitter": (0.0, 0.1),
    "recurrent__heads": (0, 2), "recurrent__width": (0, 48), "recurrent__state_size": (4,), "recurrent__chunk": (4,),
    "optimizer__name": ("adamw", "muon", "adafactor", "lion", "sgd"),
}  # fmt: skip
OBJECTIVES = (  # what objectives ask of the model, else they would be refused nearly always
    {}, {}, {"objective__name": "infill"}, {"objective__name": "prefix"}, {"objective__name": "multi_token", "ahead": 3}, BOTH_WAYS,
    {**BOTH_WAYS, "objective__name": "unilm"}, {"objective__name": "translation", "direction": "bidirectional", "languages": 2}, SPAN, XLNET,
)  # fmt: skip


def draw(rng):
    """A config with random changes that is accepted, and the changes."""
    for _ in range(1000):
        keys = rng.sample(sorted(POOL), rng.randint(3, 20))
        changes = {key: rng.choice(POOL[key]) for key in keys} | rng.choice(OBJECTIVES)
        try:
            return changed(changes), changes
        except ValueError:
            continue
    raise AssertionError("nothing is accepted")


def build(c):
    """Shapes of everything a run needs: parameters, their places and optimizer, a training pass with each output."""
    module = transformer.build(c.model)
    params = transformer.param_shapes(module)
    placement.parameter_shardings(params, mesh_of("data=1"))
    optimizer = make_optimizer(c.optimizer, lambda step: jnp.float32(1.0), model=c.model)
    assert table(c.optimizer, params, model=c.model)
    assert count.flops_per_token(c.model, sequence_length=16) > 0
    tokens_BL = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def step(params, tokens_BL):
        more = {"source": {"tokens": tokens_BL}} if c.model.encoder_layers else {}
        if c.model.two_stream:
            more["queries"] = dict.fromkeys(("positions", "orders", "segments"), tokens_BL[:, :3])

        def loss(params, output):
            made, _ = module.apply(
                {"params": params}, tokens_BL, segments_BL=jnp.ones_like(tokens_BL), deterministic=False,
                rngs={"dropout": jax.random.key(0)}, mutable=["losses"], output=output, **more,
            )  # fmt: skip
            return jnp.sum(made)

        outputs = ["logits", *(["ahead"] if c.model.ahead > 1 else []), *(["classes"] if c.model.classes else [])]
        total = jax.grad(lambda p: sum(loss(p, output) for output in outputs))(params)
        return optimizer.update(total, optimizer.init(params), params)[0]

    updates = jax.eval_shape(step, params, tokens_BL)
    assert jax.tree.map(lambda x: x.shape, updates) == jax.tree.map(lambda x: x.shape, params)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_accepted_can_be_built_placed_and_trained(seed):
    build_some(random.Random(seed), 6)


def test_what_is_accepted_starts_with_finite_logits():
    c, changes = draw(random.Random(7))
    module, tokens_BL = transformer.build(c.model), jnp.arange(4, 12)[None]

    @jax.jit
    def logits(key):
        source = {"tokens": tokens_BL} if c.model.encoder_layers else None
        return module.apply({"params": transformer.init_params(module, key)}, tokens_BL, source=source)

    assert np.isfinite(logits(jax.random.key(0))).all(), changes


@pytest.mark.parametrize(
    "number", [pytest.param(60, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.exhaustive)]
)
def test_much_more_of_what_is_accepted_can_be_built_placed_and_trained(number):
    build_some(random.Random(99), number)


def build_some(rng, number):
    for _ in range(number):
        c, changes = draw(rng)
        try:
            build(c)
        except Exception as error:
            raise AssertionError(f"accepted, but it does not work: {changes}") from error
