"""Parameters start as their scheme's paper says, everywhere in the network; and the schemes do what they are for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few, first_params, losses_of, mesh_of, prepare_steps, tiny_config
from networks import logits_of

from llmjax.model import init, parametrization, transformer
from llmjax.parallel import placement

D, H, K, F, V, T, N, M = 64, 4, 16, 128, 320, 96, 3, 5  # T: rows of the position table; N decoder, M encoder layers
ENCODER_DECODER = {
    "model__layers": N, "model__encoder_layers": M, "model__width": D, "model__mlp_width": F, "model__norm_place": "post",
    "model__tie_embeddings": False, "model__languages": 40, "objective__name": "span",
}  # fmt: skip
DECODER = {
    "model__layers": 4, "model__width": D, "model__mlp_width": F, "model__tie_embeddings": False,
    "model__position": "learned", "model__max_length": T, "train__sequence_length": 16,
}  # fmt: skip


def start_of(c):
    """Path -> array of the parameters of a config at their start."""
    params = first_params(transformer.build(c.model))
    return {placement.path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}


def glorot(fan_in, fan_out):
    return math.sqrt(2 / (fan_in + fan_out))


def expected(scheme, layers=4, encoder_layers=0):
    """Endings of paths -> standard deviations, written from the papers."""
    small = D**-0.5
    if scheme == "gpt2":
        branches = (3 if encoder_layers else 2) * layers
        return {"embedding": 0.02, "query/kernel": 0.02, "value/kernel": 0.02, "gate/kernel": 0.02, "head/kernel": 0.02,
                "layers/attention/out/kernel": 0.02 / math.sqrt(branches), "mlp/down/kernel": 0.02 / math.sqrt(branches)}  # fmt: skip
    if scheme == "xavier":
        return {"embedding": small, "query/kernel": glorot(D, D), "value/kernel": glorot(D, D), "out/kernel": glorot(D, D),
                "up/kernel": glorot(D, F), "down/kernel": glorot(D, F), "head/kernel": glorot(D, V)}  # fmt: skip
    if scheme == "lecun":
        return {"embedding": 1.0, "query/kernel": small, "out/kernel": small, "up/kernel": small, "head/kernel": small,
                "down/kernel": F**-0.5}  # fmt: skip
    if scheme == "t5":
        return {"embedding": 1.0, "query/kernel": (D * K) ** -0.5, "key/kernel": small, "value/kernel": small,
                "out/kernel": (H * K) ** -0.5, "up/kernel": small, "gate/kernel": small, "down/kernel": F**-0.5}  # fmt: skip
    if scheme == "orthogonal":
        return {"embedding": small, "query/kernel": small, "up/kernel": F**-0.5, "down/kernel": F**-0.5,
                "head/kernel": V**-0.5}  # fmt: skip
    raise KeyError(scheme)


def assert_stds(params, stds):
    """Every ending matches some parameter, and those have this standard deviation within its sampling error."""
    for ending, std in stds.items():
        found = {name: x for name, x in params.items() if name.endswith(ending)}
        assert found, ending
        for name, x in found.items():
            assert np.std(x) == pytest.approx(std, rel=5 / math.sqrt(2 * x.size)), name
            assert abs(np.mean(x)) < 5 * std / math.sqrt(x.size), name


@pytest.mark.parametrize("scheme", ["gpt2", "xavier", "lecun", "t5", "orthogonal"])
def test_every_scheme_has_the_standard_deviations_of_its_paper(scheme):
    params = start_of(tiny_config(model__init=scheme, **DECODER))
    assert_stds(params, expected(scheme))
    assert_stds(params, {"position_embedding": {"gpt2": 0.02, "lecun": 1.0, "t5": 1.0}.get(scheme, D**-0.5)})
    for name, x in params.items():
        if name.endswith("scale"):
            assert (x == 1).all(), name


def test_biases_start_at_zero_in_every_scheme():
    for scheme in ("t5", "orthogonal"):
        params = start_of(
            tiny_config(model__init=scheme, model__bias=("qkv", "out", "mlp", "norm", "head"), model__norm="layer")
        )
        biases = {name: x for name, x in params.items() if name.endswith("bias")}
        assert len(biases) == 11
        assert all((x == 0).all() for x in biases.values())


def test_t5s_relative_positions_start_at_one_over_the_root_of_the_width():
    changes = {**DECODER, "model__position": "t5", "model__relative_buckets": 128, "model__relative_max_distance": 256}
    params = start_of(tiny_config(model__init="t5", model__attention_scale=1.0, **changes))
    assert_stds(params, {"relative_embedding": D**-0.5})


def test_xaviers_distribution_is_uniform_between_its_bounds():
    params = start_of(tiny_config(model__init="xavier", **DECODER))
    x = params["layers/mlp/up/kernel"]
    bound = math.sqrt(6 / (D + F))
    assert bound * 0.999 < np.abs(x).max() <= bound
    np.testing.assert_allclose(np.histogram(x, 10, (-bound, bound))[0] / x.size, 0.1, atol=0.01)


@pytest.mark.parametrize("changes", few([{**DECODER, "model__moe__experts": 3, "model__moe__shared": 1}, DECODER]))
def test_orthogonal_matrices_are_orthogonal_in_every_layer_role_and_expert(changes):
    params = start_of(tiny_config(model__init="orthogonal", **changes))
    stacks = {
        name: x.reshape(-1, *x.shape[x.ndim - 2 :])
        for name, x in {
            **{n: x for n, x in params.items() if "/mlp/" in n or "/moe/" in n},
            "query": params["layers/attention/query/kernel"].reshape(4, D, D),
            "out": params["layers/attention/out/kernel"].reshape(4, D, D),
            "head": params["head/kernel"],
        }.items()
    }
    assert len(stacks) >= 6
    for name, matrices in stacks.items():
        for a in matrices.astype(np.float64):
            gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
            np.testing.assert_allclose(gram, np.eye(len(gram)), atol=2e-6, err_msg=name)
        assert len({x.tobytes() for x in matrices}) == len(matrices), f"{name}: two are the same"


@pytest.mark.parametrize(
    "scheme", ["lecun", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t_fixup", "mup"))]
)
def test_an_expert_starts_as_a_dense_mlp_of_its_size_does(scheme):
    changes = {**DECODER, "model__init": scheme, "model__norm": "none" if scheme == "t_fixup" else "rms"}
    dense = start_of(tiny_config(**changes))
    sparse = start_of(tiny_config(**changes, model__moe__experts=4))
    for role in ("up", "gate", "down"):
        x = sparse[f"layers/moe/{role}/kernel"]
        assert x.shape == (4, 4, *dense[f"layers/mlp/{role}/kernel"].shape[1:])
        for expert in range(4):
            assert np.std(x[:, expert]) == pytest.approx(np.std(dense[f"layers/mlp/{role}/kernel"]), rel=0.02)


def test_t_fixup_scales_what_its_paper_scales_by_the_depth_of_each_stack():
    c = tiny_config(**{**ENCODER_DECODER, "model__norm_place": "pre"}, model__init="t_fixup", model__norm="none")
    decoder, encoder = (9 * N) ** -0.25, 0.67 * M**-0.25
    params = start_of(c)
    assert_stds(params, {
        "embedding": decoder * D**-0.5, "language_embedding": decoder * D**-0.5, "query/kernel": glorot(D, D),
        "key/kernel": glorot(D, D), "gate/kernel": glorot(D, F), "head/kernel": glorot(D, V),
    })  # fmt: skip
    for stack, gain in (("layers", decoder), ("encoder/layers", encoder)):
        parts = {
            "attention/value": glorot(D, D),
            "attention/out": glorot(D, D),
            "mlp/up": glorot(D, F),
            "mlp/down": glorot(D, F),
        }
        exact = {f"{stack}/{part}/kernel": gain * std for part, std in parts.items()}
        assert_stds({name: params[name] for name in exact}, exact)
    assert_stds(params, {"cross/value/kernel": decoder * glorot(D, D), "cross/out/kernel": decoder * glorot(D, D)})


def test_deepnorms_alpha_and_beta_are_those_of_its_table():
    assert init.deepnorm(18) == pytest.approx(((2 * 18) ** 0.25, (8 * 18) ** -0.25))
    alpha, beta = init.deepnorm(6, 12, encoder=True)
    assert (alpha, beta) == pytest.approx((0.81 * (12**4 * 6) ** (1 / 16), 0.87 * (12**4 * 6) ** (-1 / 16)))
    assert init.deepnorm(6, 12) == pytest.approx(((3 * 6) ** 0.25, (12 * 6) ** -0.25))
    c = tiny_config(**ENCODER_DECODER, model__init="deepnorm")
    params = start_of(c)
    for stack, encoder in (("layers", False), ("encoder/layers", True)):
        alpha, beta = init.deepnorm(N, M, encoder=encoder)
        assert init.residual_scale(c.model, encoder=encoder) == alpha
        parts = {"attention/query": 1, "attention/key": 1, "attention/value": beta, "attention/out": beta}
        exact = {f"{stack}/{part}/kernel": gain * glorot(D, D) for part, gain in parts.items()}
        exact |= {f"{stack}/mlp/{part}/kernel": beta * glorot(D, F) for part in ("up", "down")}
        assert_stds({name: params[name] for name in exact}, exact)
    assert init.residual_scale(tiny_config(model__norm_place="post").model) == 1


def test_deepnorms_alpha_multiplies_the_residual_stream():
    c = tiny_config(
        model__init="deepnorm", model__norm_place="post", model__layers=1, model__mlp="none", model__final_norm=False
    )
    c.model.norm_epsilon = 1e-4
    module = transformer.build(c.model)
    params = jax.tree.map(lambda x: x, first_params(module))
    params["layers"]["attention"]["out"]["kernel"] *= 0  # what is left is the norm of alpha x
    params["embedding"] = jnp.full_like(params["embedding"], 1e-2)
    hidden = logits_of(module, params, jnp.ones((1, 1), jnp.int32), output="hidden")
    alpha = 2**0.25
    np.testing.assert_allclose(hidden, alpha * 1e-2 / math.sqrt((alpha * 1e-2) ** 2 + 1e-4), rtol=1e-5)


def test_initialisation_knows_its_place_in_sections_patterns_and_the_heads_of_later_tokens():
    changes = {
        "model__layers": 5,
        "model__pattern": ("local", "global"),
        "model__moe__experts": 2,
        "model__moe__first": 1,
    }
    ahead = {"model__ahead": 3, "objective__name": "multi_token"}
    c = tiny_config(**{**DECODER, **changes}, model__init="t_fixup", model__norm="none", **ahead)
    params = start_of(c)
    gain = (9 * 5) ** -0.25
    assert {name.split("/attention")[0] for name in params if "value" in name} >= {"layers/0", "layers/1", "ahead"}
    assert_stds(params, {"value/kernel": gain * glorot(D, D), "query/kernel": glorot(D, D)})


# ---------------------------------------------------------------- muP


def test_mup_at_its_base_width_is_gpt2_but_for_the_head_that_starts_at_zero():
    ours = start_of(tiny_config(**DECODER, model__init="mup", model__mup_base_width=D))
    theirs = start_of(tiny_config(**DECODER, model__init="gpt2"))
    for name, x in ours.items():
        np.testing.assert_array_equal(x, 0 * theirs[name] if name == "head/kernel" else theirs[name], err_msg=name)


def test_mups_variances_multipliers_and_scales_follow_its_table():
    c = tiny_config(
        **DECODER, model__init="mup", model__mup_base_width=D // 4, model__moe__experts=32, model__logit_scale=3.0
    )
    assert_stds(start_of(c), {
        "embedding": 0.02, "query/kernel": 0.02 / 2, "up/kernel": 0.02 / 2, "router/kernel": 0.02 / 4,
        "attention/out/kernel": 0.02 / 2 / math.sqrt(8), "down/kernel": 0.02 / 2 / math.sqrt(8),
    })  # fmt: skip
    assert parametrization.logit_scale(c.model) == 3 / 4
    assert parametrization.attention_scale(c.model) == 1 / K
    c.model.init = "gpt2"
    assert parametrization.logit_scale(c.model) == 3
    assert parametrization.attention_scale(c.model) == K**-0.5


def test_mups_scales_reach_the_scores_and_the_logits():
    changes = {"model__width": 32, "model__heads": 2, "model__position": "none", "model__pattern": ("global",)}
    tokens_BL = jnp.asarray([[3, 4, 5, 6]])
    sp = tiny_config(**changes, model__attention_scale=1 / 16, model__logit_scale=0.25)
    mup = tiny_config(**changes, model__init="mup", model__mup_base_width=8)
    params = first_params(transformer.build(sp.model))
    a, b = (logits_of(transformer.build(c.model), params, tokens_BL) for c in (sp, mup))
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- what T-Fixup and DeepNorm are for


def final_loss(scheme, *, steps=40, **changes):
    """The loss of a deep and narrow network after some steps of Adam without warm-up; chance is log 24 = 3.2."""
    c = tiny_config(
        model__init=scheme, model__heads=2, model__mlp_width=128, model__activation="relu", schedule__name="constant",
        schedule__warmup="0 steps", optimizer__learning_rate=3e-3, optimizer__beta2=0.98, optimizer__weight_decay=0.0,
        optimizer__clip_norm=0.0, train__duration=f"{steps} steps", **changes,
    )  # fmt: skip
    losses, _ = losses_of(c, mesh_of("data=1"), steps=steps)
    return float(np.mean(losses[-5:]))


@pytest.mark.slow
def test_t_fixup_learns_without_norms_and_warm_up_where_plain_initialisations_do_not():
    schemes = ("t_fixup", "gpt2", "xavier")
    losses = {scheme: final_loss(scheme, model__norm="none", model__layers=16) for scheme in schemes}
    print({name: round(loss, 2) for name, loss in losses.items()})
    assert losses["t_fixup"] < 2.0
    assert losses["t_fixup"] < losses["gpt2"] - 0.5
    assert losses["t_fixup"] < losses["xavier"] - 0.5 or math.isnan(losses["xavier"])


@pytest.mark.slow
def test_deepnorm_learns_with_norms_after_the_sums_of_many_layers_where_plain_initialisation_does_not():
    changes = {"model__norm": "layer", "model__norm_place": "post", "model__layers": 24}
    losses = {scheme: final_loss(scheme, **changes) for scheme in ("deepnorm", "xavier")}
    print({name: round(loss, 2) for name, loss in losses.items()})
    assert losses["deepnorm"] < 1.0
    assert losses["xavier"] > 2.0


# ---------------------------------------------------------------- the same everywhere


@pytest.mark.parametrize("scheme", few(["orthogonal", "xavier"]))
def test_the_start_is_the_same_bits_on_every_mesh(scheme):
    c = tiny_config(model__init=scheme)
    alone, *_ = prepare_steps(c, mesh_of("data=1"))
    spread, *_ = prepare_steps(c, mesh_of("data=2 fsdp=2 tensor=2"))
    jax.tree.map(np.testing.assert_array_equal, alone.params, spread.params)
