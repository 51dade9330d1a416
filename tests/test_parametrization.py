"""muP and CompleteP: every parameter has the factors of the papers' tables, and they reach the network and the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few, first_params, losses_of, mesh_of, tiny_config
from networks import logits_of

from llmjax import config
from llmjax.model import init, transformer
from llmjax.model.parametrization import Scales, branch_scale, scales
from llmjax.parallel import placement
from llmjax.train import optimizer

M, L = 4.0, 3.0
WIDE = {"model__init": "completep", "model__mup_base_width": 8, "model__mup_base_layers": 2, "model__layers": 6}
DEEP = {**WIDE, "model__mup_base_width": 32}
# Written from Table 8 of Yang et al. 2021 and Table 1 of Dey et al. 2025, with m = 4, l = 3 and alpha = 1:
# (std, multiplier, rate, decay, epsilon) under AdamW.
TABLE = {
    "embedding": (1, 1, 1, 1, 1 / M),
    "position_embedding": (1, 1, 1, 1, 1 / M),
    "layers/attention/query/kernel": (M**-0.5, 1, 1 / M, M, 1 / (M * L)),
    "layers/0/attention/value/kernel": (M**-0.5, 1, 1 / M, M, 1 / (M * L)),
    "last/attention/out/kernel": (M**-0.5, 1 / L, 1 / M, M, 1 / (M * L)),
    "layers/mlp/gate/kernel": (M**-0.5, 1, 1 / M, M, 1 / (M * L)),
    "layers/mlp/down/kernel": (M**-0.5, 1 / L, 1 / M, M, 1 / (M * L)),
    "layers/moe/router/kernel": (1 / M, 1, 1 / M, M, 1 / (M * L)),
    "layers/moe/down/kernel": (M**-0.5, 1 / L, 1 / M, M, 1 / (M * L)),
    "layers/attention_norm/scale": (1, 1, 1, 1, 1 / (M * L)),
    "layers/attention/query/bias": (1, 1, 1, 1, 1 / (M * L)),
    "final_norm/scale": (1, 1, 1, 1, 1 / M),
    "head/kernel": (0, 1 / M, 1, 1, 1 / M),
    "classifier/kernel": (0, 1, 1 / M, M, 1 / M),
    "pooler/kernel": (M**-0.5, 1, 1 / M, M, 1 / M),
}


def test_the_factors_of_adamw_are_those_of_the_papers_tables():
    c = tiny_config(**WIDE, model__tie_embeddings=False).model
    for name, expected in TABLE.items():
        found = scales(c, name)
        got = (found.std, found.multiplier, found.rate, found.decay, found.epsilon)
        assert got == pytest.approx(expected), name
    assert scales(tiny_config(**WIDE).model, "embedding").multiplier == 1 / M  # tied: it makes the logits


def test_muon_needs_no_factor_but_where_the_outputs_stay_few_and_depth_alpha_slows_what_is_in_the_layers():
    c = tiny_config(**WIDE, model__mup_depth_power=0.5).model
    inside = L**-0.5
    assert scales(c, "layers/mlp/up/kernel", optimizer="muon").rate == pytest.approx(inside)
    assert scales(c, "layers/moe/router/kernel", optimizer="muon").rate == pytest.approx(M**-0.5 * inside)
    assert scales(c, "layers/mlp/up/kernel").rate == pytest.approx(inside / M)
    assert scales(c, "layers/mlp_norm/scale").rate == pytest.approx(inside)
    assert scales(c, "layers/mlp/down/kernel").multiplier == pytest.approx(L**-0.5)
    assert scales(c, "layers/mlp/up/kernel").epsilon == pytest.approx(1 / (M * L**0.5))
    assert scales(c, "final_norm/scale").rate == 1


@pytest.mark.parametrize("scheme", ["gpt2", "xavier", "deepnorm"])
def test_other_schemes_have_no_factors(scheme):
    c = tiny_config().model
    c.init, c.mup_base_width, c.mup_base_layers = scheme, 1, 1
    assert scales(c, "layers/mlp/up/kernel") == scales(c, "head/kernel") == Scales()
    assert optimizer.scales_of(tiny_config().optimizer, {"embedding": jnp.ones(2)}, model=c) == {}


def test_completep_divides_what_branches_add_and_starts_as_its_base_does():
    c = tiny_config(**DEEP)
    assert branch_scale(c.model) == pytest.approx(1 / L)
    params, tokens_BL = first_params(transformer.build(c.model)), jnp.asarray([[3, 4, 5, 6]])
    plain = tiny_config(model__layers=6, model__branch_scale=1 / 3, model__attention_scale=1 / 8)
    a, b = (logits_of(transformer.build(one.model), params, tokens_BL) for one in (c, plain))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    base = tiny_config(**{**DEEP, "model__layers": 2}).model
    for kind in ("outward", "inward"):
        path = "layers/mlp/down" if kind == "outward" else "layers/mlp/up"
        assert init.std(c.model, kind, (64, 32), path=path) == init.std(base, kind, (64, 32), path=path)


def test_adams_epsilon_is_smaller_by_the_width_and_in_the_layers_by_the_depth():
    """With a gradient of epsilon everywhere the first update is 1 / (1 + factor) times the rate's factor."""
    c = tiny_config(**WIDE, optimizer__learning_rate=1.0, optimizer__weight_decay=0.0, optimizer__epsilon=1e-3)
    shapes = transformer.param_shapes(transformer.build(c.model))
    made = optimizer.make_optimizer(c.optimizer, lambda step: jnp.float32(1.0), model=c.model)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)

    @jax.jit
    def first(params):
        return made.update(jax.tree.map(lambda p: 1e-3 * p, params), made.init(params), params)[0]

    for path, update in jax.tree_util.tree_leaves_with_path(first(params)):
        name = placement.path_name(path)
        factors = scales(c.model, name)
        np.testing.assert_allclose(update, -factors.rate / (1 + factors.epsilon), rtol=1e-4, err_msg=name)


def test_the_printed_table_has_the_factors_of_every_parameter():
    c = tiny_config(**WIDE, optimizer__name="muon")
    params = first_params(transformer.build(c.model))
    factors = optimizer.scales_of(c.optimizer, params, model=c.model)
    header, *rows = init.parameter_table(params, factors=factors).splitlines()
    assert header.split()[-8:] == ["x", "multiplier", "x", "rate", "x", "decay", "x", "epsilon"]
    told = {row.split()[0]: row.split()[-4:] for row in rows[:-1]}
    assert told["embedding"] == ["0.25", "1", "1", "0.25"]
    assert told["layers/mlp/down/kernel"] == ["0.3333", "1", "1", "0.08333"]
    assert "multiplier" not in init.parameter_table(params)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_place": "post"}, "set model.norm_place=pre, sandwich or after"),
        ({"encoder_layers": 2, "objective.name": "span"}, "set model.init=mup"),
        ({"pattern": ("mamba2", "global")}, "no rule for the gates of mamba2"),
        ({"optimizer.name": "sgd"}, "set optimizer.name to adamw"),
    ],
)
def test_completep_refuses_by_name_what_it_has_no_rule_for(changes, said):
    c = tiny_config(**WIDE)
    for key, value in changes.items():
        config.set_key(c, key if "." in key else f"model.{key}", value)
    with pytest.raises(ValueError, match=said):
        config.check(c)


@pytest.mark.parametrize(
    ("mesh", "name"),
    few(
        [
            ("pipeline=2 data=1", "muon"),
            ("data=2 fsdp=2 tensor=2", "adamw"),
            ("pipeline=2 data=1", "adamw"),
            ("data=2 fsdp=2 tensor=2", "muon"),
        ],
        0,
        2,
    ),
)
def test_completep_trains_alike_on_every_mesh(mesh, name):
    c = tiny_config(**WIDE, optimizer__name=name, model__kv_heads=2)
    alone, _ = losses_of(c, mesh_of("data=1"), steps=6)
    spread, _ = losses_of(c, mesh_of(mesh), steps=6)
    np.testing.assert_allclose(spread, alone, rtol=2e-4)
