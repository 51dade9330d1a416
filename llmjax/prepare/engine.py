"""How the preparation runs: a map over parts and a query of their keys. This is the engine without a server.

`map` calls a function for every job, which reads and writes files of its own and returns a small summary. `query`
selects from the keys in Parquet files. `spark.py` has the same two on a cluster.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from llmjax import progress, storage
from llmjax.prepare import shards

SMALL_BYTES = 32_000_000  # less is done before a pool of processes would have started


@dataclass(frozen=True)
class Job:
    """One call of a map: its number, the file of its summary, and the arguments of the function."""

    number: int
    summary: Path
    arguments: dict[str, Any]
    size: int = 0  # for the progress bar


class Engine(Protocol):
    """An engine runs the preparation."""

    def map(self, function: Callable[..., Any], jobs: Sequence[Job], *, label: str) -> list[Any]:
        """The function's summaries (JSON values) in the order of the jobs. A job whose summary is there does not run again."""
        ...

    def query(self, sql: str, *, keys: Sequence[str], out: Path) -> pa.Table:
        """The rows, in no fixed order, of a SELECT from the table `keys`: all rows of those Parquet files.

        The text must mean the same to DuckDB and to Spark. The rows stay in the file `out`.
        """
        ...

    def write(self, jobs: Sequence[Job]) -> list[Any]:
        """Write output shards: `shards.write_shard` for every job. The engine decides how the documents come together."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...


@dataclass
class Local:
    """A pool of processes, and DuckDB for every query within a memory budget, spilling to `spill`."""

    workers: int
    memory_bytes: int
    spill: Path
    _pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[..., Any], jobs: Sequence[Job], *, label: str) -> list[Any]:
        """See `Engine.map`. OSError if a worker was killed: the kernel kills processes when the memory is used up."""
        left = [job for job in jobs if not job.summary.exists()]
        with progress.bar(label, sum(job.size for job in jobs) or None) as advance:
            for job in jobs:
                if job.summary.exists():
                    advance(job.size)
            if self.workers == 1 or len(left) <= 1 or sum(job.size for job in left) < SMALL_BYTES:
                for job in left:
                    run_job(function, job)
                    advance(job.size)
            else:
                self._pooled(function, left, advance)
        return [json.loads(job.summary.read_text(encoding="utf-8")) for job in jobs]

    def _pooled(self, function: Callable[..., Any], jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
        if self._pool is None:  # kept for the next map: processes start slowly
            # Spawned, not forked: a fork of a process with threads (JAX has many) can hang.
            self._pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            futures = {self._pool.submit(run_job, function, job): job for job in jobs}
            for future in as_completed(futures):
                future.result()
                advance(futures[future].size)
        except BrokenProcessPool as error:
            raise OSError(
                0, "a worker of the preparation was killed, probably for want of memory: lower prepare.workers or "
                "prepare.max_document_bytes; the same command goes on with the parts that are left"
            ) from error  # fmt: skip

    def close(self) -> None:
        """End the processes. Jobs that have not begun do not begin."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def query(self, sql: str, *, keys: Sequence[str], out: Path) -> pa.Table:
        """See `Engine.query`."""
        if not out.exists():
            with self.database() as database, storage.replacing(out, shared=True) as temporary:
                database.read_parquet(list(keys)).create_view("keys")
                database.sql(sql).write_parquet(str(temporary), compression="zstd")
        return pq.read_table(out)

    def write(self, jobs: Sequence[Job]) -> list[Any]:
        """See `Engine.write`: the tasks read the documents from the files of the parts."""
        return self.map(shards.write_shard, jobs, label="writing")

    @contextmanager
    def database(self) -> Iterator[Any]:
        """A DuckDB in memory that spills."""
        import duckdb

        self.spill.mkdir(parents=True, exist_ok=True)
        database = duckdb.connect()
        try:
            database.execute(f"SET memory_limit = '{self.memory_bytes // 2 // 1_000_000}MB'")
            database.execute(f"SET temp_directory = '{str(self.spill).replace(chr(39), chr(39) * 2)}'")
            database.execute(f"SET threads = {self.workers}")
            yield database
        finally:
            database.close()


def run_job(function: Callable[..., Any], job: Job) -> None:
    """Run one job and write its summary. A job with a summary is done."""
    storage.write_json(job.summary, function(**job.arguments), shared=True)


def workers_of(setting: int) -> int:
    """`prepare.workers`, or the cores that this process may use."""
    return setting or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
