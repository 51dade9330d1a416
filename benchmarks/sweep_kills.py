"""A study with two workers that are killed again and again must give the table of an undisturbed study.

    python benchmarks/sweep_kills.py --kills 20 --out results/sweep_kills.json

Twelve arms with three seeds of tiny runs on generated text. The first study runs alone. The second has two workers. The
script kills them with SIGKILL at random times, --kills times in all, and starts them again. It reports whether the
tables are equal, whether a trial ended twice, and how many steps were taken twice. `--small` is the form that a test
runs: two arms, two seeds, three kills.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import make_parser, write

ARMS = 12
WORDS = ("the", "model", "reads", "a", "line", "and", "writes", "another", "one", "def", "return", "x", "=", "1")
CONFIG = """
from llmjax.config import base


def get_config(arg=""):
    c = base()
    c.name = "kills"
    c.data.sources = ({sources!r},)
    c.data.min_bytes = 1
    c.data.holdout_percent = 20.0
    c.tokenizer.kind = "byte"
    c.model.layers, c.model.width, c.model.heads, c.model.mlp_width = 1, 16, 2, 32
    c.model.vocab_size = 320
    c.model.attention = "reference"
    c.train.duration, c.train.batch_size, c.train.sequence_length = "40 steps", 4, 16
    c.train.eval_every, c.train.eval_batches = "50%", 1
    c.checkpoint.every = "5 steps"
    c.parallel.cpu_devices = 1
    c.stages = ("prepare", "tokenizer", "train")
    return c


def get_sweep(arg=""):
    rates = [round(0.001 * 1.5**i, 6) for i in range({arms})]
    arms = {{f"rate {{rate}}": {{"optimizer.learning_rate": rate}} for rate in rates}}
    return {{"arms": arms, "seeds": {seeds}, "metric": "train/loss"}}
"""


def start(folder: Path, study: Path) -> subprocess.Popen:
    """A worker of the study, with its output in a file."""
    words = [sys.executable, "-m", "llmjax", "sweep", "--config", str(folder / "kills.py"), "--workdir", str(study)]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder)


def alone(folder: Path, study: Path) -> None:
    """Run a study to its end with one worker."""
    if start(folder, study).wait():
        raise SystemExit((folder / "output.txt").read_text()[-3000:])


def killed(folder: Path, study: Path, *, kills: int, pause: float) -> int:
    """Run a study with two workers of which one is killed every so often; how many were killed."""
    draws, done = random.Random(0), 0
    workers = [start(folder, study) for _ in range(2)]
    due = time.monotonic() + pause * draws.uniform(0.5, 1.5)
    while any(worker.poll() is None for worker in workers):
        if done < kills and time.monotonic() > due:
            place = draws.randrange(2)
            if workers[place].poll() is None:
                os.killpg(workers[place].pid, signal.SIGKILL)
                workers[place].wait()
                done += 1
                workers[place] = start(folder, study)
            due = time.monotonic() + pause * draws.uniform(0.5, 1.5)
        time.sleep(0.05)
    alone(folder, study)  # both workers may have been killed near the end
    return done


def table(study: Path) -> dict[str, Any]:
    """What the study says of each arm, without what depends on the time."""
    arms = json.loads((study / "results.json").read_text())["arms"]
    timed = ("seconds",)
    return {name: {key: value for key, value in arm.items() if key not in timed} for name, arm in arms.items()}


def facts(study: Path) -> dict[str, Any]:
    """Trials, how many lines say that one has ended, starts, and steps that were taken more than once."""
    lines = [json.loads(line) for line in (study / "trials.jsonl").read_text().splitlines() if line.strip()]
    ended = [line["trial"] for line in lines if line["state"] == "done"]
    again = 0
    for path in study.glob("runs/*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        again += len(steps) - len(set(steps))
    return {
        "trials": len(set(ended)),
        "ended_twice": len(ended) - len(set(ended)),
        "starts": sum(line["state"] == "running" for line in lines),
        "steps_in_metrics_twice": again,
    }


def main() -> int:
    parser = make_parser(__doc__, out=Path("results/sweep_kills.json"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=15.0, help="seconds between kills, on average")
    parser.add_argument("--small", action="store_true", help="two arms, two seeds, at most three kills")
    args = parser.parse_args()
    arms, seeds, kills = (2, 2, 3) if args.small else (ARMS, 3, args.kills)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = folder / "text"
        sources.mkdir()
        for i in range(24):
            words = (WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(120))
            (sources / f"{i:02}.txt").write_text(f"Text number {i}.\n" + " ".join(words) + "\n")
        (folder / "kills.py").write_text(CONFIG.format(sources=str(sources), arms=arms, seeds=seeds))
        alone(folder, folder / "alone")
        done = killed(folder, folder / "killed", kills=kills, pause=args.pause)
        results = {
            "arms": arms, "seeds": seeds, "kills": done, "same_table": table(folder / "alone") == table(folder / "killed"),
            "alone": facts(folder / "alone"), "killed": facts(folder / "killed"),
        }  # fmt: skip
    print(json.dumps(results, indent=1))
    write(results, args.out)
    there = results["killed"]["trials"] == arms * seeds and results["killed"]["ended_twice"] == 0
    enough = done > 0 if args.small else done == kills  # a fast machine ends the small study before the third kill
    return 0 if results["same_table"] and there and enough else 1


if __name__ == "__main__":
    sys.exit(main())
