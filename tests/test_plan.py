"""Plans: what is read from compiled programs is what they do, formulas are near it, and saved steps are the same steps."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh_of, tiny_config
from jax.sharding import NamedSharding, PartitionSpec

from llmjax import cli, start
from llmjax.errors import UserError
from llmjax.scaling import analytic, collectives, compiler, hlo, search, timeline
from llmjax.scaling.plan import make_plan
from llmjax.scaling.render import render
from llmjax.scaling.topology import link_model, parse_topology, wraps
from llmjax.startup import accelerators

ROOT = Path(__file__).parent.parent
AXES = {"data": 2, "tensor": 4}


def machine(link=lambda sent: 1.0):
    return timeline.Machine(1e12, 1e11, link, lambda sent: (sent.kind,))


def walk_compiled(function, specs, *arguments, out=None):
    """The cost of a small program on a 2 x 4 mesh of fake devices."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    given = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(function, out_shardings=None if out is None else NamedSharding(mesh, out)).lower(*given).compile()
        )
    program = hlo.parse(compiled.as_text())
    return timeline.walk(program, machine())


def sent_by(cost):
    """(kind, axes) -> (times, bytes each, bytes sent each) of a program with one collective of each kind."""
    return {
        (sent.collective.kind, collectives.axes_of(sent.collective, AXES)): (
            sent.count, sent.collective.bytes, sent.collective.moved,
        )
        for sent in cost.sent.values()
    }  # fmt: skip


def manual(function, x, before, after):
    """What a function sends that runs on each device's piece of x."""

    def run(x):
        return jax.shard_map(function, in_specs=before, out_specs=after, check_vma=False)(x)

    return sent_by(walk_compiled(run, (before,), x, out=after))


def test_an_all_reduce_in_a_scan_counts_as_often_as_the_scan_turns():
    layers, width, rows = 5, 64, 16

    def stack(w_NDD, x_BD):
        def layer(x_BD, w_DD):
            y_BD = jax.lax.with_sharding_constraint(x_BD @ w_DD, PartitionSpec("data", None))
            return jax.lax.with_sharding_constraint(jnp.tanh(y_BD), PartitionSpec("data", "tensor")), None

        return jax.lax.scan(layer, x_BD, w_NDD)[0]

    w_NDD, x_BD = jnp.zeros((layers, width, width)), jnp.zeros((rows, width))
    cost = walk_compiled(stack, (PartitionSpec(None, "tensor", None), PartitionSpec("data", "tensor")), w_NDD, x_BD)
    size = rows // 2 * width * 4
    assert sent_by(cost) == {("all-reduce", ("tensor",)): (layers, size, 2 * size * 3 / 4)}
    assert cost.flops == layers * 2 * (rows / 2) * (width / 4) * width
    assert cost.unknown_loops == 0


def test_every_kind_of_collective_has_the_bytes_known_by_hand():
    x, both = jnp.zeros((16, 32)), PartitionSpec(("data", "tensor"), None)
    piece, part = 16 // 8 * 32 * 4, 16 // 2 * 32 * 4
    gathered = manual(lambda x: jax.lax.all_gather(x, "tensor", tiled=True), x, both, PartitionSpec("data", None))
    assert gathered == {("all-gather", ("tensor",)): (1, 4 * piece, 3 * piece)}
    scattered = manual(lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True), x, PartitionSpec("data", None), both)
    assert scattered == {("reduce-scatter", ("tensor",)): (1, part, part * 3 / 4)}
    passed = manual(lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), x, both, both)
    assert passed == {("collective-permute", ("data",)): (1, piece, piece)}
    columns = PartitionSpec("data", "tensor")
    turned = manual(lambda x: jax.lax.all_to_all(x, "tensor", 1, 0, tiled=True), x, both, columns)
    assert turned == {("all-to-all", ("tensor",)): (1, piece, piece * 3 / 4)}
    summed = manual(lambda x: jax.lax.psum(x, ("data", "tensor")), x, both, PartitionSpec(None, None))
    assert summed == {("all-reduce", ("data", "tensor")): (1, piece, 2 * piece * 7 / 8)}


TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%fused_product (p0: bf16[128,512], p1: bf16[4,512,256], p2: s32[]) -> bf16[128,256] {
  %p0 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[4,512,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,512,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p1, %p2, %zero, %zero), dynamic_slice_sizes={1,512,256}
  %flat = bf16[512,256]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %convolution = bf16[128,256]{1,0:T(8,128)(2,1)} convolution(%p0, %flat), dim_labels=bf_io->bf
}

%scatter (input: f32[256,64]) -> f32[64,64] {
  %input = f32[256,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[256,64]{1,0:T(8,128)} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  %id = u32[] partition-id()
  %start = s32[] convert(%id)
  %nought = s32[] constant(0)
  ROOT %part = f32[64,64]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %start, %nought), dynamic_slice_sizes={64,64}
}, execution_thread="sparsecore"

%condition (carried: (s32[], bf16[128,512], bf16[4,512,256], /*index=3*/s32[])) -> pred[] {
  %carried = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)}, bf16[4,512,256]{2,1,0:T(8,128)(2,1)}, /*index=3*/s32[]) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%carried), index=0
  %limit = s32[]{:T(128)} get-tuple-element(%carried), index=3
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%body (carry: (s32[], bf16[128,512], bf16[4,512,256], /*index=3*/s32[])) -> (s32[], bf16[128,512], bf16[4,512,256], s32[]) {
  %carry = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)}, bf16[4,512,256]{2,1,0:T(8,128)(2,1)}, /*index=3*/s32[]) parameter(0)
  %now = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %two = s32[]{:T(128)} constant(2)
  %copied = s32[]{:T(128)S(6)} copy(%now)
  %next = s32[]{:T(128)} add(%copied, %two)
  %x = bf16[128,512]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %w = bf16[4,512,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %end = s32[] get-tuple-element(%carry), index=3
  %permute-start = (bf16[128,512]{1,0:T(8,128)(2,1)}, bf16[128,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  %product = bf16[128,256]{1,0:T(8,128)(2,1)} fusion(%x, %w, %copied), kind=kOutput, calls=%fused_product, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, backend_config={"window_config":{"estimated_cycles":"5000"}}
  %permute-done = bf16[128,512]{1,0:T(8,128)(2,1)} collective-permute-done(%permute-start)
  ROOT %carry.1 = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)}, bf16[4,512,256]{2,1,0:T(8,128)(2,1)}, /*index=3*/s32[]) tuple(%next, %permute-done, %w, %end)
}

ENTRY %main (x.1: bf16[128,512], w.1: bf16[4,512,256], g: f32[256,64]) -> f32[64,64] {
  %first = s32[]{:T(128)} constant(0)
  %last = s32[]{:T(128)} constant(8)
  %x.1 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[4,512,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %g = f32[256,64]{1,0:T(8,128)} parameter(2)
  %tuple = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)}, bf16[4,512,256]{2,1,0:T(8,128)(2,1)}, /*index=3*/s32[]) tuple(%first, %x.1, %w.1, %last)
  %while = (s32[]{:T(128)}, bf16[128,512]{1,0:T(8,128)(2,1)}, bf16[4,512,256]{2,1,0:T(8,128)(2,1)}, /*index=3*/s32[]) while(%tuple), condition=%condition, body=%body
  ROOT %fusion = f32[64,64]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%scatter
}
"""


def test_the_dialect_of_tpu_programs_is_read():
    program = hlo.parse(TPU_PROGRAM)
    assert program.partitions == 8
    loop = program.entry.by_name["while"]
    assert hlo.trip_count(program, program.entry, loop) == 4  # from 0 to 8 by 2, the limit being carried through
    products = 2 * 128 * 512 * 256
    seconds = products / 1e12
    cost = timeline.walk(program, machine(lambda sent: 3 * seconds if sent.kind == "collective-permute" else 7.0))
    assert cost.flops == 4 * products
    kinds = {sent.collective.kind: sent for sent in cost.sent.values()}
    permute, scatter = kinds["collective-permute"], kinds["reduce-scatter"]
    assert permute.count == 4
    assert permute.collective.bytes == 128 * 512 * 2
    assert collectives.axes_of(permute.collective, AXES) == ("tensor",)
    assert scatter.collective.bytes == 256 * 64 * 4  # an all-reduce of which each device keeps its part
    assert collectives.axes_of(scatter.collective, AXES) == ("tensor",)
    # The product runs between start and done and hides as much as it takes; what follows nothing is exposed altogether.
    traffic = (128 * 512 + 512 * 256 + 128 * 256) * 2  # of the stack of four only the slice
    busy = max(seconds, traffic / 1e11)
    assert permute.exposed == pytest.approx(4 * (3 * seconds - busy)) if 3 * seconds > busy else permute.exposed == 0
    assert scatter.exposed == 7.0
    assert cost.cycles == 4 * 5000


def test_groups_and_convolutions_of_every_notation():
    assert collectives.replica_groups("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", 4) == ((0, 2), (1, 3))
    assert collectives.replica_groups("replica_groups={{0,1},{2,3}}", 4) == ((0, 1), (2, 3))
    assert collectives.replica_groups("replica_groups={}", 3) == ((0, 1, 2),)
    along = collectives.replica_groups("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a'}, use_global_device_ids=true", 8)
    assert along == ((0, 4), (1, 5), (2, 6), (3, 7))
    half = collectives.replica_groups("replica_groups=mesh['a'=2,'c'=4] {'c':(2)2}", 8)
    assert half == ((0, 1), (2, 3), (4, 5), (6, 7))
    both = collectives.replica_groups("replica_groups=mesh['a'=2,'c'=4] {'a','c'}", 8)
    assert both == (tuple(range(8)),)
    for comma in ("", ","):  # a mesh whose axes are the other way round than the devices' numbers
        turned = f"replica_groups=mesh['axis_0'=4,'axis_1'=2]{comma} device_ids=([2,4]T(1,0)) "
        assert collectives.replica_groups(f"{turned}{{'axis_0'}}, dimensions={{0}}", 8) == ((0, 1, 2, 3), (4, 5, 6, 7))
        assert collectives.replica_groups(f"{turned}{{'axis_1'}}", 8) == ((0, 4), (1, 5), (2, 6), (3, 7))
    listed = collectives.replica_groups("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", 4)
    assert listed == ((0, 2), (1, 3))
    # A TPU writes a product of 8 pairs of matrices as one convolution, of whose window one place in 8 is not empty.
    text = """\
HloModule m

ENTRY %main (a: bf16[8,16,32], b: bf16[8,32,64]) -> bf16[8,16,64] {
  %a = bf16[8,16,32]{2,1,0} parameter(0)
  %b = bf16[8,32,64]{2,1,0} parameter(1)
  ROOT %c = bf16[8,16,64]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""
    program = hlo.parse(text)
    assert hlo.product_flops(program.entry, program.entry.root) == 2 * 8 * 16 * 32 * 64


@pytest.mark.parametrize(
    "groups",
    [
        "mesh['a'=2,'b'=4], device_ids=([2,4]R(1,0)) {'a'}", "mesh['a'=2,'b'=4], devices=(0) {'a'}", "mesh['a'=2] {'b'}",
        "mesh['a'=2,'b'=4], device_ids=(0,1) {'a'}", "mesh['a'=2,b=4] {'a'}", "[2,4]", "{0,1}", "all",
    ],
)  # fmt: skip
def test_groups_in_another_notation_are_an_error(groups):
    with pytest.raises(UserError, match="which is not understood: use the compiler"):
        collectives.replica_groups(f"channel_id=1, replica_groups={groups}, dimensions={{0}}", 8)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("ROOT %fusion = f32[64,64]{1,0:T(8,128)} fusion", "ROOT %fusion = f32<64,64> fusion"),
        ("ROOT %fusion = f32[64,64]", "ROOT %fusion = what[64,64]"),
        ("ROOT %fusion = f32", "ROOT %fusion: = f32"),
        ("ENTRY %main (", "  %between = s32[] constant(0)\nENTRY %main ("),
        ("ENTRY %main (", "MAIN: {\nENTRY %main ("),
        ("  ROOT %fusion", "  %late = f32[] all-gather-done(%first)\n  ROOT %fusion"),
        ("  ROOT %fusion", "  %new = f32[] teleport-start(%first)\n  ROOT %fusion"),
    ],
)
def test_text_of_a_program_that_is_not_understood_is_an_error(text, other):
    assert text in TPU_PROGRAM
    with pytest.raises(UserError, match="which is not understood: use the compiler"):
        timeline.walk(hlo.parse(TPU_PROGRAM.replace(text, other)), machine(lambda sent: 1.0))


@pytest.mark.parametrize("opcode", collectives.ASYNC_CALLS)
def test_a_call_that_is_started_runs_beside_what_follows(opcode):
    def text(inner):
        return f"""
%inner (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} {inner}
}}

ENTRY %e (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %s = ((f32[8]{{0}}), f32[8]{{0}}, u32[]) {opcode}(%a), calls=%inner
  %b = f32[8]{{0}} add(%a, %a)
  ROOT %d = f32[8]{{0}} {opcode.replace("start", "done")}(%s)
}}
"""

    cost = timeline.walk(hlo.parse(text("negate(%p)")), machine())
    assert cost.seconds == pytest.approx(96 / 1e11) and not cost.sent  # the addition, and the call beside it
    gather = "all-reduce(%p), replica_groups={{0,1}}, to_apply=%sum"
    cost = timeline.walk(hlo.parse(text(gather)), machine())
    assert [one.exposed for one in cost.sent.values()] == [pytest.approx(1.0 - 96 / 1e11)]


STEP = "jit(step)/transpose(jvp(Transformer))/while/body/closed_call/checkpoint"


@pytest.mark.parametrize(
    ("traced", "found"),
    [
        (
            "jit(step)/jvp(Transformer)/while/body/closed_call/layers/layers._branch/mlp/up/dot_general",
            ("forward", "mlp/up"),
        ),
        (f"{STEP}/rematted_computation/layers/layers._branch/mlp/gate/dot_general", ("again", "mlp/gate")),
        (f"{STEP}/layers/layers._branch/attention/out/dot_general", ("backward", "attention/out")),
        (f"{STEP}/jit(_splash_attention)/splash_mha_dkv_segmented/pallas_call", ("backward", "splash dkv")),
        ("jit(step)/add", ("other", "add")),
    ],
)
def test_work_is_told_by_the_pass_and_the_part_of_the_network(traced, found):
    text = f'ENTRY %e (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n  ROOT %b = f32[8]{{0}} add(%a, %a), metadata={{op_name="{traced}"}}\n}}'
    cost = timeline.walk(hlo.parse(text), machine())
    assert cost.work == {found: timeline.Work(cost.seconds, 0.0)}


def test_the_state_has_the_bytes_that_its_arrays_have():
    c = tiny_config(parallel__mesh="fsdp=4 tensor=2", train__ema=0.9)
    mesh = mesh_of("fsdp=4 tensor=2")
    module, optimizer, _ = compiler.parts(c, compiler.stages(c))
    make, abstract = compiler.init_state(module, optimizer, c, mesh)
    state = make(jax.random.key(0))

    def held(tree):
        device = mesh.devices.flat[3]
        return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)

    assert compiler.state_bytes(abstract) == {
        "parameters": held(state.params),
        "frozen": 0.0,
        "optimizer": held(state.opt_state),
        "average": held(state.ema),
    }


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        ("RESOURCE_EXHAUSTED: CompileTimeHbmOom: ... total memory required (38.84G) exceeds available HBM (30.74G)", 38.84, 30.74),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.38T) exceeds available HBM (95.74G).", 2.38 * 1024, 95.74),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 97.05G of 95.74G hbm. Exceeded hbm capacity by 1.31G.", 97.05, 95.74),
    ],
)  # fmt: skip
def test_a_refusal_is_read(message, needed, available):
    refusal = compiler.read_refusal(message)
    assert refusal is not None
    assert refusal.needed == pytest.approx(needed * 2**30)
    assert refusal.available == pytest.approx(available * 2**30)
    assert compiler.read_refusal("INVALID_ARGUMENT: something else") is None


# ------------------------------------------------------------------ on paper


def paper(c, topology="h100:8"):
    c = compiler.resolve(c, platform="gpu")
    sizes = compiler.stages(c)
    return analytic.plan(c, parse_topology(topology), sizes.stages[-1])


POLICIES = ("full", "save_qkv_proj", "save_dot_except_mlp", "selective", "none")  # each keeps more than the one before


def test_formulas_move_as_they_should():
    def of(**changes):
        return paper(tiny_config(**{"parallel__mesh": "fsdp=8", "train__batch_size": 64, **changes}))

    plain = of()
    assert of(parallel__mesh="data=8").memory["optimizer"] > 3 * plain.memory["optimizer"]
    by_policy = [of(model__remat=policy).memory["activations kept"] for policy in POLICIES]
    assert by_policy == sorted(by_policy)
    assert of(train__micro_batches=4).memory["logits"] == plain.memory["logits"] / 4
    assert of(model__remat="full").flops > plain.flops
    tensor = of(parallel__mesh="fsdp=4 tensor=2")
    assert {flow.axes for flow in tensor.flows} == {("fsdp",), ("tensor",)}
    sequence = of(parallel__mesh="fsdp=4 tensor=2", parallel__sequence=True, model__remat="full")
    whole = of(parallel__mesh="fsdp=4 tensor=2", model__remat="full")
    assert sequence.memory["activations kept"] == whole.memory["activations kept"] / 2
    assert plain.memory["peak"] == pytest.approx(sum(v for k, v in plain.memory.items() if k != "peak"))


def test_a_gpu_plan_says_that_it_is_on_paper_and_what_it_costs(tmp_path, capsys):
    spec = str(ROOT / "configs" / "models" / "llama.py") + ":tiny"
    arguments = ["plan", "--config", spec, "--topology", "h100:4", "--price", "2.5", "--out", str(tmp_path / "p.json")]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "on paper" in said
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["run"]["price"] == pytest.approx(2.5 * plan["run"]["chip_hours"])
    assert plan["fits"]
    too_wide = ["--config.model.width=65536", "--config.model.layers=64", "--config.model.mlp_width=262144"]
    assert cli.main([*arguments[:5], *too_wide]) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v9:4x4x4"], "it can be v4"),
        (["--topology", "v5p:4x4"], "torus of 3 dimensions"),
        (["--topology", "h100:4x4"], "h100:64"),
        (["--topology", "h100:6"], "cannot be spread"),
        (["--topology", "h100:4", "--config.train.duration=2 epochs"], "tokens or steps"),
        (["--topology", "h100:4", "--save-executable", "x"], "works for TPUs only"),
    ],
)
def test_a_plan_that_cannot_be_made_is_told_with_its_mend(arguments, says, capsys):
    spec = str(ROOT / "configs" / "models" / "llama.py") + ":tiny"
    assert cli.main(["plan", "--config", spec, *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_search_tries_the_config_first_and_only_what_can_be():
    c = tiny_config(parallel__mesh="fsdp=4 tensor=2", train__batch_size=64, train__micro_batches=2)
    topology = parse_topology("h100:8")
    chosen = search.promising(c, topology, count=6)
    assert chosen[0] == {}
    assert len({str(changes) for changes in chosen}) == len(chosen) == 6
    for changes in chosen:
        made = search.changed(c, changes)
        assert math.prod(compiler.abstract_mesh(made, devices=8).shape.values()) == 8
    tried = search.search(c, topology, trials=2)
    changes, plan = search.best(tried)
    assert plan["fits"]


def test_links_of_a_torus():
    topology = parse_topology("v5p:4x4x8")
    assert wraps(topology) == (True, True, True)
    assert wraps(parse_topology("v5e:4x16")) == (False, True)
    assert wraps(parse_topology("v5p:2x2x1")) == (False, False, False)

    class Device:
        def __init__(self, *coords):
            self.coords, self.slice_index = coords, 0

    places = [Device(x, y, z) for x in range(4) for y in range(4) for z in range(8)]
    mesh = {"data": 4, "fsdp": 4, "tensor": 8}
    seconds, channels = link_model(topology, places, mesh)
    ring = collectives.Collective("all-gather", (tuple(range(8)),), 8e9)
    assert seconds(ring) == pytest.approx(7e9 / 200e9)  # two links of 100 GB/s
    plane = collectives.Collective("all-gather", (tuple(range(32)),), 8e9)
    assert seconds(plane) == pytest.approx(8e9 * 31 / 32 / 400e9)
    forward = collectives.Collective("collective-permute", tuple((i, (i + 1) % 8) for i in range(8)), 1e9)
    backward = collectives.Collective("collective-permute", tuple((i, (i - 1) % 8) for i in range(8)), 1e9)
    assert channels(forward) == (("tensor", 1),)
    assert channels(backward) == (("tensor", -1),)


@pytest.mark.parametrize("objective", ["causal", "span", "masked", "infill", "multi_token"])
def test_plans_know_the_batches_of_every_objective(objective):
    more = {"multi_token": {"model__ahead": 2}, "masked": {"model__direction": "bidirectional"}}.get(objective, {})
    c = tiny_config(objective__name=objective, model__vocab_size=512, **more)
    mesh = mesh_of("data=2")
    batch = compiler.abstract_batch(c, mesh, rows=8)
    assert {"tokens", "targets", "weights"} <= set(batch)
    assert all(len(leaf.shape) == 2 and leaf.shape[0] == 8 for leaf in batch.values())


# ------------------------------------------------------------------ the TPU's own compiler

TPU = """
import json, sys
from argparse import Namespace
from pathlib import Path
from llmjax import config
from llmjax.scaling.command import run
def plan(c, **given):
    asked = {"slices": 1, "price": None, "search": False, "trials": 8, "paper": False, "out": None, "save_executable": None}
    return run(Namespace(**asked | given), c)
spec, out = sys.argv[1:]
tiny = config.load(spec, overrides=["parallel.mesh=fsdp=2 tensor=2", "model.remat=full", "model.vocab_size=320", "model.attention=dot_product", "parallel.compiler=('xla_enable_async_all_gather=true',)"])
status = plan(tiny, topology="v5e:2x2", out=Path(out), save_executable=Path(out).with_suffix(".steps"))
large = config.load(spec, overrides=["parallel.mesh=fsdp=4", "model.attention=dot_product", "model.width=8192", "model.heads=64", "model.kv_heads=0", "model.head_size=128", "model.layers=16", "model.vocab_size=320"])
print(json.dumps({"status": status, "too large": plan(large, topology="v5e:2x2")}))
"""  # fmt: skip


def test_the_tpu_compiler_plans_a_tiny_run_and_refuses_a_large_one(tmp_path):
    pytest.importorskip("libtpu")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", TPU, f"{ROOT}/configs/models/llama.py:tiny", str(tmp_path / "plan.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"status": 0, "too large": 3}
    assert "DOES NOT FIT" in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    m = plan["memory"]
    assert m["parameters"] + m["optimizer"] <= m["arguments"] <= m["peak"] < plan["available"]
    assert {axis for one in plan["collectives"] for axis in one["axes"]} <= {"fsdp", "tensor"}
    assert sum(one["sent"] for one in plan["collectives"]) > 0
    assert plan["flops"]["executed"] > 0.5 * plan["flops"]["model"]
    assert 0 < plan["mfu"] < 1
    assert plan["not_counted"]["loops"] == 0
    assert render(plan) in done.stdout
    header = json.loads((tmp_path / "plan.steps").read_bytes().split(b"\n", 1)[0])
    assert header["for"]["device"] == "TPU v5 lite"
    assert header["for"]["options"] == {"xla_enable_async_all_gather": "true"}
    assert list(header["programs"]) == ["16 rows in 1"]


def test_the_tpu_compiler_takes_the_kernel_for_experts(tmp_path):
    """And executes little more than the model asks for: XLA's own product of the gradients is one of all rows for each expert."""
    pytest.importorskip("libtpu")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    code = "import sys; from llmjax import cli; sys.exit(cli.main())"
    changes = ["--config.model.width=256", "--config.model.dtype=bfloat16", "--config.model.mlp_width=512"]
    arguments = ["--config", f"{ROOT}/configs/models/mixtral.py:tiny", "--topology", "v5e:2x2", *changes]
    command = [sys.executable, "-c", code, "plan", *arguments, "--out", str(tmp_path / "plan.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["flops"]["model"] < plan["flops"]["executed"] < 1.5 * plan["flops"]["model"]


def test_make_plan_is_what_the_command_prints():
    c = compiler.resolve(tiny_config(), platform="gpu")
    plan = make_plan(c, parse_topology("a100:1"), price=1.0)
    assert "tokens/s a chip" in render(plan)


def test_a_machine_with_the_compiler_and_no_tpu_is_not_asked_for_one(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(accelerators.Path, "glob", lambda path, pattern: iter(()))
    assert start.platforms() == {"JAX_PLATFORMS": "cpu"}
    monkeypatch.setattr(
        accelerators.Path, "glob", lambda path, pattern: iter([path] if pattern.startswith("accel") else ())
    )
    assert start.platforms() == {}
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    assert start.platforms() == {}
