"""A law of small runs predicts the held-out loss of a run of eight times their largest compute, before it starts.

    python benchmarks/predict.py fit --workers 2
    python benchmarks/predict.py final --seed 0

`fit` trains 33 models on bytes of this Python's standard library, none for more than two minutes of an idle core, fits a law
to those of at least SHORTEST steps with `llmjax laws`, and writes the prediction for the run of WIDTH and STEPS. It goes on where it was stopped. `final` trains that
run, and refuses to start without a written prediction. Promised: the loss is within 0.03 nats a byte of the prediction, and inside
its 90 % interval. The baseline predicts the loss of the largest fitted run.

All models have three layers, and their rates follow from muP. Every run has its own number of steps, at whose end the rate is 0, and
sees no text twice. N counts the matrices and norms that a token passes, the head included, and not the lookup of embeddings. A law
counts 6 N D FLOPs. At these widths attention adds a third to two thirds, so the run has 8 times the largest by both counts.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmjax.config import ConfigDict, base, parse_arg

LAYERS, HEAD, BATCH, LENGTH = 3, 8, 2, 128
# Width -> steps of 256 tokens: 7, 11 and 22 tokens for each parameter; the run that is predicted has 11. Grids in which this ratio
# fell with the width predicted the large run by a ratio that none of its neighbours had. A grid of one seed and of ratios from 7
# to 14 left an error of .04, as much as the noise of its runs explains (LOG.md).
GRID = {
    24: (790, 1240, 2480),
    32: (1330, 2080, 4170),
    48: (2810, 4410, 8820),
    64: (4840, 7600),
}
SEEDS = 3
# `llmjax laws` fits its cheaper runs alone and compares the costliest: with the runs of 790 steps it warned of an error of 1.2 %, and
# advised to leave out the shortest; without them the error is .04 %. Decided before the large run.
SHORTEST = 1_000
WIDTH, STEPS = 112, 23_000
RESAMPLES = 100  # of the law
VOCABULARY = 260  # bytes and special tokens
PROMISED = 0.03  # nats
METRIC = "loss"


def sizes(width: int) -> dict[str, int]:
    """The settings of a width."""
    return {"model.width": width, "model.heads": width // HEAD, "model.mlp_width": 3 * width}


def get_config(arg: str = "") -> ConfigDict:
    """The run of `width` and `steps`."""
    given = parse_arg(arg, width=WIDTH, steps=STEPS)
    c = base()
    c.name = "predict"
    c.stages = ("prepare", "tokenizer", "train", "eval")
    c.data.holdout_percent, c.data.holdout_max_bytes = 10.0, 65_536
    c.tokenizer.kind = "byte"
    c.model.vocab_multiple = 1
    c.model.layers, c.model.scan_unroll = LAYERS, LAYERS
    for key, value in sizes(given.width).items():
        c.model[key.removeprefix("model.")] = value
    c.model.tie_embeddings = False
    c.model.init, c.model.mup_base_width = "mup", 64
    c.optimizer.name = "muon"
    c.optimizer.muon_learning_rate, c.optimizer.learning_rate = 0.02, 0.01
    c.schedule.name, c.schedule.final, c.schedule.warmup = "linear", 0.0, "5%"
    c.train.batch_size, c.train.sequence_length, c.train.duration = BATCH, LENGTH, f"{given.steps} steps"
    c.train.eval_every = "0 steps"
    c.checkpoint.every = "100%"
    c.eval.xz, c.eval.stride = False, LENGTH
    c.parallel.cpu_devices = 1
    return c


def get_sweep(arg: str = "") -> dict[str, Any]:
    """The runs that the law is fitted to."""
    arms = {
        f"width {width}, {steps} steps": sizes(width) | {"train.duration": f"{steps} steps"}
        for width, row in GRID.items()
        for steps in row
    }
    return {"arms": arms, "control": "", "seeds": SEEDS, "metric": METRIC}


def llmjax(*words: str) -> None:
    """Run a command. Raises CalledProcessError when it fails."""
    subprocess.run([sys.executable, "-m", "llmjax", *words], check=True)


def point(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself; `flops` counts attention."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    names = ("parameters_without_embeddings", "tokens", "flops", "train_seconds")
    return {name: found[f"train/{name}"] for name in names} | {"loss": found["loss"]}


def steps_of(arm: str) -> int:
    """The steps in the name of an arm of `get_sweep`."""
    return int(arm.split()[2])


def predict(workdir: Path, *, workers: int) -> dict[str, Any]:
    """Train the runs that are open, fit the law, and predict the loss of the large run."""
    from llmjax.model.count import flops_per_token, param_count
    from llmjax.sweep import study

    llmjax("sweep", "--config", __file__, "--workdir", str(workdir), "--workers", str(workers))
    runs = study.read(workdir)
    folders = {f"{trial.arm}, seed {trial.seed}": runs.run_folder(trial) for trial in runs.trials}
    rows = {arm: point(folder) for arm, folder in folders.items()}
    c, tokens, law = get_config().model, STEPS * BATCH * LENGTH, workdir / "law.json"
    c.vocab_size = VOCABULARY
    asked = f"parameters={param_count(c) - VOCABULARY * WIDTH},tokens={tokens}"
    fitted_to = [runs.run_folder(trial) for trial in runs.trials if steps_of(trial.arm) >= SHORTEST]
    llmjax("laws", *map(str, fitted_to), "--predict", asked, "--resamples", str(RESAMPLES), "--out", str(law))
    fitted = json.loads(law.read_text(encoding="utf-8"))
    largest = max(rows.values(), key=lambda row: row["flops"])
    said = fitted["predictions"][0]
    return {
        "prediction": said,
        "baseline": largest["loss"],
        "times_6nd": 6.0 * said["parameters"] * said["tokens"] / fitted["largest_flops"],
        "times_with_attention": flops_per_token(c, sequence_length=LENGTH) * tokens / largest["flops"],
        "law": {key: value for key, value in fitted.items() if key not in ("predictions", "resampled")},
        "rows": rows,
        "final": {},
    }


def final(workdir: Path, found: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """Train the large run and compare its loss with what was written before."""
    folder = workdir / f"final-{seed}"
    llmjax("run", "--config", __file__, "--workdir", str(folder), f"--config.seed={seed}")
    row, said = point(folder), found["prediction"]
    return row | {
        "error": row["loss"] - said["loss"],
        "baseline_error": row["loss"] - found["baseline"],
        "inside": said["low"] <= row["loss"] <= said["high"],
        "kept": abs(row["loss"] - said["loss"]) <= PROMISED and said["low"] <= row["loss"] <= said["high"],
    }


def read(file: Path) -> dict[str, Any]:
    """Earlier results without their command and machine; {}: there are none."""
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {key: value for key, value in tree.items() if key not in ("command", "machine")}


def main() -> int:
    from common import make_parser, write

    parser = make_parser(__doc__, out=Path("results/predict.json"))
    parser.add_argument("part", choices=("fit", "final"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/predict-study"), help="the folder of all runs")
    parser.add_argument("--workers", type=int, default=1, help="fit: runs at a time")
    parser.add_argument("--seed", type=int, default=0, help="final: its seed")
    args = parser.parse_args()
    if args.part == "fit":
        if read(args.out).get("final"):
            parser.error(f"{args.out} has a run that was predicted: delete the file before you fit another law")
        found = {"promised": PROMISED, **predict(args.workdir, workers=args.workers)}
    else:
        if "prediction" not in read(args.out):
            parser.error(f"{args.out} has no prediction: run `python benchmarks/predict.py fit` first")
        row = final(args.workdir, read(args.out), seed=args.seed)
        found = read(args.out)  # again: runs of several seeds may go on at the same time
        found["final"][f"seed {args.seed}"] = row
    write(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
