"""What the benchmarks share: the command line, workers that take turns, clocks, and results that name their machine.

A script has `main`, which reads `make_parser(__doc__)`, measures, and hands a dict to `write`. Scripts that compare two sides
start a worker process for each (`start_worker`) and ask them by turns (`ask`): each works only while the others wait, so
a machine whose speed drifts slows all sides alike.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")


def make_parser(doc: str | None, *, out: Path | None = None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with the option --out (by default `out`) that all scripts have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, metavar="FILE.json", help="also write the results as JSON")
    return parser


def read_rows(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file, or of a list in a .json file. A row without one of the names ends the script by its number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines() if x.strip()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise SystemExit(f"{path} has no rows: it must have one or more")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing or not isinstance(row, dict):
            raise SystemExit(f"{path}, row {number}, has no {' and no '.join(missing)}")
    return rows


def machine() -> dict[str, Any]:
    """The processor's model, cores, memory in GB, load, and the versions of Python and of the packages that matter."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(
            os.getloadavg()[0], 2
        ),  # of the last minute: more than the script itself makes, others were at work
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def processor() -> str:
    """The model of the processor, as the system calls it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    with suppress(OSError, subprocess.SubprocessError):  # macOS
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def write(results: Mapping[str, Any], out: Path | None) -> None:
    """Write results as JSON with the command and the machine in front. Without a file, nothing is done."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = {"command": command(), "machine": machine()}
        whole |= {key: value for key, value in results.items() if key not in whole}
        out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written: {out}")


def replaced(text: str, part: str, content: str) -> str:
    """A page's text with the part between its two marks, `<!-- PART: ... -->` and `<!-- end -->`, replaced."""
    pattern = rf"(<!-- {part}: [^>]*-->\n).*?(<!-- end -->)"
    new, count = re.subn(pattern, lambda found: found[1] + content + found[2], text, flags=re.DOTALL)
    assert count == 1, f"the page has no part {part!r}"
    return new


def command() -> str:
    """The command that is running, without this machine's folders: a path outside the repository is its last part."""
    script = Path(sys.argv[0]).resolve()
    words = ["python", str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name]
    for word in sys.argv[1:]:
        outside = ("/" in word or word.startswith(".")) and not Path(word).resolve().is_relative_to(ROOT)
        words.append(Path(word).name if outside else word)
    return shlex.join(words)


def cpu_seconds() -> float:
    """Seconds of user and system time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """The most memory that this process (or, with RUSAGE_CHILDREN, one of its children) has had."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(function: Callable[[], Any], size: int, *, repeats: int = 1) -> float:
    """MB per CPU second of a function that works through `size` bytes: the best of some calls."""
    return size / 1e6 / max(min(timed(function)[1] for _ in range(repeats)), 1e-9)


class OutOfTime(Exception):  # noqa: N818
    """The seconds of a call are over; the same command goes on."""


class Budget:
    """The seconds of a call of a script that goes on in its next call; 0: without end."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds if seconds else math.inf

    def left(self) -> float | None:
        """The seconds that are left; None: there is no end. Raises OutOfTime when none are."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise OutOfTime
        return left if math.isfinite(left) else None


def llmjax(
    *arguments: str | Path,
    budget: Budget | None = None,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    accepted: Collection[int] = (0,),
) -> int:
    """Run `llmjax ARGUMENTS` in a process of its own: its status.

    At the end of the budget it gets SIGTERM, on which a training saves, and the same command goes on from there.

    Args:
        log: gets what it says, behind what is there; None: it says it here.
        accepted: the statuses that are no failure.

    Raises:
        OutOfTime: when it was stopped.
        RuntimeError: when it failed.
    """
    left = budget.left() if budget else None
    with contextlib.ExitStack() as held:
        said = None if log is None else held.enter_context(log.open("ab"))
        command = [sys.executable, "-m", "llmjax", *map(str, arguments)]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=said, stderr=said
        )
        try:
            status = process.wait(left)
        except BaseException as error:  # an interrupted script leaves no training behind either
            process.terminate()
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise OutOfTime from None
            raise
    if status not in accepted:
        where = "" if log is None else f": {log.read_text(errors='replace')[-2000:]}"
        raise RuntimeError(f"llmjax {' '.join(map(str, arguments[:3]))} ended with status {status}{where}")
    return status


class WorkerError(Exception):
    """A worker ended before it answered."""


class Worker(subprocess.Popen):
    """A process that answers each line on its standard input with a line of JSON."""


def start_worker(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[Worker, dict[str, Any]]:
    """Start a worker, and wait for the line by which it says that it is ready."""
    worker = Worker(
        list(command),
        env={**os.environ, **(environment or {})},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    return worker, _answer(worker)


def ask(worker: Worker, line: str) -> dict[str, Any]:
    """Give a worker a line and wait for its answer. Raises WorkerError if it ended instead."""
    assert worker.stdin is not None
    with suppress(BrokenPipeError):
        worker.stdin.write(f"{line}\n")
        worker.stdin.flush()
    return _answer(worker)


def end(worker: Worker) -> None:
    """Close a worker's input, upon which it ends."""
    assert worker.stdin is not None
    with suppress(BrokenPipeError):
        worker.stdin.close()
    worker.wait()


def _answer(worker: Worker) -> dict[str, Any]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):  # compilers print beside it
            return json.loads(line)
    raise WorkerError(f"a worker ended with status {worker.wait()}; what it said is above")
