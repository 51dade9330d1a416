"""The decoder: every fast path equals its readable reference, and no token sees what it must not."""

import functools
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import few, first_params, losses_of, mesh_of, tiny_config
from jax import extend
from networks import causal_mask, close, logits_of, make, packed, settings

from llmjax import config
from llmjax.model import attention, kernels, layers, transformer
from llmjax.model.cache import init_cache
from llmjax.model.count import flops_per_token
from llmjax.model.init import std
from llmjax.parallel import placement
from llmjax.parallel.placement import path_name

GOLDEN = Path(__file__).parent / "golden" / "parameters.json"
ANYWHERE = sorted(set(attention.KERNELS) - {"cudnn"})
FAST = sorted(set(ANYWHERE) - {"reference"})


# Attention kernels


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("groups", few([2, 1, 4]))
@pytest.mark.parametrize("name", FAST)
def test_every_attention_kernel_and_its_gradient_equal_the_reference_on_packed_rows(
    name, groups, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(kernels, "BLOCK", 8)  # blocks that do not divide the length, and documents that cross them
    _, segments_BL = packed([[3, 13, 5], [21], [1, 1, 19]])
    mask_BLM = causal_mask(segments_BL)
    rng = np.random.default_rng(groups)
    q_BLHK, dy_BLHK = rng.normal(size=(2, 3, 21, 4, 6))
    k_BMGK, v_BMGK = rng.normal(size=(2, 3, 21, groups, 6))

    @functools.partial(jax.jit, static_argnums=0)
    def run(kernel, q_BLHK, k_BMGK, v_BMGK, dy_BLHK):
        y_BLHK, pull = jax.vjp(lambda *x: kernel(*x, mask_BLM, causal=True), q_BLHK, k_BMGK, v_BMGK)
        return y_BLHK, *pull(dy_BLHK)

    inputs = [jnp.asarray(x, dtype) for x in (q_BLHK, k_BMGK, v_BMGK, dy_BLHK)]
    # The reference in float32 on the same (rounded) inputs is the truth for both types.
    expected = run(attention.reference, *(x.astype(jnp.float32) for x in inputs))
    results = run(attention.KERNELS[name], *inputs)
    assert all(x.dtype == dtype for x in results)
    close(results, expected, tolerance)


@pytest.mark.parametrize("name", FAST)
def test_every_attention_kernel_equals_the_reference_on_a_cache_longer_than_the_queries(name, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 2)
    rng = np.random.default_rng(0)
    q_BLHK, k_BMGK, v_BMGK = (
        jnp.asarray(rng.normal(size=(3, n, h, 6)), jnp.float32) for n, h in [(5, 4), (12, 2), (12, 2)]
    )
    mask_BLM = jnp.arange(12)[None, None, :] <= (jnp.array([[0], [3], [7]]) + jnp.arange(5)[None, :])[:, :, None]
    results = attention.KERNELS[name](q_BLHK, k_BMGK, v_BMGK, mask_BLM)
    close(results, attention.reference(q_BLHK, k_BMGK, v_BMGK, mask_BLM), 2e-6)


@pytest.mark.parametrize("mesh", ["data=1", "data=2 tensor=2", "context=2"])
def test_long_rows_one_by_one_equal_the_reference(mesh, monkeypatch):
    monkeypatch.setattr(kernels, "SHORT", 16)
    monkeypatch.setattr(kernels, "TILE", 8)
    _, segments_BL = packed([[3, 13, 6], [22]])
    mask_BLM = causal_mask(segments_BL)
    rng = np.random.default_rng(0)
    q_BLHK, k_BMGK, v_BMGK = (jnp.asarray(rng.normal(size=(2, 22, h, 6)), jnp.float32) for h in (4, 2, 2))
    expected = attention.reference(q_BLHK, k_BMGK, v_BMGK, mask_BLM)
    with placement.active(mesh_of(mesh), tiny_config()):
        run = jax.jit(attention.blocked, static_argnames="causal")
        close([run(q_BLHK, k_BMGK, v_BMGK, mask_BLM, causal=causal) for causal in (True, False)], [expected] * 2, 2e-6)


@pytest.mark.slow
def test_blocked_attention_gives_the_same_losses_on_a_mesh():
    losses = {}
    for name, mesh in (("reference", "data=1"), ("blocked", "data=2 tensor=2")):
        c = tiny_config(model__kv_heads=2)
        c.model.attention = name
        losses[name], _ = losses_of(c, mesh_of(mesh), steps=4)
    np.testing.assert_allclose(losses["blocked"], losses["reference"], rtol=0, atol=1e-5)


def test_auto_is_resolved_once_by_platform_and_a_named_kernel_is_kept():
    c = settings(attention="auto")
    assert attention.resolve(c, platform="cpu") == "blocked"
    assert attention.resolve(c, platform="tpu") == "splash"
    assert attention.resolve(c, platform="gpu") == "dot_product"
    assert all(attention.resolve(settings(attention=name), platform="cpu") == name for name in ANYWHERE)
    module, params = make(c)  # and a decoder that nobody resolved works too
    named = transformer.build(settings(attention=attention.resolve(c, platform=jax.default_backend())))
    tokens_BL = jnp.arange(12)[None]
    np.testing.assert_array_equal(logits_of(module, params, tokens_BL), logits_of(named, params, tokens_BL))


def test_swiglu_and_its_derivative_are_those_of_its_formula_and_save_two_arrays():
    up, gate, dy = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)

    def both(of):
        made, backward = jax.vjp(of, up, gate)
        return made, backward(dy), backward

    (made, grads, backward), (plain, wanted, _) = both(kernels.swiglu), both(lambda up, gate: up * jax.nn.silu(gate))
    np.testing.assert_array_equal(made, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), grads, wanted)
    assert [x.size for x in jax.tree.leaves(backward)] == [32, 32]


def test_gelu_and_its_gradient_equal_the_formula_with_the_normal_distribution():
    x = jnp.linspace(-6, 6, 101)
    results = jax.jit(jax.vmap(jax.value_and_grad(kernels.gelu)))(x)
    expected = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(nn.gelu, approximate=False))))(x)
    close(results, expected, 1e-6)


# What a token may see


@pytest.mark.parametrize("name", ANYWHERE)
def test_logits_have_gradient_exactly_from_earlier_tokens_of_their_own_document(name, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 4)
    module, params = make(settings(attention=name, tie_embeddings=False))
    tokens_BL = jnp.arange(12)[None]  # token t is t: row s of the embedding is the input at s
    direction_V = jax.random.normal(jax.random.key(5), (32,))

    @jax.jit
    @jax.jacrev
    def influence(embedding_VD, positions_BL, segments_BL):
        changed = {**params, "embedding": embedding_VD}
        logits_BLV = module.apply({"params": changed}, tokens_BL, positions_BL=positions_BL, segments_BL=segments_BL)
        return logits_BLV[0] @ direction_V

    for documents in ([12], [5, 3, 4]):
        positions_BL, segments_BL = packed([documents])
        gradients = influence(params["embedding"], positions_BL, segments_BL)
        seen = np.abs(np.asarray(gradients)).max(-1)[:, :12] > 0  # logits at t, input at s
        np.testing.assert_array_equal(seen, np.asarray(causal_mask(segments_BL)[0]))


@pytest.mark.parametrize(
    ("name", "position"),
    few(
        [
            *((name, "rotary") for name in ANYWHERE),
            ("reference", "learned"),
            *((name, "learned") for name in FAST),
        ],
        len(ANYWHERE) + 1,
    ),
)
def test_packed_documents_have_the_logits_that_each_has_alone(name, position, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 4)
    module, params = make(settings(attention=name, position=position))
    lengths = [5, 2, 5]
    tokens_BL = jax.random.randint(jax.random.key(3), (1, 12), 0, 32)

    @jax.jit
    def run(tokens_BL, positions_BL=None, segments_BL=None):
        return module.apply({"params": params}, tokens_BL, positions_BL=positions_BL, segments_BL=segments_BL)

    together = run(tokens_BL, *packed([lengths]))
    alone = [run(x) for x in jnp.split(tokens_BL, np.cumsum(lengths)[:-1].tolist(), axis=1)]
    close(together, jnp.concatenate(alone, 1), 5e-6)
    assert float(jnp.abs(run(tokens_BL, *packed([[12]])) - together).max()) > 1e-2, "packing changes nothing here"


# Decoding with a cache

# Of the covering array, which is greedy, so many hold every value and two thirds of the pairs. More of the pairs are in
# those that run as slow, and the exhaustive ones hold the rest.
ENOUGH, SLOW = 7, 10

OPTIONS: dict[str, tuple[Any, ...]] = {
    "activation": ("gelu", "relu2", "swiglu"),
    "attention": ("auto", "reference"),
    "attention_scale": (0.0, 0.3),
    "attention_sinks": (False, True),
    "attention_soft_cap": (0.0, 2.0),
    "block": ("serial", "parallel"),
    "kv_heads": (0, 2, 1),
    "norm": ("rms", "layer", "batch", "none"),
    "norm_zero_centered": (False, True),
    "pattern": (
        ("global",),
        ("local", "global"),
        ("rglru", "rglru", "local"),
        ("mamba2",),
        ("lstm", "global"),
        ("rnn",),
    ),
    "position": ("rotary", "learned", "sinusoidal", "alibi", "t5", "xlnet", "none"),
    "rotary_fraction": (1.0, 0.5),
    "qk_norm": (False, True),
    "tie_embeddings": (False, True),
    "bias": ((), ("qkv", "out", "mlp", "norm", "head")),
    "logit_soft_cap": (0.0, 2.0),
    "head_size": (0, 6),
}


def covering(options: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few settings in which any two values of any two options occur together: a greedy covering array."""
    rng = np.random.default_rng(0)
    left = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(options, 2)
        for x, y in itertools.product(options[a], options[b])
    }
    chosen = []
    while left:
        candidates = [{key: values[rng.integers(len(values))] for key, values in options.items()} for _ in range(200)]
        pairs = [set(itertools.combinations(candidate.items(), 2)) for candidate in candidates]
        best = max(range(200), key=lambda i: len(pairs[i] & left))
        chosen.append(candidates[best])
        left -= pairs[best]
    return chosen


@pytest.mark.parametrize(
    "changes", few(covering(OPTIONS), ENOUGH, SLOW), ids=lambda one: "-".join(map(str, one.values()))
)
def test_cached_decoding_equals_the_plain_forward_pass(changes):
    module, params = make(settings(window=3, layers=4, **changes))
    tokens_BL = jax.random.randint(jax.random.key(2), (3, 10), 0, 32)
    expected = logits_of(module, params, tokens_BL)

    @jax.jit
    def cached(tokens_BL, positions_BL, segments_BL, cache):
        arguments = {"positions_BL": positions_BL, "segments_BL": segments_BL, "cache": cache}
        return module.apply({"params": params}, tokens_BL, **arguments)

    prompts_B, row_B = jnp.array([6, 1, 4]), jnp.arange(3)
    cache = init_cache(module.c, batch=3, length=12)
    is_prompt = jnp.arange(6)[None, :] < prompts_B[:, None]
    prefill_BL = jnp.where(is_prompt, tokens_BL[:, :6], 31)  # right-padded with a token that must not matter
    positions_BL = jnp.broadcast_to(jnp.arange(6)[None], (3, 6))
    logits_BLV, cache = cached(prefill_BL, positions_BL, is_prompt.astype(jnp.int32), cache)
    at = prompts_B - 1
    found = [logits_BLV[row_B, at]]
    for at in range(6, 10):  # steps; the shorter rows are behind, each at its own length
        positions_B = prompts_B + at - 6
        one_BL = tokens_BL[row_B, positions_B][:, None]
        logits_BLV, cache = cached(one_BL, positions_B[:, None], jnp.ones_like(one_BL), cache)
        found.append(logits_BLV[:, 0])
    for step, logits_BV in enumerate(found):
        close(logits_BV, expected[row_B, prompts_B - 1 + step], 1e-5)


# The same numbers by other ways of computing


@functools.cache
def plain_loss_and_gradient() -> tuple[jax.Array, Any]:
    return loss_and_gradient(settings())


def loss_and_gradient(c: config.ConfigDict) -> tuple[jax.Array, Any]:
    _, params = make(settings())
    positions_BL, segments_BL = packed([[12], [5, 7]])
    tokens_BL = jax.random.randint(jax.random.key(4), (2, 12), 0, 32)
    module = transformer.build(c)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits_BLV = module.apply({"params": params}, tokens_BL, positions_BL=positions_BL, segments_BL=segments_BL)
        return jnp.mean(jnp.square(nn.log_softmax(logits_BLV)))

    return loss(params)


@pytest.mark.parametrize(
    "changes",
    few(
        [
            {"remat": "save_dot_except_mlpwi", "attention": "blocked", "scan_unroll": 2, "barriers": True},
            {"remat": "full"},
            {"remat": "selective"},
            {"remat": "minimal_with_context"},
            {"remat": "save_out_proj"},
            {"remat": "full", "attention": "blocked"},
            {"scan_unroll": 2},
        ],
    ),
    ids=str,
)
def test_rematerialisation_and_unrolling_change_neither_loss_nor_gradients(changes):
    close(loss_and_gradient(settings(**changes)), plain_loss_and_gradient(), 1e-5)


@pytest.mark.parametrize("barriers", [False, True])
def test_barriers_keep_every_product_apart_in_both_passes(barriers):
    c = settings(barriers=barriers, activation="swiglu")
    mlp, x_BLD = layers.MLP(c), jnp.ones((1, 2, c.width))
    params = mlp.init(jax.random.key(0), x_BLD)
    gradient = jax.grad(lambda params, x_BLD: mlp.apply(params, x_BLD).sum(), argnums=(0, 1))
    found = str(jax.make_jaxpr(gradient)(params, x_BLD)).count(" optimization_barrier ")
    assert found == (2 * 2 * 3 if barriers else 0)  # in and out, forward and backward, of up, gate and down


def test_unrolling_by_a_number_that_does_not_divide_the_layers_works():
    _, params = make(settings(layers=3))
    tokens_BL = jnp.arange(12)[None]
    plain, *unrolled = (
        logits_of(transformer.build(settings(layers=3, scan_unroll=n)), params, tokens_BL) for n in (1, 2, 5)
    )
    for found in unrolled:
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", few(["blocked", "reference"]))
def test_bfloat16_is_close_to_float32_and_keeps_float32_parameters_and_logits(name):
    exact = plain_loss_and_gradient()
    loss, gradient = loss_and_gradient(settings(dtype="bfloat16", attention=name))
    np.testing.assert_allclose(loss, exact[0], rtol=2e-2)
    close(gradient, exact[1], 0.1)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradient))
    module, params = make(settings(dtype="bfloat16", attention=name))
    assert logits_of(module, params, jnp.arange(8)[None]).dtype == jnp.float32


def test_dropout_depends_on_the_key_alone_and_is_off_by_default():
    module, params = make(settings(dropout=0.5))
    plain, _ = make(settings())
    tokens_BL = jnp.arange(12)[None]
    np.testing.assert_array_equal(logits_of(module, params, tokens_BL), logits_of(plain, params, tokens_BL))
    drop = jax.jit(lambda key: module.apply({"params": params}, tokens_BL, deterministic=False, rngs={"dropout": key}))
    one, same, other = (drop(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 1e-2


# Counting


def product_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products in a jaxpr: 2 for each multiply-and-add, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(product_flops(inner) for inner in extend.core.jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {
            "activation": "gelu",
            "tie_embeddings": True,
            "bias": ("qkv", "out", "mlp", "norm"),
            "norm": "layer",
            "position": "learned",
        },
        {"activation": "swiglu", "tie_embeddings": False, "kv_heads": 2, "head_size": 6, "qk_norm": True},
    ],
    ids=["gpt", "modern"],
)
def test_flops_per_token_are_those_of_the_products_that_a_training_step_computes(changes):
    c = settings(**changes)
    module, params = make(c)
    tokens_BL = jnp.zeros((3, 10), jnp.int32)
    step = jax.value_and_grad(lambda params: jnp.sum(module.apply({"params": params}, tokens_BL)))
    computed = product_flops(jax.make_jaxpr(step)(params).jaxpr)
    assert computed == flops_per_token(c, sequence_length=10) * tokens_BL.size
    kernel_sizes = [
        x.size for path, x in jax.tree_util.tree_leaves_with_path(params) if path_name(path).endswith("kernel")
    ]
    head = c.vocab_size * c.width if c.tie_embeddings else 0
    assert flops_per_token(c, sequence_length=0) == 6 * (sum(kernel_sizes) + head)


@pytest.mark.parametrize("scheme", few(["gpt2", "lecun"]))
def test_parameters_start_with_the_standard_deviation_of_their_kind(scheme):
    c = settings(
        init=scheme,
        init_std=0.02,
        width=128,
        mlp_width=256,
        layers=8,
        tie_embeddings=False,
        bias=("qkv", "out", "mlp", "norm"),
    )
    c.update({"position": "learned", "norm": "layer", "max_length": 128, "vocab_size": 256})
    params = first_params(transformer.build(c))
    outward = ("layers/attention/out/kernel", "layers/mlp/down/kernel")
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if name.endswith(("scale", "bias")):
            np.testing.assert_array_equal(x, jnp.full_like(x, name.endswith("scale")), err_msg=name)
            continue
        if scheme == "gpt2":
            expected = 0.02 / math.sqrt(2 * 8) if name in outward else 0.02
        else:
            fan_in = 256 if name == "layers/mlp/down/kernel" else 128
            expected = 1.0 if name.endswith("embedding") else fan_in**-0.5
        np.testing.assert_allclose(np.std(x), expected, rtol=0.02, err_msg=name)
        np.testing.assert_allclose(np.mean(x), 0, atol=4 * expected / math.sqrt(x.size), err_msg=name)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0, "all layers start alike"


def test_an_unknown_kind_of_parameter_starts_like_an_inward_one_only_where_that_is_meant():
    c = settings(init="gpt2", init_std=0.02, layers=8)
    assert std(c, "outward", (16, 16)) == pytest.approx(std(c, "inward", (16, 16)) / 4)


def test_a_padded_vocabulary_that_cannot_hold_the_tokenizer_is_an_error_that_says_so():
    assert transformer.padded_vocab(settings(vocab_size=0, vocab_multiple=64), 65) == 128
    assert transformer.padded_vocab(settings(vocab_size=65), 65) == 65
    with pytest.raises(ValueError, match="set it to 0 to follow the tokenizer"):
        transformer.padded_vocab(settings(vocab_size=64), 65)


def test_gated_mlps_have_about_as_many_parameters_as_plain_ones():
    plain, gated = (layers.mlp_width(settings(width=768, mlp_width=0, activation=a)) for a in ("gelu", "swiglu"))
    assert (plain, gated) == (3072, 2048)


def test_parameters_of_the_default_model_are_the_golden_ones():
    c = config.base().model
    c.vocab_size = transformer.padded_vocab(c, 4096)
    params = first_params(transformer.build(c))
    table = {
        path_name(path): [list(x.shape), str(x.dtype), round(float(jnp.std(x)), 3)]
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table.items()))
        GOLDEN.write_text(f"{{\n{rows}\n}}\n")
    assert table == json.loads(GOLDEN.read_text()), (
        "the model's parameters changed: older checkpoints no longer fit, or start differently. "
        "If it was meant to, run UPDATE_GOLDEN=1 pytest tests/test_model.py and say why in the commit"
    )
