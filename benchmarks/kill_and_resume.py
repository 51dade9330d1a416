"""Kill `llmjax train` with SIGKILL at random moments, go on each time, and compare with the run that was never killed.

    python benchmarks/kill_and_resume.py --kills 30 [--seed 0] [--out results/kill_and_resume.json]

A third of the kills come while training, a third while a checkpoint is being written (its temporary folder is there),
a third at any time after the start, set-up included. After each, every checkpoint must be readable; at the end the
parameters and the optimizer state must be the same bits as the uninterrupted run's, and metrics.jsonl must hold each
step once with the same losses. A run that ends before all kills are spent is compared and a new one is begun.
Takes some five minutes on 2 cores. The exit status is 1 if anything differs.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from llmjax import config, recipe
from llmjax.train import checkpoint

STEPS, EVERY = 1500, 25  # EVERY: between checkpoints
MOMENTS = ("training", "saving", "any time")


def make_run(folder: Path) -> Path:
    """A run whose text is generated and prepared, ready to train."""
    rng = random.Random(0)
    (folder / "text").mkdir()
    for i in range(40):
        words = [f"{rng.choice('abcdefgh')}{rng.randrange(50)}" for _ in range(200)]
        (folder / "text" / f"{i:02}.txt").write_text(f"Text {i}\n" + " ".join(words) + "\n")
    c = config.base()
    c.data.sources = (str(folder / "text"),)
    c.data.holdout_percent = 10.0
    c.tokenizer.kind = "byte"
    c.model.layers, c.model.width, c.model.heads, c.model.dropout = 2, 32, 2, 0.1
    c.train.duration, c.train.batch_size, c.train.sequence_length, c.train.ema = f"{STEPS} steps", 8, 32, 0.99
    c.train.eval_every, c.train.eval_batches = "250 steps", 1
    c.checkpoint.every = f"{EVERY} steps"
    config.check(c)
    with contextlib.redirect_stdout(io.StringIO()):
        recipe.run(c.lock(), folder / "prepared", ("prepare", "tokenizer"))
    return folder / "prepared"


def start(workdir: Path) -> subprocess.Popen[str]:
    """`llmjax train` in a process of its own, its output in WORKDIR/output.txt."""
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),  # starting is not what is measured
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "llmjax", "train", "--workdir", str(workdir)]
    with (workdir / "output.txt").open("w") as output:
        return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)


def rows_of(workdir: Path) -> list[dict]:
    """The whole rows of metrics.jsonl; a kill may have torn the last."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wrote_rows(workdir: Path, *, since: float) -> bool:
    """Whether metrics.jsonl was written to after the wall clock's `since`."""
    path = workdir / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > since


def saving(workdir: Path, *, since: float) -> bool:
    """Whether a checkpoint begun after the wall clock's `since` is unfinished; what an earlier kill left does not count."""
    try:
        return any(path.stat().st_ctime > since for path in (workdir / "checkpoints").glob("*tmp*"))
    except FileNotFoundError:  # finished between the two looks
        return False


def wait_and_kill(workdir: Path, moment: str, rng: random.Random) -> dict | None:
    """Start training and kill it; what was on disk then. None: it ended first."""
    began, since = time.perf_counter(), time.time()
    process = start(workdir)
    ready, delay = {
        "training": (lambda: wrote_rows(workdir, since=since), rng.uniform(0.0, 3.0)),
        "saving": (lambda: saving(workdir, since=since), rng.choice([0.0, rng.uniform(0.0, 0.1)])),
        "any time": (lambda: True, rng.uniform(0.2, 8.0)),
    }[moment]
    while process.poll() is None and not ready():
        time.sleep(0.0002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the run failed by itself:\n{(workdir / 'output.txt').read_text()}")
    rows = rows_of(workdir)
    return {
        "moment": moment,
        "seconds_after_start": round(time.perf_counter() - began, 2),
        "rows": len(rows),
        "newest_checkpoint": max(checkpoint.steps_in(workdir / "checkpoints"), default=0),
        "inside_a_save": saving(workdir, since=since),
        "unreadable_checkpoints": sum(
            not readable(workdir / "checkpoints" / str(s)) for s in checkpoint.steps_in(workdir / "checkpoints")
        ),
    }


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    arrays = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "rest", "ema"):
            tree = checkpointer.restore((folder / item).absolute())
            arrays |= {
                item + jax.tree_util.keystr(path): np.asarray(x)
                for path, x in jax.tree_util.tree_leaves_with_path(tree)
            }
    return arrays


def readable(folder: Path) -> bool:
    """Whether a checkpoint can be read whole. The oldest may be in the middle of its deletion: that is no damage."""
    try:
        checkpoint.read_meta(folder)
        arrays_of(folder)
    except Exception as error:
        if folder.name != str(min(checkpoint.steps_in(folder.parent))) or len(checkpoint.steps_in(folder.parent)) == 1:
            print(f"unreadable: {folder}: {error}")
            return False
    return True


def differences(workdir: Path, expected: Path) -> list[str]:
    """What differs between two finished runs; empty when nothing does."""
    found = []
    mine, theirs = (arrays_of(checkpoint.newest(run)) for run in (workdir, expected))
    found += [
        name
        for name in mine.keys() | theirs.keys()
        if name not in mine or name not in theirs or mine[name].tobytes() != theirs[name].tobytes()
    ]
    rows, rows_expected = rows_of(workdir), rows_of(expected)
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
        found.append("metrics.jsonl does not hold each step once")
    keys = ("step", "loss", "heldout_loss", "grad_norm", "learning_rate")
    if [[r.get(k) for k in keys] for r in rows] != [[r.get(k) for k in keys] for r in rows_expected]:
        found.append("metrics.jsonl holds other numbers")
    return found


def main() -> int:
    """Run the experiment and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills: list[dict] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepared = make_run(folder)
        whole = shutil.copytree(prepared, folder / "whole")
        if start(whole).wait():
            raise SystemExit((whole / "output.txt").read_text())
        runs = 0
        print(f"{'kill':>4}  {'moment':<10}  {'after':>7}  {'rows':>5}  {'checkpoint':>10}  inside a save  unreadable")
        while len(kills) < args.kills:
            runs += 1
            workdir = shutil.copytree(prepared, folder / f"killed-{runs}")
            while len(kills) < args.kills:
                kill = wait_and_kill(workdir, MOMENTS[len(kills) % len(MOMENTS)], rng)
                if kill is None:
                    break
                kills.append(kill)
                print(
                    f"{len(kills):>4}  {kill['moment']:<10}  {kill['seconds_after_start']:>5.2f} s  {kill['rows']:>5}  "
                    f"{kill['newest_checkpoint']:>10}  {'yes' if kill['inside_a_save'] else 'no':<13}  {kill['unreadable_checkpoints']}",
                    flush=True,
                )
            else:
                if start(workdir).wait():
                    raise SystemExit((workdir / "output.txt").read_text())
            wrong += differences(workdir, whole)
    result = {
        "command": f"python benchmarks/kill_and_resume.py --kills {args.kills} --seed {args.seed}",
        "kills": len(kills),
        "inside_a_save": sum(kill["inside_a_save"] for kill in kills),
        "unreadable_checkpoints": sum(kill["unreadable_checkpoints"] for kill in kills),
        "runs": runs,
        "steps_a_run": STEPS,
        "differences": wrong,
        "moments": kills,
    }
    print(
        f"{len(kills)} kills ({result['inside_a_save']} inside a save) in {runs} runs of {STEPS} steps: "
        f"{result['unreadable_checkpoints']} unreadable checkpoints; final parameters, optimizer state, moving average and metrics "
        f"{'differ: ' + ', '.join(wrong) if wrong else 'bit-identical to the uninterrupted run'}"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong or result["unreadable_checkpoints"] else 0


if __name__ == "__main__":
    sys.exit(main())
