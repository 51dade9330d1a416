"""An index of 100 MB of documents beside bm25s: seconds, memory, size, and searches a second.

    pip install bm25s PyStemmer
    python benchmarks/index_speed.py --docs DIR [--peer PYTHON] [--megabytes 100] [--turns 2] [--out results/index_speed.json]

The texts are the .py, .md, .rst and .txt files of DIR in the order of their names, until they have the size: the packages
of an environment, for instance. They are cut into blocks once, and both sides index the same blocks and are asked the same
words, which are drawn from them. The sides take turns, each in a process of its own, and end with an index on the disk
that another process can open. `peak_memory` is the process's largest resident size while it makes the index.

Ours is `llmjax.retrieve.documents.index`: SQLite's FTS5 with Porter's stemmer. It keeps the texts, an update is one
transaction, and a changed file is replaced alone. bm25s keeps a sparse matrix of scores and no texts, and is made anew
when a text changes. "folder" is our whole `update` of the same files: reading, cutting, indexing; "again" the same when
one file of it has changed.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import ROOT, make_parser, peak_bytes, write

KINDS = (".py", ".md", ".rst", ".txt")
SIDES = ("ours", "bm25s")
QUERIES, WORDS, FOUND = 300, 4, 100  # questions, words of each, blocks that are asked for


def make_texts(docs: Path, megabytes: float, folder: Path) -> int:
    """Copies the first texts of a folder, and returns their bytes."""
    size = 0
    for number, file in enumerate(sorted(one for one in docs.rglob("*") if one.suffix in KINDS and one.is_file())):
        if size >= megabytes * 1e6:
            return size
        shutil.copyfile(file, folder / f"{number:06}-{file.stem[:60]}.txt")  # all as plain text
        size += file.stat().st_size
    raise SystemExit(f"{docs} has only {size / 1e6:.0f} MB of {', '.join(KINDS)} files: give a larger folder")


def make_blocks(texts: Path, out: Path) -> int:
    """Writes the blocks of all texts, a line each, and returns their number."""
    from llmjax.retrieve.documents import blocks, reading

    count = 0
    with out.open("w", encoding="utf-8") as file:
        for one in reading.files_of(texts):
            for _, text, reason in reading.texts_of(one):
                for block in [] if reason else blocks.cut(text):
                    file.write(json.dumps(text[block.start : block.end]) + "\n")
                    count += 1
    return count


def make_queries(blocks: Path, count: int) -> list[str]:
    """Words of random blocks; the same for both sides."""
    draw, lines = random.Random(0), blocks.read_text(encoding="utf-8").splitlines()
    found: list[str] = []
    while len(found) < count:
        words = re.findall(r"[a-z]{4,}", json.loads(draw.choice(lines)).lower())
        if len(words) >= WORDS:
            found.append(" ".join(draw.sample(words, WORDS)))
    return found


def read(blocks: Path) -> Iterator[str]:
    with blocks.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def clocked(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and its seconds of the wall and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    return made, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def size_of(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())


def searched(search: Callable[[str], Any], queries: list[str]) -> dict[str, float]:
    times = []
    for query in queries:
        began = time.perf_counter()
        search(query)
        times.append(time.perf_counter() - began)
    ordered = sorted(times)
    return {"searches_per_second": len(times) / sum(times), "p50": ordered[len(ordered) // 2], "p99": ordered[-len(ordered) // 100]}  # fmt: skip


def measure_ours(blocks: Path, queries: list[str], folder: Path) -> dict[str, Any]:
    from llmjax.retrieve.documents.index import Index

    def make() -> None:
        with Index(folder) as index:
            index.add((str(number), "", text) for number, text in enumerate(read(blocks)))

    found = {"made": clocked(make)[1], "peak_memory": peak_bytes(), "size": size_of(folder)}
    with Index(folder) as index:
        return found | searched(lambda query: index.lexical(query, k=FOUND), queries)


def measure_bm25s(blocks: Path, queries: list[str], folder: Path) -> dict[str, Any]:
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("porter")

    def make() -> None:
        tokens = bm25s.tokenize(list(read(blocks)), stopwords="en", stemmer=stemmer, show_progress=False)
        retriever = bm25s.BM25(k1=1.2, b=0.75)
        retriever.index(tokens, show_progress=False)
        retriever.save(folder)

    found = {"made": clocked(make)[1], "peak_memory": peak_bytes(), "size": size_of(folder)}
    retriever = bm25s.BM25.load(folder)

    def search(query: str) -> Any:
        tokens = bm25s.tokenize(query, stopwords="en", stemmer=stemmer, show_progress=False)
        return retriever.retrieve(tokens, k=FOUND, show_progress=False)

    return found | searched(search, queries) | {"version": bm25s.__version__}


def measure_folder(texts: Path, folder: Path) -> dict[str, Any]:
    """Our whole update of the files, and the update after a change of one of them."""
    from llmjax.retrieve.documents.index import Index

    with Index(folder) as index:
        changes, whole = clocked(lambda: index.update(texts))
        found = {"files": changes.read, "blocks": changes.blocks, "whole": whole, "peak_memory": peak_bytes()}
        first = next(iter(sorted(texts.iterdir())))
        first.write_text(first.read_text(encoding="utf-8") + "\nA new line.\n", encoding="utf-8")
        changes, again = clocked(lambda: index.update(texts))
        assert changes.read == 1
        return found | {"again": again}


def run(name: str, python: Path, work: Path) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [str(python), __file__, "--measure", name, "--work", str(work)]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare(work: Path) -> dict[str, Any]:
    """Writes the blocks and the queries: in a process of its own, whose memory no measured process inherits."""
    count = make_blocks(work / "texts", work / "blocks.jsonl")
    (work / "queries.json").write_text(json.dumps(make_queries(work / "blocks.jsonl", QUERIES)))
    return {"blocks": count}


def measure(name: str, work: Path) -> dict[str, Any]:
    if name == "prepare":
        return prepare(work)
    blocks, queries = work / "blocks.jsonl", json.loads((work / "queries.json").read_text())
    with tempfile.TemporaryDirectory(dir=work) as folder:
        if name == "folder":
            return measure_folder(work / "texts", Path(folder))
        return {"ours": measure_ours, "bm25s": measure_bm25s}[name](blocks, queries, Path(folder))


def ratios(measured: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Ours by theirs: medians over the turns."""
    middle = {
        side: {
            "cpu_seconds": statistics.median(one["made"]["cpu_seconds"] for one in made),
            "seconds": statistics.median(one["made"]["seconds"] for one in made),
            **{name: statistics.median(one[name] for one in made) for name in ("peak_memory", "size", "searches_per_second")},
        }
        for side, made in measured.items()
    }  # fmt: skip
    return {name: middle["ours"][name] / middle["bm25s"][name] for name in middle["ours"]}


def main() -> int:
    """See the module."""
    parser = make_parser(__doc__, out=ROOT / "results" / "index_speed.json")
    parser.add_argument("--docs", type=Path, help="a folder with texts")
    parser.add_argument("--peer", type=Path, default=Path(sys.executable), help="a Python with bm25s (default: this)")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--measure", choices=("prepare", *SIDES, "folder"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.work)))
        return 0
    if args.docs is None:
        parser.error("give --docs, a folder with texts")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "texts").mkdir()
        size = make_texts(args.docs, args.megabytes, work / "texts")
        count = run("prepare", Path(sys.executable), work)["blocks"]
        pythons = {"ours": Path(sys.executable), "bm25s": args.peer.absolute()}
        measured: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(args.turns):
            for side in SIDES:
                measured[side].append(run(side, pythons[side], work))
                print(side, json.dumps(measured[side][-1]), flush=True)
        results = {"bytes": size, "blocks": count, "ours_by_theirs": ratios(measured), **measured}
        results["folder"] = run("folder", pythons["ours"], work)
    print(json.dumps({name: results[name] for name in ("bytes", "blocks", "ours_by_theirs", "folder")}, indent=1))
    write(results, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
