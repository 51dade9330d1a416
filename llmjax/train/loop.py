"""The only training loop. Commands hand it the objective, the source of batches, what is frozen and the evaluation.

A step that is due for a checkpoint and an evaluation saves before it evaluates. Metrics are fetched one step late, so
the device never waits for the host. SIGTERM and Ctrl-C save and stop, and the same command goes on later. A spike of the
loss also ends the loop, and the stage starts it again from an earlier checkpoint (rewind.py). Several processes take the
same steps: the clock or signal of one of them becomes a flag that all of them exchange (sync.py).
"""

import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from llmjax.errors import Stopped
from llmjax.model.transformer import Transformer
from llmjax.objectives import Objective
from llmjax.parallel import processes
from llmjax.train import checkpoint, hunt
from llmjax.train.frozen import combine
from llmjax.train.journal import Journal
from llmjax.train.setup import MakeEvaluate, MakeSource, Run, prepare
from llmjax.train.step import Batch, State
from llmjax.train.sync import Flags


def train(
    c: ConfigDict,
    workdir: Path,
    *,
    module: Transformer,
    objective: Objective,
    make_source: MakeSource,
    tokens_per_epoch: int = 0,
    make_evaluate: MakeEvaluate | None = None,
    initial_params: Callable[[Any], Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    started: float | None = None,
) -> dict[str, float | int | str]:
    """Train `module` and return the final numbers of the run.

    Args:
        c: the resolved config (model.vocab_size set).
        workdir: the run; its checkpoints/ and metrics.jsonl are continued if they exist.
        objective: the loss.
        make_source: (number of steps of the run) -> the source of its batches.
        tokens_per_epoch: for durations in epochs.
        make_evaluate: (mesh, abstract parameters) -> (parameters -> named numbers), run every `train.eval_every`. It
            should compile its programs before it returns.
        initial_params: abstract parameters -> parameters to start from instead of random ones.
        notes: further entries of every checkpoint's metadata, for JSON.
        started: time.perf_counter() at the start of the command, for the report of the time to the first step.

    Raises:
        UserError: for a mesh that does not fit, checkpoints that cannot be read, too many bad steps.
        Stopped: after SIGTERM or SIGINT, once the state is saved.
        Spike: when `train.rewind` is on and there is a step to go back to: call `rewind.go_back`, then this again.
    """
    run = prepare(
        c, workdir, module=module, objective=objective, make_source=make_source, tokens_per_epoch=tokens_per_epoch,
        make_evaluate=make_evaluate, initial_params=initial_params, started=started,
    )  # fmt: skip
    state, batch, sizes, step, total = run.state, run.batch, run.sizes, run.first, run.total
    eval_every, save_every, keep_every = (
        sizes.period(value, total_steps=total)
        for value in (c.train.eval_every, c.checkpoint.every, c.checkpoint.keep_every)
    )
    checkpoints = checkpoint.manager(workdir / "checkpoints", keep=c.checkpoint.keep, keep_every=keep_every)
    journal = Journal(c, workdir, run, checkpoints, notes=notes or {})
    clock, several = journal.clock, processes.count() > 1
    find_bad = _hunter(c, module, objective, run) if c.train.hunt_nan else None
    signals: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: signals.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}

    def due_for_eval(step: int) -> bool:
        return run.evaluate is not None and (step == total or bool(eval_every and step % eval_every == 0))

    pending: tuple[Any, ...] | None = None  # the step before; its row is made while the device is busy
    flags = Flags()
    try:
        if step and not journal.has_row:
            journal.write(journal.last_row(state, evaluate=due_for_eval(step)))
        if c.train.eval_first and not step and run.evaluate is not None:
            journal.evaluate_first(state)
        clock.start()
        while step < total and not flags.stop:
            own = time.perf_counter()
            batch = run.next_batch(state, step) if batch is None else batch
            step += 1
            with jax.transfer_guard("disallow"):
                state, values = run.programs[sizes.at(step - 1)](state, batch, *run.arguments)
            timed = c.checkpoint.every_seconds and own - journal.last_save > c.checkpoint.every_seconds
            # Signals are read once: one that comes later stops after the next step.
            flags = run.sync.exchange(Flags(bool(signals), bool(timed), time.perf_counter() - own))
            if pending is not None:
                journal.write(journal.row(*pending, flags=flags))
            pending = (step, values, run.source.metrics())
            if step == run.first + 1:
                journal.first_step(values)
            # One of several processes may ask for a checkpoint while it is being written.
            timed = flags.save and not (several and journal.last_saved == step - 1)
            must_save = step == total or timed or flags.stop or bool(save_every and step % save_every == 0)
            ready = c.train.hunt_nan or (not several and values["loss"].is_ready())
            if must_save or due_for_eval(step) or ready:
                row = journal.row(*pending, flags=flags, hunt=find_bad and partial(find_bad, state, batch, step))
                pending = None
                clock.stop()
                if must_save:
                    journal.save(state, row)
                if due_for_eval(step):
                    row = journal.evaluated(state, row)
                journal.write(row)
                clock.start()
            batch = None
        checkpoints.wait_until_finished()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        try:
            journal.close()
        finally:  # a save that is left to the end of the process is cut off
            checkpoints.close()
    if flags.stop or run.sync.wait(Flags(stop=bool(signals))).stop:
        by = signal.Signals(signals[0]).name if signals else "a signal to another process"
        saved = "saved" if journal.last_saved == step else f"last saved after step {journal.last_saved:,}"
        raise Stopped(f"stopped by {by}, {saved} in {workdir / 'checkpoints'}; the same command goes on")
    return journal.results(state)


def _hunter(
    c: ConfigDict, module: Transformer, objective: Objective, run: Run
) -> Callable[[State, Batch, int, bool], str]:
    """(state, batch, step, whether its gradients were finite) -> the first value that was not finite, in words.

    The step was skipped, so the state is still the one that the batch met.
    """
    examine = hunt.make_examine(module, objective, c, run.mesh)

    def find(state: State, batch: Batch, step: int, gradients_finite: bool) -> str:
        parts = run.sizes.at(step - 1).micro_batches
        params, key = combine(state.params, state.frozen), jax.random.fold_in(run.arguments[0], step - 1)
        found = (examine(params, batch, key, part, parts) for part in range(parts))
        said = (hunt.explain(one, c.model) for one in found)
        return hunt.warn(said, step=step, gradients_finite=gradients_finite)

    return find
