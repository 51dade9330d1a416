"""A step divides by the weights it was given, adds up in float32, and changes nothing when it must not."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, make_batch, mesh_of, prepare_steps, tiny_config

import llmjax
from llmjax.data.ramp import batch_sizes
from llmjax.interop import tensors
from llmjax.interop.write import export_model
from llmjax.model import transformer
from llmjax.model.init import initializer
from llmjax.model.layers import lookup
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import placement
from llmjax.train import checkpoint
from llmjax.train.programs import make_programs
from llmjax.train.step import batch_shardings


def floats(state):
    """Everything of a state but its counters."""
    tree = (state.params, state.ema, state.opt_state)
    return [x for x in jax.tree.leaves(jax.device_get(tree)) if jnp.issubdtype(x.dtype, jnp.floating)]


def counts(state):
    return [int(x) for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.integer)]


# ---------------------------------------------------------------- what is not finite

OVERFLOWS = {
    "a division of zero by zero": {"optimizer__name": "adamw", "model__tie_embeddings": False},
    "an update without bounds": {"optimizer__name": "sgd", "optimizer__clip_norm": 0.0, "optimizer__learning_rate": 3e38},
}  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if "zero" in k else pytest.mark.slow) for k in OVERFLOWS])
def test_a_step_whose_update_is_not_finite_is_skipped_as_one_whose_gradient_is_not(kind):
    c = tiny_config(**OVERFLOWS[kind], model__layers=1, model__param_dtype="bfloat16", train__ema=0.9)
    c.optimizer.epsilon = 0.0  # the config's check would refuse it
    state, _, run = prepare_steps(c, mesh_of("data=1"))
    after, values = run(state, make_batch(c, 0))
    assert np.isfinite([float(values[name]) for name in ("loss", "grad_norm", "param_norm")]).all()
    assert not np.isfinite(float(values["update_norm"]))
    assert (int(after.step), int(after.skipped), int(after.bad_in_a_row)) == (1, 1, 1)
    assert_same_bits(floats(after), floats(state))
    assert counts(after) == [count + 1 for count in counts(state)], "the schedule keeps its place"


# ---------------------------------------------------------------- weights

AVERAGED = {"train__ema": 0.9, "objective__l2": 1e-3}


def test_only_the_ratio_of_weights_counts_and_a_batch_without_weight_changes_nothing():
    c = tiny_config(**AVERAGED)
    state, _, run = prepare_steps(c, mesh_of("data=1"))
    state, _ = run(state, make_batch(c, 0))  # from here on there is momentum
    batch = make_batch(c, 1)

    def weighted(factor):
        return run(state, {**batch, "weights": (factor * batch["weights"]).astype(np.float32)})

    (whole, values), (shares, few) = weighted(1.0), weighted(1e-4)
    assert float(few["target_tokens"]) < 0.01
    np.testing.assert_allclose(few["target_tokens"], 1e-4 * values["target_tokens"], rtol=1e-5)
    for name in ("loss", "objective", "grad_norm", "update_norm"):
        np.testing.assert_allclose(few[name], values[name], rtol=1e-4, err_msg=name)
    for a, b in zip(floats(shares), floats(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)

    none, values = weighted(0.0)
    assert_same_bits(floats(none), floats(state))  # no decay, no momentum
    assert counts(none) == [count + 1 for count in counts(state)]
    assert (int(none.step), int(none.skipped), int(none.bad_in_a_row)) == (2, 0, 0)
    assert float(values["target_tokens"]) == 0
    assert np.isnan(float(values["loss"])), "there is none; a row of metrics.jsonl says null"


# ---------------------------------------------------------------- memory


def test_new_parameters_and_moments_never_wait_beside_the_old_ones():
    """They did until the norm of the update was known: four times the parameters, gradients included, and now twice."""
    c = tiny_config(model__width=128, model__mlp_width=512, train__batch_size=1, model__layers=4)
    mesh = mesh_of("data=1")
    made = make_programs(c, transformer.build(c.model), OBJECTIVES[c.objective.name], batch_sizes(c.train), mesh)
    batch = jax.device_put(make_batch(c, 0), batch_shardings(mesh))
    step = made.compile(made.sizes.stages[0], batch, rows=1, total_steps=8)
    params = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(made.abstract.params))
    assert step.memory_analysis().temp_size_in_bytes < 2.8 * params


# ---------------------------------------------------------------- float32, whatever is stored


def test_the_gradient_of_a_tables_row_is_the_sum_of_all_its_uses():
    ids_BL, rng = jnp.zeros((4, 1024), jnp.int32).at[0, 0].set(2), np.random.default_rng(0)
    table_VD = jnp.asarray(rng.normal(size=(3, 8)), jnp.bfloat16)
    dy_BLD = jnp.asarray(rng.normal(1, 1, (4, 1024, 8)), jnp.bfloat16)
    made, back = jax.vjp(lambda table: lookup(table, ids_BL), table_VD)
    np.testing.assert_array_equal(made, np.asarray(table_VD)[np.asarray(ids_BL)])
    expected = np.zeros((3, 8))
    np.add.at(expected, np.asarray(ids_BL), np.asarray(dy_BLD, np.float64))
    np.testing.assert_allclose(np.asarray(back(dy_BLD)[0], np.float64), expected, rtol=1e-2)  # in bfloat16 a quarter


def test_what_starts_in_bfloat16_is_drawn_in_float32():
    c = tiny_config(model__param_dtype="bfloat16").model
    x = np.asarray(initializer(c, "embedding")(jax.random.key(0), (300, 300), jnp.bfloat16), np.float32)
    assert np.abs(x).max() > 3.5 * c.init_std and len(np.unique(x)) > 1000  # drawn in bfloat16: 2.9, and 128


def test_gradients_of_parameters_in_bfloat16_are_added_up_in_float32():
    c = tiny_config(model__layers=1, model__param_dtype="bfloat16", train__batch_size=32, train__micro_batches=32)
    state, _, run = prepare_steps(c, mesh_of("data=1"))
    batch = {name: np.repeat(x[:1], 32, axis=0) for name, x in make_batch(c, 0).items()}
    small = np.where(np.arange(32) == 0, 1.0, 1 / 400).astype(np.float32)[
        :, None
    ]  # 1/400: below half a step of bfloat16
    norms = [float(run(state, {**batch, "weights": w * batch["weights"]})[1]["grad_norm"]) for w in (1.0, small)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)  # else 31/400 of it is lost


def test_what_is_trained_from_given_weights_is_float32_and_what_is_frozen_stays_as_stored():
    changes = {"model__param_dtype": "bfloat16", "train__ema": 0.9, "optimizer__train": "mlp/"}
    _, given, _ = prepare_steps(tiny_config(**changes, train__init_from="runs/base"), mesh_of("data=1"))
    _, new, _ = prepare_steps(tiny_config(**changes), mesh_of("data=1"))
    assert {x.dtype for x in jax.tree.leaves(given.params)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(given.frozen)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves((new.params, new.frozen))} == {jnp.dtype("bfloat16")}
    for state in (given, new):
        assert {x.dtype for x in jax.tree.leaves((state.ema, state.opt_state))} == {
            np.dtype("float32"),
            np.dtype("int32"),
        }


def test_a_checkpoint_whose_optimizer_state_is_bfloat16_is_opened_in_float32(tmp_path):
    c = tiny_config(**AVERAGED)
    state, abstract, _ = prepare_steps(c, mesh_of("data=1"))
    rng = np.random.default_rng(0)

    def narrow(tree):  # of any numbers
        drawn = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(jnp.bfloat16), tree)
        return jax.tree.map(lambda x, new: jax.device_put(new) if x.dtype == jnp.float32 else x, tree, drawn)

    old = dataclasses.replace(state, opt_state=narrow(state.opt_state), ema=narrow(state.ema))
    with checkpoint.manager(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, old, step=1, meta={"step": 1})
        checkpoints.wait_until_finished()
    restored = checkpoint.restore(tmp_path, abstract)
    assert restored is not None
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(restored[0]), jax.tree.leaves(jax.device_get(old)), strict=True
    ):
        np.testing.assert_array_equal(x, y.astype(x.dtype), err_msg=placement.path_name(path))
    assert [x.dtype for x in jax.tree.leaves(restored[0])] == [x.dtype for x in jax.tree.leaves(abstract)]


def test_a_model_trained_in_float32_is_served_in_the_type_it_computes_in_and_exported_in_its_own(tmp_path, one_device):
    c = tiny_config(model__layers=1, model__param_dtype="bfloat16", train__init_from="runs/base", train__ema=0.9)
    state, _, _ = prepare_steps(c, mesh_of("data=1"))
    ema = jax.tree.map(lambda x: jax.device_put(np.asarray(x) * np.float32(1.1)), state.ema)  # unlike the parameters
    state = dataclasses.replace(state, ema=ema)
    with checkpoint.manager(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step, dtype in enumerate(("float32", "bfloat16"), start=1):
            c.model.dtype = dtype
            meta = {"step": step, "config": c.to_dict(), "imported": {"model_type": "llama"}}
            checkpoint.save(checkpoints, state, step=step, meta=meta)
        checkpoints.wait_until_finished()
    for step, dtype in enumerate((jnp.float32, jnp.bfloat16), start=1):
        served = llmjax.load(tmp_path, step=step).params
        for x, trained in zip(jax.tree.leaves(served), jax.tree.leaves(jax.device_get(state.ema)), strict=True):
            np.testing.assert_array_equal(np.asarray(x), trained.astype(dtype), strict=True)
    export_model(tmp_path, tmp_path / "exported")
    stored = tensors.open_folder(tmp_path / "exported").tensors.values()
    assert {tensor.dtype for tensor in stored} == {np.dtype("bfloat16")}
