"""The shelf of ablations: every file of configs/ablations/ as a study, one after another.

    python benchmarks/ablations.py
    python benchmarks/ablations.py --only positions,norms

A run takes one to two minutes of one idle core: 113 arms and three controls, three seeds each. All studies but `mixture`
and `replay` share a control and a folder; `replay` needs the run runs/quickstart. Stop the script at any time: the next
call goes on. After each study the results are written, to --out, to the docstring of the config and to the table in
configs/README.md. A difference is in bits per byte of held-out text, paired by seed, with a 95 % interval; `p_holm` is
corrected for the arms of its study.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import ROOT, llmjax, make_parser, replaced, write

from llmjax import config, storage
from llmjax.sweep.study import default_folder

SHELF = sorted((ROOT / "configs" / "ablations").glob("*.py"))
KEPT = ("mean", "low", "high", "seeds", "p_holm", "value", "values", "settings", "states", "seconds", "flops")
CLEAR = 0.05  # below this p an arm is marked


def difference(arm: Mapping[str, Any]) -> str:
    """An arm beside the control, as `+.045 (+.030 to +.060) *`; the mark: p < CLEAR after Holm's correction."""
    if arm["mean"] is None:
        states = ", ".join(f"{count} {state}" for state, count in arm["states"].items())
        return f"no figure: {states}"
    if arm["low"] is None:
        return short(arm["mean"])
    mark = " *" if arm["p_holm"] is not None and arm["p_holm"] < CLEAR else ""
    return f"{short(arm['mean'])} ({short(arm['low'])} to {short(arm['high'])}){mark}"


def short(number: float) -> str:
    """A signed number with three decimals and no zero before the point."""
    return f"{number:+.3f}".replace("0.", ".", 1)


def with_results(text: str, name: str, study: Mapping[str, Any]) -> str:
    """A config's text whose docstring tells the results of its study."""
    control, arms = study["control"], dict(study["arms"])
    value = arms.pop(control)["value"]
    wide = max(map(len, arms))
    rows = "\n".join(f"    {arm:{wide}}  {difference(row)}" for arm, row in arms.items())
    told = (
        "Three paired seeds, one to two minutes of one core a run. Bits per byte of held-out text: the control\n"
        f"{value:.3f}. The arms less the control, with 95 % intervals (* p < {CLEAR} after Holm's correction):\n\n{rows}\n\n"
        f"`python benchmarks/ablations.py --only {name}` measured them (results/ablations.json).\n"
    )
    new, count = re.subn(r'Three paired seeds.*?(?=""")', lambda _: told, text, count=1, flags=re.DOTALL)
    assert count == 1, f"the docstring of {name} has no part about its results"
    return new


def table(studies: Mapping[str, Any]) -> str:
    """All arms of all studies, for configs/README.md."""
    lines = ["| study | arm | bits per byte, less the control's | FLOPs |", "|---|---|---|---|"]
    for name, study in sorted(studies.items()):
        control, arms = study["control"], study["arms"]
        lines.append(f"| [{name}](ablations/{name}.py) | {control} | is {arms[control]['value']:.3f} | |")
        for arm, row in arms.items():
            if arm != control:
                flops = f"x {row['flops'] / arms[control]['flops']:.2f}" if row["flops"] else ""
                lines.append(f"| | {arm} | {difference(row)} | {flops} |")
    missing = [file.stem for file in SHELF if file.stem not in studies]
    note = f"\nNot run yet: {', '.join(f'`{name}`' for name in missing)}.\n" if missing else ""
    return "\n".join(lines) + "\n" + note


def publish(studies: Mapping[str, Any]) -> None:
    """Write the results where a reader of the configs looks for them."""
    for file in SHELF:
        if file.stem in studies:
            text = file.read_text(encoding="utf-8")
            storage.write_text(file, with_results(text, file.stem, studies[file.stem]))
    page = ROOT / "configs" / "README.md"
    storage.write_text(page, replaced(page.read_text(encoding="utf-8"), "ablations", table(studies)))


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
        studies[file.stem] = {
            "command": f"llmjax sweep --config {spec}",
            "metric": results["metric"],
            "control": results["control"],
            "arms": arms,
        }
        write({"studies": studies}, args.out)
        publish(studies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
