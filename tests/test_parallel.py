"""Every axis of the mesh, alone and together, gives the gradients of one device; pipelines are as idle as they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import abstract_state, few, first_params, losses_of, make_batch, mesh_of, prepare_steps, tiny_config

from llmjax import config
from llmjax.model import attention, transformer
from llmjax.model.views import Pattern, View
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import context, pipeline, placement
from llmjax.parallel import mesh as meshes
from llmjax.train.step import batch_shardings

MOE = {"model__moe__experts": 4, "model__moe__active": 2, "model__moe__shared": 1}
HYBRID = {"model__pattern": ("rglru", "local"), "model__window": 5, "model__layers": 4}


def gradients_of(c, mesh):
    """A function () -> the loss sum and the gradients of a batch, on the host."""
    module = transformer.build(c.model)
    params, module = first_params(module), placement.on_mesh(module, mesh, c)
    params = jax.device_put(params, placement.parameter_shardings(params, mesh, rules=c.parallel.rules))
    batch = make_batch(c, 0)
    if c.model.encoder_layers:
        batch |= {f"source_{name}": np.roll(batch[name], 3, axis=0)[:, :12] for name in ("tokens", "segments")}
    batch = jax.device_put(batch, batch_shardings(mesh))
    key = jax.random.key(1)

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        return OBJECTIVES[c.objective.name](module, params, batch, key, c.objective).objective

    def run():
        with placement.active(mesh, c):
            return jax.device_get(loss(params, batch))

    return run


@functools.cache
def alone(changes):
    return gradients_of(tiny_config(train__batch_size=8, **dict(changes)), mesh_of("data=1"))()


def largest_difference(line, changes, parallel):
    """Of any gradient on the mesh from that on one device, relative to the largest element of its parameter."""
    loss, expected = alone(tuple(changes.items()))
    c = tiny_config(train__batch_size=8, **changes, **parallel, parallel__mesh=line)
    here, found = gradients_of(c, mesh_of(line))()
    np.testing.assert_allclose(here, loss, rtol=1e-5)
    worst = jax.tree.map(lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-6), found, expected)
    return max(jax.tree.leaves(worst))


CASES = {
    "pipeline": ("pipeline=4", {"model__layers": 4}, {}),
    "pipeline, uneven layers": ("pipeline=4", {"model__layers": 5}, {}),
    "pipeline, rounds": ("pipeline=2", {"model__layers": 4}, {"parallel__rounds": 2, "parallel__parts": 4}),
    "pipeline, uneven rounds": ("pipeline=2", {"model__layers": 5}, {"parallel__rounds": 2, "parallel__parts": 2}),
    "pipeline, rematerialised": ("pipeline=2", {"model__layers": 4, "model__remat": "full"}, {}),
    "pipeline, hybrid": ("data=2 pipeline=2", HYBRID, {}),
    "pipeline, encoder-decoder": (
        "data=2 pipeline=2",
        {"model__encoder_layers": 4, "model__position": "t5", "objective__name": "span"},
        {},
    ),
    "pipeline, fsdp, tensor": ("pipeline=2 fsdp=2 tensor=2", {"model__layers": 4}, {}),
    "context, gathered": ("context=4", {}, {}),
    "context, ring": ("context=4", {}, {"parallel__context": "ring"}),
    "context, ring, ALiBi": ("data=2 context=2", {"model__position": "alibi"}, {"parallel__context": "ring"}),
    "context, ring, window, soft cap": (
        "context=2",
        {
            "model__pattern": ("local",),
            "model__window": 5,
            "model__attention_soft_cap": 5.0,
            "model__attention_sinks": True,
        },
        {"parallel__context": "ring"},
    ),
    "context, ring, ALiBi, window, soft cap": (
        "data=2 context=2",
        {
            "model__position": "alibi",
            "model__pattern": ("local",),
            "model__window": 5,
            "model__attention_soft_cap": 5.0,
            "model__attention_sinks": True,
        },
        {"parallel__context": "ring"},
    ),
    "context, ring, tensor": ("data=2 context=2 tensor=2", {"model__kv_heads": 2}, {"parallel__context": "ring"}),
    "context, recurrent": ("context=4", HYBRID, {}),
    "sequence": ("fsdp=2 tensor=4", {}, {"parallel__sequence": True}),
    "features": ("fsdp=2 tensor=4", {}, {"parallel__features": True}),
    "expert, dropless": ("expert=4", MOE, {}),
    "expert, capacity": ("expert=2 tensor=2", {**MOE, "model__moe__dispatch": "capacity"}, {}),
    "expert, context, capacity": ("expert=2 context=2", {**MOE, "model__moe__dispatch": "capacity"}, {}),
    "pipeline, expert, tensor": (  # the losses of single layers are means of each part, as of each micro-batch
        "pipeline=2 expert=2 tensor=2",
        {**MOE, "model__layers": 4, "model__moe__balance_over": "layers", "model__moe__z_loss": 0.0},
        {},
    ),
    "pipeline, context ring": ("pipeline=2 context=2 tensor=2", {"model__layers": 4}, {"parallel__context": "ring"}),
}


# Every axis once. The others, which combine them, are slow, and those whose parts are all in another one exhaustive.
ENOUGH = (
    "pipeline, uneven rounds",
    "context, ring, ALiBi, window, soft cap",
    "sequence",
    "features",
)  # experts on devices of their own are fast in test_moe.py, a layer with its gradients
REPEATED = ("pipeline", "pipeline, uneven layers", "pipeline, rounds", "pipeline, fsdp, tensor", "context, gathered",
            "context, ring", "context, ring, ALiBi", "context, ring, window, soft cap", "expert, capacity")  # fmt: skip
ORDER = sorted(CASES, key=lambda name: (name in REPEATED, name not in ENOUGH))


@pytest.mark.parametrize("name", few(ORDER, len(ENOUGH), len(CASES) - len(ENOUGH) - len(REPEATED)))
def test_gradients_on_the_mesh_are_those_of_one_device(name):
    line, changes, parallel = CASES[name]
    worst = largest_difference(line, changes, parallel)
    print(f"{name}: {worst:.1e}")  # pytest -rP shows it
    assert worst < 2e-5


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_decides_what_fsdp_divides(zero):
    state = abstract_state(tiny_config(parallel__zero=zero), mesh_of("fsdp=4 tensor=2"))
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert kernel.sharding.shard_shape(kernel.shape) == ((2, 8, 32) if zero == 3 else (2, 32, 32))
    assert {x.sharding.shard_shape(x.shape) for x in moments} == {(2, 8, 32)}


@pytest.mark.parametrize("zero", few([1, 2], 0, 1))  # 3 is what all other tests have
def test_zero_changes_no_loss(zero):
    losses, state = losses_of(tiny_config(parallel__zero=zero), mesh_of("fsdp=4 tensor=2"), steps=3)
    expected, _ = losses_of(tiny_config(), mesh_of("data=1"), steps=3)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    assert state.params["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 32, 32)


@pytest.mark.slow  # test_objectives.py has micro-batches, and the gradients of pipelines are compared above
def test_a_pipeline_trains_with_micro_batches_as_one_device_does():
    changes = {"model__layers": 4, "train__micro_batches": 2, "train__batch_size": 16}
    expected, _ = losses_of(tiny_config(**changes), mesh_of("data=1"), steps=3)
    c = tiny_config(parallel__mesh="data=2 pipeline=2", **changes)
    found, _ = losses_of(c, mesh_of("data=2 pipeline=2"), steps=3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_how_experts_are_used_is_counted_alike_on_every_mesh_and_however_the_batch_is_cut():
    changes = {**MOE, "model__moe__dispatch": "capacity", "model__moe__capacity_factor": 0.7, "model__layers": 3}
    found = []
    for line, more in (
        ("data=1", {}),
        ("data=1", {"train__micro_batches": 4}),
        ("pipeline=2 expert=2", {"parallel__rounds": 2, "parallel__parts": 2}),  # with copies that fill the last stage
    ):
        c = tiny_config(**changes, **more, parallel__mesh=line)
        state, _, run = prepare_steps(c, mesh_of(line))
        values = run(state, make_batch(c, 0))[1]
        found.append([float(values[name]) for name in ("expert_load_max", "expert_dropped")])
    assert found[0][0] > 1.05 and 0.2 < found[0][1] < 0.6, found[0]
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


@pytest.mark.exhaustive
def test_what_follows_the_experts_load_moves_in_a_pipeline_as_without():
    changes = {**MOE, "model__moe__bias_rate": 0.1, "model__layers": 4, "train__batch_size": 8}
    parts = {"train__micro_batches": 4}  # the parts of the pipeline, one after another
    _, expected = losses_of(tiny_config(**changes, **parts), mesh_of("data=1"), steps=2)
    c = tiny_config(**changes, parallel__mesh="pipeline=2", parallel__parts=4)
    _, found = losses_of(c, mesh_of("pipeline=2"), steps=2)
    name = "expert_bias"
    np.testing.assert_allclose(found.params["layers"]["moe"][name], expected.params["layers"]["moe"][name], atol=1e-6)
    assert np.abs(expected.params["layers"]["moe"][name]).max() > 0.05


@pytest.mark.slow
def test_dropout_in_a_pipeline_differs_by_layer_and_part_and_repeats():
    c = tiny_config(model__layers=4, model__dropout=0.3, train__batch_size=8, parallel__mesh="pipeline=2")
    run = gradients_of(c, mesh_of("pipeline=2"))
    first, again = run(), run()
    jax.tree.map(np.testing.assert_array_equal, first, again)
    dry = alone((("model__layers", 4),))
    assert 0 < abs(first[0] / dry[0] - 1) < 0.2


def test_stages_hold_their_own_layers_and_share_the_vocabulary():
    c = tiny_config(model__layers=4, parallel__mesh="pipeline=2 tensor=2")
    state, _, _ = prepare_steps(c, mesh_of("pipeline=2 tensor=2"))  # a step leaves everything where it was
    for tree in (state.params, *(s for s in state.opt_state if hasattr(s, "mu"))):
        params = getattr(tree, "mu", tree)
        assert params["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 32, 32)
        assert params["embedding"].addressable_shards[0].data.shape == (80, 32)
    uneven = tiny_config(model__layers=5, parallel__mesh="pipeline=2")
    state, _, _ = prepare_steps(uneven, mesh_of("pipeline=2"))
    assert state.params["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (5, 16, 64)


# ---------------------------------------------------------------- how idle, how many parts


def ticks_of(stages, rounds, parts, layers):
    """How often the loop of a compiled pipeline turns."""
    c = tiny_config(
        model__layers=layers, train__batch_size=parts, parallel__mesh=f"pipeline={stages}", parallel__rounds=rounds,
        parallel__parts=parts,
    )  # fmt: skip
    mesh = mesh_of(f"pipeline={stages}")
    module = placement.on_mesh(transformer.build(c.model), mesh, c)
    params = transformer.param_shapes(transformer.build(c.model))
    tokens_BL = jax.ShapeDtypeStruct((parts, 16), jnp.int32)
    with placement.active(mesh, c):
        traced = jax.make_jaxpr(lambda p, t: module.apply({"params": p}, t))(params, tokens_BL)

    def lengths(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation.params["length"]
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from lengths(inner)

    return max(lengths(traced.jaxpr))


@pytest.mark.parametrize(("stages", "rounds", "parts"), few([(4, 2, 8), (2, 1, 4), (4, 1, 6), (2, 2, 4)]))
def test_the_bubble_that_is_printed_is_that_of_the_ticks_that_run(stages, rounds, parts):
    ticks = ticks_of(stages, rounds, parts, layers=stages * rounds)
    busy = parts * rounds
    assert pipeline.bubble(stages=stages, parts=parts, rounds=rounds) == pytest.approx(1 - busy / ticks)


def test_parts_are_chosen_by_the_stages_or_refused():
    c = tiny_config()
    assert pipeline.parts(c, stages=4, rows=64) == 16
    assert pipeline.parts(c, stages=4, rows=6) == 6
    assert pipeline.describe(c, mesh_of("pipeline=4"), rows=12) == (
        "4 stages, 12 parts of a micro-batch: 20.0% of a stage's time is bubble"
    )
    assert pipeline.describe(c, mesh_of("data=2"), rows=12) == ""
    with pytest.raises(ValueError, match=r"parallel.parts=5 does not divide the 12 rows"):
        pipeline.parts(tiny_config(parallel__parts=5), stages=4, rows=12)
    with pytest.raises(ValueError, match="needs at least as many parts as stages"):
        pipeline.parts(tiny_config(parallel__mesh="pipeline=4", parallel__rounds=2), stages=4, rows=2)


def test_a_causal_ring_leaves_out_what_nobody_may_see():
    """Keys of the row's last piece would spoil whoever multiplies them, even by 0: only their own device does."""
    ways, length = 4, 16
    mesh = mesh_of(f"context={ways}")
    q, k, v = (jax.random.normal(key, (2, length, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    spoiled = v.at[:, -length // (2 * ways) :].set(jnp.nan)
    segments = jnp.ones((2, length), jnp.int32)
    view = View(None, pattern=Pattern(segments, segments, causal=True))
    with jax.set_mesh(mesh):
        found = jax.jit(context.ring)(q, k, spoiled, view)
    clean = attention.reference(q, k, v, view.mask())
    own = (0, 1)  # pieces 0 and 7 are on one device, which multiplies all of its own
    seen = np.isfinite(np.asarray(found)).all(axis=(0, 2, 3))
    assert seen.tolist() == [i not in own and i < 14 for i in range(length)]
    np.testing.assert_allclose(found[:, 2:14], clean[:, 2:14], atol=1e-5)


@pytest.mark.parametrize("line", ["pipeline=2", "context=2"])
def test_how_a_network_runs_is_said_by_the_module_and_never_by_where_it_is_called(line):
    c, mesh = tiny_config(parallel__context="ring", parallel__mesh=line), mesh_of(line)
    plain = transformer.build(c.model)
    module = placement.on_mesh(plain, mesh, c)
    assert module != plain and module == placement.on_mesh(plain, mesh, c) and hash(module) != hash(plain)
    params = jax.eval_shape(functools.partial(transformer.init_params, module), jax.random.key(0))
    tokens_BL = jax.ShapeDtypeStruct((4, 16), jnp.int32)

    def program(module):
        return str(jax.make_jaxpr(lambda p, t: module.apply({"params": p}, t))(params, tokens_BL))

    with placement.active(mesh, c):
        assert "ppermute" in program(module) and "ppermute" not in program(plain)
    with pytest.raises(ValueError, match=r"call it inside `placement.active"):
        program(module)


def test_a_ring_that_does_not_divide_the_sequence_is_refused():
    c = tiny_config(train__sequence_length=18, parallel__mesh="context=4", parallel__context="ring")
    with pytest.raises(ValueError, match=r"context=4 does not divide the 18 positions"):
        gradients_of(c, mesh_of("context=4"))()


# ---------------------------------------------------------------- slices and processes


def test_the_first_axes_cross_the_network_between_slices():
    sizes = meshes.parse_mesh("data=2 pipeline=4 fsdp=16 tensor=4", devices=512)
    spans = {n: meshes.slice_sizes(sizes, slices=n) for n in (1, 2, 4, 8)}
    assert [{k: v for k, v in s.items() if v > 1} for s in spans.values()] == [
        {}, {"data": 2}, {"data": 2, "pipeline": 2}, {"data": 2, "pipeline": 4},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="cannot be laid over 3 slices"):
        meshes.slice_sizes(sizes, slices=3)
    sizes = meshes.parse_mesh("data=3 fsdp=4", devices=12)
    with pytest.raises(ValueError, match="begin with data=2"):
        meshes.slice_sizes(sizes, slices=2)


class FakeDevice:
    def __init__(self, number, process):
        self.id, self.process_index = number, process


@pytest.mark.parametrize(
    ("sizes", "processes", "groups"),
    [
        ({"data": 8}, 4, [0, 1, 2, 3]),
        ({"fsdp": 2, "tensor": 4}, 2, [0, 1]),
        ({"fsdp": 2, "tensor": 4}, 4, [0, 0, 1, 1]),
        ({"pipeline": 4, "fsdp": 2}, 4, [0, 0, 0, 0]),
        ({"data": 2, "pipeline": 4}, 2, [0, 1]),
        ({"pipeline": 2, "data": 4}, 8, [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_processes_read_the_rows_that_their_devices_hold(monkeypatch, sizes, processes, groups):
    sizes = {axis: sizes.get(axis, 1) for axis in meshes.AXES}
    devices = [FakeDevice(i, i * processes // 8) for i in range(8)]
    mesh = jax.sharding.Mesh(np.array(devices, object).reshape(*sizes.values()), tuple(sizes))
    found = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(meshes.row_group(mesh))
    assert sorted(number for number, _ in found) == sorted(groups)
    assert {count for _, count in found} == {len(set(groups))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__zero": 4}, "parallel.zero=4 must be at least 1 and at most 3"),
        ({"parallel__slices": -1}, "parallel.slices=-1 must be at least 0"),
        ({"parallel__rounds": 0}, "parallel.rounds=0 must be at least 1"),
        ({"parallel__parts": -1}, "parallel.parts=-1 must be at least 0"),
        ({"parallel__rounds": 2}, "give the mesh the axis pipeline"),
        ({"parallel__mesh": "pipeline=2", "model__norm": "batch"}, "model.norm=batch takes statistics"),
        ({"parallel__sequence": True}, "parallel.sequence divides positions over tensor"),
        ({"parallel__features": True, "parallel__mesh": "tensor=3"}, "features divides model.width=32 over tensor=3"),
        ({"parallel__features": True, "parallel__sequence": True, "parallel__mesh": "tensor=2"}, "set one to False"),
        (
            {"parallel__mesh": "context=2", "parallel__context": "ring", "model__attention_dropout": 0.1},
            "parallel.context=ring never has the weights",
        ),
        (
            {
                "parallel__mesh": "pipeline=2", "objective__name": "permutation", "objective__recurrence": 2,
                "model__position": "xlnet", "model__two_stream": True,
            },
            "objective.recurrence=2 hands the states of every layer",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_parallel_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config.check(tiny_config(**changes))
