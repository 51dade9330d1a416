"""Preparation of the first step: devices, the number of steps, the state, compiled programs."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llmjax import human
from llmjax.config import changes
from llmjax.config.values import flatten
from llmjax.data.ramp import BatchSizes, Stage, batch_sizes
from llmjax.data.source import Source
from llmjax.errors import UserError
from llmjax.model import init
from llmjax.model.transformer import Transformer
from llmjax.objectives import Objective
from llmjax.parallel import compiler_options, pipeline, placement, processes
from llmjax.parallel import mesh as meshes
from llmjax.startup import malloc
from llmjax.train import base, checkpoint, folders, hardware, initial
from llmjax.train import budget as budgets
from llmjax.train import optimizer as optimizers
from llmjax.train.budget import Budget
from llmjax.train.checkpoint import Restored
from llmjax.train.frozen import combine, split
from llmjax.train.heldout import Evaluate
from llmjax.train.programs import ANY_STEPS, Programs, make_programs
from llmjax.train.rewind import Skip, batch_number, skips_of
from llmjax.train.step import Batch, State, batch_shardings
from llmjax.train.sync import Flags, Sync

MakeSource = Callable[[int], Source]  # from the number of steps of the run; 0: not known yet, only a step is timed
MakeEvaluate = Callable[[Mesh, Any], Evaluate]  # from the mesh and the abstract parameters


@dataclass(frozen=True)
class Run:
    """A run before its next step."""

    mesh: Mesh
    sizes: BatchSizes
    total: int  # steps
    first: int  # steps taken so far
    state: State
    meta: dict[str, Any]  # of the checkpoint that the run continues
    source: Source
    skips: list[Skip]
    changed: dict[str, Any]  # settings that differ from that checkpoint: key -> (before, now)
    batch: Batch | None  # the next one; None: no step is left
    programs: Mapping[Stage, Callable[..., Any]]
    arguments: tuple[Any, ...]  # of each program after state and batch
    evaluate: Evaluate | None
    sync: Sync
    budget: Budget | None
    peak: float  # FLOP/s of all devices; 0: not known
    started: float  # time.perf_counter() at the start of the command
    phases: dict[str, float]  # seconds of each part of the preparation

    def next_batch(self, state: State, step: int) -> Batch:
        """The batch of a step (from 0), on the devices; `state` is the one before the step."""
        made = self.source.batch(batch_number(step, self.skips), combine(state.params, state.frozen))
        return on_devices(made, self.mesh)


def on_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's rows of a batch as its part of the global arrays."""
    sharding = batch_shardings(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def prepare(
    c: ConfigDict,
    workdir: Path,
    *,
    module: Transformer,
    objective: Objective,
    make_source: MakeSource,
    tokens_per_epoch: int,
    make_evaluate: MakeEvaluate | None,
    initial_params: Callable[[Any], Any] | None,
    started: float | None,
) -> Run:
    """Everything before the first step; arguments and errors as of `loop.train`."""
    began = time.perf_counter()
    sizes = batch_sizes(c.train, tokens_per_epoch=tokens_per_epoch)
    mesh, peak = _devices(c, sizes)
    sync = Sync(mesh)
    processes.barrier()
    sync.wait(Flags())  # the first program that needs the others, while all are here
    factory = make_programs(c, placement.on_mesh(module, mesh, c), objective, sizes, mesh)
    before = time.perf_counter()
    total, budget, programs = _steps(c, workdir, factory, make_source)
    measured = time.perf_counter() - before  # a step was compiled there, if its time had to be measured

    restored = _state(c, workdir, factory, total, initial_params)
    changed = _changed(c, restored.meta)
    state, meta, first = restored.state, restored.meta, restored.meta["step"]
    if first > total:
        raise UserError(
            f"the run has taken {first:,} steps, and train.duration={c.train.duration!r} is {total:,}: give at least as "
            "many, or another --workdir"
        )
    source = make_source(total)
    if c.train.rewind.factor and not source.stateless:
        raise UserError(
            "train.rewind.factor skips batches, which those that depend on the run so far do not allow: set it to 0"
        )
    source.restore(restored.source)
    jax.block_until_ready(state)
    found = processes.broadcast_from_first(lambda: [[skip.step, skip.batches] for skip in skips_of(workdir, meta)])
    skips = [Skip(*skip) for skip in found]
    started = began if started is None else started
    phases = {"data": began - started, "devices and state": time.perf_counter() - began - measured}
    began = time.perf_counter()

    run = Run(
        mesh=mesh, sizes=sizes, total=total, first=first, state=state, meta=meta, source=source,
        skips=skips, changed=changed, batch=None, programs=programs, arguments=factory.arguments(total), evaluate=None,
        sync=sync, budget=budget, peak=peak, started=started, phases=phases,
    )  # fmt: skip
    batch = run.next_batch(state, first) if first < total else None
    if batch is not None:
        rows = sizes.at(first).rows
        for stage in sizes.stages:  # all of them now: one that does not fit should not be found out after days
            if stage not in programs and sizes.at(first).first_step <= stage.first_step < total:
                programs[stage] = factory.compile(stage, batch, rows=rows, total_steps=total)
    abstract = factory.abstract
    averaged = abstract.params if abstract.ema is None else abstract.ema
    evaluate = None if make_evaluate is None else make_evaluate(mesh, combine(averaged, abstract.frozen))
    processes.barrier()
    malloc.give_back_freed()
    phases["compile"] = time.perf_counter() - began + measured
    return dataclasses.replace(run, batch=batch, evaluate=evaluate)


def _devices(c: ConfigDict, sizes: BatchSizes) -> tuple[Mesh, float]:
    """The mesh, and the peak FLOP/s of its devices."""
    mesh = meshes.make_mesh(c.parallel.mesh, slices=c.parallel.slices)
    check_rows(c, sizes, ways=meshes.row_ways(mesh))
    peak, peak_source = hardware.peak_flops(jax.devices()[0], device_count=mesh.size)
    processes.say(f"devices: {meshes.describe(mesh)}; peak {human.count(peak)}FLOP/s ({peak_source})")
    if c.parallel.compiler:
        processes.say(f"compiler options: {compiler_options.describe(c.parallel.compiler, mesh.devices.flat[0])}")
    for stage in sizes.stages:
        if said := pipeline.describe(c, mesh, rows=stage.rows // stage.micro_batches):
            processes.say(f"pipeline: {said}")
    return mesh, peak


def check_rows(c: ConfigDict, sizes: BatchSizes, *, ways: int) -> None:
    """Raise UserError unless the rows of every micro-batch can be spread over so many devices."""
    for stage in sizes.stages:
        rows = stage.rows // stage.micro_batches
        if rows % ways:
            ramp = f" of the stage of the batch ramp from step {stage.first_step:,}" if len(sizes.stages) > 1 else ""
            raise UserError(
                f"train.batch_size / train.micro_batches = {stage.rows} / {stage.micro_batches} = {rows} sequences{ramp} "
                f"cannot be spread over {ways} devices ({' x '.join(meshes.ROWS)} of parallel.mesh={c.parallel.mesh!r}): change "
                f"{'train.batch_start or ' if ramp else ''}one of them"
            )


def steps_of(c: ConfigDict, sizes: BatchSizes) -> int:
    """The number of steps of a `train.duration` that is no time. Raises UserError if it is less than one."""
    total = sizes.steps(c.train.duration)
    if total < 1:
        raise UserError(f"train.duration={c.train.duration!r} is less than one step of {sizes.tokens(1):,} tokens")
    return total


def _steps(
    c: ConfigDict, workdir: Path, factory: Programs, make_source: MakeSource
) -> tuple[int, Budget | None, dict[Stage, Any]]:
    """The number of steps, the budget of time, and the compiled program if the number had to be measured."""
    if not budgets.is_time(c):
        return steps_of(c, factory.sizes), None, {}
    if (budget := budgets.known(c, workdir)) is not None:
        return budget.steps, budget, {}
    source, (stage,) = make_source(0), factory.sizes.stages
    if not source.stateless:
        raise UserError(
            f"train.duration={c.train.duration!r}: the time of a step cannot be measured where batches depend on the run so "
            "far: give steps or tokens"
        )
    example = on_devices(source.batch(0, None), factory.mesh)
    program = factory.compile(stage, example, rows=stage.rows, total_steps=ANY_STEPS)
    arguments = factory.arguments(ANY_STEPS)

    def step(state: State, k: int) -> tuple[State, Any]:
        return program(state, on_devices(source.batch(k, None), factory.mesh), *arguments)

    def pace(seconds: float) -> float:
        thrown_away = factory.make_state(jax.random.key(c.seed))
        return budgets.seconds_per_step(step, thrown_away, seconds=seconds)

    budget = budgets.measure_steps(c, workdir, pace)
    return budget.steps, budget, {stage: program}


def _changed(c: ConfigDict, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a training that differ from its checkpoint's. A key that the checkpoint lacks had its default."""
    if "config" not in meta:
        return {}
    before, now = flatten(meta["config"]), flatten(c.to_dict())
    groups = ("model", "objective", "optimizer", "schedule", "train")
    found = changes.changed(before, now)
    return {key: values for key, values in found.items() if key.partition(".")[0] in groups}


def _copied(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(jnp.array(x, like.dtype, copy=True), like.sharding)


def _with_new(made: Any, read: Any) -> Any:
    """The parameters that were read, and of those that were made the ones that were not."""
    found = traverse_util.flatten_dict(made, sep="/") | traverse_util.flatten_dict(read, sep="/")
    return traverse_util.unflatten_dict(found, sep="/")


def _name_base(c: ConfigDict, workdir: Path, frozen: Any) -> str:
    """Note in the run which checkpoint has its frozen parameters: that checkpoint; "": there is none."""
    found = initial.base_of(c, workdir, frozen)
    if found is None:
        return ""
    base.write(workdir / "checkpoints", found)
    return found.absolute


def _follow_base(c: ConfigDict, checkpoints: Path) -> None:
    if c.train.init_from and folders.steps_in(checkpoints):
        base.follow(checkpoints, folders.newest(Path(c.train.init_from)))


def _state(
    c: ConfigDict, workdir: Path, factory: Programs, total: int, initial_params: Callable[[Any], Any] | None
) -> Restored:
    """The state of the newest checkpoint, or a new one."""
    folder, abstract = workdir / "checkpoints", factory.abstract
    folder.mkdir(parents=True, exist_ok=True)
    processes.broadcast_from_first(lambda: _follow_base(c, folder))
    restored = checkpoint.restore(folder, abstract)
    if restored is not None:
        processes.say(f"resuming from step {restored.meta['step']:,} of {total:,}")
        return restored
    # Read first: reading takes three times the memory of the parameters, for a moment.
    read = None if initial_params is None else initial_params(combine(abstract.params, abstract.frozen))
    state = factory.make_state(jax.random.key(c.seed))
    if read is not None:
        params, frozen = split(_with_new(combine(state.params, state.frozen), read), c)
        ema = None if abstract.ema is None else jax.tree.map(_copied, params, abstract.ema)
        state = dataclasses.replace(state, params=params, frozen=frozen, ema=ema)
    if named := processes.broadcast_from_first(partial(_name_base, c, workdir, abstract.frozen)):
        processes.say(f"base: {named}, whose parameters are frozen and not copied")
    else:
        checkpoint.save_frozen(folder, state.frozen)
    whole = combine(state.params, state.frozen)
    factors = optimizers.scales_of(c.optimizer, whole, model=c.model)
    processes.say(init.parameter_table(whole, shardings=jax.tree.map(lambda x: x.sharding, whole), factors=factors))
    processes.say(optimizers.table(c.optimizer, state.params, model=c.model))
    return Restored(state, {"step": 0, "train_seconds": 0.0}, {})
