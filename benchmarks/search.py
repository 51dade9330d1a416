"""Samplers on published grids of losses, and successive halving on published curves. No model is trained.

    python benchmarks/search.py --data DIR --out results/search.json

DIR holds steplaw_dense_lr_bs_loss.csv (Li et al. 2025: 17 grids of learning rate and batch) and gemstones_fineweb_dclm.csv
(McLeish et al. 2025: curves of 22 shapes). A point of a search is the nearest one of the grid, in logarithms. `regret` is the
loss of the best of 30 points over the best of the grid, minus 1; `excess` is the same as a share of the distance between the
grid's median and its best. TPE needs llmjax[search] and is left out without it. Halving compares the shapes at rungs that
are three times apart; its compute is 6 x parameters x tokens of what it trains, as a share of training all shapes to the end.
"""

import csv
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import make_parser, write

from llmjax.sweep import halving, samplers
from llmjax.sweep.space import Dimension

POINTS, REPEATS = 30, 20
LENGTH = 2048  # tokens of a row in Step Law's runs
Rows = Sequence[Mapping[str, str]]


def grids_of(rows: Rows) -> list[dict[str, np.ndarray]]:
    """The losses of each (N, D): arrays of rates, batches and losses."""
    found: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault((row["N"], row["D"]), []).append(row)
    return [
        {key: np.array([float(row[key]) for row in grid]) for key in ("lr", "bs", "smooth loss")}
        for grid in found.values()
    ]


def best_found(grid: Mapping[str, np.ndarray], sampler: str, seed: int) -> float:
    """The best loss among the points that a sampler tries."""
    space = (
        Dimension("rate", "log", float(grid["lr"].min()), float(grid["lr"].max())),
        Dimension("batch", "log", float(grid["bs"].min()), float(grid["bs"].max())),
    )
    known: list[samplers.Known] = []
    for number in range(POINTS):
        settings = samplers.SAMPLERS[sampler](space, number, seed, known)
        far = np.log(grid["lr"] / settings["rate"]) ** 2 + np.log(grid["bs"] / settings["batch"]) ** 2
        known.append(samplers.Known(settings, (float(grid["smooth loss"][np.argmin(far)]),)))
    return min(one.values[0] for one in known if one.values)


def samplers_of(rows: Rows) -> dict[str, Any]:
    """Regrets of every sampler over all grids and repetitions."""
    grids = grids_of(rows)
    names = [name for name in samplers.SAMPLERS if name != "tpe" or importlib.util.find_spec("optuna")]
    found = {}
    for name in names:
        regret, excess = [], []
        for grid in grids:
            best, median = float(grid["smooth loss"].min()), float(np.median(grid["smooth loss"]))
            for seed in range(REPEATS):
                loss = best_found(grid, name, seed)
                regret.append(loss / best - 1)
                excess.append((loss - best) / (median - best))
        found[name] = {
            "regret_mean": float(np.mean(regret)),
            "regret_worst": float(np.max(regret)),
            "excess_mean": float(np.mean(excess)),
            "excess_within_5_percent": float(np.mean(np.array(excess) <= 0.05)),
            "runs": len(regret),
        }
    return {"grids": len(grids), "points": POINTS, "repeats": REPEATS, "samplers": found}


def halving_of(rows: Rows) -> dict[str, Any]:
    """What halving chooses among the shapes, and the compute it takes, against training all of them to the end."""
    names = sorted({row["run_name"] for row in rows})
    curves = {
        name: {float(row["tokens"]): float(row["final_loss"]) for row in rows if row["run_name"] == name}
        for name in names
    }
    size = {row["run_name"]: float(row["params_active_precise"]) for row in rows}
    tokens = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    losses = [[curves[name][at] for at in tokens] for name in names]
    wanted = halving.rungs(len(tokens), count=len(names))
    levels = [steps - 1 for steps in wanted]
    arm, reached = halving.chosen(losses, levels)
    spent = sum(size[name] * tokens[level] for name, level in zip(names, reached, strict=True))
    whole = sum(size[name] * tokens[-1] for name in names)
    best = names[int(np.argmin([one[-1] for one in losses]))]
    return {
        "shapes": len(names), "rungs_tokens": [tokens[level] for level in levels], "chosen": names[arm], "best": best,
        "same": names[arm] == best, "compute": spent / whole, "regret": losses[arm][-1] / min(one[-1] for one in losses) - 1,
    }  # fmt: skip


def main() -> int:
    parser = make_parser(__doc__, out=Path("results/search.json"))
    parser.add_argument("--data", type=Path, required=True, help="the folder of the published tables")
    args = parser.parse_args()

    def read(name: str) -> Rows:
        with (args.data / name).open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    results = samplers_of(read("steplaw_dense_lr_bs_loss.csv")) | {
        "halving": halving_of(read("gemstones_fineweb_dclm.csv"))
    }
    for name, one in results["samplers"].items():
        print(
            f"{name:13} regret {one['regret_mean']:.4%}, worst {one['regret_worst']:.3%}; excess {one['excess_mean']:.1%}"
        )
    print(f"halving: {results['halving']}")
    write(results, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
