"""Supervised answers, preferences and rewards beside TRL on CPU, by turns: tokens a second, compile seconds, memory.

    sh ../shared/repro/trl/install.sh                     in a folder of yours: makes venv/ with TRL, PyTorch, Transformers
    python benchmarks/trl_speed.py --scripts ../shared/repro/trl --peer venv/bin/python [--only sft-tiny] [--turns 3]

A row is a task (sft, dpo, grpo) at a shape (tiny, small, smollm2): the same model of random weights, the same rows, batches and
steps, float32, AdamW. The two sides take turns, each in a process of its own. Ours is the command of the task, with the huge
pages that the installed command asks for, and its steps are timed by its metrics; TRL's is its script, which times its
steps in the same way. The first steps are left out. The script skips measurements that --out has. With `--seconds 170` it
stops after the measurement in which that time ends, and the same command goes on. One takes up to two minutes of 2 idle
cores at SmolLM2's shape.

What the numbers count: SFT and DPO all tokens of a step, GRPO the sampled ones. Ours computes a prompt once for the answers to
it (`data.share_prompts`), and its tokens count for each of them, as TRL's do. Our DPO asks the reference once, before the
first step, and TRL's in each step: that time, without what it took to compile, is added to our steps. TRL's GRPO allows no
answer to end early; ours do, and a row costs the same then. `peak_memory` is the process's largest resident size,
compilation included. TRL's scripts write no checkpoint, and ours ends with one: `trained_memory` is the largest size before it.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, Budget, OutOfTime, llmjax, make_parser, peak_bytes, write

from llmjax.start import HUGE_PAGES

SHAPES = {  # vocabulary, width, MLP, layers, heads, key-value heads: those of the peer's common.py
    "tiny": (512, 64, 256, 2, 4, 4),
    "small": (4096, 256, 768, 6, 8, 4),
    "smollm2": (49_152, 576, 1536, 30, 9, 3),
}
PEER = {"smollm2": "smollm2-135m"}  # its names, where they differ
ROWS: dict[str, tuple[tuple[int, ...], int]] = {  # (numbers of the peer's script, first steps that are left out)
    "sft-tiny": ((8, 256, 24), 2), "dpo-tiny": ((4, 256, 14), 2), "grpo-tiny": ((8, 128, 64, 4, 4), 1),
    "sft-small": ((8, 256, 10), 2), "dpo-small": ((4, 256, 8), 2), "grpo-small": ((8, 128, 64, 4, 4), 1),
    "sft-smollm2": ((2, 256, 4), 1), "dpo-smollm2": ((1, 256, 4), 1), "grpo-smollm2": ((4, 64, 16, 4, 3), 1),
}  # fmt: skip
PLAIN = (
    "--config.stages=('rows','train')", "--config.data.holdout_percent=0", "--config.train.eval_every=0 steps",
    "--config.checkpoint.every=100%", "--config.checkpoint.every_seconds=0", "--config.schedule.name=constant",
    "--config.schedule.warmup=0 steps", "--config.data.pack=False",
)  # fmt: skip
SIDES = ("ours", "theirs")
MOST_UNROLLED = 6  # layers of a scan side by side: faster, and more of them would compile for minutes


# ------------------------------------------------------------------ our side


def make_base(shape: str, runs: Path, budget: Budget) -> Path:
    """A run of random weights: one step of training on a few words."""
    vocabulary, width, mlp, layers, heads, kv_heads = SHAPES[shape]
    texts, draw = runs / "texts", random.Random(0)
    if not texts.is_dir():
        texts.mkdir(parents=True)
        for number in range(8):
            (texts / f"{number}.txt").write_text("\n".join(letters(draw, 60) for _ in range(20)))
    model = {
        "vocab_size": vocabulary, "width": width, "mlp_width": mlp, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "tie_embeddings": True, "rotary_base": 100_000.0, "max_length": 2048, "scan_unroll": min(layers, MOST_UNROLLED),
        "pattern": ("global",), "qk_norm": False,
    }  # fmt: skip
    llmjax(
        "run", "--config", "configs/quickstart.py", f"--config.data.sources=['{texts}']", "--config.tokenizer.kind=byte",
        *(f"--config.model.{name}={value}" for name, value in model.items()), "--config.data.min_bytes=1",
        "--config.optimizer.name=adamw", "--config.train.batch_size=2", "--config.train.sequence_length=32",
        "--config.train.duration=1 steps", "--config.train.eval_every=0 steps", "--config.stages=('prepare','tokenizer','train')",
        "--workdir", runs / f"base-{shape}", budget=budget, log=runs / "log",
    )  # fmt: skip
    return runs / f"base-{shape}"


def letters(draw: random.Random, count: int) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=count))


def rows_of(task: str, numbers: Sequence[int]) -> list[dict[str, str]]:
    """Rows of the peer's lengths: with the tokens of beginning and end, a text of `length` tokens has that many targets."""
    draw = random.Random(1)
    if task == "grpo":
        texts, prompt, _, group, steps = numbers
        return [{"prompt": letters(draw, prompt - 1)} for _ in range(texts // group * steps)]
    count, length, steps = numbers
    half = length // 2
    sides = ("completion",) if task == "sft" else ("chosen", "rejected")
    return [
        {"prompt": letters(draw, half - 1), **{side: letters(draw, length - half) for side in sides}}
        for _ in range(count * steps)
    ]


def settings(task: str, numbers: Sequence[int]) -> tuple[str, ...]:
    """The settings of the command that does what the peer's script does with these numbers."""
    count, steps = numbers[0], numbers[-1]
    found = {"train.batch_size": count, "train.duration": f"{steps} steps"}
    if task == "grpo":
        _, prompt, completion, group, _ = numbers
        found |= {
            "train.sequence_length": prompt + completion, "rollout.tokens": completion, "rollout.samples": group,
            "rollout.slots": count, "rollout.rewards": "['trl_speed:even']", "optimizer.learning_rate": 1e-6,
            "data.share_prompts": True,
        }  # fmt: skip
    elif task == "dpo":  # a row is a pair: its prompt but the last token, and each answer behind that one
        length, half = numbers[1], numbers[1] // 2
        found |= {"data.share_prompts": True, "train.sequence_length": half - 1 + 2 * (length - half + 1)}
        found |= {"optimizer.learning_rate": 1e-5}
    else:
        found |= {"train.sequence_length": numbers[1], "optimizer.learning_rate": 1e-4}
    return tuple(f"--config.{name}={value}" for name, value in found.items())


def even(answer: str, row: Mapping[str, Any]) -> float:
    """The share of even characters, which no group has alike."""
    return sum(ord(one) % 2 == 0 for one in answer) / max(len(answer), 1)


@contextlib.contextmanager
def compiling() -> Iterator[list[float]]:
    """Seconds of tracing, lowering and compiling, an entry each, while the context lasts."""
    import jax

    found: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measure_ours(row: str, base: Path) -> dict[str, Any]:
    """The command of a row, in this process."""
    from llmjax import cli
    from llmjax.post import heldout
    from llmjax.train import checkpoint

    task, (numbers, skip) = row.partition("-")[0], ROWS[row]
    asked = {"seconds": 0.0}
    plain = heldout.reference_log_probs

    def reference_log_probs(*arguments: Any) -> Any:
        began = time.perf_counter()
        with compiling() as inside:
            found = plain(*arguments)
        asked["seconds"] += time.perf_counter() - began - sum(inside)
        return found

    heldout.reference_log_probs = reference_log_probs
    trained, plain_save = {"bytes": 0.0}, checkpoint.save

    def save(*arguments: Any, **more: Any) -> Any:
        trained["bytes"] = trained["bytes"] or peak_bytes()
        return plain_save(*arguments, **more)

    checkpoint.save = save
    with tempfile.TemporaryDirectory() as name, compiling() as compiled:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows_of(task, numbers)))
        given = (f"--config.train.init_from={base}", f"--config.data.sources=['{folder / 'rows.jsonl'}']")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            status = cli.main([task, "--config", f"configs/post/{task}.py", *PLAIN, *settings(task, numbers), *given,
                               "--workdir", str(folder / "run")])  # fmt: skip
        if status:
            raise RuntimeError(f"llmjax {task} ended with status {status}: {said.getvalue()[-2000:]}")
        made = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return of_metrics(task, numbers, skip, made, reference=asked["seconds"]) | {
        "compile_seconds": sum(compiled),
        "peak_memory": peak_bytes(),
        "trained_memory": trained["bytes"],
    }


def of_metrics(
    task: str, numbers: Sequence[int], skip: int, made: Sequence[Mapping[str, Any]], *, reference: float
) -> dict[str, Any]:
    """Seconds and tokens of a step by a run's metrics; `reference` seconds are spread over its steps."""
    times = [row["train_seconds"] for row in made]
    steps = [after - before for before, after in itertools.pairwise(times)][skip - 1 :]
    seconds = statistics.median(steps) + reference / len(made)
    if task == "grpo":
        tokens = statistics.fmean(row["rollout/length"] for row in made[skip:]) * numbers[0]
    else:
        tokens = float(numbers[0] * numbers[1] * (2 if task == "dpo" else 1))
    found = {"step_seconds": seconds, "tokens_per_step": tokens, "tokens_per_second": tokens / seconds}
    return found | ({"reference_seconds_per_step": reference / len(made)} if task == "dpo" else {})


# ------------------------------------------------------------------ both sides


def measure(side: str, row: str, args: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """A measurement in a process of its own."""
    task, _, shape = row.partition("-")
    numbers, skip = ROWS[row]
    with tempfile.TemporaryDirectory() as name:
        if side == "ours":
            base = make_base(shape, args.runs.resolve(), budget)
            command, folder = [sys.executable, __file__, "--measure", row, "--base", str(base)], ROOT
        else:  # its scripts keep their results beside themselves
            folder = Path(shutil.copytree(args.scripts, Path(name) / "scripts", ignore=shutil.ignore_patterns("venv")))
            command = [str(args.peer.absolute()), f"bench_{task}.py", PEER.get(shape, shape), *map(str, numbers)]
        own = (
            {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks"))), **HUGE_PAGES}
            if side == "ours"
            else {}
        )
        environment = {**os.environ, "SKIP": str(skip), "THREADS": str(os.cpu_count()), **own}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not said:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(said[-1])
    return found if side == "ours" else of_peer(found)


def of_peer(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a script of the peer says, by our names."""
    return {
        "step_seconds": found["seconds_median"],
        "tokens_per_step": found["tokens_per_step"],
        "tokens_per_second": found["tokens_per_second"],
        "compile_seconds": 0.0,
        "peak_memory": found["max_rss_gib"] * 2**30,
        "versions": found["versions"],
    }


def summary(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Each row that both sides have: medians over the turns, and how often as fast we are."""
    found = {}
    for row in ROWS:
        sides = {side: [one for key, one in measured.items() if key.startswith(f"{row}/{side}/")] for side in SIDES}
        if not all(sides.values()):
            continue
        middle = {
            f"{side}_{name}": statistics.median(one[name] for one in made)
            for side, made in sides.items()
            for name in ("tokens_per_second", "peak_memory", "compile_seconds")
        }
        trained = [one["trained_memory"] for key, one in measured.items()
                   if key.startswith(f"{row}/ours/") and "trained_memory" in one]  # fmt: skip
        if trained:
            middle["trained_memory"] = statistics.median(trained) / middle["theirs_peak_memory"]
        found[row] = middle | {
            "faster": middle["ours_tokens_per_second"] / middle["theirs_tokens_per_second"],
            "memory": middle["ours_peak_memory"] / middle["theirs_peak_memory"],
            "turns": min(map(len, sides.values())),
        }
    return found


def main() -> int:
    """See the module."""
    parser = make_parser(__doc__, out=ROOT / "results" / "trl_speed.json")
    parser.add_argument("--scripts", type=Path, help="the folder with TRL's scripts (bench_sft.py, ...)")
    parser.add_argument("--peer", type=Path, help="the Python of an environment with TRL")
    parser.add_argument(
        "--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "trl-speed", help="where our models of random weights are"
    )
    parser.add_argument("--seconds", type=float, default=0, help="begin no measurement after so many; 0: no limit")
    parser.add_argument("--measure", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_ours(args.measure, args.base)))
        return 0
    if args.scripts is None or args.peer is None:
        parser.error("give --scripts, the folder with TRL's scripts, and --peer, the Python of an environment with TRL")
    measured: dict[str, Any] = json.loads(args.out.read_text())["measured"] if args.out.is_file() else {}
    budget = Budget(args.seconds)
    try:
        for row in args.only:
            for turn in range(args.turns):
                for side in SIDES:
                    key = f"{row}/{side}/{turn}"
                    if key in measured:
                        continue
                    budget.left()
                    measured[key] = measure(side, row, args, budget) | {"load": os.getloadavg()[0]}
                    print(key, f"{measured[key]['tokens_per_second']:,.0f} tokens/s", flush=True)
                    write({"summary": summary(measured), "measured": measured}, args.out)
    except OutOfTime:
        print(f"stopped after {args.seconds:g} seconds: the same command goes on")
    for row, found in summary(measured).items():
        print(f"{row:14} {found['faster']:.2f} times as fast, {found['memory']:.2f} of the memory, {found['ours_compile_seconds']:.0f} s compiled")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
