"""Train with several processes on this machine, as on a cluster. They communicate over Gloo, and restart if one is lost.

    python launch/local.py -n 4 --restarts 2 -- run --config configs/quickstart.py --workdir runs/four

The first process writes to the terminal, the others to WORKDIR/processes/N.log. N.pid holds the number of a process. If
one ends with an error, the others are ended and the job starts again from its last checkpoint, at most --restarts times.
After a mistake in the command (status 2) it does not start again. SIGTERM and Ctrl-C are passed on, so that the job saves
and stops. A second one ends it. The launcher needs nothing but Python.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent))
import jobs

GRACE_SECONDS = 2.0  # in which the other processes may print their own errors
POLL_SECONDS = 0.02


@dataclass
class Job:
    """The processes of one start, and the folder for the output of all but the first."""

    processes: list[subprocess.Popen]
    folder: Path

    @property
    def running(self) -> list[subprocess.Popen]:
        return [one for one in self.processes if one.poll() is None]

    def send(self, number: int) -> None:
        for one in self.running:
            one.send_signal(number)


def environment(index: int, *, count: int, port: str, devices: int) -> dict[str, str]:
    """The variables that a process gets beside those of the launcher."""
    env = {
        "LLMJAX_COORDINATOR": f"127.0.0.1:{port}",
        "LLMJAX_PROCESSES": str(count),
        "LLMJAX_PROCESS": str(index),
        "LLMJAX_LOCAL_PROCESSES": str(count),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
    }
    if devices:
        others = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        env["XLA_FLAGS"] = f"{others} --xla_force_host_platform_device_count={devices}".strip()
    return env


def free_port() -> int:
    """A free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def output_of(index: int, folder: Path) -> IO[str] | None:
    """The file that a process writes to; None: the terminal."""
    return None if index == 0 else (folder / f"{index}.log").open("a")


def start(args: argparse.Namespace, command: Sequence[str], folder: Path) -> Job:
    """Start all processes, each in its own session, so that Ctrl-C reaches them only through this launcher."""
    folder.mkdir(parents=True, exist_ok=True)
    job, port = Job([], folder), str(args.port or free_port())
    for index in range(args.n):
        env = environment(index, count=args.n, port=port, devices=args.devices_per_process)
        output = output_of(index, folder)
        words = [sys.executable, "-m", "llmjax", *command]
        process = subprocess.Popen(
            words, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT if output else None, start_new_session=True,
        )  # fmt: skip
        if output:
            output.close()
        (folder / f"{index}.pid").write_text(f"{process.pid}\n")
        job.processes.append(process)
    return job


def wait(job: Job, stops: list[int]) -> int:
    """Wait for the end of the job: 0, or the status of the first process that failed, after ending the others.

    Args:
        stops: the signals that have arrived. The first is passed on, and the second as SIGKILL.
    """
    passed, bad, since = 0, None, 0.0
    while job.running:
        if len(stops) > passed:
            passed = len(stops)
            job.send(stops[0] if passed == 1 else signal.SIGKILL)
        if bad is None:
            ended = [one for one in job.processes if one.poll()]
            bad = min(ended, key=lambda one: one.returncode > 0, default=None)  # a killed process made the others fail
            since = time.monotonic()
        elif bad.returncode < 0 or time.monotonic() - since > GRACE_SECONDS:
            job.send(signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    bad = bad or next((one for one in job.processes if one.returncode), None)
    if bad is None:
        return 0
    tell(job, bad, seconds=time.monotonic() - since)
    return 2 if any(one.returncode == 2 for one in job.processes) else bad.returncode


def tell(job: Job, bad: subprocess.Popen, *, seconds: float) -> None:
    """Print how a process ended, and the last lines of its output."""
    index = job.processes.index(bad)
    how = (
        f"was ended by {signal.Signals(-bad.returncode).name}"
        if bad.returncode < 0
        else f"ended with status {bad.returncode}"
    )
    say(f"process {index} of {len(job.processes)} {how}; the others were gone {seconds:.1f} s later")
    path = job.folder / f"{index}.log"
    if index and path.exists():
        for text in path.read_text(errors="replace").splitlines()[-5:]:
            say(f"  {path.name}: {text}")


def say(text: str) -> None:
    """Print a line of the launcher."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Run the job: exit status 0 if it ended well, also if it was told to stop and has saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, required=True, help="number of processes")
    parser.add_argument(
        "--devices-per-process",
        type=int,
        default=0,
        help="CPU devices of each process (default: its share of the cores)",
    )
    parser.add_argument("--restarts", type=int, default=0, help="how often the job may start again after an error")
    parser.add_argument("--port", type=int, default=0, help="port of the coordinator (default: a free one)")
    args, command = jobs.parse(parser, argv)
    if args.n < 1:
        raise jobs.Mistake(f"-n {args.n}: at least one process is needed")
    folder = Path(jobs.workdir(command)) / "processes"
    if args.dry_run:
        for index in range(args.n):
            env = environment(index, count=args.n, port=str(args.port or "PORT"), devices=args.devices_per_process)
            output = f" >> {jobs.line([str(folder / f'{index}.log')])} 2>&1" if index else ""
            print(jobs.line([sys.executable, "-m", "llmjax", *command], env=env) + output + " &")
        print("wait")
        return 0
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stops.append(number))
    for attempt in range(args.restarts + 1):
        status = wait(start(args, command, folder), stops)
        if status == 0:
            return 0
        if stops:
            say("stopped before everything was saved; the same command goes on from the last checkpoint")
            break
        if status == 2:
            say("this is a mistake in the command, so the job is not started again")
            break
        if attempt < args.restarts:
            say(f"starting again from the last checkpoint ({attempt + 1} of {args.restarts})")
        else:
            say(f"given up after {attempt} restarts; the same command goes on from the last checkpoint")
    return status if status > 0 else 128 - status


if __name__ == "__main__":
    sys.exit(jobs.each(main, sys.argv[1:], unnamed=True))
