"""Function calls by BFCL's data: the ceiling of a script, and a model with and without the schema of the functions.

    python benchmarks/bfcl.py --data DIR [--workdir RUN] [--limit N] [--free] [--out FILE.json]

DIR has the files of the categories (CATEGORY.jsonl, CATEGORY.answers.jsonl), as the Berkeley function-calling leaderboard publishes
them. The ceiling is a script that writes the first accepted values. Where it is wrong, the data contradict themselves,
and the script names the row. With --workdir, the model of that run writes under the schema of a question's functions
("constrained"), and with --free also without ("free"). A call is invalid if it names no function of the question, or
has arguments that are not of its schema.
"""

import json
import os
from pathlib import Path
from typing import Any

import common

from llmjax.agents import bfcl
from llmjax.eval.statistics import mean

CATEGORIES = ("simple_python", "multiple", "parallel", "irrelevance", "parallel_multiple", "live_simple")
SHOWN = CATEGORIES[:4]  # of a model


def main() -> None:
    parser = common.make_parser(__doc__, out=common.ROOT / "results" / "bfcl.json")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--workdir", type=Path, metavar="RUN", help="a chat model")
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="only the first N questions of a category for the model"
    )
    parser.add_argument("--free", action="store_true", help="also without the schema")
    args = parser.parse_args()
    results: dict[str, Any] = {"ceiling": {name: ceiling(bfcl.read(name, [args.data])) for name in CATEGORIES}}
    if args.workdir:
        import llmjax

        model = llmjax.load(args.workdir)
        for name in SHOWN:
            rows = bfcl.read(name, [args.data])
            rows = rows[: args.limit] if args.limit else rows
            ways = ("constrained", "free") if args.free else ("constrained",)
            results[name] = {way: shown(bfcl.scores(name, rows, model, free=way == "free")) for way in ways}
            print(f"{name}: {json.dumps(results[name])}", flush=True)
    print(json.dumps(results["ceiling"]))
    common.write(results, args.out)


def ceiling(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of questions that the script answers rightly, and the ids of the others."""
    found = [bfcl.score(row, bfcl.gold(row))["right"] for row in rows]
    return {
        "right": mean(found).value, "questions": len(rows),
        "contradictory": [row["id"] for row, right in zip(rows, found, strict=True) if not right],
    }  # fmt: skip


def shown(score: Any) -> dict[str, Any]:
    """The shares of a model with their standard errors."""
    kept = {name: {"value": round(e.value, 4), "error": round(e.error, 4)} for name, e in score.metrics.items()}
    return {**kept, "questions": len(score.items)}


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
