"""Four processes on one machine: the same losses as one, and what a lost process costs.

    python benchmarks/process_faults.py [--kills 10] [--seed 0] [--out results/process_faults.json]

A tiny model is trained by one process with four devices and by four processes with one device each, which must give
the same losses. Then one of the four is killed with SIGKILL at random moments, again and again, while
`launch/local.py` starts the job again: how long until the others were gone, until the next step was trained, and how
many steps were lost? The parameters at the end must be the same bits as the undisturbed run's. Then a run that was
stopped in the middle goes on as two processes and as one. Last, four processes run without a launcher: how long does a
survivor take to notice by itself? Runs on 2 cores, which four processes share: seconds are an upper bound. Status 1 if
anything differs.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from common import make_parser, write

from llmjax import config, recipe
from llmjax.train import folders

LAUNCHER = Path(__file__).resolve().parent.parent / "launch" / "local.py"
COUNT, STEPS, EVERY = 4, 400, 10  # processes, steps, steps between checkpoints
HEARTBEAT = 10
RATE = 1e-4  # low, so that differences of rounding do not grow much in so many steps
TOLERANCE = 1e-5  # between losses of different numbers of processes, relative


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
    c.train.eval_every, c.train.eval_batches = f"{STEPS // 4} steps", 1
    c.checkpoint.every = f"{EVERY} steps"
    c.optimizer.learning_rate = RATE
    c.parallel.heartbeat_seconds = HEARTBEAT
    config.check(c)
    with contextlib.redirect_stdout(io.StringIO()):
        recipe.run(c.lock(), folder / "prepared", ("prepare", "tokenizer"))
    return folder / "prepared"


def rows_of(workdir: Path) -> list[dict]:
    """The whole rows of metrics.jsonl; a kill may have torn the last."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def environment(folder: Path, *, devices: int) -> dict[str, str]:
    """Starting is not what is measured: programs are compiled once."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(workdir: Path, *, count: int, devices: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
    """Training in that many processes, through the launcher unless it is one."""
    words = [sys.executable, "-m", "llmjax"]
    if count > 1:
        words = [sys.executable, str(LAUNCHER), "-n", str(count), "--restarts", str(restarts), "--"]
    words += ["train", "--workdir", str(workdir)]
    with (workdir / "output.txt").open("a") as output:
        env = environment(workdir.parent, devices=devices)
        return subprocess.Popen(words, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], workdir: Path) -> None:
    """Wait for a run that must end well."""
    if process.wait():
        raise SystemExit(f"{workdir} ended with status {process.returncode}:\n{(workdir / 'output.txt').read_text()}")


def pids(workdir: Path) -> list[int]:
    """The numbers of the processes that the launcher started last."""
    return [int((workdir / "processes" / f"{i}.pid").read_text()) for i in range(COUNT)]


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def last_step(workdir: Path) -> tuple[int, float]:
    """The step of the newest whole row of metrics.jsonl, and when the file was written."""
    path = workdir / "metrics.jsonl"
    with contextlib.suppress(OSError, IndexError, ValueError):
        lines = path.read_bytes()[-20_000:].split(b"\n")
        return int(json.loads(lines[-2])["step"]), path.stat().st_mtime
    return 0, 0.0


def wait_until(condition, process: subprocess.Popen[str], *, seconds: float = 300.0) -> bool:  # type: ignore[no-untyped-def]
    """Whether the condition came true before the process ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def kill_one(workdir: Path, process: subprocess.Popen[str], rng: random.Random) -> dict | None:
    """Kill one process some steps after training went on, and measure; None when the run ended first."""
    before = pids(workdir)
    target = last_step(workdir)[0] + rng.randrange(1, 5 * EVERY)
    if not wait_until(lambda: last_step(workdir)[0] >= target, process):
        return None
    time.sleep(rng.uniform(0.0, 0.3))
    index = rng.randrange(COUNT)
    step = last_step(workdir)[0]
    with contextlib.suppress(ProcessLookupError):
        os.kill(before[index], signal.SIGKILL)
    killed, wall = time.monotonic(), time.time()
    if not wait_until(lambda: not any(map(alive, before)), process):
        return None
    gone = time.monotonic() - killed
    saved = max(folders.steps_in(workdir / "checkpoints"), default=0)
    if not wait_until(lambda: last_step(workdir)[1] > wall + gone and 0 < last_step(workdir)[0] > saved, process):
        return None
    return {
        "process": index,
        "step": step,
        "seconds_until_the_others_were_gone": round(gone, 2),
        "seconds_until_training_again": round(time.monotonic() - killed, 2),
        "steps_lost": step - saved,
    }


def largest_difference(workdir: Path, expected: Path) -> float:
    """The largest relative difference of the losses of two runs, all steps of which are there."""
    mine, theirs = rows_of(workdir), rows_of(expected)
    if [row["step"] for row in mine] != list(range(1, STEPS + 1)) or len(theirs) != STEPS:
        raise SystemExit(f"{workdir}: metrics.jsonl does not hold each step once")
    return max(
        abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(mine, theirs, strict=True) for key in ("loss", "heldout_loss") if key in b
    )  # fmt: skip


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, on this process's device wherever it was when it was saved."""
    here, arrays = jax.sharding.SingleDeviceSharding(jax.devices()[0]), {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "rest", "ema"):
            path = (folder / item).absolute()
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                checkpointer.metadata(path).item_metadata.tree,
            )
            leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path, like))
            arrays |= {item + jax.tree_util.keystr(name): np.asarray(x) for name, x in leaves}
    return arrays


def same_bits(workdir: Path, expected: Path) -> bool:
    """Whether parameters, optimizer state and moving average are the same bits."""
    mine, theirs = (arrays_of(folders.newest(run)) for run in (workdir, expected))
    return mine.keys() == theirs.keys() and all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)


def without_launcher(workdir: Path, rng: random.Random) -> dict:
    """Kill one of four processes that nobody watches: how long until each of the others has ended, and how."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    everything = []
    for i in range(COUNT):
        env = {**environment(workdir.parent, devices=1), "LLMJAX_COORDINATOR": f"127.0.0.1:{port}",
               "LLMJAX_PROCESSES": str(COUNT), "LLMJAX_PROCESS": str(i), "LLMJAX_LOCAL_PROCESSES": str(COUNT)}  # fmt: skip
        words = [sys.executable, "-m", "llmjax", "train", "--workdir", str(workdir)]
        with (workdir / f"output-{i}.txt").open("w") as output:
            everything.append(subprocess.Popen(words, env=env, stdout=output, stderr=subprocess.STDOUT))
    assert wait_until(lambda: last_step(workdir)[0] > 100, everything[0])
    index = rng.randrange(COUNT)
    everything[index].kill()
    killed, seconds = time.monotonic(), {}
    while len(seconds) < COUNT - 1 and time.monotonic() - killed < 300:
        for i, one in enumerate(everything):
            if i != index and i not in seconds and one.poll() is not None:
                seconds[i] = round(time.monotonic() - killed, 2)
        time.sleep(0.01)
    for one in everything:
        one.kill()
        one.wait()
    statuses = {i: one.returncode for i, one in enumerate(everything) if i != index}
    said = (workdir / f"output-{min(seconds)}.txt").read_text().strip().splitlines()
    return {
        "killed": index,
        "heartbeat_seconds": HEARTBEAT,
        "seconds": sorted(seconds.values()),
        "statuses": statuses,
        "says": next((line for line in said if line.startswith("llmjax: ")), said[-1])[:300],
    }


def main() -> int:
    """Run the experiment and print what it found."""
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepared = make_run(folder)

        def copy(name: str, source: Path = prepared) -> Path:
            return shutil.copytree(source, folder / name)

        one, four = copy("one"), copy("four")
        finish(start(one, count=1, devices=COUNT), one)
        finish(start(four, count=COUNT), four)
        across = largest_difference(four, one)
        print(f"{COUNT} processes against one with {COUNT} devices: losses differ by at most {across:.1e}", flush=True)

        kills: list[dict] = []
        disturbed, identical = [], True
        while len(kills) < args.kills:
            workdir = copy(f"killed-{len(disturbed)}")
            disturbed.append(workdir)
            process = start(workdir, count=COUNT, restarts=args.kills)
            assert wait_until(lambda workdir=workdir: (workdir / "processes" / f"{COUNT - 1}.pid").exists(), process)
            while len(kills) < args.kills and (kill := kill_one(workdir, process, rng)):
                kills.append(kill)
                print(f"kill {len(kills)}: {kill}", flush=True)
            finish(process, workdir)
            identical = identical and same_bits(workdir, four)
        print(f"final state bit-identical to the undisturbed run: {identical}", flush=True)

        halves = copy("halves")
        process = start(halves, count=COUNT)
        wait_until(lambda: last_step(halves)[0] > STEPS // 2, process)
        process.send_signal(signal.SIGTERM)
        finish(process, halves)
        stopped = max(folders.steps_in(halves / "checkpoints"))
        resumed = {}
        for count in (4, 2, 1):
            workdir = copy(f"on-{count}", halves)
            finish(start(workdir, count=count), workdir)
            resumed[count] = {
                "largest_relative_difference": largest_difference(workdir, four),
                "same_bits": same_bits(workdir, four),
            }
            print(f"stopped at step {stopped}, going on as {count}: {resumed[count]}", flush=True)
        alone = without_launcher(copy("alone"), rng)
        print(f"without a launcher: {alone}", flush=True)
    wrong = across > TOLERANCE or not identical or not resumed[4]["same_bits"]
    wrong = wrong or any(one["largest_relative_difference"] > TOLERANCE for one in resumed.values())
    wrong = wrong or 0 in alone["statuses"].values() or len(alone["seconds"]) < COUNT - 1

    def spread(name: str) -> dict[str, float]:
        values = [kill[name] for kill in kills]
        return {"median": float(np.median(values)), "largest": float(max(values))}

    names = ("seconds_until_the_others_were_gone", "seconds_until_training_again", "steps_lost")
    result = {
        "processes": COUNT,
        "steps_a_run": STEPS,
        "steps_between_checkpoints": EVERY,
        "learning_rate": RATE,
        "largest_relative_difference_to_one_process": across,
        "kills": len(kills),
        **{name: spread(name) for name in names},
        "bit_identical_to_the_undisturbed_run": identical,
        "stopped_at_step": stopped,
        "resumed_on_processes": resumed,
        "without_launcher": alone,
        "moments": kills,
    }
    write(result, args.out)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
