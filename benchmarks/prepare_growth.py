"""How time, memory and disk of the preparation grow: the same steps on 0.2, 1 and 5 GB of text.

    python benchmarks/prepare_growth.py [--gigabytes 0.2 1 5] [--out results/prepare_growth.json]

The text is this machine's (Python sources, documentation, notes of installed packages), one document a file up to 200
KB. When that is not enough, more documents are made of it: half of the lines of three neighbouring files, drawn by a
seed, so that languages and kinds stay as they are. One document in twenty is a copy of another, half of those with one
word in 25 changed. Steps: repair, exact, near, substring, personal (rules of quality are left out: nearly all text
here is code, which they reject). Memory is the largest sum of private memory of the process and its workers, disk the
largest size of the run's folder, both looked at every half second. Needs the extra [data] and psutil.

Hardware: 2 CPU cores, 8 GB of memory, and for 5 GB 45 GB of free disk; 1, 5 and 23 minutes.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import make_parser, write
from rich.console import Console
from rich.table import Table

STEPS = ("repair", "exact", "near", "substring", "personal")
SUFFIXES = (".py", ".txt", ".md", ".rst", ".html", ".c", ".h", ".js", ".json", ".po", ".tex")
RUN = """
import sys, json
from pathlib import Path
from llmjax import config
from llmjax.prepare import run
if __name__ == "__main__":
    c = config.base()
    c.data.sources = (sys.argv[1],)
    c.prepare.steps = tuple(sys.argv[3].split(","))
    print(json.dumps(run.run(c.lock(), Path(sys.argv[2]))))
"""


def main() -> None:
    """Prepare each size and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.2, 1.0, 5.0])
    parser.add_argument(
        "--roots", type=Path, nargs="+", default=[Path(sysconfig.get_path("stdlib")), Path("/usr/share")]
    )
    parser.add_argument("--steps", nargs="+", default=STEPS)
    parser.add_argument("--scratch", type=Path, help="where the text and the runs go (default: the temporary folder)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        (folder / "run.py").write_text(RUN)
        files = sorted(f for root in args.roots for f in root.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        for size in args.gigabytes:
            corpus = folder / "corpus"
            corpus.mkdir()
            documents = write_corpus(corpus, files, int(size * 1e9))
            rows.append({"gigabytes": size, "documents": documents, **prepare(folder, corpus, args.steps)})
            print(rows[-1], flush=True)
            shutil.rmtree(corpus)
    result = {"steps": list(args.steps), "rows": rows}
    table = Table("GB", "documents", "seconds", "MB/s", "CPU s", "MB/CPU-s", "memory GB", "disk GB", "disk / text")
    for row in rows:
        megabytes = row["gigabytes"] * 1000
        table.add_row(
            f"{row['gigabytes']:g}", f"{row['documents']:,}", f"{row['seconds']:.0f}", f"{megabytes / row['seconds']:.2f}",
            f"{row['cpu_seconds']:.0f}", f"{megabytes / row['cpu_seconds']:.2f}", f"{row['memory_bytes'] / 1e9:.2f}",
            f"{row['disk_bytes'] / 1e9:.2f}", f"{row['disk_bytes'] / 1e9 / row['gigabytes']:.2f}",
        )  # fmt: skip
    Console().print(table)
    write(result, args.out)


def texts(files: list[Path]) -> Iterator[str]:
    """The files' texts in the order of a seed, then half of the lines of three neighbours each, without end."""
    draw = random.Random(0)
    lines = {}
    for place in draw.sample(range(len(files)), len(files)):
        text = files[place].read_text(encoding="utf-8", errors="replace")[:200_000]
        if len(text) > 500:
            lines[place] = text.split("\n")
            yield text
    places = sorted(lines)
    while True:
        first = draw.randrange(len(places) - 2)
        near = [line for place in places[first : first + 3] for line in lines[place]]
        yield "\n".join(draw.sample(near, len(near) // 2))


def write_corpus(folder: Path, files: list[Path], size: int) -> int:
    """JSONL files of 100 MB; the number of documents."""
    draw, written, count, last = random.Random(1), 0, 0, ""
    file = None
    for text in texts(files):
        if count % 20 == 19:
            words = last.split(" ")
            for place in range(count % 2 * draw.randrange(1, 26), len(words) if count % 40 == 19 else 0, 25):
                words[place] = "other"
            text = " ".join(words)
        line = json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if file is None or file.tell() > 100_000_000:
            file = (folder / f"{written // 100_000_000:04d}.jsonl").open("wb")
        file.write(line)
        written, count, last = written + len(line), count + 1, text
        if written >= size:
            file.close()
            return count
    raise AssertionError


def prepare(folder: Path, corpus: Path, steps: list[str]) -> dict[str, Any]:
    """One preparation in a process of its own, watched."""
    import psutil

    workdir = folder / "run"
    began = time.perf_counter()
    command = [sys.executable, str(folder / "run.py"), str(corpus), str(workdir), ",".join(steps)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watched, memory, disk, cpu = psutil.Process(process.pid), 0, 0, {}
    while process.poll() is None:
        used = 0
        for one in [watched, *watched.children(recursive=True)]:
            try:
                info = one.memory_full_info()
                times = one.cpu_times()
            except psutil.Error:
                continue
            used += info.uss
            cpu[one.pid] = times.user + times.system
        memory = max(memory, used)
        disk = max(disk, folder_bytes(workdir))
        time.sleep(0.5)
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(output)
    found = json.loads(output.splitlines()[-1])
    kept = found["train_bytes"] + found["heldout_bytes"]
    shutil.rmtree(workdir)
    return {
        "seconds": time.perf_counter() - began, "cpu_seconds": sum(cpu.values()), "memory_bytes": memory,
        "disk_bytes": disk, "kept_bytes": kept, "duplicates": found["duplicates"],
    }  # fmt: skip


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder that others may be deleting."""
    total = 0
    for parent, _, names in os.walk(folder):  # which passes over folders that have gone
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


if __name__ == "__main__":
    main()
