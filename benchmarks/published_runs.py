"""The cost of famous runs by our calculators, beside the published figures.

    python benchmarks/published_runs.py --out results/published_runs.json

FLOPs are those of `llmjax plan` for the model's config, attention included, or 6 x parameters x tokens where there is no
config. Chip-hours, days and dollars follow with the share of the peak that `llmjax budget` assumes, and with list prices.
The share of the peak that the published time implies follows from the same formula. The script prints the table in
docs/plan.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, make_parser, replaced, write

from llmjax import config, human
from llmjax.parallel.chips import CHIPS
from llmjax.scaling import analytic, compiler
from llmjax.sweep import budget

# Peak FLOP/s of a chip that no plan is made for: NVIDIA's data sheet, float16 with tensor cores.
OLDER = {"v100": 125e12}
DOCS = ROOT / "docs" / "plan.md"
YEAR = 365.25 * 24


@dataclass(frozen=True)
class Run:
    """A run as published."""

    parameters: float
    tokens: float
    chip: str
    source: str
    why: str  # it differs from the estimate
    chips: int = 0  # 0: not published
    hours: float = 0.0  # chip-hours; 0: not published
    dollars: float = 0.0  # 0: not published
    price: float = 0.0  # US dollars a chip-hour, of the published sum; 0: the list price
    spec: str = ""  # the config of the model


RUNS = {
    "GPT-3 on V100": Run(
        175e9, 300e9, "v100", "Narayanan et al. 2021: 288 years of one V100",
        "the estimate assumes 40% of the peak, and on V100 that was not reached", hours=288 * YEAR, spec="models/gpt3.py:175b",
    ),
    "GPT-3 on V100, in dollars": Run(
        175e9, 300e9, "v100", "Lambda 2020: 355 years of one V100 at 1.50 an hour, 4.6M",
        "Lambda counts 28 TFLOP/s, 22% of the peak, where 40% is assumed here", hours=355 * YEAR, dollars=4.6e6, price=1.5,
        spec="models/gpt3.py:175b",
    ),
    "GPT-3 on A100": Run(
        175e9, 300e9, "a100", "Narayanan et al. 2021: 34 days on 1,024",
        "activations are computed again, which is no work of the model: 140 TFLOP/s, 45% of the peak, with it", 1024,
        1024 * 34 * 24, spec="models/gpt3.py:175b",
    ),
    "7B on 20 tokens a parameter": Run(
        7e9, 140e9, "a100-40gb", "as cited, without chip and price: about 25,000",
        "the price of a chip-hour decides: 1.84 here", dollars=25_000, spec="models/llama.py:llama2-7b",
    ),
    "PaLM": Run(
        540e9, 780e9, "v4", "Chowdhery et al. 2022: 6,144 chips for 1,200 hours, 3,072 for 336",
        "steps were run again and chips waited: 46.2% of the peak while it ran", 6144, 6144 * 1200 + 3072 * 336,
        spec="models/palm.py:540b",
    ),
    "Falcon-40B": Run(
        40e9, 1e12, "a100-40gb", "the model's card: two months on 384", "two months hold interruptions and the ramp of the batch",
        384, 384 * 61 * 24, spec="models/falcon.py:40b",
    ),
    "Chinchilla": Run(
        70e9, 1.4e12, "v4", "Hoffmann et al. 2022: 5.76e23 FLOPs, neither chips nor time",
        "the published figure is Gopher's budget, for which the size was chosen", spec="runs/chinchilla.py",
    ),
    "phi-1": Run(
        1.3e9, 24_000 * 1024 * 2048, "a100", "Gunasekar et al. 2023: under 4 days on 8", "the published time is an upper bound", 8,
        8 * 4 * 24, spec="models/phi.py:phi-1",
    ),
    "Llama 3.1 405B": Run(
        405e9, 15.6e12, "h100", "the model's card: 30.84M GPU-hours", "restarts, ramps and 38 to 43% of the peak on 16,384",
        hours=30.84e6, spec="models/llama.py:llama3.1-405b",
    ),
}  # fmt: skip


def flops_of(run: Run) -> tuple[float, float]:
    """(FLOPs as the plan counts them, 6 x parameters x tokens)."""
    plain = budget.Size(run.parameters, run.tokens).flops
    if not run.spec:
        return plain, plain
    c = compiler.resolve(config.load(str(ROOT / "configs" / run.spec)), platform="gpu")
    return analytic.token_flops(c).model * run.tokens, plain


def row_of(run: Run) -> dict[str, Any]:
    """Our figures and the published ones."""
    flops, plain = flops_of(run)
    peak = OLDER.get(run.chip) or CHIPS[run.chip].flops
    price = run.price or (CHIPS[run.chip].price if run.chip in CHIPS else 0.0)
    hours = flops / (peak * budget.MFU * budget.HOUR)
    return {
        "flops": flops,
        "six_parameters_tokens": plain,
        "chip": run.chip,
        "chips": run.chips or None,
        "chip_hours": hours,
        "days": hours / run.chips / 24 if run.chips else None,
        "dollars": hours * price if price else None,
        "price": price or None,
        "published": {"chip_hours": run.hours or None, "dollars": run.dollars or None, "source": run.source},
        "share_of_peak": flops / (peak * run.hours * budget.HOUR) if run.hours else None,
        "why": run.why,
    }


def line_of(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    days = f", {row['days']:.0f} days on {row['chips']:,}" if row["days"] else ""
    dollars = f", ${human.count(row['dollars'])} at {row['price']:.2f}" if row["dollars"] else ""
    share = f"{row['share_of_peak']:.0%}" if row["share_of_peak"] else ""
    return (
        f"| {name} | {row['flops']:.2e} ({row['six_parameters_tokens']:.2e}) | {human.count(row['chip_hours'])} of "
        f"{row['chip']}{days}{dollars} | {row['published']['source']} | {share} | {row['why']} |"
    )


def main() -> int:
    args = make_parser(__doc__, out=Path("results/published_runs.json")).parse_args()
    rows = {name: row_of(run) for name, run in RUNS.items()}
    lines = [
        f"| run | FLOPs (6 N D) | chip-hours at {budget.MFU:.0%} of the peak | published | share of the peak that it implies | why "
        "they differ |",
        "|---|---|---|---|---|---|",
        *(line_of(name, row) for name, row in rows.items()),
    ]
    print("\n".join(lines))
    DOCS.write_text(
        replaced(DOCS.read_text(encoding="utf-8"), "published runs", "\n".join(lines) + "\n"), encoding="utf-8"
    )
    write({"assumed_share_of_peak": budget.MFU, "rows": rows}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
