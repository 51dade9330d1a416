"""SIGKILLs while a model is taught: supervised, by preferences and by rewards of its own answers.

    python benchmarks/post_kills.py --out results/post_kills.json

Each of the three runs is killed ten times: while it starts, samples a round, takes steps and writes a checkpoint. The
same command goes on each time. At the end the script compares the parameters and the losses of every step bit for bit
with an undisturbed run. The model has a few thousand parameters. A start takes about five seconds of a core, and the
whole ten minutes.

The script skips finished runs. With `--seconds 170` no kill begins after that time, and the same command goes on.
`--only dpo` makes that run alone. The results are written after every run.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, Budget, OutOfTime, make_parser, write
from over_optimisation import write_once

import llmjax

STEPS = 60
SMALL = (
    "--config.train.sequence_length=16", "--config.train.batch_size=8", f"--config.train.duration={STEPS} steps",
    "--config.optimizer.learning_rate=1e-3", "--config.data.holdout_percent=20", "--config.checkpoint.every=5 steps",
    "--config.schedule.name=constant", "--config.schedule.warmup=0 steps", "--config.train.eval_every=1000 steps",
)  # fmt: skip
POLICY = (
    "--config.rollout.rewards=['last_number']", "--config.rollout.tokens=6", "--config.rollout.samples=4",
    "--config.rollout.updates=4", "--config.objective.policy.kl_weight=0.01",
)  # fmt: skip
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {"sft": ("chats", ()), "dpo": ("pairs", ()), "grpo": ("prompts", POLICY)}
BASE = (
    "--config.tokenizer.kind=byte", "--config.model.layers=1", "--config.model.width=16", "--config.model.heads=2",
    "--config.model.mlp_width=32", "--config.model.vocab_size=320", "--config.train.batch_size=8", "--config.train.sequence_length=16",
    "--config.train.duration=20 steps", "--config.train.eval_every=0 steps", "--config.data.min_bytes=1",
    "--config.data.holdout_percent=20", "--config.stages=('prepare','tokenizer','train')",
)  # fmt: skip


def main() -> int:
    """See the module."""
    parser = make_parser(__doc__, out=ROOT / "results" / "post_kills.json")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN", help="these alone")
    parser.add_argument("--kills", type=int, default=10, help="of each run")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "post-kills", help="where the runs are")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many, to go on later; 0: never")
    args = parser.parse_args()
    budget, folder = Budget(args.seconds), args.runs.resolve()
    write_files(folder)
    source = f"--config.data.sources=['{folder / 'texts'}']"
    finish(folder, "run", "--config", "configs/quickstart.py", source, *BASE, "--workdir", folder / "base")
    try:
        for verb in args.only:
            data, more = RUNS[verb]
            given = (verb, "--config", f"configs/post/{verb}.py", f"--config.train.init_from={folder / 'base'}",
                     f"--config.data.sources=['{folder / data}.jsonl']", *SMALL, *more)  # fmt: skip
            found = disturbed(folder, verb, given, kills=args.kills, budget=budget)
            print(verb, found, flush=True)
            write(summary(measured(args.out) | {verb: found}), args.out)
    except OutOfTime:
        print(f"stopped after {args.seconds:g} seconds: the same command goes on")
        return 0
    return 0 if summary(measured(args.out))["exact"] else 1


def measured(out: Path) -> dict[str, Any]:
    """The runs in a file of results."""
    return dict(json.loads(out.read_text())["runs"]) if out.is_file() else {}


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Whether all runs ended in the same bits, the number of kills, and the runs in their order."""
    return {
        "exact": all(one["same_parameters"] and one["same_losses"] for one in results.values()),
        "kills": sum(sum(one["kills"].values()) for one in results.values()),
        "runs": {verb: results[verb] for verb in RUNS if verb in results},
    }


def write_files(folder: Path) -> None:
    """Sums as texts, conversations, preferences and prompts."""
    sums = [(a, b) for a in range(8) for b in range(8)]
    for i in range(8):
        write_once(folder / "texts" / f"{i}.txt", "".join(f"{a}+{b}={a + b}\n" for a, b in sums[i::8]))
    rows: dict[str, list[dict[str, str]]] = {"chats": [], "pairs": [], "prompts": []}
    for a, b in sums:
        asked, answer = f"{a}+{b}=", str(a + b)
        rows["chats"].append({"prompt": asked, "completion": answer})
        rows["pairs"].append({"prompt": asked, "chosen": answer, "rejected": "no"})
        rows["prompts"].append({"prompt": asked, "answer": answer})
    for name, records in rows.items():
        write_once(folder / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def start(folder: Path, *command: str | Path) -> subprocess.Popen[bytes]:
    """The command as a process whose output goes to FOLDER/log."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
    with (folder / "log").open("ab") as log:
        words = [sys.executable, "-m", "llmjax", *map(str, command)]
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)


def finish(folder: Path, *command: str | Path) -> None:
    """Run the command to its end, from where it was stopped."""
    if start(folder, *command).wait():
        raise RuntimeError(f"llmjax {command[0]} failed: {(folder / 'log').read_text()[-2000:]}")


def disturbed(folder: Path, verb: str, given: tuple[str, ...], *, kills: int, budget: Budget) -> dict[str, Any]:
    """A run that is killed so often, compared with one that is not. NAME-kills.json says where it was killed."""
    whole, killed, kept = folder / f"{verb}-whole", folder / f"{verb}-killed", folder / f"{verb}-kills.json"
    finish(folder, *given, "--workdir", whole)
    places = json.loads(kept.read_text()) if kept.is_file() else []
    while len(places) < kills:
        budget.left()
        place = kill(folder, verb, (*given, "--workdir", killed), killed, number=len(places))
        if place is None:
            break  # it ended before its time had come
        places.append(place)
        kept.write_text(json.dumps(places))
    finish(folder, *given, "--workdir", killed)
    a, b = (flat(llmjax.load(run).params) for run in (whole, killed))
    losses = [[(row["step"], row["loss"]) for row in rows(run)] for run in (whole, killed)]
    return {
        "kills": {place: places.count(place) for place in ("start", "rollout", "update", "save")},
        "steps": STEPS,
        "same_parameters": a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a),
        "same_losses": losses[0] == losses[1] and len(losses[0]) == STEPS,
    }


def kill(folder: Path, verb: str, command: tuple[str | Path, ...], run: Path, *, number: int) -> str | None:
    """Start a run and kill it: what it did then; None where it ended by itself."""
    draw, before = random.Random(f"{verb} {number}"), len(rows(run))
    process = start(folder, *command)
    # The first kill comes before any step. Then they wait by turns for a step or a round, and for a checkpoint.
    wanted = "start" if not number else ("save", "update", "rollout")[number % (3 if verb == "grpo" else 2)]
    until = before + draw.randrange(1, 3)
    while process.poll() is None and wanted not in ("start", doing(run, until)):
        time.sleep(0.0005)
    if wanted == "start":
        time.sleep(2 + draw.random())
    place = doing(run, before + 1)
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return place


def doing(run: Path, steps: int) -> str:
    """What a run does: "start" before it has taken so many steps, then "save", "rollout" or "update"."""
    taken = len(rows(run))
    if taken < steps:
        return "start"
    if is_saving(run):
        return "save"
    rounds = len(list((run / "samples").glob("*.json")))  # each has four updates, and the row of the last one is late
    return "rollout" if rounds and 4 * rounds <= taken + 1 else "update"


def rows(run: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written: orbax gives it its name when it is whole."""
    folder = run / "checkpoints"
    return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


def flat(tree: Any, name: str = "") -> dict[str, np.ndarray]:
    """The arrays of a tree by their paths."""
    if isinstance(tree, dict):
        return {path: leaf for key, value in tree.items() for path, leaf in flat(value, f"{name}/{key}").items()}
    return {name: np.asarray(tree)}


if __name__ == "__main__":
    raise SystemExit(main())
