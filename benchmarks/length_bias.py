"""The length bias of the mean of means: how GRPO's own aggregation changes lengths that no reward asks for.

    python benchmarks/length_bias.py --out results/length_bias.json

The model of over_optimisation.py writes words, and a word is right if it begins with the letter a. Nothing else counts, so a
good update leaves the lengths alone. With `sequence` each word's mean counts the same: a long wrong word is held back less a
letter than a short one, and a short right word is pushed more than a long one, so wrong words grow and right words shrink.
`constant` weighs every token the same (Dr. GRPO, Liu et al. 2025).

Each of the runs takes less than three minutes of 2 cores. The script skips finished runs. With `--seconds 170` it stops
after that time, and the same command goes on. The results are written after every run.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, Budget, OutOfTime, make_parser, write
from over_optimisation import POLICY, make_start, metrics, prompts, teach

LAST = 20  # rounds
HOW = ("sequence", "constant")


def right(answer: str, row: Mapping[str, Any]) -> float:
    """1 for a word that begins with a."""
    return float(answer.strip()[:1] == "a")


def wrong_length(answer: str, row: Mapping[str, Any]) -> float | None:
    """The length of a wrong word; a right one has none."""
    return None if right(answer, row) else float(len(answer))


def right_length(answer: str, row: Mapping[str, Any]) -> float | None:
    """The length of a right word; a wrong one has none."""
    return float(len(answer)) if right(answer, row) else None


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80, help="of each policy")
    parser.add_argument(
        "--runs",
        type=Path,
        default=ROOT / "runs" / "words",
        help="where the runs are; the starts are those of over_optimisation.py",
    )
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many, to go on later; 0: never")
    args = parser.parse_args()
    functions = ["length_bias:right", "length_bias:right_length=0", "length_bias:wrong_length=0"]
    budget, runs = Budget(args.seconds), []
    try:
        for seed in args.seeds:
            folder = args.runs.resolve() / str(seed)
            start = make_start(folder, seed, budget)
            for how in HOW:
                run = teach(
                    folder, "grpo", start, prompts(), *POLICY, "--config.optimizer.learning_rate=3e-4",
                    f"--config.rollout.rewards={functions}", f"--config.seed={seed}", f"--config.train.duration={args.steps} steps",
                    f"--config.objective.policy.aggregate={how}", name=how, budget=budget,
                )  # fmt: skip
                runs.append({"seed": seed, "aggregate": how, **lengths(run)})
                print(json.dumps(runs[-1]), flush=True)
                write({"steps": args.steps, "summary": summary(runs), "runs": runs}, args.out)
    except OutOfTime:
        print(f"stopped after {args.seconds:g} seconds: the same command goes on")
    return 0


def lengths(run: Path) -> dict[str, float]:
    """Mean lengths and rewards of the first rounds and of the last ones."""
    rows = metrics(run)
    found = {}
    for name in ("right", "right_length", "wrong_length"):
        values = [row[f"rollout/reward/{name}"] for row in rows if f"rollout/reward/{name}" in row]
        found |= {
            f"{name}_at_first": statistics.fmean(values[: LAST // 4]),
            f"{name}_at_last": statistics.fmean(values[-LAST:]),
        }
    return found


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How much longer than right words wrong ones became, for each aggregation: mean, least and largest over the seeds."""
    found = {}
    for how in HOW:
        grown = [
            (one["wrong_length_at_last"] - one["wrong_length_at_first"])
            - (one["right_length_at_last"] - one["right_length_at_first"])
            for one in runs
            if one["aggregate"] == how
        ]
        if grown:
            found[how] = [statistics.fmean(grown), min(grown), max(grown)]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
