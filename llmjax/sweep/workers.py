"""Several workers on this machine, each a process of the same command, and the jobs that a launcher starts."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from llmjax import storage
from llmjax.errors import Stopped, UserError
from llmjax.sweep import study as studies
from llmjax.sweep.study import Study
from llmjax.sweep.worker import LOST

LAUNCH = Path(__file__).parents[2] / "launch"  # of a checkout
POLL_SECONDS = 0.5
PARENT = "LLMJAX_SWEEP_PARENT"  # the process that started this worker, with which it ends


def commands(study: Study) -> list[list[str]]:
    """The command of every run that is open, as the words after `llmjax`."""
    open_now = studies.open_trials(study, studies.rows(study.folder))
    folders = dict.fromkeys(study.run_folder(trial) for trial in open_now)
    return [["sweep", "--trial", "--workdir", str(folder)] for folder in folders]


def launch(study: Study, *, launcher: str, options: Sequence[str]) -> int:
    """Hand the commands of the open runs to the launcher of that name; its exit status. Raises UserError without a checkout."""
    script = LAUNCH / f"{launcher}.py"
    if not script.is_file():
        raise UserError(f"--launcher {launcher} needs launch/ of the repository: run this from a checkout")
    file = study.folder / "commands.txt"
    storage.write_text(file, "".join(f"{shlex.join(words)}\n" for words in commands(study)))
    return subprocess.run([sys.executable, str(script), *options, "--commands", str(file)], check=False).returncode


def run(study: Study, *, count: int, words: Sequence[str]) -> None:
    """Run so many workers until all have ended, and print a line for every trial that ends.

    Args:
        words: the words after `llmjax` with which a worker is started, but for --worker.

    Raises:
        Stopped: by SIGTERM or Ctrl-C, once the workers have saved and ended.
        UserError: if a worker crashed.
    """
    stops: list[int] = []
    before = {s: signal.signal(s, lambda number, _: stops.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    processes = {number: _start(study, number, count, words) for number in range(count)}
    crashed: dict[int, int] = {}
    seen, passed = dict.fromkeys(_ended(study)), 0
    try:
        while processes:
            for number, process in list(processes.items()):
                status = process.poll()
                if status is None:
                    continue
                del processes[number]
                if status == LOST and not stops:
                    processes[number] = _start(study, number, count, words)
                elif status not in (0, 1) and not stops:
                    crashed[number] = status
            if len(stops) > passed:
                passed = len(stops)
                for process in processes.values():
                    process.send_signal(signal.SIGTERM if passed == 1 else signal.SIGKILL)
            for line in _ended(study):
                if line not in seen:
                    seen[line] = None
                    print(line, flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stops:
        raise Stopped(f"stopped by {signal.Signals(stops[0]).name}; the same command goes on with {study.folder}")
    if crashed:
        log = study.folder / "workers" / f"{min(crashed)}.log"
        raise UserError(
            f"{len(crashed)} of {count} workers crashed (status {', '.join(map(str, crashed.values()))}); the end of {log} "
            "says why, and the same command goes on"
        )


def _start(study: Study, number: int, count: int, words: Sequence[str]) -> subprocess.Popen:
    with storage.appending(study.folder / "workers" / f"{number}.log") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "llmjax", *words, "--worker", f"{number}/{count}"],
            env=os.environ | {PARENT: str(os.getpid())}, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def _ended(study: Study) -> list[str]:
    """A line for each trial that has ended."""
    found = []
    for row in studies.rows(study.folder).values():
        if row["state"] in studies.ENDED:
            said = row.get("error") or json.dumps(row.get("values"))
            found.append(f"{row['arm']}, seed {row['seed']}: {row['state']}, {said}")
    return found


def take_part(worker: str) -> None:
    """Become worker I of N ("I/N"): use an equal part of the cores, and end with the process that started this one."""
    number, count = (int(part) for part in worker.split("/"))
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if count <= len(cores):
            os.sched_setaffinity(0, cores[number::count])
    parent = os.environ.get(PARENT, "")
    if parent:
        threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
