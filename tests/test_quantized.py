"""Products in int8 and fp8 are close to float32, learn, and need no other parameters."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few, losses_of, mesh_of, tiny_config
from networks import logits_of, make, settings

from llmjax.model import kernels_quantized, transformer

KINDS = ("int8", "fp8")
# Of the largest number: int8 resolves 1/127 of a row's largest; fp8 has 3 bits behind the point, its gradients 2.
TOLERANCE = {"int8": 0.02, "fp8": 0.06}
GRADIENT = {"int8": 0.02, "fp8": 0.12}


@pytest.mark.parametrize("dtype", few(["bfloat16", "float32"]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradients_are_close_to_those_in_float32(kind, dtype):
    pytest.importorskip("qwix")
    rng = np.random.default_rng(0)
    x_RD, kernel_DF, dy_RF = (jnp.asarray(rng.normal(size=s), dtype) for s in ((24, 48), (48, 32), (24, 32)))
    x_RD = x_RD.at[5].set(0).at[6].mul(1e3)  # padding, and a row of its own size
    dy_RF = dy_RF.at[5].set(0)

    def run(multiply, *arguments):
        y, pull = jax.vjp(multiply, *arguments[:2])
        return y, *pull(arguments[2])

    made = jax.jit(lambda *a: run(lambda x, k: kernels_quantized.product(x, k, kind), *a))(x_RD, kernel_DF, dy_RF)
    exact = run(jnp.matmul, *(x.astype(jnp.float32) for x in (x_RD, kernel_DF, dy_RF)))
    for name, got, want in zip(("y", "dx", "dkernel"), made, exact, strict=True):
        assert got.dtype == dtype
        error = np.abs(np.asarray(got, np.float32) - want)
        if name == "y":  # every row has its own scale
            error, want = error / (np.abs(want).max(1, keepdims=True) + 1e-9), 1.0
        assert error.max() <= (GRADIENT if name == "dx" else TOLERANCE)[kind] * np.max(np.abs(want)), name
    assert not np.asarray(made[0], np.float32)[5].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trained_in_float32_runs_in_low_precision_with_the_same_parameters(kind):
    pytest.importorskip("qwix")
    changes = {"width": 64, "mlp_width": 128, "heads": 4}
    plain, params = make(settings(**changes))
    low = transformer.build(settings(**changes, quantization=kind))
    names = transformer.param_shapes(low)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), names) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    params = jax.tree.map(lambda x: x / 4, params)
    tokens_BL = jnp.arange(24).reshape(2, 12) % 32
    exact, got = (np.asarray(logits_of(m, params, tokens_BL)) for m in (plain, low))
    assert 0 < np.abs(got - exact).max() < 2 * TOLERANCE[kind] * np.abs(exact).max()
    assert (got.argmax(-1) == exact.argmax(-1)).mean() > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_in_low_precision_as_it_does_in_float32(kind):
    pytest.importorskip("qwix")
    plain, _ = losses_of(tiny_config(), mesh_of("data=1"), steps=20)
    low, state = losses_of(tiny_config(model__quantization=kind), mesh_of("data=1"), steps=20)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params)), "masters stay float32"
    assert low[-1] < low[0] - 0.5
    assert abs(low[-1] - plain[-1]) < 0.1 * (plain[0] - plain[-1])


def test_low_precision_runs_on_a_mesh():
    pytest.importorskip("qwix")
    c = tiny_config(model__quantization="int8")
    alone, _ = losses_of(c, mesh_of("data=1"), steps=3)
    spread, _ = losses_of(c, mesh_of("data=2 fsdp=2 tensor=2"), steps=3)
    # Another order of additions moves a number over a rounding border now and then, and learning makes more of it.
    np.testing.assert_allclose(spread[0], alone[0], rtol=0, atol=2e-4)
    np.testing.assert_allclose(spread, alone, rtol=0, atol=2e-2)


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    module, params = make(settings(quantization="int8"))
    with pytest.raises(ValueError, match=r'pip install "llmjax\[quantized\]"'):
        module.apply({"params": params}, jnp.zeros((1, 4), jnp.int32))
