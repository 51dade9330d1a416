"""The training loop, the only one. Commands differ by the objective, the batches and the evaluation they hand to it.

Order at a step that is due for several things: the checkpoint is written first, then the evaluation runs, so that
nothing that can fail stands between a trained step and the disk. Metrics are fetched one step late, so the device
never waits for the host. SIGTERM and Ctrl-C save and stop; the same command then goes on. Several processes go through
the same steps; what depends on a clock or a signal of one of them, they agree on (`agree.py`).
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llmjax import human
from llmjax.data.ramp import Stage, batch_sizes
from llmjax.errors import UserError
from llmjax.model import init
from llmjax.model.count import flops_per_token
from llmjax.model.transformer import Transformer
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import mesh as meshes
from llmjax.parallel import pipeline, placement, processes
from llmjax.stopping import Stopped
from llmjax.train import checkpoint, executable, hardware, hunt, metrics
from llmjax.train import optimizer as optimizers
from llmjax.train.agree import Agreement, Wishes
from llmjax.train.frozen import combine, split
from llmjax.train.rewind import Spikes, batch_number
from llmjax.train.schedule import make_schedule
from llmjax.train.step import Batch, batch_shardings, init_state, lower_step, make_train_step

Evaluate = Callable[[Any], dict[str, float]]


def train(
    c: ConfigDict,
    workdir: Path,
    *,
    module: Transformer,
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    tokens_per_epoch: int,
    make_evaluate: Callable[[jax.sharding.Mesh], Evaluate] | None = None,
    initial_params: Callable[[Any], Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    started: float | None = None,
) -> dict[str, float | int | str]:
    """Train `module` and return the final numbers of the run.

    Args:
        c: the resolved config (model.vocab_size set).
        workdir: the run; its checkpoints/ and metrics.jsonl are continued when they exist.
        batches: step k -> iterator over this host's batches k, k + 1, ...
        tokens_per_epoch: for durations in epochs.
        make_evaluate: mesh -> (parameters -> named numbers), run every `train.eval_every`.
        initial_params: abstract parameters -> parameters to start from instead of random ones.
        notes: what else every checkpoint says about itself, for JSON.
        started: time.perf_counter() at the start of the command, for the report of the time to the first step.

    Raises:
        UserError: for a mesh that does not fit, checkpoints that cannot be read, too many bad steps.
        Stopped: after SIGTERM or SIGINT, once the state is saved.
    """
    started = time.perf_counter() if started is None else started
    phases = {"data": time.perf_counter() - started}
    sizes = batch_sizes(c.train, tokens_per_epoch=tokens_per_epoch)

    # ------------------------------------------------------------------ devices
    phase = time.perf_counter()
    mesh = meshes.make_mesh(c.parallel.mesh, slices=c.parallel.slices)
    ways = meshes.row_ways(mesh)
    for stage in sizes.stages:
        rows = stage.rows // stage.micro_batches
        if rows % ways:
            ramp = f" of the stage of the batch ramp from step {stage.first_step:,}" if len(sizes.stages) > 1 else ""
            raise UserError(
                f"train.batch_size / train.micro_batches = {stage.rows} / {stage.micro_batches} = {rows} sequences{ramp} "
                f"cannot be spread over {ways} devices ({' x '.join(meshes.ROWS)} of parallel.mesh={c.parallel.mesh!r}): change "
                f"{'train.batch_start or ' if ramp else ''}one of them"
            )
    peak, peak_source = hardware.peak_flops(jax.devices()[0], device_count=mesh.size)
    print(f"devices: {meshes.describe(mesh)}; peak {human.count(peak)}FLOP/s ({peak_source})")
    for stage in sizes.stages:
        if said := pipeline.describe(c, mesh, rows=stage.rows // stage.micro_batches):
            print(f"pipeline: {said}")

    agreement = Agreement(mesh)
    processes.meet()
    agreement.last(Wishes())  # the first program that needs the others, while all are here

    # ------------------------------------------------------------------ optimizer and schedule
    total = sizes.steps(c.train.duration)
    if total < 1:
        raise UserError(f"train.duration={c.train.duration!r} is less than one step of {sizes.tokens(1):,} tokens")
    schedule = make_schedule(c.schedule, total_steps=total, sizes=sizes)
    optimizer = optimizers.make_optimizer(c.optimizer, schedule, model=c.model)

    # ------------------------------------------------------------------ state: resumed, given, or new
    make_state, abstract = init_state(module, optimizer, c, mesh)
    folder = workdir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    restored = checkpoint.restore(folder, abstract)
    if restored is not None:
        state, meta = restored
        print(f"resuming from step {meta['step']:,} of {total:,}")
    else:
        state = make_state(jax.random.key(c.seed))
        if initial_params is not None:
            params, frozen = split(initial_params(combine(abstract.params, abstract.frozen)), c.optimizer.train)
            ema = jax.tree.map(lambda x: x.copy(), params) if c.train.ema else None
            state = dataclasses.replace(state, params=params, frozen=frozen, ema=ema)
        checkpoint.save_frozen(folder, state.frozen)
        meta = {"step": 0, "train_seconds": 0.0}
        whole = combine(state.params, state.frozen)
        print(init.parameter_table(whole, shardings=jax.tree.map(lambda x: x.sharding, whole)))
        print(optimizers.table(c.optimizer, state.params, model=c.model))
    first = meta["step"]
    has_row = processes.from_first(lambda: metrics.keep_rows(workdir / "metrics.jsonl", up_to=first))
    spikes = Spikes(c.train.rewind, meta.get("spikes"))
    jax.block_until_ready(state)
    phases["devices and state"] = time.perf_counter() - phase

    # ------------------------------------------------------------------ compile
    phase = time.perf_counter()
    rows_sharding = batch_shardings(mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    key = jax.jit(lambda: jax.random.key(c.seed + 1), out_shardings=everywhere)()  # made in each process
    stream = batches(batch_number(first, spikes.skips))

    def next_batch() -> Batch:
        return {k: jax.make_array_from_process_local_data(rows_sharding, v) for k, v in next(stream).items()}

    def compile_step(batch: Batch, stage: Stage) -> Any:
        """The step for a stage's batches, of which `batch` may have another number of rows."""
        like = {
            k: jax.ShapeDtypeStruct((len(v) * stage.rows // rows, *v.shape[1:]), v.dtype, sharding=v.sharding)
            for k, v in batch.items()
        }
        step_fn = make_train_step(
            module, OBJECTIVES[c.objective.name], optimizer, schedule, c, micro_batches=stage.micro_batches
        )
        lowered = lower_step(step_fn, abstract, like, key, mesh=mesh, c=c)
        if c.train.executable:
            return executable.load(Path(c.train.executable), executable.name_of(stage), lowered, c=c, mesh=mesh)
        return lowered.compile()

    programs = {}
    if first < total:
        batch, rows = next_batch(), sizes.at(first).rows
        for stage in sizes.stages:  # all of them now: one that does not fit should not be found out after days
            if sizes.at(first).first_step <= stage.first_step < total:
                programs[stage] = compile_step(batch, stage)
    evaluate = make_evaluate(mesh) if make_evaluate is not None else None
    processes.meet()
    phases["compile"] = time.perf_counter() - phase

    # ------------------------------------------------------------------ the loop
    flops = flops_per_token(c.model, sequence_length=c.train.sequence_length)
    eval_every, save_every, keep_every = (
        sizes.period(value, total_steps=total)
        for value in (c.train.eval_every, c.checkpoint.every, c.checkpoint.keep_every)
    )
    checkpoints = checkpoint.manager(folder, keep=c.checkpoint.keep, keep_every=keep_every)
    writer = metrics.Writer(workdir, tensorboard=c.train.tensorboard, silent=not processes.is_first())
    progress = metrics.Progress(total=total, every=c.train.log_every)
    clock = metrics.Clock(meta["train_seconds"])
    born = processes.from_first(lambda: metrics.first_start(workdir, train_seconds=meta["train_seconds"]))
    agreed, several = Wishes(), processes.count() > 1
    examine: Callable[..., dict[str, Any]] | None = None
    spike: int | None = None  # the step since which the loss has been high, once that is a spike
    hunted = ""  # what was not finite first in the last bad step
    step, last_saved, stopping, started_at = first, first, False, first
    seconds_before, began, last_save, last_row = clock.seconds, time.perf_counter(), time.perf_counter(), clock.seconds
    signals: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: signals.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}

    def make_row(step: int, values: dict[str, jax.Array]) -> dict[str, Any]:
        """Wait for a step and turn its metrics into a row. Raises UserError after too many bad steps."""
        nonlocal last_row, spike
        numbers = {k: float(v) for k, v in jax.device_get(values).items()}
        now = clock.seconds
        rate = (sizes.tokens(step) - sizes.tokens(step - 1)) / max(now - last_row, 1e-9)
        last_row = now
        bad = int(numbers.pop("bad_in_a_row"))
        gradients_finite = math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])
        if bad == 1 and c.train.hunt_nan:
            hunt_step(step, gradients_finite)
        if bad >= c.train.max_bad_steps:
            raise UserError(
                f"the {'updates' if gradients_finite else 'gradients'} were not finite in {bad} steps in a row, up to step {step}; the parameters are as they "
                f"were before. {hunted}Lower optimizer.learning_rate, raise optimizer.epsilon, look at the batches, or set model.dtype=float32, and run "
                f"again: it goes on from the last checkpoint in {folder}"
            )
        if numbers["target_tokens"]:  # without any there is no loss
            spike = spikes.see(step, numbers["loss"])
        slowest = {"host_step_seconds_max": agreed.seconds, "slowest_host": agreed.slowest} if several else {}
        return {
            "step": step,
            **numbers,
            "skipped": int(numbers["skipped"]),
            "batch_size": sizes.at(step - 1).rows,
            "tokens": sizes.tokens(step),
            "flops": sizes.tokens(step) * flops,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / mesh.size,
            "mfu": rate * flops / peak if peak else None,
            "train_seconds": now,
            "goodput": now / max(time.time() - born, now, 1e-9),
            **slowest,
            **({"rewinds": len(spikes.skips)} if spikes.skips else {}),
        }

    def hunt_step(step: int, gradients_finite: bool) -> None:
        """Say what was not finite first in a step that was skipped, whose batch and parameters are still those at hand."""
        nonlocal examine, hunted
        parts = sizes.at(step - 1).micro_batches
        examine = examine or hunt.make_examine(module, OBJECTIVES[c.objective.name], c, mesh)
        step_key = jax.random.fold_in(key, step - 1)
        found = (examine(combine(state.params, state.frozen), batch, step_key, part, parts) for part in range(parts))
        hunted = hunt.warn((hunt.explain(one, c.model) for one in found), step=step, gradients_finite=gradients_finite)
        progress.note(hunted)
        hunted = f"{hunted.removeprefix('WARNING: ')}. "

    def go_back(since: int, seen: int) -> int | None:
        """Return to before a spike of the loss and skip its batches; the step to go on from, None if there is none."""
        nonlocal state, stream, spikes, clock, writer, last_row
        checkpoints.wait_until_finished()
        saved = processes.from_first(lambda: list(checkpoints.all_steps()))
        target = spikes.choose(saved, since=since)
        if target is None:
            progress.note(f"WARNING: the loss is high since step {since:,}, and no checkpoint is from before: going on")
            spikes.forget()
            return None
        skip = spikes.skip(back_to=target, seen=seen)
        progress.note(
            f"WARNING: the loss is high since step {since:,}: going back to step {target:,} and skipping {skip.batches:,} "
            f"batches (time {len(spikes.skips)} of {c.train.rewind.limit})"
        )
        for later in sorted(step for step in saved if step > target)[::-1]:
            checkpoints.delete(later)  # a start after a kill must not go on from inside the spike
        jax.tree.map(lambda x: x.delete(), state)
        state, meta = checkpoint.restore_step(folder / str(target), abstract)
        spikes = Spikes(c.train.rewind, {**meta.get("spikes", {}), "skips": spikes.state["skips"]})
        stream = batches(batch_number(target, spikes.skips))
        writer.close()
        processes.from_first(lambda: metrics.keep_rows(workdir / "metrics.jsonl", up_to=target))
        writer = metrics.Writer(workdir, tensorboard=c.train.tensorboard, silent=not processes.is_first())
        clock = metrics.Clock(meta["train_seconds"])
        last_row = clock.seconds
        return target

    def save(row: dict[str, Any]) -> None:
        """Start writing a checkpoint; the row goes with it, for a kill between the two files."""
        nonlocal last_save, last_saved
        last_save, last_saved = time.perf_counter(), row["step"]
        if row["step"] not in checkpoints.all_steps():
            meta = {"step": row["step"], "train_seconds": clock.seconds, "tokens": row["tokens"], "seed": c.seed}
            meta |= {"spikes": spikes.state, **(notes or {})}
            checkpoint.save(
                checkpoints, state, step=row["step"], meta={**meta, "row": metrics.clean(row), "config": c.to_dict()}
            )

    def due_for_eval(step: int) -> bool:
        return evaluate is not None and (step == total or bool(eval_every and step % eval_every == 0))

    def evaluated(row: dict[str, Any]) -> dict[str, Any]:
        assert evaluate is not None
        with placement.active(mesh, c):
            row = {**row, **evaluate(combine(state.params if state.ema is None else state.ema, state.frozen))}
        bits = f", {row['heldout_bits_per_byte']:.4f} bits per byte" if "heldout_bits_per_byte" in row else ""
        if "heldout_accuracy" in row and not bits:
            bits = f", {row['heldout_accuracy']:.2%} right"
        progress.note(f"step {row['step']:,}: loss {row['loss']:.3f}, held-out loss {row['heldout_loss']:.4f}{bits}")
        return row

    def finish(row: dict[str, Any]) -> None:
        writer.write(row)
        pace = (clock.seconds - seconds_before) / max(row["tokens"] - sizes.tokens(first), 1)
        progress.show(row, seconds_left=pace * (sizes.tokens(total) - row["tokens"]))

    pending: tuple[int, dict[str, jax.Array]] | None = None
    try:
        if first and not has_row:
            last = {**meta["row"], "loss": float("nan") if meta["row"]["loss"] is None else meta["row"]["loss"]}
            finish(evaluated(last) if due_for_eval(first) else last)
        clock.start()
        while step < total and not stopping:
            step += 1
            own = time.perf_counter()
            if step > started_at + 1:
                batch = next_batch()
            with jax.transfer_guard("disallow"):
                state, values = programs[sizes.at(step - 1)](state, batch, key)
            timed = c.checkpoint.every_seconds and time.perf_counter() - last_save > c.checkpoint.every_seconds
            # Signals are read once: one that comes later stops after the next step.
            agreed = agreement.ask(Wishes(bool(signals), bool(timed), time.perf_counter() - own))
            if pending is not None:
                finish(make_row(*pending))
            pending = (step, values)
            if phases.get("first step") is None:
                jax.block_until_ready(values)
                phases["first step"] = clock.seconds - seconds_before
                spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
                progress.note(f"first step {time.perf_counter() - started:.1f} s into the stage: {spent}")
            stopping = agreed.stop
            timed = agreed.save and not (several and last_saved == step - 1)  # asked for while it was being done
            must_save = step == total or timed or stopping or (save_every and step % save_every == 0)
            ready = c.train.hunt_nan or (not several and values["loss"].is_ready())
            row: dict[str, Any] | None = None
            if spike is None and (must_save or due_for_eval(step) or ready):
                row = make_row(*pending)
                pending = None
            if spike is not None:
                clock.stop()
                back = go_back(spike, seen=step if row is not None else step - 1)
                spike = None
                if back is not None:
                    step = last_saved = back
                    pending, batch, started_at = None, next_batch(), back
                    clock.start()
                    continue
                clock.start()
            if row is None and pending is not None and (must_save or due_for_eval(step)):
                row = make_row(*pending)
                pending = None
            if row is not None:
                clock.stop()
                if must_save:
                    save(row)
                if due_for_eval(step):
                    row = evaluated(row)
                finish(row)
                clock.start()
        checkpoints.wait_until_finished()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        progress.close()
        writer.close()
        checkpoints.close()
    if stopping or agreement.last(Wishes(stop=bool(signals))).stop:
        by = signal.Signals(signals[0]).name if signals else "a signal to another process"
        raise Stopped(f"stopped by {by}, saved in {folder}; the same command goes on")

    # ------------------------------------------------------------------ the numbers
    leaves = jax.tree_util.tree_leaves_with_path(combine(state.params, state.frozen))
    parameters = sum(leaf.size for _, leaf in leaves)
    embeddings = sum(leaf.size for path, leaf in leaves if "embedding" in placement.path_name(path))
    rate = sizes.tokens(total) / max(clock.seconds, 1e-9)
    return {
        "steps": total,
        "loss": processes.from_first(
            lambda: metrics.tail_mean(workdir / "metrics.jsonl", "loss", count=max(10, total // 100))
        ),
        "tokens": sizes.tokens(total),
        "flops": sizes.tokens(total) * flops,
        "train_seconds": clock.seconds,
        "wall_seconds": time.perf_counter() - began,
        "goodput": clock.seconds / max(time.time() - born, clock.seconds, 1e-9),
        "compile_seconds": phases["compile"],
        "first_step_seconds": sum(phases.values()),
        "tokens_per_second": rate,
        "mfu": rate * flops / peak if peak else "unknown",
        "skipped": int(state.skipped),
        "parameters": parameters,
        "parameters_without_embeddings": parameters - embeddings,
        "device": meshes.describe(mesh),
        "checkpoint_step": total,
    }
