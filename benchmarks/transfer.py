"""Does the best rate of a small model hold at four times the width? muP against the standard parametrisation.

    python benchmarks/transfer.py --out results/transfer.json
    python benchmarks/transfer.py --only adamw --seeds 1 --widths 32

Five rates at each of two widths, AdamW and Muon, muP and the standard parametrisation, three seeds: 120 runs of 0.8M tokens
of this Python's standard library, bytes for tokens, of half a minute to one of two idle cores each. Trainings are in steps,
so the machine's load does not change them. The script may be stopped at any time and goes on where it was; results are
written after every optimizer, scheme and width, with what is still open.

For each optimizer and scheme the rate with the lowest held-out loss at the small width is transferred. `regret` is the
held-out loss of the large width at that rate relative to the best of its own five rates, less 1: at most 0.01 is promised
for muP. Losses are means over the seeds.
"""

import json
import sys
from pathlib import Path
from typing import Any

from llmjax.config import ConfigDict, base, parse_arg

WIDTHS = (32, 128)
RATES = {
    "adamw": (0.001, 0.003, 0.01, 0.03, 0.1),
    "muon": (0.01, 0.02, 0.04, 0.08, 0.16),
}
SCHEMES = ("mup", "gpt2")
METRIC = "train/heldout_loss"
PROMISED = 0.01


def get_config(arg: str = "") -> ConfigDict:
    """One width, optimizer and scheme: `width=64,optimizer=adamw,init=mup`."""
    given = parse_arg(arg, width=WIDTHS[0], optimizer="adamw", init="mup")
    c = base()
    c.name = "transfer"
    c.stages = ("prepare", "tokenizer", "train")
    c.tokenizer.kind = "byte"
    c.model.layers, c.model.scan_unroll = 2, 2
    c.model.width, c.model.heads, c.model.mlp_width = given.width, given.width // 16, 3 * given.width
    c.model.tie_embeddings = False
    c.model.init, c.model.mup_base_width = given.init, WIDTHS[0]
    c.optimizer.name = given.optimizer
    c.schedule.name, c.schedule.final, c.schedule.warmup = "linear", 0.0, "10%"
    c.train.batch_size, c.train.sequence_length, c.train.duration = 16, 128, "400 steps"
    c.train.eval_every, c.train.eval_batches = "100%", 16
    c.checkpoint.every = "100%"
    return c


def get_sweep(arg: str = "") -> dict[str, Any]:
    """The five rates of the optimizer; Muon's rest has half of its rate."""
    given = parse_arg(arg, width=WIDTHS[0], optimizer="adamw", init="mup")
    arms = {}
    for rate in RATES[given.optimizer]:
        settings = {"optimizer.learning_rate": rate}
        if given.optimizer == "muon":
            settings = {"optimizer.muon_learning_rate": rate, "optimizer.learning_rate": rate / 2}
        arms[f"{rate:g}"] = settings
    return {"arms": arms, "seeds": 3, "metric": METRIC, "control": ""}


def transferred(small: dict[str, float | None], large: dict[str, float | None]) -> dict[str, Any]:
    """The rate that is best at the small width, and what it costs at the large one; None: it diverged there."""
    rate, best = (min((r for r in by if by[r] is not None), key=lambda r, by=by: by[r]) for by in (small, large))
    at_rate, at_best = large[rate], large[best]
    return {"transferred": rate, "best": best, "regret": None if at_rate is None else at_rate / (at_best or 1.0) - 1}


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the rows that are complete say, by optimizer and scheme."""
    found = {}
    for optimizer in RATES:
        for scheme in SCHEMES:
            both = [rows.get(f"{optimizer} {scheme} {width}") for width in WIDTHS]
            if all(row and not row["open"] for row in both):
                found[f"{optimizer} {scheme}"] = transferred(*(row["loss"] for row in both if row))
    return found


def main() -> int:
    from common import llmjax, make_parser, write

    parser = make_parser(__doc__, out=Path("results/transfer.json"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/transfer-study"), help="the folder of all studies")
    parser.add_argument("--only", default=",".join(RATES), help="optimizers, with commas")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="schemes, with commas")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="widths, with commas")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    folder = args.workdir.resolve()
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    rows: dict[str, dict[str, Any]] = before.get("rows", {})
    for optimizer in args.only.split(","):
        for scheme in args.schemes.split(","):
            for width in args.widths.split(","):
                config = f"benchmarks/transfer.py:width={width},optimizer={optimizer},init={scheme}"
                # Status 1: some trials failed, which the results say.
                llmjax("sweep", "--config", config, "--workdir", folder, "--seeds", str(args.seeds), accepted=(0, 1))
                found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
                rows[f"{optimizer} {scheme} {width}"] = {
                    "command": f"llmjax sweep --config {config} --seeds {args.seeds}",
                    "loss": {name: arm["value"] for name, arm in found["arms"].items()},
                    "values": {name: arm["values"] for name, arm in found["arms"].items()},
                    "states": {name: arm["states"] for name, arm in found["arms"].items()},
                    "seeds": args.seeds,
                    "open": found["open"],
                }
                write({"promised": PROMISED, "summary": summary(rows), "rows": rows}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
