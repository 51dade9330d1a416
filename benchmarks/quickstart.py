"""What README says of the quickstart, from finished runs: figures, picture and sample.

    make quickstart PYTHON=python3.11
    .venv/bin/llmjax run --config configs/quickstart.py:hour
    .venv/bin/python benchmarks/kneser_ney.py --run runs/quickstart --out results/kneser_ney.json
    .venv/bin/python benchmarks/quickstart.py runs/quickstart --hour runs/quickstart-hour

Writes results/quickstart.json and results/quickstart-hour.json: the run's results.json, with the version of Python and
the name and SHA-256 of each held-out module, because the corpus is this Python's own library. Writes
docs/quickstart.svg, the held-out bits per byte during the training, and the marked parts of README.md. Without a run
the script only makes README's tables again from results/; tests/test_docs.py compares the two. With `--picture` it leaves
the figures alone and makes picture and sample.
"""

import argparse
import hashlib
import json
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, replaced
from plans import LLAMA_BEST, PUBLISHED

from llmjax.report.curves import Curve, read_curves
from llmjax.report.plots import Line, draw

README, PICTURE, RESULTS = ROOT / "README.md", ROOT / "docs" / "quickstart.svg", ROOT / "results"
SAMPLE_LINES = 10
# The report's colours (llmjax/report/templates), for a picture that stands alone.
STYLE = """<style>
svg { --series-1: #2a6fb0; --series-2: #8a8f98; --series-3: #c47a1d; --muted: #5b6470; --line: #c9ced6; --bad: #b3261e;
 --sans: system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --series-1: #6db3f2; --series-2: #9aa1ab; --series-3: #e8a34f;
 --muted: #aab2bd; --line: #3a414b; } }
</style>"""


def heldout(run: Path) -> dict[str, str]:
    """Path in the standard library -> SHA-256 of its text, of the held-out documents of a prepared run."""
    files = sorted((run / "prepare" / "heldout").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return {
        row["path"]: hashlib.sha256(row["text"].encode()).hexdigest() for row in sorted(rows, key=lambda r: r["path"])
    }


def figures(name: str) -> Any:
    """The figures that are kept under results/."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def keep(name: str, run: Path) -> None:
    """Keep a run's results under results/, with the Python and the held-out modules that they are of."""
    found = json.loads((run / "results.json").read_text())
    found |= {"prepare/python": platform.python_version(), "prepare/heldout": heldout(run)}
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def table() -> str:
    """README's table of figures, as Markdown."""
    short, hour, kneser_ney = (figures(name) for name in ("quickstart", "quickstart-hour", "kneser_ney"))
    return f"""\
| bits per byte on modules never seen (lower is better) | {short["train/duration"]} of 2 CPU cores | within an hour |
|---|---|---|
| **llmjax** (`configs/quickstart.py`, `:hour`) | **{short["bits_per_byte"]:.3f}** ({short["train/steps"]:,} steps) | **{hour["bits_per_byte"]:.3f}** |
| `xz -9e` on the same bytes | {short["xz_bits_per_byte"]:.3f} | |
| Kneser-Ney 5-gram over the same tokens | {kneser_ney["bits_per_byte"]:.3f} | |
"""


def comparison() -> str:
    """README's table of measurements beside peers, as Markdown."""
    nanogpt = [shape["ratio"] for shape in figures("nanogpt").values() if isinstance(shape, dict) and "ratio" in shape]
    engine = figures("inference")["cases"]["batch 8"]
    harness = figures("harness")["models"]
    found = {
        tool: (row["megabytes_per_cpu_second"], row["precision"]) for tool, row in figures("dedup")["tools"].items()
    }
    plan = next(row for row in figures("plans/variants") if row["variant"] == LLAMA_BEST)
    speed = plan["tokens_per_second_per_chip"]
    rows = [
        ("loss of nanoGPT's Shakespeare setting, nats a character", f"{figures('shakespeare')['loss']:.2f}",
         "1.88, nanoGPT's README", "shakespeare.json"),
        ("a training step of nanoGPT's shapes", f"{min(nanogpt):.2f} to {max(nanogpt):.2f} times the speed",
         "nanoGPT on PyTorch", "nanogpt.json"),
        (f"greedy text of GPT-2 124M, {engine['rows']} rows at a time",
         f"{engine['ratio']:.1f} times the tokens a second, {engine['identical']} of {engine['rows']} identical",
         "`generate()` of transformers", "inference.json"),
        (f"five leaderboard tasks, {harness[0]['requests']:,} requests",
         f"{min(one['ratio_warm'] for one in harness):.1f} to {max(one['ratio_warm'] for one in harness):.1f} times the speed, "
         + ("the same scores" if all(one["metrics_identical"] for one in harness) else "other scores"),
         "lm-evaluation-harness on PyTorch", "harness.json"),
        ("near duplicates: MB a CPU second, share removed rightly", "{:.0f}, {:.4f}".format(*found["llmjax"]),
         "daft {:.0f}, {:.3f}; datatrove {:.2f}, {:.3f}".format(*found["daft"], *found["datatrove"]), "dedup.json"),
        ("Llama 2 70B on 256 chips of TPU v5p, tokens a second a chip",
         f"planned: {speed:.0f} (compiler's cycles) to {speed / plan['mfu_by_compiler'] * plan['mfu']:.0f} (roofline)",
         f"measured: {PUBLISHED['llama2']}, MaxText", "plans/table.md"),
    ]  # fmt: skip
    lines = [f"| {what} | {ours} | {peer} | [{file}](results/{file}) |" for what, ours, peer, file in rows]
    return "| what | llmjax | peer | kept in |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"


def picture(run: Path) -> str:
    """Held-out bits per byte during the training beside what the yardsticks reach, as an SVG file."""
    curves = read_curves(run / "metrics.jsonl")
    assert curves is not None, f"{run} has no metrics.jsonl"
    curve = curves.by_name["heldout_bits_per_byte"]

    def level(value: float) -> Curve:
        steps, values = np.array([0.0, float(curve.step[-1])]), np.array([value, value])
        return Curve(steps, values, values, values)

    lines = [
        Line("llmjax, held-out modules", curve, 0, points=True),
        Line("xz -9e", level(json.loads((run / "results.json").read_text())["xz_bits_per_byte"]), 1, dashed=True),
        Line("Kneser-Ney 5-gram", level(figures("kneser_ney")["bits_per_byte"]), 2, dashed=True),
    ]
    svg = draw("quickstart", lines, y_label="bits per byte", wide=True)
    return re.sub(r"(<svg[^>]*>)", rf"\1{STYLE}", svg, count=1) + "\n"


def sample(run: Path) -> str:
    """The first function that the run wrote for the first prompt of its config, as Markdown."""
    row = json.loads((run / "generate" / "samples.jsonl").read_text().splitlines()[0])
    lines = (
        (row["prompt"] + row["text"]).split("\n\n\n")[0].split("\n")[:SAMPLE_LINES]
    )  # two blank lines end a function
    code = "\n".join(line.rstrip() for line in lines).rstrip()
    return f"<!-- fmt: off -->\n```python\n{code}\n```\n<!-- fmt: on -->\n"  # ruff leaves it as it was written


def main() -> None:
    """Make what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="the folder of a finished quickstart, by this Python")
    parser.add_argument("--hour", type=Path, help="the folder of a finished quickstart.py:hour")
    parser.add_argument("--picture", action="store_true", help="only picture and sample, with the figures as they are")
    args = parser.parse_args()
    text = README.read_text()
    if args.run and not args.picture:
        keep("quickstart", args.run)
    if args.hour:
        keep("quickstart-hour", args.hour)
    if args.run:
        PICTURE.write_text(picture(args.run))
        text = replaced(text, "sample", sample(args.run))
    README.write_text(replaced(replaced(text, "figures", table()), "comparison", comparison()))


if __name__ == "__main__":
    main()
