"""Every kind of parameter is updated by the rule that is meant for it: Muon, Adam, muP's rates, decay, and observed ones."""

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same_bits, few, losses_of, make_batch, mesh_of, prepare_steps, tiny_config

from llmjax.model import transformer
from llmjax.model.observed import is_observed
from llmjax.model.parametrization import scales
from llmjax.parallel import placement
from llmjax.train import optimizer
from llmjax.train.optimizer import apply_updates, is_matrix, make_optimizer, muon_dimensions, updated_by

OPTIMIZERS = ("adamw", "muon", "adafactor", "lion", "sgd")
GOLDEN = Path(__file__).parent / "golden" / "optimizer-groups.txt"
BIASES = ("qkv", "out", "mlp", "norm", "head")
CONFIGS = {  # together they have every kind of parameter there is
    "hybrid": {
        "model__layers": 10, "model__pattern": ("rnn", "lstm", "rglru", "mamba2", "conv", "local", "global"), "model__bias": BIASES,
        "model__moe__experts": 4, "model__moe__shared": 1, "model__moe__bias_rate": 0.001, "model__moe__first": 1,
        "model__ahead": 3, "objective__name": "multi_token", "model__tie_embeddings": False, "model__qk_norm": True,
        "model__position": "learned", "model__norm_place": "sandwich", "model__embedding_norm": True,
        "model__recurrent__state_size": 8, "model__activation": "gelu",
    },
    "encoder-decoder": {
        "model__encoder_layers": 2, "model__position": "t5", "objective__name": "span", "model__languages": 3,
        "model__embedding_width": 16, "model__moe__experts": 4, "model__moe__every": 2,
    },
    "two streams": {
        "model__two_stream": True, "model__position": "xlnet", "objective__name": "permutation", "model__types": 2,
        "model__norm": "layer", "model__norm_place": "post",
    },
    "bidirectional": {
        "model__direction": "bidirectional", "objective__name": "masked", "model__types": 2, "model__pooler": True,
        "model__classes": 3, "model__head_transform": True, "model__norm": "layer", "model__bias": BIASES,
    },
    "batch norm": {"model__norm": "batch", "model__bias": BIASES},
}  # fmt: skip


def shapes_of(c):
    return transformer.param_shapes(transformer.build(c.model))


def describe(c):
    """A line for each kind of parameter: path, shape, rule under AdamW and Muon, muP's factor, decay, Muon's matrices."""
    params = shapes_of(c)
    twice = tiny_config(model__init="mup", model__mup_base_width=c.model.width // 2).model
    lines = []
    leaves = jax.tree_util.tree_leaves_with_path(params)
    flat = jax.tree.structure(params).flatten_up_to(muon_dimensions(params))
    rules = [jax.tree.leaves(updated_by(params, optimizer=name)) for name in ("adamw", "muon")]
    for (path, leaf), dimensions, adamw, muon in zip(leaves, flat, *rules, strict=True):
        name = placement.path_name(path)
        matrices = ""
        if dimensions is not None:
            sides = dimensions.reduction_axis, dimensions.output_axis
            matrices = " x ".join("".join(f"[{leaf.shape[i]}]" for i in side) for side in sides)
        factor = "" if scales(twice, name).rate == 1 else "rate / width ratio"
        name, shape = re.sub(r"(first|layers|last)/(\d+/)?", "layers/", name), str(leaf.shape)
        if name.startswith("layers"):
            shape = shape.replace(f"({leaf.shape[0]},", "(N,", 1)
        lines.append(" | ".join([name, shape, adamw, muon, factor, "decay" if is_matrix(name) else "", matrices]))
    return "\n".join(dict.fromkeys(line.rstrip(" |") for line in lines))


def test_every_kind_of_parameter_is_in_the_golden_group():
    text = "\n\n".join(f"{name}\n{describe(tiny_config(**changes))}" for name, changes in CONFIGS.items()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), (
        "parameters are updated otherwise. If that was meant, run UPDATE_GOLDEN=1 pytest tests/test_optimizer.py and look at the diff"
    )


def test_what_muon_updates_are_matrices_inside_the_layers_and_all_of_them():
    for changes in CONFIGS.values():
        params = shapes_of(tiny_config(**changes))
        for (path, leaf), by in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(updated_by(params, optimizer="muon")),
            strict=True,
        ):
            name = placement.path_name(path)
            inside = any(part in name.split("/") for part in ("first", "layers", "last", "ahead"))
            assert (by == "muon") == (inside and name.endswith("kernel") and not name.endswith("conv/kernel")), name
            assert leaf.ndim >= 3 or by != "muon", name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_rule_for_every_kind_of_parameter(name):
    for changes in (CONFIGS["hybrid"], CONFIGS["two streams"], CONFIGS["batch norm"]):
        c = tiny_config(**changes, optimizer__name=name)
        params = shapes_of(c)
        transformation = make_optimizer(c.optimizer, lambda step: jnp.float32(1.0), model=c.model)
        updates, _ = jax.eval_shape(lambda p, o=transformation: o.update(p, o.init(p), p), params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        counts = [
            int(line.split()[0].replace(",", ""))
            for line in optimizer.table(c.optimizer, params, model=c.model).splitlines()
        ]
        assert sum(counts) == sum(x.size for x in jax.tree.leaves(params))


def test_the_printed_table_says_rates_factors_decay_and_observed_parameters():
    c = tiny_config(**{**CONFIGS["hybrid"], "model__pattern": ("global",)}, model__init="mup", model__mup_base_width=8)
    lines = optimizer.table(c.optimizer, shapes_of(c), model=c.model).splitlines()
    assert {line.split(": ", 1)[1] for line in lines} == {
        "adamw, learning rate 0.01, weight decay 0.1, epsilon 1e-08 x 0.25",
        "adamw, learning rate 0.01 x 0.25, weight decay 0.1 x 4, epsilon 1e-08 x 0.25",
        "adamw, learning rate 0.01, no weight decay, epsilon 1e-08 x 0.25", "bias that balances the experts, step 0.001",
    }  # fmt: skip


# ---------------------------------------------------------------- float32, whatever is stored


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_and_updates_are_float32_for_parameters_stored_in_bfloat16(name):
    c = tiny_config(**CONFIGS["hybrid"], model__param_dtype="bfloat16", optimizer__name=name)
    params, transformation = shapes_of(c), make_optimizer(c.optimizer, lambda step: jnp.float32(1.0), model=c.model)
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    made = jax.eval_shape(lambda p: transformation.update(p, transformation.init(p), p), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(made):
        assert leaf.dtype in (jnp.float32, jnp.int32), placement.path_name(path)


def test_a_second_moment_follows_gradients_that_become_small():
    c = tiny_config(optimizer__beta2=0.999)
    transformation = make_optimizer(c.optimizer, lambda step: jnp.float32(1.0))
    params = {"layers": {"mlp": {"up": {"kernel": jnp.full((1, 4, 4), 0.02, jnp.bfloat16)}}}}

    def step(state, size):
        return transformation.update(jax.tree.map(lambda p: jnp.full_like(p, size), params), state, params)[1], None

    state, _ = jax.lax.scan(step, transformation.init(params), jnp.repeat(jnp.array([1.0, 0.1]), 1000))
    moments = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if "nu" in placement.path_name(path)]
    once = 1 - 0.999**1000
    np.testing.assert_allclose(moments[0], once * 0.999**1000 + 0.01 * once, rtol=1e-3)  # 0.5 in bfloat16


def test_what_is_stored_in_bfloat16_moves_by_its_updates_on_average_and_never_by_more_than_one_of_its_steps():
    start, count = np.array([0.02, -0.02, 1.0, 3e38, 0.0], np.float32), 4096
    params = {"x": jnp.broadcast_to(jnp.asarray(start, jnp.bfloat16), (count, 5))}
    step = np.array([1e-5, 1e-5, -1e-4, 0.0, 0.0], np.float32)
    moved = apply_updates(params, {"x": jnp.broadcast_to(step, (count, 5))}, jax.random.key(0))["x"]
    assert moved.dtype == jnp.bfloat16
    change = np.asarray(moved, np.float64) - np.asarray(params["x"], np.float64)
    grid = np.array([2.0**-13, 2.0**-13, 2.0**-8, 1.0, 1.0])  # between two neighbours of bfloat16
    error = np.sqrt(np.abs(step) * grid / count)  # the standard deviation of a mean of such lots
    assert (np.abs(change.mean(0) - step) <= 4 * error).all(), change.mean(0)
    assert (np.abs(change) <= grid).all()
    assert not change[:, 3:].any(), "an update of zero moves nothing"
    nearest = optax.apply_updates(params, {"x": jnp.broadcast_to(step, (count, 5))})["x"]
    np.testing.assert_array_equal(nearest, params["x"])  # what rounding to the nearest makes of such updates


def test_what_is_not_finite_stays_so_in_bfloat16():
    params = {"x": jnp.zeros(3, jnp.bfloat16)}
    moved = apply_updates(params, {"x": jnp.array([jnp.nan, jnp.inf, 3.4e38])}, jax.random.key(0))["x"]
    assert not np.isfinite(np.asarray(moved, np.float32)).any()  # the last is above bfloat16's largest number


# ---------------------------------------------------------------- Adafactor


def test_adafactor_does_to_every_matrix_of_a_stack_what_optax_does_to_one_matrix():
    rng = np.random.default_rng(0)

    def numbers(*shape):
        sizes = rng.uniform(1e-4, 3, (*shape[:1], *(1,) * (len(shape) - 1)))  # layers, and rows, of unlike size
        return jnp.asarray(rng.normal(size=shape) * sizes, jnp.float32)

    params = {
        "embedding": numbers(200, 130),
        "final_norm/scale": numbers(130),
        "layers/attention/query/kernel": numbers(2, 130, 2, 129),  # factored
        "layers/attention/out/kernel": numbers(2, 2, 16, 130),  # not
        "layers/mlp/up/kernel": numbers(2, 130, 140),
        "layers/mlp/up/bias": numbers(2, 140),
        "layers/moe/up/kernel": numbers(2, 3, 130, 140),  # a matrix for each expert
        "layers/moe/up/bias": numbers(2, 3, 140),
    }

    def apart(tree):
        found = {}
        for name, x in tree.items():
            stacked = name.startswith("layers") + ("moe" in name)
            found |= {f"{name} {i}": x[i] for i in np.ndindex(x.shape[:stacked])}
        return found

    c = tiny_config(optimizer__name="adafactor", optimizer__weight_decay=0.0)
    ours, theirs = make_optimizer(c.optimizer, lambda step: jnp.float32(1.0)), optax.adafactor(1e-2)
    state, single = ours.init(params), apart(params)
    their_state, our_update, their_update = theirs.init(single), jax.jit(ours.update), jax.jit(theirs.update)
    for k in range(3):
        gradient = {name: 10.0 ** (k - 2) * numbers(*x.shape) for name, x in params.items()}
        updates, state = our_update(gradient, state, params)
        expected, their_state = their_update(apart(gradient), their_state, single)
        for name, update in apart(updates).items():
            np.testing.assert_allclose(update, expected[name], rtol=1e-4, atol=1e-8, err_msg=name)
        params, single = optax.apply_updates(params, updates), optax.apply_updates(single, expected)


# ---------------------------------------------------------------- muP's rates


def flat_updates(c, gradient):
    """Path -> the first update of each parameter, all parameters being 1, for a gradient of that everywhere."""
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes_of(c))
    transformation = make_optimizer(c.optimizer, lambda step: jnp.float32(1.0), model=c.model)

    @jax.jit
    def first(params):
        return transformation.update(jax.tree.map(lambda p: gradient * p, params), transformation.init(params), params)[
            0
        ]

    return {placement.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(first(params))}


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_under_mup_kernels_learn_slower_by_the_width_and_decay_as_ever(name):
    changes = {
        "model__tie_embeddings": False,
        "optimizer__name": name,
        "optimizer__learning_rate": 0.1,
        "optimizer__weight_decay": 0.5,
        "model__mup_base_width": 8,
    }
    mup, plain = (flat_updates(tiny_config(**changes, model__init=scheme), 0.01) for scheme in ("mup", "gpt2"))
    slower = 0.25**0.5 if name == "adafactor" else 0.25  # whose updates are as small as muP's parameters already
    for path, update in mup.items():
        factor = slower if path.endswith("kernel") and path != "head/kernel" else 1.0
        decayed = -0.1 * 0.5 * is_matrix(path)
        np.testing.assert_allclose(
            update - decayed, factor * (plain[path] - decayed), rtol=1e-4, atol=1e-7, err_msg=path
        )


def test_under_mup_muons_matrices_keep_their_rate_and_the_rest_follows_adams_rule():
    changes = {
        "objective__name": "masked",
        "model__direction": "bidirectional",
        "model__pooler": True,
        "model__mup_base_width": 8,
    }
    mup, plain = (
        flat_updates(tiny_config(**changes, optimizer__name="muon", optimizer__weight_decay=0.0, model__init=s), 0.01)
        for s in ("mup", "gpt2")
    )
    for path, update in mup.items():
        np.testing.assert_allclose(
            update, plain[path] * (0.25 if path == "pooler/kernel" else 1.0), rtol=1e-4, err_msg=path
        )


# ---------------------------------------------------------------- observed parameters


def test_running_statistics_become_the_average_of_what_is_observed():
    params = {"final_norm": {"running_mean": jnp.full(3, 2.0), "running_var": jnp.ones(3), "scale": jnp.ones(3)}}
    c = tiny_config(optimizer__learning_rate=0.5)
    transformation = make_optimizer(c.optimizer, lambda step: jnp.float32(0.0), model=c.model)
    observed = 7.0
    gradient = jax.tree.map(lambda p: p - observed, params)
    updates, _ = transformation.update(gradient, transformation.init(params), params)
    np.testing.assert_allclose(updates["final_norm"]["running_mean"], 0.1 * (observed - 2.0), rtol=1e-6)
    np.testing.assert_allclose(updates["final_norm"]["running_var"], 0.1 * (observed - 1.0), rtol=1e-6)
    np.testing.assert_array_equal(updates["final_norm"]["scale"], 0)


def test_the_experts_bias_moves_by_equal_steps_against_the_load_and_never_without_its_step():
    params = {"layers": {"moe": {"expert_bias": jnp.zeros((1, 3))}}}
    c = tiny_config(model__moe__experts=3, model__moe__bias_rate=0.01)
    transformation = make_optimizer(c.optimizer, lambda step: jnp.float32(0.0), model=c.model)
    excess = {"layers": {"moe": {"expert_bias": jnp.array([[5.0, 0.0, -0.1]])}}}
    updates, _ = transformation.update(excess, transformation.init(params), params)
    np.testing.assert_allclose(updates["layers"]["moe"]["expert_bias"], [[-0.01, 0.0, 0.01]])
    nobody = make_optimizer(c.optimizer, lambda step: jnp.float32(0.0))
    with pytest.raises(ValueError, match="give make_optimizer the model's settings"):
        nobody.update(excess, nobody.init(params), params)


STILL = {
    "train__ema": 0.9,
    "model__layers": 1,
    "optimizer__learning_rate": 0.0,
    "optimizer__weight_decay": 0.0,
    "optimizer__clip_norm": 1e-6,
}
FOLLOWING = {
    "batch norm": {"model__norm": "batch"},
    "experts": {"model__moe__experts": 4, "model__moe__bias_rate": 0.01},
}


@pytest.mark.parametrize("kind", few(FOLLOWING))  # test_moe.py has what moves the experts' bias
def test_observed_parameters_follow_whatever_the_weights_clipping_and_micro_batches(kind):
    changes = {**FOLLOWING[kind], **STILL}
    once = make_batch(tiny_config(train__batch_size=4), 0)
    batch = {name: np.repeat(x, 2, axis=0) for name, x in once.items()}  # then both halves observe the same
    light = {**batch, "weights": batch["weights"] * (np.arange(16) % 8 == 0)}  # the sums are divided by little
    state, _, run = prepare_steps(tiny_config(**changes), mesh_of("data=1"))
    whole, weighted = (observed(run(state, b)[0]) for b in (batch, light))
    _, _, run_in_parts = prepare_steps(tiny_config(**changes, train__micro_batches=2), mesh_of("data=1"))
    parts = observed(run_in_parts(state, batch)[0])
    start = observed(state)
    assert start
    for name, x in whole.items():
        assert np.abs(x - start[name]).max() > 1e-3, f"{name} stayed where it was"
        np.testing.assert_allclose(weighted[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(parts[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


def observed(state):
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    return {placement.path_name(p): np.asarray(x) for p, x in leaves if is_observed(placement.path_name(p))}


def test_batch_norms_statistics_reach_those_of_the_data_and_evaluation_uses_them():
    c = tiny_config(model__norm="batch", **STILL)
    state, _, run = prepare_steps(c, mesh_of("data=1"))
    batch, module = make_batch(c, 0), transformer.build(c.model)

    @jax.jit
    def outputs(params):
        arguments = {"segments_BL": batch["segments"], "rngs": {"dropout": jax.random.key(0)}}
        return [module.apply({"params": params}, batch["tokens"], deterministic=d, **arguments) for d in (True, False)]

    def gap(params):
        alone, together = outputs(params)
        return float(jnp.abs(alone - together)[batch["segments"] > 0].max())

    far = gap(state.params)
    for _ in range(150):
        state, values = run(state, batch)
    assert gap(state.params) < 0.02 * far, (far, gap(state.params))
    assert float(values["grad_norm"]) < 10, "the distance to the statistics is no gradient of the loss"


def test_observed_parameters_are_left_alone_by_a_step_that_is_skipped():
    c = tiny_config(**FOLLOWING["batch norm"], **STILL)
    state, _, run = prepare_steps(c, mesh_of("data=1"))
    bad = make_batch(c, 0)
    bad["weights"][0, 0] = np.nan
    after, values = run(state, bad)
    assert int(values["skipped"]) == 1
    assert_same_bits((after.params, after.ema), (state.params, state.ema))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLLOWING)
def test_a_model_with_observed_parameters_learns(kind):
    losses, state = losses_of(tiny_config(**FOLLOWING[kind], train__ema=0.9), mesh_of("data=1"), steps=20)
    assert losses[-1] < losses[0] - 1.0, losses
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.ema))
