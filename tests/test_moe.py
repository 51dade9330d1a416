"""Sparse layers compute what their papers say, drop what they must, stay balanced, and are the same on any mesh."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import few, first_params, mesh_of, tiny_config
from ml_collections import FrozenConfigDict

from llmjax import config
from llmjax.model import moe, routing
from llmjax.model.layers import ACTIVATIONS, activated
from llmjax.model.moe import MoE
from llmjax.model.transformer import build
from llmjax.parallel import placement

B, L, D, F, E = 4, 10, 8, 12, 4
TOLERANCE = 1e-5


def settings(**changes: Any) -> FrozenConfigDict:
    """config.model with E small experts; "moe__" keys are those of moe."""
    whole = config.base()
    c = whole.model
    c.width, c.mlp_width, c.moe.experts, c.init, c.heads = D, F, E, "lecun", 2
    for key, value in changes.items():
        config.set_key(whole, "model." + key.replace("__", "."), value)
    return FrozenConfigDict(c)


def tokens(rows: int = B, length: int = L, *, padded: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """x_BLD and valid_BL, without padding or with rows of unequal length."""
    x_BLD = np.random.default_rng(7).normal(size=(rows, length, D)).astype(np.float32)
    lengths_B = length - 2 * np.arange(rows) % length if padded else np.full(rows, length)
    return x_BLD, np.arange(length)[None] < lengths_B[:, None]


def make(c: FrozenConfigDict, *, deterministic: bool = False) -> tuple[MoE, Any]:
    """The module and its parameters, biases not zero."""
    return MoE(c, deterministic), jax.tree.map(lambda p: p, _params(c))


@functools.cache
def _params(c: FrozenConfigDict) -> Any:
    shapes = jax.eval_shape(MoE(c).init, jax.random.key(0), *tokens())["params"]
    rng = np.random.default_rng(2)

    def value(path: Any, p: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.3 if "bias" in str(path[-1]) else p.shape[-2] ** -0.5
        return jnp.asarray(scale * rng.normal(size=p.shape), p.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


@functools.partial(jax.jit, static_argnums=(0, 2))
def call(
    module: MoE, variables: Any, mutable: tuple[str, ...], x_BLD: jax.Array, valid_BL: jax.Array, seed: int = 0
) -> Any:
    """The output, and what is sown if collections are named."""
    return module.apply(variables, x_BLD, valid_BL, rngs={"dropout": jax.random.key(seed)}, mutable=mutable or False)


def assert_close(a: Any, b: Any, tolerance: float = TOLERANCE) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# ---------------------------------------------------------------------- the products


def routes(name: str, active: int) -> tuple[jax.Array, jax.Array]:
    """Experts and weights: (B, L, J) each."""
    _, valid_BL = tokens(padded=name == "padding")
    scores = np.random.default_rng(active).random((B, L, E))
    if name == "one takes all":
        scores[..., 2] += 1
    if name == "one is empty":
        scores[..., 1] -= 1
    c = settings(moe__active=active)
    return routing.choose(jax.nn.softmax(jnp.asarray(scores, jnp.float32)), valid_BL, c.moe)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(function: Any, c: FrozenConfigDict, experts_BLJ: jax.Array, *rest: Any) -> Any:
    def loss(weights_BLJ: jax.Array, x_BLD: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array]:
        y_BLD = function(c, x_BLD, experts_BLJ, weights_BLJ, weights)
        return jnp.sum(jnp.sin(3 * y_BLD)), y_BLD

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*rest)


@pytest.mark.parametrize("route", ["random", "one takes all", "one is empty", "padding"])
@pytest.mark.parametrize(
    ("active", "activation", "bias"), few([(2, "swiglu", ()), (1, "gelu", ("mlp",)), (4, "reglu", ())])
)
def test_dropless_equals_a_loop_over_experts_with_its_gradients(route, active, activation, bias):
    c = settings(activation=activation, bias=bias, moe__active=active, moe__normalize=active > 1)
    _, params = make(c)
    weights = {name: params[name] for name in ("up", "gate", "down") if name in params}
    arguments = (*routes(route, active), tokens()[0], weights)
    assert_close(value_and_gradients(moe.mixture, c, *arguments), value_and_gradients(moe.reference, c, *arguments))


@pytest.mark.parametrize("sizes", [(200, 0, 1, 90), (0, 0, 0, 291), (64, 64, 64, 64), (0, 0, 0, 0)])
def test_blocks_for_cpu_equal_ragged_dot_and_its_gradient_wherever_experts_begin(sizes):
    sizes_E, total = jnp.asarray(sizes), sum(sizes)
    own = (jnp.arange(300) < total)[:, None]
    x, dy = (own * jax.random.normal(jax.random.key(i), (300, size)) for i, size in enumerate((D, F)))
    kernel = jax.random.normal(jax.random.key(3), (E, D, F))
    product = jax.jit(moe._blocks_product, static_argnames="contract")
    assert_close(product(x, kernel, sizes_E, contract=1), moe._ragged_product(x, kernel, sizes_E), 1e-4)
    assert_close(product(dy, kernel, sizes_E, contract=2), moe._ragged_product(dy, kernel.mT, sizes_E), 1e-4)
    assert_close(jax.jit(moe._blocks_outer)(x, dy, sizes_E), moe._ragged_outer(x, dy, sizes_E), 1e-4)


@pytest.mark.parametrize("sizes", few([((200, 0, 1, 90),), ((0, 0, 0, 291),), ((0, 0, 0, 0),)]))
def test_the_kernel_for_tpu_gives_the_same_gradient(sizes):
    """By Pallas' interpreter; tests/test_plan.py compiles it for a TPU where the compiler is installed."""
    sizes_E, total = jnp.asarray(sizes, jnp.int32), sum(sizes)
    own = (jnp.arange(300) < total)[:, None]
    x, dy = (own * jax.random.normal(jax.random.key(i), (300, size)) for i, size in enumerate((D, F)))
    assert_close(moe._tiled_outer(x, dy, sizes_E, interpret=True), moe._ragged_outer(x, dy, sizes_E), 1e-4)


def test_bfloat16_differs_from_float32_by_rounding_alone():
    module, params = make(settings(moe__shared=1), deterministic=True)
    x_BLD, valid_BL = tokens()
    exact = call(module, {"params": params}, (), x_BLD, valid_BL)
    rounded = call(MoE(settings(moe__shared=1, dtype="bfloat16")), {"params": params}, (), x_BLD, valid_BL)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rounded, np.float32), exact, atol=0.03 * float(jnp.abs(exact).max()))


# ---------------------------------------------------------------------- the papers


def one_expert(c: FrozenConfigDict, params: Any, x_D: np.ndarray, e: int | None) -> np.ndarray:
    """Expert e's output for one token, or the shared experts'."""
    own = jax.tree.map(lambda p: np.asarray(p if e is None else p[e]), params["shared"] if e is None else params)
    up, gate, down = (own[name]["kernel"] for name in ("up", "gate", "down"))
    return (x_D @ up * np.asarray(ACTIVATIONS[c.activation](x_D @ gate))) @ down


def switch(logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    p = np.exp(logits) / np.exp(logits).sum()
    return {int(p.argmax()): p.max()}


def mixtral(logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    best = np.argsort(-logits)[:2]
    return dict(zip(best, np.exp(logits[best]) / np.exp(logits[best]).sum(), strict=True))


def deepseek_v2(logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    p = np.exp(logits) / np.exp(logits).sum()
    return {e: 4.0 * p[e] for e in np.argsort(-p)[:3]}


def deepseek_v3(logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    s = 1 / (1 + np.exp(-logits))
    best = np.argsort(-(s + bias))[:3]
    return {e: 2.5 * s[e] / s[best].sum() for e in best}


PAPERS: dict[Any, dict[str, Any]] = {
    switch: {"moe__active": 1, "moe__normalize": False},
    mixtral: {"moe__active": 2},  # GShard's weights are the same
    deepseek_v2: {"moe__active": 3, "moe__normalize": False, "moe__scale": 4.0, "moe__shared": 1},
    deepseek_v3: {
        "moe__active": 3,
        "moe__score": "sigmoid",
        "moe__scale": 2.5,
        "moe__shared": 2,
        "moe__bias_rate": 0.1,
    },
}


@pytest.mark.parametrize("paper", PAPERS, ids=lambda f: f.__name__)
def test_a_layer_is_token_by_token_what_the_paper_says(paper):
    c = settings(**PAPERS[paper], moe__width=6)
    module, params = make(c)
    if "router" in params:  # decided choices, so that rounding cannot change them
        params["router"]["kernel"] = 4 * params["router"]["kernel"]
    x_BLD, valid_BL = tokens()
    found = np.asarray(call(module, {"params": params}, (), x_BLD, valid_BL))
    for b, i in np.ndindex(2, L):
        x_D = np.asarray(x_BLD[b, i])
        chosen = paper(x_D @ np.asarray(params["router"]["kernel"]), np.asarray(params.get("expert_bias", 0)))
        expected = sum(weight * one_expert(c, params, x_D, e) for e, weight in chosen.items())
        if c.moe.shared:
            assert params["shared"]["up"]["kernel"].shape == (D, c.moe.shared * 6)
            expected = expected + one_expert(c, params, x_D, None)
        np.testing.assert_allclose(found[b, i], expected, atol=1e-4)


def test_the_router_of_a_top_1_layer_learns_from_the_output_alone():
    module, params = make(settings(moe__active=1, moe__normalize=False, moe__balance_loss=0.0, moe__z_loss=0.0))
    gradient = jax.grad(lambda p: jnp.sum(jnp.square(call(module, {"params": p}, (), *tokens()))))(params)
    assert float(jnp.abs(gradient["router"]["kernel"]).max()) > 1e-3


def test_jitter_is_noise_in_training_only():
    c = settings(moe__jitter=0.5)
    module, params = make(c)
    first, again, other = (call(module, {"params": params}, (), *tokens(), seed) for seed in (0, 0, 1))
    assert_close(first, again, 0)
    assert float(jnp.abs(first - other).max()) > 1e-3
    calm, plain = (call(MoE(s), {"params": params}, (), *tokens()) for s in (c, settings()))
    assert_close(calm, plain, 0)


# ---------------------------------------------------------------------- capacity


def served(experts_BLJ: np.ndarray, c: FrozenConfigDict) -> np.ndarray:
    """Which choices find a place, by going through them: row by row, first choices before second ones."""
    kept = np.zeros(experts_BLJ.shape, bool)
    for b, row_LJ in enumerate(experts_BLJ):
        real = int((row_LJ[:, 0] < E).sum())
        room = [-(-(c.moe.capacity_factor * c.moe.active * real) // E)] * E
        for j in range(row_LJ.shape[1]):
            for i, e in enumerate(row_LJ[:, j]):
                if e < E and room[e] > 0:
                    room[e] -= 1
                    kept[b, i, j] = True
    return kept


@pytest.mark.parametrize("factor", few([1.0, 0.5, 1.25, 4.0], 2))
@pytest.mark.parametrize("padded", [False, True])
def test_experts_with_a_capacity_serve_first_choices_first_and_drop_the_rest(factor, padded):
    c = settings(moe__dispatch="capacity", moe__capacity_factor=factor)
    module, params = make(c)
    x_BLD, valid_BL = tokens(padded=padded)
    logits_BLE = x_BLD @ params["router"]["kernel"]
    experts_BLJ, weights_BLJ = routing.choose(routing.scores(logits_BLE, c.moe), valid_BL, c.moe)
    kept_BLJ = served(np.asarray(experts_BLJ), c)
    weights = {name: params[name] for name in ("up", "gate", "down")}
    (dweights, *others), y_BLD = value_and_gradients(
        moe.reference, c, experts_BLJ, weights_BLJ * kept_BLJ, x_BLD, weights
    )
    found = value_and_gradients(moe.mixture, c, experts_BLJ, weights_BLJ, x_BLD, weights)
    assert_close(found, ((dweights * kept_BLJ, *others), y_BLD))
    _, sown = call(module, {"params": params}, ("routing",), x_BLD, valid_BL)
    share = 1 - kept_BLJ.sum() / (2 * np.asarray(valid_BL).sum())
    found = routing.metrics(routing.all_layers(sown["routing"]["usage"]))
    np.testing.assert_allclose(found["expert_dropped"], share, atol=1e-6)
    assert (share > 0.2) if factor < 1 else (share == 0 or factor < 4)


def test_what_an_expert_drops_depends_on_the_tokens_of_the_own_row_alone_and_not_on_padding():
    module, params = make(settings(moe__dispatch="capacity", moe__capacity_factor=0.7))
    x_BLD, valid_BL = tokens(padded=True)
    run = functools.partial(call, module, {"params": params}, ())
    whole = run(x_BLD, valid_BL)
    assert_close(run(x_BLD[1:2], valid_BL[1:2]), whole[1:2])
    assert bool(jnp.any(~valid_BL[1, 8:])) and bool(jnp.all(valid_BL[1, :8]))
    assert_close(run(x_BLD[1:2, :8], valid_BL[1:2, :8]), whole[1:2, :8])


def test_a_capacity_of_plenty_is_dropless():
    c, plenty = settings(), settings(moe__dispatch="capacity", moe__capacity_factor=float(E))
    _, params = make(c)
    assert_close(*(call(MoE(s), {"params": params}, (), *tokens(padded=True)) for s in (c, plenty)))


@pytest.mark.parametrize(
    ("factor", "experts", "expected"), [(1.1, 10, 11), (1.25, 8, 157), (2.0, 1, 100), (0.01, 64, 1)]
)
def test_a_capacity_is_the_even_share_times_the_factor_rounded_up(factor, experts, expected):
    c = settings(moe__capacity_factor=factor, moe__experts=experts, moe__active=1)
    length = {10: 100, 8: 1000}.get(experts, 100)
    assert routing.capacities(length, c.moe)[length] == expected


# ---------------------------------------------------------------------- padding


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_padding_is_not_routed_and_changes_neither_outputs_nor_losses_nor_gradients(dispatch):
    c = settings(moe__dispatch=dispatch, moe__capacity_factor=0.7, moe__bias_rate=0.1, bias=("mlp",))
    module, params = make(c)
    x_BLD, valid_BL = tokens(padded=True)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(params: Any, x_BLD: jax.Array) -> Any:
        y_BLD, sown = module.apply({"params": params}, x_BLD, valid_BL, mutable=["losses", "routing"])
        real = jnp.where(valid_BL[..., None], y_BLD, 0.0)
        return jnp.sum(jnp.square(real)) + sum(jax.tree.leaves(sown["losses"])), (y_BLD, sown)

    (gradients, dx_BLD), (y_BLD, sown) = run(params, x_BLD)
    other_BLD = jnp.where(valid_BL[..., None], x_BLD, 100.0)
    (others, _), (other_y_BLD, other_sown) = run(params, other_BLD)
    assert_close((gradients, y_BLD, sown), (others, other_y_BLD, other_sown), 1e-6)
    assert not bool(jnp.any(y_BLD[~valid_BL])) and not bool(jnp.any(dx_BLD[~valid_BL]))
    assert jnp.sum(sown["routing"]["usage"][0].loads) == 2 * jnp.sum(valid_BL)


# ---------------------------------------------------------------------- losses and balance


def test_the_losses_equal_their_formulas_on_a_worked_example():
    # Four tokens and one of padding, two experts, one choice: three tokens go to expert 0.
    probs = jnp.array([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3], [0.0, 1.0]]])
    valid_BL = jnp.array([[True, True, True, True, False]])
    c = settings(moe__experts=2, moe__active=1, moe__normalize=False)
    experts_BLJ, _ = routing.choose(probs, valid_BL, c.moe)
    used = routing.usage(probs, experts_BLJ, valid_BL, c.moe)
    np.testing.assert_array_equal(used.loads, [3, 1])
    by_hand = 2 * (3 / 4 * (0.9 + 0.6 + 0.2 + 0.7) / 4 + 1 / 4 * (0.1 + 0.4 + 0.8 + 0.3) / 4)
    np.testing.assert_allclose(routing.balance_loss(used.loads, used.probs), by_hand, rtol=1e-6)
    logits = jnp.log(jnp.array([[[1.0, 1.0], [2.0, 3.0], [0.5, 0.5], [1.0, 3.0], [9.0, 9.0]]]))
    by_hand = (np.log(2) ** 2 + np.log(5) ** 2 + 0 + np.log(4) ** 2) / 4
    np.testing.assert_allclose(routing.z_loss(logits, valid_BL), by_hand, rtol=1e-6)
    # Two choices of three experts, all scores alike: 3 experts x (1/3 of the choices) x (mean score 1/3) x 3 = 1.
    np.testing.assert_allclose(routing.balance_loss(jnp.full(3, 2.0), jnp.full(3, 1.0)), 1.0, rtol=1e-6)


def random_layers(layers: int = 3, active: int = 2) -> tuple[Any, list[Any]]:
    """Settings, and (scores, experts, which are no padding) of sparse layers whose routers differ."""
    c = settings(moe__active=active, moe__balance_loss=0.02)
    noise = 2 * jax.random.normal(jax.random.key(0), (layers, 2, 16, E))
    valid_BL = jnp.arange(16)[None] < jnp.array([[16], [5]])
    scores = [jax.nn.softmax(x) for x in noise]
    return c, [(s, routing.choose(s, valid_BL, c.moe)[0], valid_BL) for s in scores]


def test_over_all_layers_the_balance_loss_is_what_transformers_defines():
    c, layers = random_layers()

    def theirs(layers: list[Any]) -> float:
        """load_balancing_loss_func: the tokens of all layers one after another, those of padding masked."""
        scores_XE, experts_XJ, valid_X = (
            np.concatenate([np.asarray(x[i]).reshape(-1, *x[i].shape[2:]) for x in layers]) for i in range(3)
        )
        chosen_XJE = np.eye(E)[np.where(valid_X[:, None], experts_XJ, 0)] * valid_X[:, None, None]
        tokens_JE, probs_E = chosen_XJE.sum(0) / valid_X.sum(), (scores_XE * valid_X[:, None]).sum(0) / valid_X.sum()
        return float((tokens_JE * probs_E[None]).sum() * E)

    used = routing.all_layers([routing.usage(*layer, c.moe) for layer in layers])
    np.testing.assert_allclose(routing.pooled_balance_loss(used, c.moe), 0.02 * theirs(layers), rtol=1e-5)
    apart = [0.02 * theirs([layer]) / 2 for layer in layers]  # summed over layers, and 1 at balance: what `batch` means
    singles = [routing.usage(*layer, c.moe) for layer in layers]
    np.testing.assert_allclose([0.02 * routing.balance_loss(u.loads, u.probs) for u in singles], apart, rtol=1e-5)
    even = routing.Usage(jnp.full((3, E), 8.0), jnp.full((3, E), 4.0))
    np.testing.assert_allclose(routing.pooled_balance_loss(even, c.moe), 0.02 * 2, rtol=1e-6)  # k, whatever the depth


def test_over_rows_the_balance_loss_is_the_mean_of_each_rows_own():
    c, ((scores_BLE, experts_BLJ, valid_BL), *_) = random_layers()
    empty = [jnp.concatenate([x, x[:1]]) for x in (scores_BLE, jnp.full_like(experts_BLJ, E), valid_BL)]
    empty[1], empty[2] = empty[1].at[:2].set(experts_BLJ), empty[2].at[2].set(False)
    rows = [routing.usage(*(x[b : b + 1] for x in empty), c.moe) for b in range(2)]
    expected = np.mean([routing.balance_loss(u.loads, u.probs) for u in rows])
    np.testing.assert_allclose(routing.row_balance_loss(*empty, c.moe), expected, rtol=1e-6)


def test_the_busiest_expert_and_what_is_dropped_are_shares_of_a_steps_sums():
    loads_NE = jnp.array([[4.0, 4.0, 4.0, 4.0], [10.0, 6.0, 0.0, 0.0]])
    found = routing.metrics(routing.Usage(loads_NE, loads_NE, jnp.array([0.0, 8.0])))
    np.testing.assert_allclose(found["expert_load_max"], (1 + 2.5) / 2)
    np.testing.assert_allclose(found["expert_dropped"], 8 / 32)
    assert set(routing.metrics(routing.Usage(loads_NE, loads_NE))) == {"expert_load_max"}


def test_the_losses_are_sown_with_their_weights_in_training_only():
    module, params = make(settings(moe__balance_loss=0.5, moe__z_loss=0.25))
    c_free = settings(moe__balance_loss=0.0, moe__z_loss=0.0)
    x_BLD, valid_BL = tokens()
    logits_BLE = x_BLD @ params["router"]["kernel"]
    scores_BLE = jax.nn.softmax(logits_BLE)
    used = routing.usage(scores_BLE, routing.choose(scores_BLE, valid_BL, c_free.moe)[0], valid_BL, c_free.moe)
    _, sown = call(module, {"params": params}, ("losses",), x_BLD, valid_BL)
    expected = {
        "balance": 0.5 * routing.balance_loss(used.loads, used.probs),
        "z": 0.25 * routing.z_loss(logits_BLE, valid_BL),
    }
    assert_close(sown["losses"], {name: (loss,) for name, loss in expected.items()})
    for quiet in (MoE(c_free, deterministic=False), MoE(settings())):
        _, sown = call(quiet, {"params": params}, ("losses",), x_BLD, valid_BL)
        assert not jax.tree.leaves(sown)


def test_the_balance_loss_is_least_at_balance_and_its_gradient_leads_there():
    valid_BL = jnp.ones((1, 64), bool)
    c = settings(moe__active=2)
    noise = jax.random.normal(jax.random.key(0), (1, 64, E))

    @jax.jit
    def loss(skew_E: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores_BLE = jax.nn.softmax(noise + skew_E[None, None])
        used = routing.usage(scores_BLE, routing.choose(scores_BLE, valid_BL, c.moe)[0], valid_BL, c.moe)
        return routing.balance_loss(used.loads, used.probs), used.loads

    skew_E, gradient = jnp.array([2.0, 0.0, 0.0, -1.0]), jax.jit(jax.grad(loss, has_aux=True))
    before, loads_E = loss(skew_E)
    for _ in range(200):
        skew_E -= 0.5 * gradient(skew_E)[0]
    after, balanced_E = loss(skew_E)
    assert before > 1.2 and float(jnp.max(loads_E)) > 50
    assert 0.99 < after < 1.01 and float(jnp.max(jnp.abs(balanced_E - 32))) <= 4


def test_a_skewed_router_is_balanced_by_the_sign_of_its_bias_gradient_whatever_the_loss():
    rate = 0.01
    c = settings(moe__bias_rate=rate, moe__score="sigmoid", moe__balance_loss=0.0, moe__z_loss=0.0)
    module, params = make(c)
    x_BLD = jnp.concatenate([tokens(16, 16)[0], jnp.ones((16, 16, 1))], axis=-1)[..., 1:]  # the last input is always 1
    valid_BL = jnp.ones((16, 16), bool)
    params["router"]["kernel"] = (0.5 * params["router"]["kernel"]).at[-1].set(jnp.array([1.5, 0.5, 0.0, -1.0]))
    params["expert_bias"] = jnp.zeros(E)

    @jax.jit
    def gradient(bias_E: jax.Array, factor: float) -> tuple[jax.Array, jax.Array]:
        def loss(bias_E: jax.Array) -> tuple[jax.Array, jax.Array]:
            y_BLD, sown = module.apply(
                {"params": params | {"expert_bias": bias_E}}, x_BLD, valid_BL, mutable=["routing"]
            )
            return factor * jnp.sum(y_BLD), sown["routing"]["usage"][0].loads / 512

        return jax.grad(loss, has_aux=True)(bias_E)

    bias_E = params["expert_bias"]
    first, load_E = gradient(bias_E, 1.0)
    np.testing.assert_allclose(first, 512 * (load_E - 0.25), atol=1e-3)  # tokens above the mean, 2 choices of 256 each
    assert_close(gradient(bias_E, -7.0)[0], first, 0)
    assert float(load_E.max()) > 0.45
    for _ in range(150):
        bias_E -= rate * jnp.sign(gradient(bias_E, 1.0)[0])
    _, load_E = gradient(bias_E, 1.0)
    assert float(jnp.abs(load_E - 0.25).max()) < 0.03


# ---------------------------------------------------------------------- scans, remat, meshes, the whole model


class Residual(nn.Module):
    c: FrozenConfigDict

    @nn.compact
    def __call__(self, x_BLD: jax.Array, valid_BL: jax.Array) -> tuple[jax.Array, None]:
        return x_BLD + MoE(self.c, deterministic=False, name="moe")(x_BLD, valid_BL), None


@pytest.mark.slow
def test_a_scanned_and_rematerialised_stack_equals_a_loop_over_its_layers():
    c = settings(moe__bias_rate=0.1, moe__score="sigmoid", bias=("mlp",))
    x_BLD, valid_BL = tokens(padded=True)
    stack = nn.scan(
        nn.remat(Residual, prevent_cse=False),
        variable_axes={"params": 0, "losses": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=2,
    )(c)
    params = jax.jit(stack.init)(jax.random.key(0), x_BLD, valid_BL)["params"]

    def scanned(params: Any) -> jax.Array:
        (y_BLD, _), sown = stack.apply({"params": params}, x_BLD, valid_BL, mutable=["losses"])
        return jnp.sum(jnp.sin(y_BLD)) + sum(jnp.sum(loss) for loss in jax.tree.leaves(sown))

    def looped(params: Any) -> jax.Array:
        y_BLD, total = x_BLD, jnp.zeros(())
        for layer in range(2):
            own = jax.tree.map(operator.itemgetter(layer), params)
            (y_BLD, _), sown = Residual(c).apply({"params": own}, y_BLD, valid_BL, mutable=["losses"])
            total += sum(jax.tree.leaves(sown))
        return jnp.sum(jnp.sin(y_BLD)) + total

    assert_close(*(jax.jit(jax.value_and_grad(f))(params) for f in (scanned, looped)))


@functools.cache
def on_mesh(line: str, c: FrozenConfigDict) -> tuple[Any, str]:
    """Output, what is sown and gradients on a mesh, and the program."""
    module, params = make(c)
    x_BLD, valid_BL = tokens(8, padded=True)

    def loss(params: Any, x_BLD: jax.Array) -> Any:
        y_BLD, sown = module.apply({"params": params}, x_BLD, valid_BL, mutable=["losses", "routing"])
        total = jnp.sum(jnp.sin(y_BLD.astype(jnp.float32))) + sum(jax.tree.leaves(sown["losses"]))
        return total, (y_BLD, sown)

    mesh = mesh_of(line)
    stacked = {"layers": {"moe": jax.tree.map(lambda p: p[None], params)}}
    places = placement.parameter_shardings(stacked, mesh)["layers"]["moe"]
    places = jax.tree.map(lambda s: jax.NamedSharding(mesh, jax.P(*s.spec[1:])), places)
    arguments = jax.device_put((params, x_BLD), (places, jax.NamedSharding(mesh, placement.BATCH)))
    with placement.active(mesh, tiny_config(model__heads=2)):
        run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(*arguments).compile()
    return jax.device_get(run(*arguments)), run.as_text()


@pytest.mark.parametrize(
    ("dispatch", "line"),
    few(
        [
            *(("dropless", "data=8"), ("capacity", "data=2 fsdp=2 tensor=2")),
            *(("dropless", "data=2 fsdp=2 tensor=2"), ("capacity", "data=8")),
        ],
        keep=2,
    ),
)
def test_a_layer_is_the_same_on_every_mesh_and_no_device_gathers_the_tokens(dispatch, line):
    c = settings(moe__dispatch=dispatch, moe__shared=1, moe__bias_rate=0.1, bias=("mlp",), moe__capacity_factor=0.7)
    spread, program = on_mesh(line, c)
    assert_close(spread, on_mesh("data=1", c)[0])
    assert "all-to-all" not in program
    if line == "data=8":
        assert "all-gather" not in program


def test_bfloat16_runs_on_every_axis_of_a_mesh():
    c = settings(dtype="bfloat16", bias=("mlp",))
    module, params = make(c)
    (gradients, (y_BLD, _)), _ = on_mesh("data=2 fsdp=2 tensor=2", c)
    alone_BLD = call(module, {"params": params}, (), *tokens(8, padded=True))
    np.testing.assert_allclose(np.asarray(y_BLD, np.float32), np.asarray(alone_BLD, np.float32), atol=0.05, rtol=0.05)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(gradients))


def test_a_model_with_sparse_layers_places_every_parameter_sows_by_layer_and_moves_its_biases():
    c = settings(moe__bias_rate=0.1, moe__shared=1, layers=2, vocab_size=64, bias=("mlp",))
    module = build(c)
    params = first_params(module)
    assert set(params["layers"]["moe"]) == {"router", "up", "gate", "down", "shared", "expert_bias"}
    places = placement.parameter_shardings(params, mesh_of("data=2 fsdp=2 tensor=2"))
    assert places["layers"]["moe"]["down"]["kernel"].spec == jax.P(None, "expert", "tensor", "fsdp")
    ids_BL = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(params: Any) -> Any:
        logits_BLV, sown = module.apply({"params": params}, ids_BL, deterministic=False, mutable=["losses", "routing"])
        return jnp.mean(jax.nn.logsumexp(logits_BLV, -1)) + sum(map(jnp.sum, jax.tree.leaves(sown["losses"]))), sown

    gradients, sown = run(params)
    assert sown["losses"]["layers"]["moe"]["balance"][0].shape == (2,)
    loads_NE = sown["routing"]["layers"]["moe"]["usage"][0].loads
    assert loads_NE.shape == (2, E)
    np.testing.assert_allclose(gradients["layers"]["moe"]["expert_bias"], loads_NE - 8, atol=1e-4)


@pytest.mark.parametrize(("groups", "active", "best"), [(4, 2, 1), (4, 2, 2), (2, 1, 2), (4, 4, 1)])
def test_a_token_chooses_among_the_experts_of_its_best_groups(groups, active, best):
    c = tiny_config(
        model__moe__experts=8, model__moe__active=2, model__moe__groups=groups, model__moe__active_groups=active,
        model__moe__group_score=best,
    ).model.moe  # fmt: skip
    scores_BLE = np.random.default_rng(0).uniform(size=(2, 9, 8)).astype(np.float32)
    found, weights = routing.choose(jnp.asarray(scores_BLE), jnp.ones((2, 9), bool), c)
    for row, column in np.ndindex(2, 9):
        by_group = np.sort(scores_BLE[row, column].reshape(groups, -1), axis=1)[:, ::-1]
        kept = np.argsort(by_group[:, :best].sum(axis=1))[::-1][:active]
        allowed = [e for e in range(8) if e // (8 // groups) in kept]
        chosen = sorted(allowed, key=lambda e: -scores_BLE[row, column, e])[:2]
        assert found[row, column].tolist() == chosen
        expected = scores_BLE[row, column, chosen] / scores_BLE[row, column, chosen].sum()
        np.testing.assert_allclose(weights[row, column], expected, rtol=1e-5)


def test_the_clamped_gate_is_bounded_above_and_its_partner_on_both_sides():
    values = np.array([-40.0, -7.5, -1.0, 0.0, 0.5, 6.9, 7.1, 40.0])
    up, gate = map(np.ravel, np.meshgrid(values, values))
    small = np.minimum(gate, 7)
    expected = (np.clip(up, -7, 7) + 1) * small / (1 + np.exp(-1.702 * small))
    c = tiny_config(model__activation="swiglu_clamped").model
    found = activated(c, jnp.asarray(up, jnp.float32), jnp.asarray(gate, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
