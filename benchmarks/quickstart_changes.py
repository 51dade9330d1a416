"""The effect of each change of the quickstart's settings: writes results/quickstart_changes.json.

    python benchmarks/quickstart_changes.py --only 'as at c4ef595,width 128 for 192'
    python benchmarks/quickstart_changes.py --only seeds
    git worktree add /tmp/base c4ef595 && python benchmarks/quickstart_changes.py --only cost --base /tmp/base

Each arm up to width 128 has the changes of the arms before it, but for the rows of 512. Arms are short, and are measured on all held-out
text in rows of the training's length, which gives a token less context than `llmjax eval`. `seeds` runs the config as it
is for as many steps as cost the CPU seconds of 640 steps of commit c4ef595 (by `cost`), and takes the figure of `llmjax eval`. `cost` is CPU seconds a step
here and in a checkout of an earlier commit, by turns. Steps and CPU seconds are compared, never minutes: the machine may
be shared. The script skips finished runs. An arm takes 2 minutes of one core, a seed 10.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, machine, make_parser, write

SEED_STEPS, COST_STEPS = 1095, (8, 32)
WIDE, ATTENTION = "model.width=192", "model.pattern=('global',)"
ARMS: dict[str, tuple[int, tuple[str, ...]]] = {  # steps, and what differs from the config
    "as at c4ef595": (120, (WIDE, ATTENTION, "model.qk_norm=False")),
    "convolution before attention": (120, (WIDE, "model.qk_norm=False")),
    "queries and keys normalised": (120, (WIDE,)),
    "4 rows of 512 for 8 of 256": (120, (WIDE, "train.sequence_length=512", "train.batch_size=4")),
    "width 128 for 192": (230, ()),  # for the same CPU seconds, as those below
    "AdamW's rate .02 for .01": (230, ("optimizer.learning_rate=0.02",)),
    "Muon's rate .04 for .02": (230, ("optimizer.muon_learning_rate=0.04",)),
    "width 96": (310, ("model.width=96",)),
    "3 layers": (290, ("model.layers=3",)),
}
SCREEN = ("train.eval_every=100%", "train.eval_batches=60", "checkpoint.every=100%")


def start(folder: Path, settings: Sequence[str], *, stages: str, source: Path = ROOT) -> subprocess.Popen[bytes]:
    """Start a run of the quickstart in this folder, with the settings on top, by the code of a checkout."""
    words = ["run", "--config", "configs/quickstart.py", "--workdir", str(folder), f"--config.stages={stages}"]
    command = [sys.executable, "-m", "llmjax", *words, *(f"--config.{setting}" for setting in settings)]
    env = {**os.environ, "PYTHONPATH": str(source)}
    return subprocess.Popen(command, cwd=source, env=env, stdout=subprocess.DEVNULL)


def prepared(folder: Path, shared: Path) -> None:
    """Text and tokenizer, which all runs share."""
    if not (shared / "tokenizer" / "results.json").is_file():
        assert start(shared, ["eval.xz=False"], stages='["prepare","tokenizer"]').wait() == 0
    if not folder.is_dir():
        shutil.copytree(shared, folder)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def screen(name: str, folder: Path, shared: Path) -> dict[str, Any]:
    """One arm."""
    steps, changes = ARMS[name]

    def measured() -> list[float]:
        return [
            row["heldout_bits_per_byte"]
            for row in rows_of(folder)
            if row.get("step") == steps and "heldout_bits_per_byte" in row
        ]

    if not measured():
        prepared(folder, shared)
        settings = (f"train.duration={steps} steps", *SCREEN, *changes)
        assert start(folder, settings, stages='["prepare","tokenizer","train"]').wait() == 0
    losses = [row["loss"] for row in rows_of(folder) if "loss" in row]
    return {
        "settings": list(changes),
        "steps": len(losses),
        "heldout_bits_per_byte": measured()[-1],
        "training_loss_of_last_30_steps": float(np.mean(losses[-30:])),
    }


def seed(number: int, folder: Path, shared: Path) -> dict[str, Any]:
    """The config itself, for SEED_STEPS, and its measure."""
    prepared(folder, shared)
    settings = (f"train.duration={SEED_STEPS} steps", f"seed={number}")
    assert start(folder, settings, stages='["prepare","tokenizer","train","eval","generate","report"]').wait() == 0
    results = json.loads((folder / "results.json").read_text())
    return {"seed": number, "steps": results["train/steps"], "bits_per_byte": results["bits_per_byte"]}


def cost(folder: Path, source: Path) -> float:
    """CPU seconds of a step, from the process's clock at the first and the last of COST_STEPS."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = (f"train.duration={COST_STEPS[1] + 2} steps", "train.eval_every=0 steps")
    process = start(folder, settings, stages='["prepare","tokenizer","train"]', source=source)
    seen: dict[int, float] = {}
    while process.poll() is None:
        time.sleep(0.2)
        done = sum("loss" in row for row in rows_of(folder))
        if COST_STEPS[0] <= done <= COST_STEPS[1] and done not in seen:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            seen[done] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    assert process.returncode == 0
    first, last = min(seen), max(seen)
    return (seen[last] - seen[first]) / (last - first)


def main() -> int:
    """Make what is asked for, and keep the rest of the file as it is."""
    parser = make_parser(__doc__, out=ROOT / "results" / "quickstart_changes.json")
    parser.add_argument("--only", default=",".join((*ARMS, "seeds")), help="arms, seeds, cost, with commas")
    parser.add_argument("--base", type=Path, help="for cost: a checkout of the commit to compare with")
    parser.add_argument("--seeds", type=int, default=3, help="how many, for seeds")
    parser.add_argument("--turns", type=int, default=2, help="for cost")
    parser.add_argument(
        "--workdir", type=Path, default=ROOT / "runs" / "quickstart-changes", help="the folder of all runs"
    )
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    shared = args.workdir / "shared"
    for name in args.only.split(","):
        if name in ARMS and name not in found.get("arms", {}):
            found.setdefault("arms", {})[name] = screen(name, args.workdir / name.replace(" ", "-"), shared)
        elif name == "seeds":
            for number in range(len(found.get("seeds", ())), args.seeds):
                found.setdefault("seeds", []).append(seed(number, args.workdir / f"seed-{number}", shared))
        elif name == "cost":
            sides = {"base": args.base.resolve(), "here": ROOT}
            for _ in range(args.turns):
                for side, source in sides.items():
                    made = cost((args.workdir / f"cost-{side}").resolve(), source)
                    found.setdefault("cpu_seconds_a_step", {}).setdefault(side, []).append(made)
        elif name not in ARMS:
            parser.error(f"{name} is none of {', '.join((*ARMS, 'seeds', 'cost'))}")
        write({**found, "machine": machine()}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
