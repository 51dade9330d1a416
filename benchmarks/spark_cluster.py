"""The preparation on a real Spark cluster on this machine, with one worker killed during the run, against the local
engine.

    pip install 'llmjax[data,spark]'        and Java 17
    python benchmarks/spark_cluster.py [--sources stdlib ...] [--workers 3] [--out results/spark_cluster.json]

Starts a standalone master and workers as processes of their own on 127.0.0.1, runs the same preparation (cleaning,
exact and near-duplicates, repeated passages) with prepare.engine=local and =spark, kills one worker and its executors
with SIGKILL after --kill-after seconds of the Spark run, and compares every shard byte for byte. Prints both times; on
one machine Spark can only be slower. Stops everything that it started.

Hardware: 2 CPU cores, Java 17.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import make_parser, write

STEPS = ("repair", "exact", "near", "substring", "personal")
PART_BYTES = 2_000_000  # small parts, so that there is something to lose


def main() -> None:
    """Run both engines and print how they compare."""
    parser = make_parser(__doc__)
    parser.add_argument("--sources", nargs="+", default=["stdlib", "stdlib-tests"])
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--kill-after", type=float, default=20.0, metavar="SECONDS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        local_seconds = prepare(args.sources, folder / "local", "local", "")
        cluster = Cluster(folder, args.workers)
        try:
            timer = threading.Timer(args.kill_after, cluster.kill_one)
            timer.start()
            spark_seconds = prepare(args.sources, folder / "spark", "spark", cluster.master)
            timer.cancel()
        finally:
            cluster.stop()
        local, spark = (digests(folder / name / "prepare") for name in ("local", "spark"))
        result = {
            "workers": args.workers,
            "killed": cluster.killed,
            "steps": STEPS,
            "documents": json.loads((folder / "spark/prepare/manifest.json").read_text())["total"]["documents"],
            "overall": json.loads((folder / "spark/prepare/manifest.json").read_text())["overall"],
            "shards": len(local),
            "equal": local == spark,
            "local_seconds": round(local_seconds, 1),
            "spark_seconds": round(spark_seconds, 1),
        }
    print(json.dumps(result, indent=1))
    write(result, args.out)
    if not cluster.killed:
        sys.exit("the run was over before a worker could be killed: lower --kill-after")
    if local != spark:
        sys.exit("the engines do not agree")


def prepare(sources: list[str], workdir: Path, engine: str, master: str) -> float:
    """One preparation in a process of its own; its seconds."""
    code = (
        "import sys; from pathlib import Path; from llmjax import config; from llmjax.prepare import parts, run\n"
        f"parts.PART_BYTES = {PART_BYTES}; parts.cut.__kwdefaults__['part_bytes'] = {PART_BYTES}\n"
        "if __name__ == '__main__':\n"
        f"    c = config.base(); c.data.sources = {tuple(sources)!r}; c.prepare.steps = {STEPS!r}\n"
        f"    c.prepare.engine = {engine!r}; c.prepare.spark_master = {master!r} or 'local'\n"
        "    c.data.holdout_percent = 5.0; c.data.shard_bytes = 4_000_000\n"
        f"    run.run(c.lock(), Path({str(workdir)!r}))\n"
    )
    script = workdir.parent / f"{engine}.py"
    script.write_text(code)
    began = time.perf_counter()
    subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every shard."""
    files = sorted(folder.glob("*/*.jsonl"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


class Cluster:
    """A standalone Spark master and workers, each a process group of its own."""

    def __init__(self, folder: Path, workers: int) -> None:
        import pyspark

        self.killed = False
        self._class = Path(pyspark.__file__).parent / "bin" / "spark-class"
        self._folder = folder
        port = _free_port()
        self.master = f"spark://127.0.0.1:{port}"
        self._processes = [
            self._start("master", "master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", "0")
        ]
        _wait_for(port)
        for number in range(workers):
            options = ("--host", "127.0.0.1", "--cores", "1", "--memory", "2g", "--webui-port", "0", self.master)
            self._processes.append(self._start(f"worker-{number}", "worker.Worker", *options))
        time.sleep(10)  # until they have found each other

    def _start(self, name: str, java_class: str, *options: str) -> subprocess.Popen:
        (self._folder / name).mkdir()
        environment = {**os.environ, "SPARK_WORKER_DIR": str(self._folder / name), "PYSPARK_PYTHON": sys.executable}
        return subprocess.Popen(
            [str(self._class), f"org.apache.spark.deploy.{java_class}", *options],
            env=environment, stdout=(self._folder / name / "log").open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def kill_one(self) -> None:
        """SIGKILL the last worker with the executors that it has started."""
        os.killpg(self._processes[-1].pid, signal.SIGKILL)
        self.killed = True
        print("killed a worker", file=sys.stderr)

    def stop(self) -> None:
        """End all processes."""
        for process in reversed(self._processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes:
            process.wait(timeout=30)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(120):
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    sys.exit("the Spark master did not start; is Java 17 installed?")


if __name__ == "__main__":
    if shutil.which("java") is None:
        sys.exit("Spark needs Java 17")
    main()
