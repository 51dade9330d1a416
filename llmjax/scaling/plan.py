"""`llmjax plan`: memory, communication, time and cost of a run on a pod, as a dictionary that is written as JSON.

For TPUs the real step is compiled and its program is read. For GPUs all numbers are by formula, and so they are for TPUs
where one asks for it. Units are bytes, seconds,
FLOPs and US dollars, of one device unless the key says otherwise. A device is a chip; on TPU7x it is half a chip.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llmjax import config, storage
from llmjax.data.ramp import BatchSizes, Stage
from llmjax.errors import UserError
from llmjax.parallel import compiler_options, pipeline
from llmjax.parallel import mesh as meshes
from llmjax.scaling import analytic, compiler, hlo, post, timeline
from llmjax.scaling.collectives import axes_of
from llmjax.scaling.topology import Topology, compiler_lock, devices, link_model
from llmjax.train import executable

HOUR, DAY = 3600.0, 86400.0
SMALL = 0.002  # of a step: work that is not told
CHIPS_OF_HOST = 4  # of a TPU slice of several hosts
Plan = dict[str, Any]


def make_plan(
    c: ConfigDict, topology: Topology, *, price: float | None = None, save: Path | None = None, paper: bool = False
) -> Plan:
    """The plan of a run on a topology.

    Args:
        price: US dollars for an hour of one chip; None: the list price.
        save: write the compiled steps of all batch sizes of the run to this file.
        paper: plan by formula where there is a compiler, too.

    Raises UserError for a mesh that does not fit the devices, the model or the batch, if steps cannot be saved, and for
    rows of an objective that the compiler is not given.
    """
    with compiler_lock() if topology.chip.torus and not paper else nullcontext():
        return plan_locked(c, topology, price=price, save=save, paper=paper)


def plan_locked(
    c: ConfigDict, topology: Topology, *, price: float | None = None, save: Path | None = None, paper: bool = False
) -> Plan:
    """`make_plan` for a caller that holds the compiler's lock."""
    tpu = topology.chip.torus > 0
    if tpu and not paper and c.data.format == "conversations" and c.objective.name != "causal":
        raise UserError(
            f"the compiler is given rows of tokens, and those of objective.name={c.objective.name} hold more: plan by "
            "formula, with --paper"
        )
    c = compiler.resolve(c, platform="tpu" if tpu else "gpu")
    sizes = compiler.stages(c)
    stage = sizes.stages[-1]
    plan = facts(c, topology, sizes, stage)
    formula = post.plan(c, topology, stage)
    plan["on_paper"] = {"memory": formula.memory, "seconds": formula.seconds}
    plan["checkpoint"] = _checkpoint(c, topology)
    if tpu and not paper:
        mesh = mesh_on(c, topology)
        _compile(plan, c, topology, mesh, sizes, stage, save)
    else:
        if save is not None:
            raise UserError("--save-executable works for TPUs only, and not with --paper: leave it out")
        _on_paper(plan, formula)
    if plan["fits"]:
        plan["run"] = _run(plan, topology, sizes, price)
    return plan


def mesh_on(c: ConfigDict, topology: Topology) -> Mesh:
    """The mesh over the devices of a topology, with neighbours of the torus along the last axes."""
    return meshes.make_mesh(c.parallel.mesh, devices=devices(topology), slices=topology.slices)


def facts(c: ConfigDict, topology: Topology, sizes: BatchSizes, stage: Stage) -> Plan:
    """The numbers that need no compilation."""
    axes = compiler.abstract_mesh(c, devices=topology.devices).shape
    tokens = stage.rows * c.train.sequence_length
    flops = analytic.token_flops(c).model
    plan = {
        "config": c.name,
        "topology": str(topology),
        "chips": topology.chips,
        "devices": topology.devices,
        "mesh": {axis: size for axis, size in axes.items() if size > 1},
        "settings": {
            "rows": stage.rows,
            "micro_batches": stage.micro_batches,
            "sequence_length": c.train.sequence_length,
            "remat": c.model.remat,
            "attention": c.model.attention,
            "zero": c.parallel.zero,
            "sequence_over_tensor": c.parallel.sequence,
            "features_over_tensor": c.parallel.features,
            "optimizer": c.optimizer.name,
            "duration": c.train.duration,
        },
        "parameters": analytic.parameter_count(c),
        "tokens_per_step": tokens,
        "flops": {"model_per_token": flops, "model": flops * tokens / topology.devices},
        "available": topology.chip.usable / topology.chip.devices,
        "peak_flops": topology.chip.flops / topology.chip.devices,
    }
    if axes["pipeline"] > 1:
        rows = stage.rows // stage.micro_batches // _ways(axes)
        count = pipeline.parts(c, stages=axes["pipeline"], rows=rows)
        idle = pipeline.bubble(stages=axes["pipeline"], parts=count, rounds=c.parallel.rounds)
        plan["pipeline"] = {"parts": count, "rounds": c.parallel.rounds, "bubble": idle}
    return plan


def _ways(axes: Mapping[str, int]) -> int:
    ways = 1
    for axis in meshes.ROWS:
        ways *= axes[axis]
    return ways


def _compile(
    plan: Plan, c: ConfigDict, topology: Topology, mesh: Mesh, sizes: BatchSizes, stage: Stage, save: Path | None
) -> None:
    """Add the numbers of the compiler."""
    plan["made_by"] = f"jax {metadata.version('jax')}, libtpu {metadata.version('libtpu')}"
    plan["exact"] = True
    options = compiler_options.choose(c.parallel.compiler, mesh.devices.flat[0])
    plan["compiler_options"] = {"chosen": list(c.parallel.compiler), "options": options}
    try:
        made = compiler.compile_stage(c, mesh, sizes, stage)
    except compiler.DoesNotFitError as refusal:
        if save is not None:
            raise UserError(f"nothing is saved: the step does not fit ({refusal})") from refusal
        plan |= {"fits": False, "refusal": str(refusal)}
        plan["memory"] = {
            "peak": refusal.needed,
            **compiler.state_bytes(compiler.abstract_state(c, mesh.abstract_mesh)),
        }
        plan["available"] = refusal.available or plan["available"]
        plan["over_by"] = max(refusal.needed - plan["available"], 0.0)
        return
    plan["seconds_to_trace"], plan["seconds_to_compile"] = made.trace_seconds, made.compile_seconds
    plan["memory"] = compiler.state_bytes(made.abstract) | compiler.compiled_bytes(made.compiled)
    plan["fits"] = True  # the compiler refuses programs that do not
    if config.parse_duration(c.train.eval_every)[0] and c.train.eval_batches:
        _evaluation(plan, c, mesh, made)
    read_program(plan, made.compiled.as_text(), topology, mesh)
    if save is not None:
        programs = {executable.name_of(stage): (made.lowered, made.compiled)}
        for other in sizes.stages[:-1]:
            one = compiler.compile_stage(c, mesh, sizes, other)
            programs[executable.name_of(other)] = (one.lowered, one.compiled)
        plan["executable"] = {"file": str(save), "bytes": executable.save(save, programs, mesh=mesh, options=options)}


def _evaluation(plan: Plan, c: ConfigDict, mesh: Mesh, made: compiler.Compiled) -> None:
    """Add the memory while held-out text is measured, beside the state of the training."""
    try:
        needed = compiler.evaluation_bytes(c, mesh, made)
    except compiler.DoesNotFitError as refusal:
        needed = refusal.needed
    plan["memory"]["evaluation"] = needed
    if needed > max(plan["available"], plan["memory"]["peak"]):
        refusal_text = "the measurement of held-out text does not fit: raise train.micro_batches"
        plan |= {"fits": False, "refusal": refusal_text, "over_by": needed - plan["available"]}


def read_program(plan: Plan, text: str, topology: Topology, mesh: Mesh) -> None:
    """Add the numbers of the program's text: FLOPs, collectives, time."""
    program = hlo.parse(text)
    chip = topology.chip
    link_seconds, channels = link_model(topology, compiler.device_order(mesh), mesh.shape)
    machine = timeline.Machine(chip.flops / chip.devices, chip.bandwidth / chip.devices, link_seconds, channels)
    cost = timeline.walk(program, machine)
    plan["flops"] |= {"executed": cost.flops, "recomputed": max(cost.flops - plan["flops"]["model"], 0.0)}
    groups: dict[tuple[str, tuple[str, ...]], dict[str, float]] = {}
    for sent in cost.sent.values():
        one = groups.setdefault(
            (sent.collective.kind, axes_of(sent.collective, mesh.shape)),
            dict.fromkeys(("count", "bytes", "sent", "seconds", "exposed"), 0.0),
        )
        one["count"] += sent.count
        one["bytes"] += sent.collective.bytes * sent.count
        one["sent"] += sent.collective.moved * sent.count
        one["seconds"] += sent.seconds
        one["exposed"] += sent.exposed
    plan["collectives"] = [
        {"kind": kind, "axes": list(axes), **numbers}
        for (kind, axes), numbers in sorted(
            groups.items(), key=lambda item: -item[1]["exposed"] - 1e-9 * item[1]["bytes"]
        )
    ]
    plan["seconds"] = {
        "products": cost.flops / machine.flops,
        "memory": cost.bytes / machine.bandwidth,
        "busy": cost.busy,
        "exposed": sum(one["exposed"] for one in groups.values()),
        "waits": cost.waits,
        "step": cost.seconds,
    }
    if chip.clock:
        timed = timeline.walk(
            program, timeline.Machine(machine.flops, machine.bandwidth, link_seconds, channels, chip.clock)
        )
        plan["seconds"]["compiler"] = timed.seconds
    plan["work"] = [
        {"phase": phase, "part": part, "seconds": work.seconds, "at_peak": work.at_peak}
        for (phase, part), work in sorted((timed if chip.clock else cost).work.items(), key=lambda one: -one[1].seconds)
        if work.seconds > SMALL * plan["seconds"]["step"]
    ]
    plan["not_counted"] = {"kernels": cost.kernels, "loops": cost.unknown_loops}
    _mfu(plan)


def _on_paper(plan: Plan, paper: analytic.Paper) -> None:
    plan["exact"] = False
    plan["memory"] = paper.memory
    plan["fits"] = paper.memory["peak"] <= plan["available"]
    if not plan["fits"]:
        plan["over_by"] = paper.memory["peak"] - plan["available"]
    plan["flops"] |= {"executed": paper.flops, "recomputed": paper.flops - plan["flops"]["model"]}
    plan["collectives"] = [
        {"kind": f.kind, "axes": list(f.axes), "sent": f.bytes, "why": f.why, "hidden": f.hidden} for f in paper.flows
    ]
    plan["seconds"] = {"products": paper.seconds["compute"], **paper.seconds}
    _mfu(plan)


def _mfu(plan: Plan) -> None:
    ideal = plan["flops"]["model"] / plan["peak_flops"]
    plan["mfu"] = ideal / plan["seconds"]["step"]
    if "compiler" in plan["seconds"]:
        plan["mfu_by_compiler"] = ideal / plan["seconds"]["compiler"]


def _checkpoint(c: ConfigDict, topology: Topology) -> dict[str, float]:
    """Bytes of a checkpoint: the state, once, in all and from each host if hosts write equal parts."""
    state = compiler.abstract_state(c, compiler.abstract_mesh(c, devices=topology.devices))
    kept = (state.params, state.opt_state, state.ema)
    size = float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)))
    hosts = max(1, topology.chips // (topology.chip.node or CHIPS_OF_HOST))
    return {"bytes": size, "hosts": hosts, "bytes_of_host": size / hosts}


def _run(plan: Plan, topology: Topology, sizes: BatchSizes, price: float | None) -> dict[str, Any]:
    """Steps, and at least so many days, dollars and watt-hours, of the whole run: no step takes less time than planned.

    Small batches of a ramp count with the same speed for each token.
    """
    total = sizes.steps(plan["settings"]["duration"])
    tokens = sizes.tokens(total)
    seconds = tokens / plan["tokens_per_step"] * max(plan["seconds"]["step"], plan["seconds"].get("compiler", 0.0))
    chip = topology.chip
    rate = chip.price if price is None else price
    hours = seconds / HOUR * topology.chips
    return {
        "steps": total,
        "tokens": tokens,
        "days": seconds / DAY,
        "tokens_per_second_per_chip": tokens / seconds / topology.chips,
        "chip_hours": hours,
        "price_per_chip_hour": rate,
        "price_source": "given" if price is not None else chip.sources.get("price", ""),
        "price": hours * rate if rate else None,
        "megawatt_hours": hours * chip.watts / 1e6,
        "watts": chip.watts,
        "watts_source": chip.sources["watts"],
    }


def write(plan: Plan, path: Path) -> None:
    """Write a plan as JSON."""
    storage.write_json(path, plan)
