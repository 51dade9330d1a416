"""Processor time of `llmjax prepare` with configs/data/web.py: this checkout and an earlier one, by turns, step by step.

    python benchmarks/prepare_speed.py --base DIR [--turns 3] [--out results/prepare_speed.json]

DIR is a checkout of the earlier version (`git worktree add --detach DIR COMMIT`). Both run with this interpreter and its
packages. The corpus, up to 52 MB, is made of this machine's documentation and Python packages: pages of HTML, text, JSON Lines
and a WARC file, a twentieth of them copies and a tenth nearly so. A first short run of each side, which compiles, is not
counted. Seconds are those of user and system of one worker and of the processes that it starts. At the end this checkout
runs once more with the earlier rule of C4 (`prepare.c4_end_marks`), and its documents are compared with the earlier ones.

Needs the extra [data]. Hardware: any; 4 minutes on two idle cores.
"""

import glob
import gzip
import html
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from common import ROOT, make_parser, write
from rich.console import Console
from rich.table import Table

SIZES = {"html": 16_000_000, "txt": 10_000_000, "jl": 12_000_000, "warc": 14_000_000}  # bytes
PAGES = 8_000_000  # bytes of HTML that are pages of this machine; the others are made of text
TEXTS = 70_000_000  # bytes of text that are read
SMALL = 160  # documents of each kind for the run that compiles: most are code, which the filters reject
SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm", ".py", "README", "copyright", ".gz")
MENU = "".join(f'<li><a href="/{n}">Section {n}</a></li>' for n in range(20))
PAGE = (
    '<!doctype html><html><head><meta charset="utf-8"><title>Page</title><script>var a={{"x":1}};</script></head><body>'
    f'<header><a href="/">Home</a></header><nav><ul>{MENU}</ul></nav><main><article><h1>Title</h1>{{}}</article></main>'
    "<aside>Related</aside><footer>Copyright 2024</footer></body></html>"
)


def main() -> None:
    """Make the corpus, run both sides by turns, print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="a checkout of the earlier version")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--corpus", type=Path, help="a folder with html/, txt/, jl/ and warc/ instead of one made here")
    args = parser.parse_args()
    sides = {"base": args.base.resolve(), "new": ROOT.resolve()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = args.corpus or make_corpus(folder / "corpus", SIZES)
        small = make_corpus(folder / "small", dict.fromkeys(SIZES, SMALL * 10_000))
        for checkout in sides.values():
            prepare(checkout, small, folder)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(args.turns):
            for name, checkout in sides.items():
                turns[name].append(prepare(checkout, corpus, folder))
                print(
                    name, {key: round(turns[name][-1][key], 2) for key in ("cpu_seconds", "wall_seconds")}, flush=True
                )
        results = {name: summary(runs) for name, runs in turns.items()}
        old_rule = prepare(sides["new"], corpus, folder, "--config.prepare.c4_end_marks=True")
        megabytes = sum(file.stat().st_size for file in corpus.rglob("*") if file.is_file()) / 1e6
    base, new = (results[name]["cpu_seconds"] for name in sides)
    kept = {name: runs[0]["kept"] for name, runs in turns.items()}
    answer = {
        "commits": {name: commit(checkout) for name, checkout in sides.items()},
        "corpus_mb": megabytes,
        "turns": args.turns,
        **results,
        "ratio_of_cpu_seconds": base / new,
        "mb_a_cpu_second": {"base": megabytes / base, "new": megabytes / new},
        "kept_documents": {**{name: sum(found.values()) for name, found in kept.items()},
                           "new, with the earlier rule of C4": sum(old_rule["kept"].values()),
                           "of these as base": sum((old_rule["kept"] & kept["base"]).values())},
    }  # fmt: skip
    show(answer)
    write(answer, args.out)


def make_corpus(folder: Path, sizes: dict[str, int]) -> Path:
    """A folder of html/, txt/, jl/ and warc/ of so many bytes, the same every time on the same machine."""
    draw = random.Random(1)
    texts, pages = read_machine(draw)
    for kind in sizes:
        (folder / kind).mkdir(parents=True)
    size, number = dict.fromkeys(sizes, 0), 0
    for page in pages:
        if size["html"] < sizes["html"] * PAGES / SIZES["html"]:
            (folder / f"html/{number}.html").write_bytes(page)
            number, size["html"] = number + 1, size["html"] + len(page)
    with open(folder / "jl/a.jsonl", "w") as rows, open(folder / "warc/a.warc.gz", "wb") as archive:
        for text in texts:
            kind = min(size, key=lambda kind: size[kind] / sizes[kind])
            if size[kind] > sizes[kind]:
                break
            near = [text.replace(" the ", " this ", 2)] if draw.random() < 0.1 else []
            for copy in [text, *near, *([text] if draw.random() < 0.05 else [])]:
                data = page_of(copy) if kind in ("html", "warc") else copy.encode()
                if kind == "jl":
                    rows.write(json.dumps({"text": copy}) + "\n")
                elif kind == "warc":
                    archive.write(gzip.compress(record(number, data), 3, mtime=0))
                else:
                    (folder / f"{kind}/{number}.{kind}").write_bytes(data)
                number, size[kind] = number + 1, size[kind] + len(data)
    return folder


def read_machine(draw: random.Random) -> tuple[list[str], list[bytes]]:
    """Texts and pages of this machine, shuffled."""
    roots = ("/usr/share/doc", "/usr/lib/python3", "/usr/share/perl", "/usr/share/man", sysconfig.get_path("stdlib"),
             sysconfig.get_path("purelib"))  # fmt: skip
    names = [
        name
        for root in roots
        for name in sorted(glob.glob(f"{root}/**/*", recursive=True))
        if name.endswith(SUFFIXES) and os.path.isfile(name)
    ]
    draw.shuffle(names)
    texts, pages, size = [], [], 0
    for name in names:
        try:
            data = gzip.decompress(Path(name).read_bytes()) if name.endswith(".gz") else Path(name).read_bytes()
            text = data.decode()
        except (OSError, UnicodeDecodeError, EOFError):
            continue
        if not 800 < len(data) < 400_000:
            continue
        if name.endswith((".html", ".htm")):
            pages.append(data)
        else:
            texts.append(text)
        size += len(data)
        if size > TEXTS:
            break
    return texts, pages


def page_of(text: str) -> bytes:
    """A page with the paragraphs of a text between a menu and a footer."""
    return PAGE.format("".join(f"<p>{html.escape(p)}</p>\n" for p in text.split("\n\n") if p.strip())).encode()


def record(number: int, page: bytes) -> bytes:
    """A record of WARC that holds a page."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    return (
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:%032d>\r\nWARC-Target-URI: http://s%d.org/\r\n"
        b"Content-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
        % (number, number, len(answer), answer)
    )


def prepare(checkout: Path, corpus: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Prepare the corpus by a checkout: seconds of processor and clock, seconds of each step, the kept texts."""
    module, _, name = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["scripts"][
        "llmjax"
    ].partition(":")
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    sources = json.dumps([str(corpus / kind) for kind in SIZES])
    command = [
        sys.executable, "-c", f"from {module} import {name}; {name}()", "prepare", "--config", str(checkout / "configs/data/web.py"),
        f"--config.data.sources={sources}", "--config.prepare.workers=1", "--config.prepare.keep_work=True",
        "--config.data.holdout_percent=0", *options, "--workdir", str(workdir),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(checkout), "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    if done.returncode not in (0, 4):  # 4: some documents could not be read
        sys.exit(f"{checkout}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    steps: Counter[str] = Counter()
    for file in (workdir / "prepare/work").glob("documents-*/*.json"):
        steps.update(json.loads(file.read_text())["seconds"])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    shards = sorted((workdir / "prepare/train").glob("*.jsonl"))
    kept = Counter(json.loads(line)["text"] for shard in shards for line in shard.read_text().splitlines())
    return {"cpu_seconds": cpu, "wall_seconds": wall, "steps": dict(steps), "kept": kept}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of several runs, by step; `other` is start, reading, writing and duplicates."""
    cpu = statistics.median(run["cpu_seconds"] for run in runs)
    names = dict.fromkeys(name for run in runs for name in run["steps"])
    steps = {name: statistics.median(run["steps"].get(name, 0.0) for run in runs) for name in names}
    return {
        "cpu_seconds": cpu,
        "cpu_seconds_of_each": [run["cpu_seconds"] for run in runs],
        "wall_seconds": statistics.median(run["wall_seconds"] for run in runs),
        "steps": {**steps, "other": cpu - sum(steps.values())},
    }


def commit(checkout: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def show(answer: dict[str, Any]) -> None:
    """Print the table by step."""
    table = Table("CPU seconds", "base", "new")
    for name in answer["base"]["steps"]:
        table.add_row(name, *(f"{answer[side]['steps'].get(name, 0.0):.2f}" for side in ("base", "new")))
    table.add_row("all", *(f"{answer[side]['cpu_seconds']:.1f}" for side in ("base", "new")))
    Console().print(table)
    print(f"ratio {answer['ratio_of_cpu_seconds']:.2f}; kept documents {answer['kept_documents']}")


if __name__ == "__main__":
    main()
