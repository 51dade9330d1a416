"""Benchmark questions hidden in training text: the share that is found, and the clean documents that are rejected as
leaks.

    python benchmarks/leaks.py --eval DIR --texts DIR [--out results/leaks.json]

Hides 200 questions of the benchmarks in DIR (JSONL, as lm-evaluation-harness reads them), drawn evenly over the files,
in paragraphs of --texts, each in four ways: verbatim; in other case, spacing and punctuation; with one word in twenty
changed; with one word in ten changed. Then `prepare` runs with the step decontaminate on these and on 10,000 clean
documents: lines of --texts and paragraphs of the Python files installed with this interpreter that hold none of them.
Questions of fewer than 8 words also occur by chance, so the script counts them separately. Needs the extra [data].

Hardware: any; a minute on 2 CPU cores.
"""

import json
import random
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import make_parser, write
from rich.console import Console
from rich.table import Table

from llmjax import config
from llmjax.prepare import decontaminate, run

QUESTIONS, CLEAN = 200, 10_000
EDITS = ("verbatim", "case, spaces, marks", "1 word in 20", "1 word in 10")


def main() -> None:
    """Plant, prepare, count."""
    parser = make_parser(__doc__)
    parser.add_argument("--eval", type=Path, required=True, metavar="DIR", help="benchmarks as JSONL")
    parser.add_argument("--texts", type=Path, required=True, metavar="DIR", help="plain text to hide them in")
    args = parser.parse_args()
    draw = random.Random(0)
    files = sorted(args.eval.glob("*.jsonl"))
    if not files:
        sys.exit(f"{args.eval} has no .jsonl files")
    questions = pick(files, draw)
    paragraphs = [line for file in sorted(args.texts.glob("*.txt")) for line in lines(file) if len(line.split()) > 30]
    draw.shuffle(paragraphs)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = plant(questions, paragraphs[: len(questions) * len(EDITS) * 2], draw)
        clean = (paragraphs[len(questions) * len(EDITS) * 2 :] + list(code_paragraphs()))[: CLEAN * 2]
        draw.shuffle(clean)
        rows += [{"text": text, "kind": "clean", "name": f"clean-{n}"} for n, text in enumerate(clean[:CLEAN])]
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = prepare(folder, files)
    result = account(rows, found, questions)
    show(result)
    write(result, args.out)


def pick(files: list[Path], draw: random.Random) -> list[tuple[str, str]]:
    """(benchmark, question) drawn evenly over the files."""
    found = []
    for file in files:
        items = decontaminate.read_benchmark(file)
        chosen = draw.sample(items, min(len(items), -(-QUESTIONS // len(files))))
        found += [(file.stem, item.fields["question"]) for item in chosen]
    draw.shuffle(found)
    return found[:QUESTIONS]


def lines(file: Path) -> list[str]:
    """The lines of a text file."""
    return file.read_text(encoding="utf-8", errors="replace").splitlines()


def code_paragraphs() -> Iterator[str]:
    """Paragraphs of the standard library's sources."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for paragraph in file.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            if len(paragraph.split()) > 30:
                yield paragraph


def edit(question: str, kind: str, draw: random.Random) -> str:
    """A question changed as its copies on the web are."""
    words = question.split()
    if kind == "case, spaces, marks":
        return "  ".join(words).upper().replace(",", " ;").replace("?", " ?!")
    every = {"1 word in 20": 20, "1 word in 10": 10}.get(kind)
    if every:
        for place in range(draw.randrange(every), len(words), every):
            words[place] = draw.choice(("something", "other", "many", "perhaps"))
    return " ".join(words) if every else question


def plant(questions: list[tuple[str, str]], paragraphs: list[str], draw: random.Random) -> list[dict[str, str]]:
    """A row for each question and way of changing it, between two paragraphs."""
    rows = []
    for kind in EDITS:
        for benchmark, question in questions:
            before, after = paragraphs.pop(), paragraphs.pop()
            text = f"{before}\n{edit(question, kind, draw)}\n{after}"
            rows.append({"text": text, "kind": kind, "name": benchmark, "question": question})
    return rows


def prepare(folder: Path, files: list[Path]) -> dict[str, str]:
    """Text of a rejected document's beginning -> reason."""
    c = config.base()
    c.data.sources = (str(folder / "in.jsonl"),)
    c.data.holdout_percent = 0.0
    c.prepare.steps = ("decontaminate",)
    c.prepare.decontaminate = tuple(map(str, files))
    run.run(c.lock(), folder / "run")
    found = {}
    for shard in (folder / "run/prepare/rejected").glob("*.jsonl"):
        for line in shard.read_text().splitlines():
            row = json.loads(line)
            found[row["path"]] = row["reason"]
    return found


def account(rows: list[dict[str, str]], found: dict[str, str], questions: list[tuple[str, str]]) -> dict[str, Any]:
    """Shares found by way of changing and by benchmark, and what was wrongly taken for a leak."""
    total: Counter[tuple[str, str]] = Counter()
    hits: Counter[tuple[str, str]] = Counter()
    alarms = []
    for number, row in enumerate(rows, start=1):
        reason = found.get(f"in.jsonl:{number}", "")
        is_leak = reason.startswith("leak")
        if row["kind"] == "clean":
            if is_leak:
                alarms.append({"reason": reason, "text": row["text"][:300]})
            continue
        size = "long" if len(row["question"].split()) >= decontaminate.SHORT else "short"
        for key in ((row["kind"], size), (row["kind"], row["name"])):
            total[key] += 1
            hits[key] += is_leak
    names = sorted({benchmark for benchmark, _ in questions})
    return {
        "questions": len(questions),
        "found": {kind: {size: [hits[kind, size], total[kind, size]] for size in ("long", "short")} for kind in EDITS},
        "by_benchmark": {name: {kind: [hits[kind, name], total[kind, name]] for kind in EDITS} for name in names},
        "clean": sum(row["kind"] == "clean" for row in rows),
        "false_alarms": len(alarms),
        "alarms": alarms[:10],
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("", *EDITS, title=f"{result['questions']} questions hidden: found of planted")
    table.add_row("8 words or more", *("{} / {}".format(*result["found"][kind]["long"]) for kind in EDITS))
    table.add_row("fewer than 8 words", *("{} / {}".format(*result["found"][kind]["short"]) for kind in EDITS))
    for name, kinds in result["by_benchmark"].items():
        table.add_row(name, *("{} / {}".format(*kinds[kind]) for kind in EDITS))
    console = Console()
    console.print(table)
    console.print(f"false alarms: {result['false_alarms']} of {result['clean']:,} clean documents")


if __name__ == "__main__":
    main()
