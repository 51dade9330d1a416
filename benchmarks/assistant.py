"""configs/assistant.py with several seeds: what each link teaches, with intervals, times and a conversation.

    python benchmarks/assistant.py --base runs/quickstart [--seeds 3] [--runs runs/assistant-seeds] [--out results/assistant.json]
    python benchmarks/assistant.py --pages               only the tables of README and docs/assistant.md, from results/

Every seed is a chain of its own behind the same base model; one that is done is not run again, and its times are kept. The
same 200 held-out prompts measure every link. Intervals are of 95 %: differences are paired over prompts, and the variance of
a mean is that over prompts (of means over seeds) and that over seeds (of means over prompts) together. The machine should be
idle. Each seed takes at most 10 minutes of 2 cores.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, cpu_seconds, make_parser, replaced, write

LINKS = ("base", "sft", "dpo", "grpo")
NORMAL_95 = 1.96
DIFFERENCES = (  # (name, later, earlier, measure)
    ("sft above base", "sft", "base", "exact_match"),
    ("grpo above sft", "grpo", "sft", "reward"),
    ("grpo above sft", "grpo", "sft", "exact_match"),
    ("dpo above sft", "dpo", "sft", "reward"),
)
RESULTS = ROOT / "results" / "assistant.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "assistant.md")  # each has the table
QUESTIONS = (
    "Which arguments call `def resize(width, height, scale=1)` with height=20 and width=7?",
    "Which arguments call `def resize(width, height, scale=1)` with scale=3 and height=20 and width=7?",
    "Which parameters does `def wait_for(event, timeout=None, loop=None)` need?",
    "Which parameters of `def parse_header(line, strict, limit=0)` are optional?",
    "What does `def remove_section(section)` do?",
)


def run_seed(base: Path, workdir: Path, seed: int) -> dict[str, float]:
    """Wall and CPU seconds of a chain, measured once and kept in its folder."""
    kept = workdir / "times.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    command = [sys.executable, "-m", "llmjax", "run", "--config", "configs/assistant.py", "--workdir", str(workdir)]
    command += [f"--config.seed={seed}", f"--config.base.train.init_from={base}"]
    began, used = time.perf_counter(), cpu_seconds()
    subprocess.run(command, cwd=ROOT, check=True)
    times = {"wall_seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - used}
    kept.write_text(json.dumps(times))
    return times


def answers(workdir: Path, link: str) -> list[dict[str, Any]]:
    """The answers of a link with their scores."""
    return [json.loads(line) for line in (workdir / link / "answers" / "answers.jsonl").read_text().splitlines()]


def estimate(values_SP: np.ndarray) -> dict[str, float]:
    """The mean over seeds and prompts, with its interval of 95 %."""
    seeds, prompts = values_SP.shape
    variance = float(values_SP.mean(axis=0).var(ddof=1)) / prompts
    if seeds > 1:
        variance += float(values_SP.mean(axis=1).var(ddof=1)) / seeds
    mean, half = float(values_SP.mean()), NORMAL_95 * math.sqrt(variance)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def conversation(workdir: Path) -> list[dict[str, str]]:
    """The questions with the answers of the chain's last model, in `llmjax chat`."""
    found = []
    for question in QUESTIONS:
        command = [sys.executable, "-m", "llmjax", "chat", "--workdir", str(workdir)]
        done = subprocess.run(command, cwd=ROOT, input=question + "\n", capture_output=True, text=True, check=True)
        found.append({"question": question, "answer": done.stdout.strip()})
    return found


def table() -> str:
    """What each link reaches, from the results that are kept, as Markdown."""
    results = json.loads(RESULTS.read_text())
    lines = [
        f"| {results['prompts']:.0f} questions about functions never seen, {results['seeds']} seeds | base | examples | preferences | rewards | no model |",
        "|---|---|---|---|---|---|",
    ]
    for measure, name in (("exact_match", "exact match"), ("reward", "reward")):
        means = [results["links"][link][measure]["mean"] for link in LINKS]
        cells = [*(f"{mean:.3f}" for mean in means), f"{results['baseline'][measure]:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_pages() -> None:
    """Put the table into the pages."""
    for page in PAGES:
        page.write_text(replaced(page.read_text(), "assistant", table()))


def main() -> None:
    """See the module."""
    parser = make_parser(__doc__, out=RESULTS)
    parser.add_argument("--base", type=Path, help="a finished run of configs/quickstart.py")
    parser.add_argument("--pages", action="store_true", help="only the tables, from the results that are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "assistant-seeds", help="where the chains are")
    args = parser.parse_args()
    if args.pages:
        return write_pages()
    if not args.base:
        parser.error("give --base, a finished run of configs/quickstart.py, or --pages")
    folders = [args.runs.resolve() / str(seed) for seed in range(args.seeds)]
    times = [run_seed(args.base.resolve(), folder, seed) for seed, folder in enumerate(folders)]
    scores = {
        link: {
            measure: np.array([[row[measure] for row in answers(folder, link)] for folder in folders], float)
            for measure in ("exact_match", "reward")
        }
        for link in LINKS
    }
    last = json.loads((folders[-1] / "results.json").read_text())
    results = {
        "seeds": args.seeds,
        "prompts": last["sft/answers/prompts"],
        "links": {link: {m: estimate(values) for m, values in of.items()} for link, of in scores.items()},
        "kinds": {
            link: {k: v for k, v in last.items() if k.startswith(f"{link}/answers/exact_match/")} for link in LINKS
        },
        "baseline": {m: last[f"sft/answers/baseline_{m}"] for m in ("exact_match", "reward")},
        "differences": [
            {"name": name, "measure": measure, **estimate(scores[later][measure] - scores[earlier][measure])}
            for name, later, earlier, measure in DIFFERENCES
        ],
        "times": times,
        "conversation": conversation(folders[-1]),
    }
    for link, measures in results["links"].items():
        print(link, *(f"{m} {e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for m, e in measures.items()))
    print("baseline", *(f"{m} {value:.3f}" for m, value in results["baseline"].items()))
    for one in results["differences"]:
        print(f"{one['name']}, {one['measure']}: {one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]")
    for said in results["conversation"]:
        print(f"> {said['question']}\n{said['answer']}")
    write(results, args.out)
    if args.out.resolve() == RESULTS:
        write_pages()


if __name__ == "__main__":
    main()
