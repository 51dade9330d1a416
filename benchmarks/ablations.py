"""The shelf of ablations: every file of configs/ablations/ as a study, one after another.

    python benchmarks/ablations.py --out results/ablations.json
    python benchmarks/ablations.py --only positions,norms

A run takes about a minute of two idle cores, and the shelf about six hours: 113 arms and three controls, three seeds each.
All studies but `mixture` and `replay` share a control and a folder; `replay` needs the run runs/quickstart. Stop the
script at any time: the next call goes on, and the results are written after each study. A difference is in bits per byte
of held-out text, paired by seed, with a 95 % interval; `p_holm` is corrected for the arms of its study.
"""

import json
import sys
from pathlib import Path
from typing import Any

from common import ROOT, llmjax, make_parser, write

from llmjax import config
from llmjax.sweep.study import default_folder

SHELF = sorted((ROOT / "configs" / "ablations").glob("*.py"))
KEPT = ("mean", "low", "high", "seeds", "p_holm", "value", "values", "settings", "states", "seconds", "flops")


def main() -> int:
    parser = make_parser(__doc__, out=Path("results/ablations.json"))
    parser.add_argument("--only", default="", help="names of studies, with commas")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs", help="the folder of the studies' folders")
    parser.add_argument("--workers", default="1", help="trials at a time")
    args = parser.parse_args()
    wanted = [file for file in SHELF if not args.only or file.stem in args.only.split(",")]
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    studies: dict[str, Any] = before.get("studies", {})
    for file in wanted:
        spec = f"configs/ablations/{file.name}"
        folder = args.workdir.resolve() / default_folder(config.load(str(file))).name
        # Status 1: some trials failed, which the results say.
        llmjax("sweep", "--config", spec, "--workdir", folder, "--workers", args.workers, accepted=(0, 1))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        arms = {name: {key: arm[key] for key in KEPT} for name, arm in results["arms"].items()}
        studies[file.stem] = {"command": f"llmjax sweep --config {spec}", "metric": results["metric"], "arms": arms}
        write({"studies": studies}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
