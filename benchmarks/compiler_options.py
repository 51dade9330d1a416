"""Do options of the compiler leave the losses of a training as they are? The test before a run takes a set that may change them.

    python benchmarks/compiler_options.py --config configs/models/llama.py:tiny --options vmem data_parallel

The config is prepared once, and trained three times from the same seed on the same batches: without options, with them, and
without them on a second seed of the data's order. The options pass if no step's loss differs from the one without them by
more than --share of how much the two seeds differ on average: the order of sums may change, the training may not. Run it on
the chip and the mesh of the run itself; elsewhere it tells nothing about them. A row for every call is added to --out.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, machine, make_parser


def losses(arguments: list[str], workdir: Path) -> list[float]:
    """The loss of every step after a command of llmjax on a run."""
    command = [sys.executable, "-m", "llmjax", *arguments, "--workdir", str(workdir)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def compare(config: str, options: list[str], *, steps: int, share: float, folder: Path) -> dict[str, object]:
    """The largest difference of a step's loss with the options, beside the mean difference of two seeds."""
    short = [f"--config.train.duration={steps} steps", "--config.train.eval_every=0 steps"]
    stages = "--config.stages=('prepare','tokenizer','train')"
    plain = losses(["run", "--config", config, stages, *short], folder)
    chosen = losses(["train", "--again", *short, f"--config.parallel.compiler={tuple(options)!r}"], folder)
    results = json.loads((folder / "train" / "results.json").read_text())
    other = losses(["train", "--again", *short, "--config.seed=1", "--config.parallel.compiler=()"], folder)
    worst = max(abs(a - b) for a, b in zip(plain, chosen, strict=True))
    between = statistics.fmean(abs(a - b) for a, b in zip(plain, other, strict=True))
    return {
        "config": config, "sets": options, "options": results["compiler_options"], "device": results["device"],
        "steps": steps, "largest_difference": worst, "between_seeds": between, "share": share,
        "passed": worst <= share * between, "machine": machine(),
    }  # fmt: skip


def main() -> None:
    """Compare, add the row, and end with status 1 if the losses differ."""
    parser = make_parser(__doc__, out=ROOT / "results" / "compiler_options.json")
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="a short run, on the mesh of the long one"
    )
    parser.add_argument("--options", required=True, nargs="+", metavar="SET", help="entries of parallel.compiler")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--share", type=float, default=0.1, help="of the mean difference between two seeds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = compare(args.config, args.options, steps=args.steps, share=args.share, folder=Path(folder) / "run")
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print(json.dumps({name: value for name, value in row.items() if name != "machine"}, indent=1))
    sys.exit(0 if row["passed"] else 1)


if __name__ == "__main__":
    main()
