"""The quality rules beside datatrove's: how often they decide alike, and what they cost.

    python benchmarks/quality_rules.py --megabytes 20 --peer-python PEER/bin/python --out results/quality_rules.json

Real text of this machine, and with --folder also the .txt and .jsonl files in one; half of it is documentation and
code, which is hard for the rules. datatrove (with spaCy) runs in a process of its own, under --peer-python. Both
report CPU seconds without imports and without compiling. Ours run with both kinds of words.
"""

import argparse
import glob
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
from common import make_parser, write

DOCUMENT = 3000  # characters
RULES = ("gopher_quality", "gopher_repetition", "fineweb", "c4")


def make_corpus(megabytes: float, folder: str) -> list[str]:
    """Pieces of files, from each kind of file in turn."""
    places = [
        f"{sysconfig.get_paths()['stdlib']}/*.py",
        "/usr/share/doc/**/*",
        f"{sysconfig.get_paths()['purelib']}/**/*.py",
    ]
    places += [
        f"{sysconfig.get_paths()['purelib']}/**/{name}" for name in ("METADATA", "*.md", "*.rst", "LICENSE*", "*.txt")
    ]
    places += [f"{folder}/**/*.txt", f"{folder}/**/*.jsonl"] * bool(folder)
    documents: list[str] = []
    for place in places:
        pieces: list[str] = []
        goal = megabytes * 1e6 / len(places)
        for path in sorted(glob.glob(place, recursive=True)):
            if goal < 0:
                break
            try:
                text = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if path.endswith(".jsonl"):
                rows = [json.loads(line) for line in text.splitlines()]
                found = [" ".join(value for value in row.values() if isinstance(value, str)) for row in rows]
            else:
                found = [text[i : i + DOCUMENT] for i in range(0, min(len(text), 100 * DOCUMENT), DOCUMENT)]
            pieces += found
            goal -= sum(map(len, found))
        documents += pieces
    return documents


def run_datatrove(texts: list[str]) -> tuple[dict[str, list[bool]], dict[str, float]]:
    """Which texts each filter rejects, and the CPU seconds of each; the tokens are cached between two of them."""
    from datatrove.data import Document
    from datatrove.pipeline import filters

    tools = {
        "gopher_quality": filters.GopherQualityFilter(),
        "gopher_repetition": filters.GopherRepetitionFilter(),
        "fineweb": filters.FineWebQualityFilter(),
        "c4": filters.C4QualityFilter(),
    }
    warm = "Something to load what is loaded at first use. " * 20
    rejected: dict[str, list[bool]] = {name: [] for name in tools}
    seconds = dict.fromkeys(tools, 0.0)
    for tool in tools.values():
        tool.filter(Document(text=warm, id="warm"))
    for text in texts:
        for name, tool in tools.items():
            begin = time.process_time()
            try:
                decision = tool.filter(Document(text=text, id=""))
            except ZeroDivisionError:  # its FineWeb rule on a text without a word
                decision = False
            seconds[name] += time.process_time() - begin
            rejected[name].append(decision is not True)
    return rejected, seconds


def run_ours(
    texts: list[str], words: Literal["unicode", "spacy_compat"]
) -> tuple[dict[str, list[bool]], dict[str, float]]:
    """The same through the steps, in record batches; the statistics are counted once and shared, so their cost is apart."""
    from llmjax import config
    from llmjax.prepare import documents
    from llmjax.prepare.kernels.statistics import shared_statistics
    from llmjax.prepare.steps import make_step

    settings = config.base().prepare
    settings.words = words
    steps = {name: make_step(name, settings) for name in RULES}
    rejected: dict[str, list[bool]] = {name: [] for name in RULES}
    seconds = dict.fromkeys(("statistics", *RULES), 0.0)
    for step in steps.values():
        step(documents.make_batch([{"text": "Something to compile for."}]))
    for start in range(0, len(texts), 1024):
        batch = documents.make_batch([{"text": text} for text in texts[start : start + 1024]])
        begin = time.process_time()
        shared_statistics(batch["text"], np.arange(batch.num_rows), words=words, short_line=30)
        seconds["statistics"] += time.process_time() - begin
        for name, step in steps.items():
            begin = time.process_time()
            reasons = step(batch)["reason"].to_pylist()
            seconds[name] += time.process_time() - begin
            rejected[name] += [bool(reason) for reason in reasons]
    return rejected, seconds


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--folder", default="", help="more text, .txt and .jsonl")
    parser.add_argument("--peer-python", default="", help="an interpreter with datatrove and spacy")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder = Path(options.worker)
        (folder / "peer.json").write_text(json.dumps(run_datatrove(json.loads((folder / "texts.json").read_text()))))
        return

    texts = make_corpus(options.megabytes, options.folder)
    size = sum(len(text.encode()) for text in texts) / 1e6
    report: dict = {"megabytes": size, "documents": len(texts)}
    own = {"unicode": run_ours(texts, "unicode"), "spacy_compat": run_ours(texts, "spacy_compat")}
    peer: dict[str, list[bool]] = {}
    if options.peer_python:
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "texts.json").write_text(json.dumps(texts))
            command = [options.peer_python, __file__, "--worker", name]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""}, stdout=sys.stderr)
            peer, seconds = json.loads((Path(name) / "peer.json").read_text())
        rules = sum(seconds[rule] for rule in RULES if rule != "c4")
        report["datatrove"] = {"megabytes_per_cpu_second": {rule: size / seconds[rule] for rule in RULES}}
        report["datatrove"]["megabytes_per_cpu_second"]["gopher and fineweb"] = size / rules
    for words, (rejected, seconds) in own.items():
        rules = sum(seconds[rule] for rule in seconds if rule != "c4")
        entry: dict = {
            "megabytes_per_cpu_second": {
                "statistics": size / seconds["statistics"],
                "gopher and fineweb": size / rules,
                "c4": size / seconds["c4"],
            }
        }
        for rule in RULES:
            entry[rule] = {"rejected": float(np.mean(rejected[rule]))}
            if peer:
                entry[rule]["rejected_by_datatrove"] = float(np.mean(peer[rule]))
                entry[rule]["agreement"] = float(np.mean(np.array(rejected[rule]) == np.array(peer[rule])))
        report[words] = entry
    print(json.dumps(report, indent=1))
    write(report, options.out)


if __name__ == "__main__":
    main()
