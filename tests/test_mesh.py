"""The same run on any mesh, every array where the table says, and clear errors for meshes that cannot be."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import abstract_state, assert_same_bits, losses_of, make_batch, mesh_of, prepare_steps, tiny_config
from jax.sharding import PartitionSpec

from llmjax.model import transformer
from llmjax.parallel import mesh as meshes
from llmjax.parallel import placement, reading
from llmjax.train import checkpoint, optimizer

MESHES = ("data=1", "data=8", "fsdp=8", "data=2 fsdp=2 tensor=2")
ONES = dict.fromkeys(("data", "pipeline", "fsdp", "expert", "context", "tensor"), 1)
TOLERANCE = 1e-5  # nats; sums over devices are added in another order


@pytest.fixture(scope="module")
def one_device():
    c = tiny_config()
    start, _, _ = prepare_steps(c, mesh_of("data=1"))
    return jax.device_get(start.params), losses_of(c, mesh_of("data=1"), steps=20)[0]


@pytest.mark.parametrize("line", [*(pytest.param(line, marks=pytest.mark.slow) for line in MESHES[1:-1]), MESHES[-1]])
def test_a_run_has_the_same_start_bit_for_bit_and_the_same_20_losses_on_every_mesh(line, one_device):
    params, losses = one_device
    c = tiny_config()
    start, _, _ = prepare_steps(c, mesh_of(line))
    assert_same_bits(start.params, params)
    here, _ = losses_of(c, mesh_of(line), steps=20)
    assert losses[-1] < losses[0] - 0.5, "a run that learns nothing proves nothing"
    print(f"{line}: the largest difference of 20 losses is {np.abs(here - losses).max():.1e}")  # pytest -rP shows it
    np.testing.assert_allclose(here, losses, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_muons_products_are_divided_among_data_devices_and_the_losses_stay_the_same():
    c = tiny_config(optimizer__name="muon")
    alone, _ = losses_of(c, mesh_of("data=1"), steps=10)
    divided, _ = losses_of(c, mesh_of("data=2"), steps=10)
    np.testing.assert_allclose(divided, alone, rtol=0, atol=TOLERANCE)
    stack = jnp.zeros((2, 32, 32))
    for line, layers_each in (("data=2", 1), ("data=8", 2), ("data=2 fsdp=2", 2)):  # 8 do not divide 2 layers
        with placement.active(mesh_of(line), tiny_config()):
            pieces = jax.jit(optimizer.shard_layers)(stack).addressable_shards
        assert {piece.data.shape[0] for piece in pieces} == {layers_each}, line


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_and_moments_are_stored_in_the_pieces_that_the_table_promises(name):
    state, _, run = prepare_steps(tiny_config(optimizer__name=name), mesh_of("data=2 fsdp=2 tensor=2"))
    moments = [state]
    if name == "adamw":  # whose program other tests have
        moments.append(run(state, make_batch(tiny_config(), 0))[0])
    for moment in moments:  # as made, and as the step leaves it
        pieces: dict[str, set[tuple[int, ...]]] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path((moment.params, moment.opt_state)):
            parameter = "/".join(part for part in placement.path_name(path).split("/") if not part.isdigit())
            if leaf.ndim:
                pieces.setdefault(parameter, set()).update(s.data.shape for s in leaf.addressable_shards)
        expected = {  # width 32, 4 heads of 8, MLP 64, vocabulary 320; fsdp and tensor halve a dimension each
            "embedding": (160, 16),
            "layers/attention/query/kernel": (2, 16, 2, 8),
            "layers/attention/key/kernel": (2, 16, 2, 8),
            "layers/attention/out/kernel": (2, 2, 8, 16),
            "layers/mlp/up/kernel": (2, 16, 32),
            "layers/mlp/down/kernel": (2, 32, 16),
            "layers/mlp_norm/scale": (2, 32),
            "final_norm/scale": (32,),
        }
        for suffix, shape in expected.items():
            found = {key: shapes for key, shapes in pieces.items() if key.endswith(suffix)}
            assert len(found) > 1, f"{suffix}: the parameter and at least one moment"
            assert set.union(*found.values()) == {shape}, found


def test_activations_are_spread_over_the_mesh_inside_the_step(monkeypatch):
    # Under a bare `with mesh:` flax drops every constraint without a word, and a pod runs out of memory.
    applied = []
    original = jax.lax.with_sharding_constraint

    def spy(x, sharding):
        applied.append(str(getattr(sharding, "spec", sharding)))
        return original(x, sharding)

    monkeypatch.setattr(jax.lax, "with_sharding_constraint", spy)
    monkeypatch.setattr(helpers, "_STEPS", {})  # what other tests traced
    losses_of(tiny_config(), mesh_of("data=2 fsdp=2 tensor=2"), steps=1)
    rows = "('data', 'fsdp', 'expert')"
    for spec in (f"({rows}, 'context', 'tensor')", f"({rows}, 'context', 'tensor', None)"):  # BLF, BLHK
        assert any(spec in text for text in applied), applied
    assert any(f"({rows}, 'context', ('tensor', 'pipeline'))" in text for text in applied), applied  # BLV


MULTI_QUERY = {"model__kv_heads": 1}  # fewer than tensor devices


def test_fewer_key_heads_than_tensor_devices_are_kept_whole():
    state = abstract_state(tiny_config(**MULTI_QUERY), mesh_of("fsdp=2 tensor=4"))
    key, query = (state.params["layers"]["attention"][name]["kernel"] for name in ("key", "query"))
    assert key.sharding.spec == PartitionSpec(None, "fsdp", None, None)
    assert query.sharding.shard_shape(query.shape) == (2, 16, 1, 8)


@pytest.mark.slow  # the losses above are the same on every mesh
def test_fewer_key_heads_than_tensor_devices_change_nothing():
    c = tiny_config(**MULTI_QUERY)
    alone, spread = (losses_of(c, mesh_of(line), steps=4)[0] for line in ("data=1", "fsdp=2 tensor=4"))
    np.testing.assert_allclose(spread, alone, rtol=0, atol=TOLERANCE)


def test_a_checkpoint_of_one_mesh_is_the_same_bits_on_another(tmp_path):
    c = tiny_config()
    _, state = losses_of(c, mesh_of("data=2 fsdp=2 tensor=2"), steps=2)
    with checkpoint.manager(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, state, step=2, meta={"step": 2})
        checkpoints.wait_until_finished()
    for line in ("fsdp=8", "data=1"):
        abstract = abstract_state(c, mesh_of(line))
        restored, meta, _ = checkpoint.restore(tmp_path, abstract)
        assert meta["step"] == 2
        assert_same_bits(restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)
    prepare_steps(c, mesh_of("data=1"))[-1](restored, make_batch(c, 2))  # and the run goes on there


def test_a_parameter_without_a_row_is_an_error():
    params = {"layers": {"mixer": {"kernel": jnp.zeros((2, 4, 4))}}}
    with pytest.raises(ValueError, match=r"no row places the parameter layers/mixer/kernel.*parallel\.rules"):
        placement.parameter_shardings(params, mesh_of("data=1"))


def test_rows_of_the_config_come_before_the_table_and_are_checked():
    params, mesh = {"embedding": jnp.zeros((64, 32))}, mesh_of("fsdp=2 tensor=4")
    place = placement.parameter_shardings
    assert place(params, mesh, rules=[("embedding", (None, "tensor"))])["embedding"].spec == PartitionSpec(
        None, "tensor"
    )
    with pytest.raises(ValueError, match="has 1 dimensions and the parameter 2"):
        place(params, mesh, rules=[("embedding", ("fsdp",))])
    with pytest.raises(ValueError, match="names the axis 'model'; axes are data, pipeline, fsdp, expert"):
        place(params, mesh, rules=[("embedding", ("model", None))])


def test_an_axis_that_does_not_divide_a_dimension_is_an_error_that_says_which():
    with pytest.raises(ValueError, match=r"fsdp=3 does not divide dimension 1 of embedding \(320, 32\)"):
        prepare_steps(tiny_config(), mesh_of("fsdp=3"))
    with pytest.raises(ValueError, match="tensor=8 does not divide"):
        prepare_steps(tiny_config(), mesh_of("tensor=8"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data=3", "asks for 3 devices and there are 8"),
        ("data=-1 fsdp=3", "asks for 3 devices or a multiple and there are 8"),
        ("data=-1 fsdp=-1", "2 axes of size -1"),
        ("model=8", "'model=8' is not understood; write AXIS=SIZE, axes data, pipeline, fsdp, expert, context, tensor"),
        ("data=0", "is not understood"),
        ("data 8", "is not understood"),
        ("data=4 data=2 fsdp=4", "gives the axis data twice"),
    ],
)
def test_a_bad_mesh_line_is_an_error_that_says_what_is_wrong(line, message):
    with pytest.raises(ValueError, match=message):
        meshes.parse_mesh(line, devices=8)


def test_a_mesh_line_gives_every_axis_and_fills_the_free_one():
    assert meshes.parse_mesh("fsdp=2 data=-1", devices=8) == ONES | {"data": 4, "fsdp": 2}
    mesh = meshes.make_mesh("data=-1 tensor=2")
    assert dict(mesh.shape) == ONES | {"data": 4, "tensor": 2}
    first, second = mesh.devices.reshape(4, 2)[0]
    assert first.id + 1 == second.id  # tensor has the closest neighbours
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)  # Linen needs Auto


def read_on(monkeypatch, share, **settings):
    """The axes that divide a model which is only read, on 8 devices that each have room for so much of it."""
    c = tiny_config(**{"model__heads": 8, **settings})
    shapes = transformer.param_shapes(transformer.build(c.model))
    bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    monkeypatch.setattr(reading, "memory", lambda device: share * bytes / reading.SHARE)
    return {axis: size for axis, size in reading.reading_mesh("", shapes, c).shape.items() if size > 1}


def test_a_copy_to_read_is_on_as_few_devices_as_hold_it(monkeypatch):
    assert read_on(monkeypatch, 0) == {"data": 8}  # devices that do not say how large they are
    assert read_on(monkeypatch, 1.01) == {"data": 8}
    assert read_on(monkeypatch, 0.9) == {"data": 4, "tensor": 2}
    assert read_on(monkeypatch, 0.2) == {"tensor": 8}
    with pytest.raises(ValueError, match=r"at least .* on each of the 8 devices of this process, which have .*B:"):
        read_on(monkeypatch, 0.1)


def test_a_copy_to_read_is_over_fsdp_where_tensor_does_not_divide_it(monkeypatch):
    assert read_on(monkeypatch, 0.9, model__heads=5, model__head_size=8) == {"data": 4, "fsdp": 2}
