"""The shelf of ablations: every file of configs/ablations/ as a study, one after another, with one shared control.

    python benchmarks/ablations.py --out results/ablations.json
    python benchmarks/ablations.py --only positions,norms

About a minute of two idle cores a run, 102 arms and the control, three seeds each: about five hours in all. It may be stopped at any time, and goes on
when it is called again. After each study the results are written, so that they are there as they come. A difference is in
bits per byte of held-out text, paired by seed, with a 95 % interval; `p_holm` is corrected for the arms of its study.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, make_parser, write

SHELF = sorted((ROOT / "configs" / "ablations").glob("*.py"))
KEPT = ("mean", "low", "high", "seeds", "p_holm", "value", "values", "settings", "states", "seconds", "flops")


def main() -> int:
    parser = make_parser(__doc__, out=Path("results/ablations.json"))
    parser.add_argument("--only", default="", help="names of studies, with commas")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablations-study"), help="the folder of all studies")
    parser.add_argument("--workers", default="1", help="trials at a time")
    args = parser.parse_args()
    wanted = [file for file in SHELF if not args.only or file.stem in args.only.split(",")]
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    studies: dict[str, Any] = before.get("studies", {})
    for file in wanted:
        config = f"configs/ablations/{file.name}"
        words = ["sweep", "--config", config, "--workdir", str(args.workdir), "--workers", args.workers]
        status = subprocess.run([sys.executable, "-m", "llmjax", *words], check=False).returncode
        if status not in (0, 1):  # 1: some trials failed, which the results say
            return status
        results = json.loads((args.workdir / "results.json").read_text(encoding="utf-8"))
        arms = {name: {key: arm[key] for key in KEPT} for name, arm in results["arms"].items()}
        studies[file.stem] = {"command": f"llmjax sweep --config {config}", "metric": results["metric"], "arms": arms}
        write({"studies": studies}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
