"""Records of the loop: the rows of metrics.jsonl, the progress line, checkpoints, and checks that training is well."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llmjax import storage
from llmjax.config import changes
from llmjax.errors import Diverged
from llmjax.model.count import flops_per_token
from llmjax.parallel import chips, compiler_options, placement, processes
from llmjax.parallel import mesh as meshes
from llmjax.train import checkpoint, folders, metrics
from llmjax.train.frozen import combine
from llmjax.train.noise import NoiseScale
from llmjax.train.rewind import Spike, Spikes
from llmjax.train.setup import Run
from llmjax.train.step import State
from llmjax.train.sync import Flags

# How the note of an evaluation words its numbers; others go by their names.
SAID = {
    "heldout_loss": "held-out loss {:.4f}",
    "heldout_bits_per_byte": "{:.4f} bits per byte",
    "heldout_accuracy": "{:.2%} right",
}


BEFORE = Path("train") / "before.json"


class Journal:
    """Writes the rows and checkpoints of a run, and keeps the clock of its training time."""

    def __init__(
        self, c: ConfigDict, workdir: Path, run: Run, checkpoints: checkpoint.Manager, *, notes: Mapping[str, Any]
    ) -> None:
        """`notes`: further entries of every checkpoint's metadata, for JSON."""
        first, before = run.first, run.meta["train_seconds"]
        self._c, self._run, self._workdir, self._checkpoints, self._notes = c, run, workdir, checkpoints, notes
        self._path = workdir / "metrics.jsonl"
        self.has_row = processes.broadcast_from_first(
            lambda: metrics.keep_rows(self._path, up_to=first)
        )  # of the last step
        self._born = processes.broadcast_from_first(lambda: metrics.first_start(workdir, train_seconds=before))
        self._writer = metrics.Writer(workdir, tensorboard=c.train.tensorboard, silent=not processes.is_first())
        self._progress = metrics.Progress(total=run.total, every=c.train.log_every)
        self.clock = metrics.Clock(before)
        self._before = self._last_row = before
        self._spikes = Spikes(c.train.rewind, run.meta.get("spikes"), skips=run.skips)
        self._noise = NoiseScale(run.meta.get("noise", ()))
        self._dollars = _price(c, run.mesh) * run.mesh.size / 3600  # a second
        self._flops = flops_per_token(c.model, sequence_length=c.train.sequence_length)
        # Settings that changed, and at which step.
        now = [{"step": first, "settings": run.changed}] if run.changed else []
        self._changes = [*run.meta.get("changes", ()), *now]
        self._hunted = ""  # what was not finite first, in words
        self.last_saved = first  # step, and when
        self.last_save = self._began = time.perf_counter()

    # ------------------------------------------------------------------ a step

    def row(
        self,
        step: int,
        values: dict[str, jax.Array],
        sampled: dict[str, float],
        *,
        flags: Flags,
        hunt: Callable[[bool], str] | None = None,
    ) -> dict[str, Any]:
        """Wait for a step and make its row.

        Args:
            sampled: the source's numbers about the batch.
            flags: of all processes, a step late.
            hunt: (whether the gradients were finite) -> the first value that was not finite in this step, in words.

        Raises:
            Diverged: after too many steps in a row that were not finite.
            Spike: when the loss has been high for too long and there is a checkpoint from before.
        """
        run, sizes = self._run, self._run.sizes
        numbers = {k: float(v) for k, v in jax.device_get(values).items()}
        now = self.clock.seconds
        rate = (sizes.tokens(step) - sizes.tokens(step - 1)) / max(now - self._last_row, 1e-9)
        self._last_row = now
        self._check_finite(step, numbers, hunt)
        if numbers["target_tokens"]:  # without any there is no loss
            self._check_spike(step, numbers["loss"])
        else:
            self._progress.note(f"WARNING: the batch of step {step:,} has no token to learn, and changes nothing")
        if "gradient_signal" in numbers:
            numbers["noise_scale"] = self._noise.see(numbers["gradient_signal"], numbers["gradient_noise"])
        several = processes.count() > 1
        return {
            "step": step,
            **numbers,
            **sampled,
            "skipped": int(numbers["skipped"]),
            "batch_size": sizes.at(step - 1).rows,
            "tokens": sizes.tokens(step),
            "flops": sizes.tokens(step) * self._flops,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / run.mesh.size,
            "mfu": rate * self._flops / run.peak if run.peak else None,
            "train_seconds": now,
            **({"dollars": now * self._dollars} if self._dollars else {}),
            "goodput": self._goodput(now),
            **({"host_step_seconds_max": flags.seconds, "slowest_host": flags.slowest} if several else {}),
            **({"rewinds": len(run.skips)} if run.skips else {}),
            **({"changed": changes.described(run.changed)} if run.changed and step == run.first + 1 else {}),
        }

    def _check_finite(self, step: int, numbers: dict[str, float], hunt: Callable[[bool], str] | None) -> None:
        bad = int(numbers.pop("bad_in_a_row"))
        gradients_finite = math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])
        if bad == 1 and hunt is not None:
            said = hunt(gradients_finite)
            self._progress.note(said)
            self._hunted = f"{said.removeprefix('WARNING: ')}. "
        if bad >= self._c.train.max_bad_steps:
            self._checkpoints.wait_until_finished()
            saved = folders.steps_in(self._workdir / "checkpoints")
            raise Diverged(
                f"the {'updates' if gradients_finite else 'gradients'} were not finite in {bad} steps in a row, up to step "
                f"{step}; the parameters are as they were before. {self._hunted}Lower optimizer.learning_rate, raise "
                "optimizer.epsilon, look at the batches, or set model.dtype=float32, and run again: it goes on from "
                f"{f'the checkpoint of step {saved[0]:,}' if saved else 'the beginning'}, from before these steps"
            )

    def _check_spike(self, step: int, loss: float) -> None:
        since = self._spikes.see(step, loss)
        if since is None:
            return
        self._checkpoints.wait_until_finished()
        saved = processes.broadcast_from_first(lambda: list(self._checkpoints.all_steps()))
        target = self._spikes.choose(saved, since=since)
        if target is not None:
            raise Spike(since, seen=step, back_to=target, skips=self._run.skips)
        self._progress.note(
            f"WARNING: the loss is high since step {since:,}, and no checkpoint is from before: going on"
        )
        self._spikes.forget()

    def last_row(self, state: State, *, evaluate: bool) -> dict[str, Any]:
        """The row of the checkpoint's step, for a run that was killed before it wrote the row."""
        kept = self._run.meta["row"]
        row = {**kept, "loss": math.nan if kept["loss"] is None else kept["loss"]}
        return self.evaluated(state, row) if evaluate else row

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and show it."""
        self._writer.write(row)
        sizes, run = self._run.sizes, self._run
        pace = (self.clock.seconds - self._before) / max(row["tokens"] - sizes.tokens(run.first), 1)
        self._progress.show(row, seconds_left=pace * (sizes.tokens(run.total) - row["tokens"]))

    def first_step(self, values: Any) -> None:
        """Wait for the first step, and print where the time before it went."""
        jax.block_until_ready(values)
        phases = self._run.phases
        phases["first step"] = self.clock.seconds - self._before
        spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
        self._progress.note(f"first step {time.perf_counter() - self._run.started:.1f} s into the stage: {spent}")

    # ------------------------------------------------------------------ now and then

    def save(self, state: State, row: dict[str, Any]) -> None:
        """Start writing a checkpoint. It holds the row too, in case of a kill between the two files.

        Nothing is saved while steps are bad, so that a checkpoint from before them stays. The last step of a run is
        always saved: bad steps are skipped and leave the parameters as they were.

        Raises:
            Diverged: when the run ends with parameters that are not finite.
        """
        step, c, total = row["step"], self._c, self._run.total
        if step == total and not math.isfinite(row["param_norm"]):
            raise Diverged(
                f"the parameters of step {step:,} are not finite, and are not saved: delete the newest checkpoints in "
                f"{self._workdir / 'checkpoints'}, lower optimizer.learning_rate, and run again"
            )
        if step < total and int(state.bad_in_a_row):
            return
        self.last_save, self.last_saved = time.perf_counter(), step
        if step in self._checkpoints.all_steps():
            return
        meta = {
            "step": step, "train_seconds": self.clock.seconds, "tokens": row["tokens"], "seed": c.seed,
            "spikes": self._spikes.state, "noise": self._noise.state, "row": metrics.clean(row), "config": c.to_dict(),
            "changes": self._changes, **self._notes,
        }  # fmt: skip
        if self._run.budget is not None:
            meta["budget"] = asdict(self._run.budget)
        checkpoint.save(self._checkpoints, state, step=step, meta=meta, source=self._run.source.state())

    def evaluated(self, state: State, row: dict[str, Any]) -> dict[str, Any]:
        """Evaluate, print the numbers, and return the row with them."""
        assert self._run.evaluate is not None
        with placement.active(self._run.mesh, self._c):
            found = self._run.evaluate(combine(state.params if state.ema is None else state.ema, state.frozen))
        told = {name: value for name, value in found.items() if "/" not in name} or found
        if "heldout_bits_per_byte" in told:
            told.pop("heldout_accuracy", None)
        said = [
            SAID.get(name, name.replace("{", "").replace("}", "") + " {:.4g}").format(v) for name, v in told.items()
        ]
        where = f"step {row['step']:,}: loss {row['loss']:.3f}" if row["step"] else "before the first step"
        self._progress.note(", ".join([where, *said]))
        return {**row, **found}

    def evaluate_first(self, state: State) -> None:
        """Evaluate before the first step. `results` has the numbers, as "before/NAME"."""
        found = self.evaluated(state, {"step": 0, "loss": math.nan})
        numbers = {f"before/{name}": value for name, value in found.items() if name not in ("step", "loss")}
        processes.broadcast_from_first(lambda: storage.write_json(self._workdir / BEFORE, numbers))

    # ------------------------------------------------------------------ the end

    def results(self, state: State) -> dict[str, float | int | str]:
        """The final numbers of the run."""
        run, sizes, total = self._run, self._run.sizes, self._run.total
        leaves = jax.tree_util.tree_leaves_with_path(combine(state.params, state.frozen))
        parameters = sum(leaf.size for _, leaf in leaves)
        embeddings = sum(leaf.size for path, leaf in leaves if "embedding" in placement.path_name(path))
        seconds = self.clock.seconds
        rate = sizes.tokens(total) / max(seconds, 1e-9)
        options = compiler_options.choose(self._c.parallel.compiler, run.mesh.devices.flat[0])
        return {
            "steps": total,
            "duration": self._c.train.duration,
            "loss": processes.broadcast_from_first(
                lambda: metrics.tail_mean(self._path, "loss", count=max(10, total // 100))
            ),
            "tokens": sizes.tokens(total),
            "flops": sizes.tokens(total) * self._flops,
            "train_seconds": seconds,
            **({"dollars": seconds * self._dollars} if self._dollars else {}),
            **({"noise_scale": self._noise.last} if self._c.train.noise_scale else {}),
            "wall_seconds": time.perf_counter() - self._began,
            "goodput": self._goodput(seconds),
            "compile_seconds": run.phases["compile"],
            "first_step_seconds": sum(run.phases.values()),
            "tokens_per_second": rate,
            "mfu": rate * self._flops / run.peak if run.peak else "unknown",
            "skipped": int(state.skipped),
            "parameters": parameters,
            "parameters_without_embeddings": parameters - embeddings,
            "device": meshes.describe(run.mesh),
            "compiler_options": " ".join(f"{name}={value}" for name, value in options.items()) or "none",
            "checkpoint_step": total,
            **processes.broadcast_from_first(self._measured_first),
        }

    def _measured_first(self) -> dict[str, float]:
        """The numbers of `evaluate_first`, which may have been in an earlier process."""
        before = self._workdir / BEFORE
        mend = "delete it, and the numbers from before the first step are left out"
        return storage.read_json(before, mend=mend) if before.exists() else {}

    def _goodput(self, seconds: float) -> float:
        return seconds / max(time.time() - self._born, seconds, 1e-9)

    def close(self) -> None:
        self._progress.close()
        self._writer.close()


def _price(c: ConfigDict, mesh: Mesh) -> float:
    """US dollars for an hour of one of the mesh's devices: as set, or the list price of its chip; 0: not known."""
    chip = chips.of_device_kind(mesh.devices.flat[0].device_kind)
    return float(c.train.device_price or (chip.price / chip.devices if chip else 0.0))
