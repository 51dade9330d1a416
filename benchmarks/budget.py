"""The choices of `llmjax budget` for famous budgets, beside those of their authors.

    python benchmarks/budget.py --out results/budget.json

Each budget is 6 x parameters x tokens of the authors' choice. The law is the one that `llmjax budget` uses:
Chinchilla's 240 points in Epoch's reading. The table in docs/laws.md is printed by this script.
"""

import sys
from pathlib import Path

from common import ROOT, make_parser, replaced, write

from llmjax import human
from llmjax.sweep import budget

# Parameters and tokens as published: Hoffmann et al. 2022, Rae et al. 2021, Chowdhery et al. 2022, Touvron et al. 2023,
# Brown et al. 2020, Dubey et al. 2024.
CHOSEN = {
    "GPT-3": (175e9, 300e9),
    "Gopher": (280e9, 300e9),
    "Chinchilla": (70e9, 1.4e12),
    "PaLM": (540e9, 780e9),
    "LLaMA 7B": (6.7e9, 1e12),
    "LLaMA 65B": (65.2e9, 1.4e12),
    "Llama 3.1 405B": (405e9, 15.6e12),
}
DOCS = ROOT / "docs" / "laws.md"


def main() -> int:
    args = make_parser(__doc__, out=Path("results/budget.json")).parse_args()
    laws = budget.read_law()
    machine = budget.Machine("h100", 1024, budget.Figure(0.4, "assumed", ""), budget.Figure(0.0, "assumed", ""))
    rows = {}
    for name, (parameters, tokens) in CHOSEN.items():
        chosen = budget.Size(parameters, tokens)
        figures = budget.plan(budget.Asked(flops=chosen.flops), laws, machine)
        loss = float(laws.law.loss(parameters, tokens))
        best = {key: figures[key].as_json() for key in ("parameters", "tokens", "loss")}
        rows[name] = {
            "flops": chosen.flops,
            "chosen": {"parameters": parameters, "tokens": tokens, "loss": loss},
            "budget": best,
            # How many times the FLOPs the best size needs for the loss of what was chosen.
            "flops_for_the_same_loss": budget.of_loss(laws.law, loss).flops / chosen.flops,
        }
    lines = [
        "| budget | FLOPs | chosen | `llmjax budget` | loss: chosen, best | FLOPs that the best size needs for the chosen loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        mine, theirs = row["budget"], row["chosen"]
        n, d = mine["parameters"], mine["tokens"]
        lines.append(
            f"| {name} | {row['flops']:.2e} | {human.count(theirs['parameters'])}, {human.count(theirs['tokens'])} tokens | "
            f"{human.count(n['value'])} ({human.count(n['low'])} to {human.count(n['high'])}), {human.count(d['value'])} tokens | "
            f"{theirs['loss']:.3f}, {mine['loss']['value']:.3f} | {row['flops_for_the_same_loss']:.0%} |"
        )
    print("\n".join(lines))
    DOCS.write_text(replaced(DOCS.read_text(encoding="utf-8"), "budgets", "\n".join(lines) + "\n"), encoding="utf-8")
    write({"law": laws.name, "rows": rows}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
