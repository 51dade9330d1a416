"""Each kind of dropout drops what it should, as often as it should, by its key alone, and never in evaluation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_params, tiny_config

from llmjax.model import attention, layers, transformer

KINDS = ("dropout", "embedding_dropout", "attention_dropout", "layer_drop")
ROWS, LENGTH, WIDTH = 8, 16, 32
PLAIN = {
    "model__norm": "none",
    "model__mlp": "none",
    "model__final_norm": False,
    "model__init": "lecun",
    "model__position": "none",
}


def started(c):
    """The module, its parameters and some tokens."""
    module = transformer.build(c.model)
    params = first_params(module)
    tokens_BL = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 4, 300)
    return module, params, tokens_BL


def streams(c, keys, *, deterministic=False):
    """What enters the first block and what leaves each, (keys, layers + 1, B, L, D), for each of the keys."""
    module, params, tokens_BL = started(c)

    def one(key):
        _, kept = module.apply(
            {"params": params}, tokens_BL, deterministic=deterministic, rngs={"dropout": key}, mutable=["intermediates"],
            capture_intermediates=lambda m, method: m.name == "layers" and method == "__call__",
        )  # fmt: skip
        return kept["intermediates"]["layers"]["__call__"][0][0]

    after = np.asarray(jax.jit(jax.lax.map, static_argnums=0)(one, jax.random.split(jax.random.key(2), keys)))
    before = np.broadcast_to(np.asarray(params["embedding"][tokens_BL]), after[:, :1].shape)
    return np.concatenate([before, after], axis=1)


def test_numbers_are_dropped_at_the_rate_and_the_others_keep_the_mean():
    x = jnp.ones((400, 500))
    y = layers.drop(x, 0.3, jax.random.key(0))
    assert float(jnp.mean(y == 0)) == pytest.approx(0.3, abs=0.005)
    np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)
    np.testing.assert_array_equal(y, layers.drop(x, 0.3, jax.random.key(0)))
    assert (y != layers.drop(x, 0.3, jax.random.key(1))).any()
    assert layers.drop(x.astype(jnp.bfloat16), jnp.float32(0.3), jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_decided_by_its_key_in_training_and_is_off_in_evaluation(kind):
    c = tiny_config(**{f"model__{kind}": 0.5}, model__layers=3)
    module, params, tokens_BL = started(c)
    plain = transformer.build(tiny_config(model__layers=3).model)

    def logits(key, deterministic, module=module):
        return module.apply({"params": params}, tokens_BL, deterministic=deterministic, rngs={"dropout": key})

    logits = jax.jit(logits, static_argnums=(1, 2))
    a, again, other = (logits(jax.random.key(k), False, module) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - other).max() > 1e-4
    for key in range(2):
        evaluated = logits(jax.random.key(key), True, module)
        np.testing.assert_array_equal(evaluated, logits(jax.random.key(0), True, plain))
    assert max(np.abs(x - evaluated).max() for x in (a, other)) > 1e-4


def test_residual_dropout_drops_what_a_branch_adds_and_keeps_its_mean():
    c = tiny_config(**PLAIN, model__layers=1, model__dropout=0.25)
    x = streams(c, 40)
    added = x[:, 1] - x[:, 0]
    whole = streams(c, 1, deterministic=True)
    branch = np.broadcast_to((whole[:, 1] - whole[:, 0]), added.shape)
    dropped = added == 0
    assert dropped.mean() == pytest.approx(0.25, abs=0.01)
    np.testing.assert_allclose(added[~dropped], branch[~dropped] / 0.75, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("shape", "rates"), [("constant", [0.4] * 5), ("linear", [0.0, 0.1, 0.2, 0.3, 0.4])])
def test_limas_shape_is_linear_from_nothing_at_the_first_layer_to_the_rate_at_the_last(shape, rates):
    x = streams(tiny_config(**PLAIN, model__layers=5, model__dropout=0.4, model__dropout_shape=shape), 10)
    measured = (np.diff(x, axis=1) == 0).mean(axis=(0, 2, 3, 4))
    np.testing.assert_allclose(measured, rates, atol=0.01)


@pytest.mark.parametrize(("shape", "rates"), [("constant", [0.4] * 4), ("linear", [0.0, 0.4 / 3, 0.8 / 3, 0.4])])
def test_layer_drop_skips_whole_layers_at_the_rate_of_each(shape, rates):
    x = streams(tiny_config(**PLAIN, model__layers=4, model__layer_drop=0.4, model__dropout_shape=shape), 400)
    same = (np.diff(x, axis=1) == 0).mean(axis=(2, 3, 4))
    assert set(np.unique(same)) == {0.0, 1.0}  # all of a layer or nothing
    np.testing.assert_allclose(same.mean(axis=0), rates, atol=0.08)
    if shape == "constant":  # layers decide alone
        assert abs(np.corrcoef(same.T) - np.eye(4)).max() < 0.2


def test_layers_of_a_pattern_have_the_rates_of_their_own_depth():
    c = tiny_config(
        **PLAIN, model__layers=4, model__pattern=("local", "global"), model__dropout=0.3, model__dropout_shape="linear"
    )
    module, params, tokens_BL = started(c)
    _, kept = module.apply(
        {"params": params}, tokens_BL, deterministic=False, rngs={"dropout": jax.random.key(0)}, mutable=["intermediates"],
        capture_intermediates=lambda m, method: m.name in ("0", "1") and method == "__call__",
    )  # fmt: skip
    x = [kept["intermediates"]["layers"][place]["__call__"][0][0] for place in ("0", "1")]
    steps = [params["embedding"][tokens_BL], x[0][0], x[1][0], x[0][1], x[1][1]]
    measured = [float((b == a).mean()) for a, b in itertools.pairwise(steps)]
    np.testing.assert_allclose(measured, [0.0, 0.1, 0.2, 0.3], atol=0.03)


def test_embedding_dropout_drops_what_enters_the_first_block():
    c = tiny_config(**PLAIN, model__layers=1, model__embedding_dropout=0.3)
    module, params, tokens_BL = started(c)
    params["layers"]["attention"]["out"]["kernel"] *= 0  # the residual stream goes through as it is
    hidden = module.apply(
        {"params": params}, tokens_BL, deterministic=False, rngs={"dropout": jax.random.key(0)}, output="hidden"
    )
    embedded = params["embedding"][tokens_BL]
    assert float((hidden == 0).mean()) == pytest.approx(0.3, abs=0.03)
    np.testing.assert_allclose(hidden[hidden != 0], (embedded / 0.7)[hidden != 0], rtol=1e-5)


def test_attention_dropout_drops_weights_and_not_values():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(2, LENGTH, 2, LENGTH)), jnp.float32) for _ in range(2))
    v = jnp.broadcast_to(jnp.eye(LENGTH)[None, :, None], (2, LENGTH, 2, LENGTH))  # then the output is the weights
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None], (2, LENGTH, LENGTH))
    whole = attention.reference(q, k, v, mask)
    part = attention.reference(q, k, v, mask, dropout=lambda w: layers.drop(w, 0.3, jax.random.key(0)))
    seen = np.asarray(mask)[:, :, None].repeat(2, axis=2)
    dropped = np.asarray(part == 0) & seen
    assert dropped.sum() / seen.sum() == pytest.approx(0.3, abs=0.05)
    np.testing.assert_allclose(part[seen & ~dropped], whole[seen & ~dropped] / 0.7, rtol=1e-5)


def test_attention_dropout_takes_a_kernel_that_has_it():
    c = tiny_config(model__attention="auto", model__attention_dropout=0.1)
    for platform in ("cpu", "gpu", "tpu"):
        assert attention.resolve(c.model, platform=platform) == "reference"
