"""How the preparation runs: a map over parts and one grouping by key. This is the engine without a server.

An engine has two methods. `map` calls a function for every job, which reads and writes files of its own and returns a
small summary. `group` brings the rows of Parquet files with equal keys together, sorted, and hands those keys that
occur more than once to a pure function from table to table. `spark.py` has the same two on a cluster.
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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmjax import progress, storage
from llmjax.prepare import shards
from llmjax.prepare.documents import write_table

Reduce = Callable[[pa.Table], pa.Table]
SMALL_BYTES = 32_000_000  # less than this is done before a pool of processes would have started
GROUP_ROWS = 1_000_000  # rows that a grouping hands on at once, whole keys only


@dataclass(frozen=True)
class Job:
    """One call of a map: its number, the file its summary goes to, and what the function is given."""

    number: int
    summary: Path
    arguments: dict[str, Any]
    size: int = 0  # for the progress bar


class Engine(Protocol):
    """What runs the preparation."""

    def map(self, function: Callable[..., Any], jobs: Sequence[Job], *, label: str) -> list[Any]:
        """The function's summaries (JSON values), in the order of the jobs; a job whose summary is there is not run again."""
        ...

    def group(
        self, paths: Sequence[str], *, key: Sequence[str], order: Sequence[str], reduce: Reduce, out: Path
    ) -> pa.Table:
        """Apply `reduce` to the rows whose key occurs more than once, sorted by key and order; its rows, in no fixed order.

        `reduce` gets whole keys, several in one table, and may not depend on which.
        """
        ...

    def write(self, jobs: Sequence[Job]) -> list[Any]:
        """Write output shards: `shards.write_shard` for every job, by whatever way brings the documents together."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...


@dataclass
class Local:
    """A pool of processes, and DuckDB for every grouping within a memory budget, spilling to `spill`."""

    workers: int
    memory_bytes: int
    spill: Path
    _pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[..., Any], jobs: Sequence[Job], *, label: str) -> list[Any]:
        """See `Engine.map`. OSError if a worker was killed, which is what a machine does that has no memory left."""
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
        """End the processes; what was not begun is not begun any more."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def group(
        self, paths: Sequence[str], *, key: Sequence[str], order: Sequence[str], reduce: Reduce, out: Path
    ) -> pa.Table:
        """See `Engine.group`."""
        if not out.exists():
            results = [reduce(table) for table in self._repeated(paths, key, order)]
            empty = reduce(pq.read_schema(paths[0]).empty_table()) if paths else pa.table({})
            write_table(pa.concat_tables([empty, *results]), out)
        return pq.read_table(out)

    def write(self, jobs: Sequence[Job]) -> list[Any]:
        """See `Engine.write`: on one machine the documents are fetched from the files of the parts."""
        return self.map(shards.write_shard, jobs, label="writing")

    def _repeated(self, paths: Sequence[str], key: Sequence[str], order: Sequence[str]) -> Iterator[pa.Table]:
        """The rows whose key is repeated, sorted, in tables of whole keys."""
        if not paths:
            return
        keys, files = ", ".join(f'"{name}"' for name in key), list(paths)
        by = ", ".join(f'"{name}"' for name in (*key, *order))
        with self.database() as database:
            repeated = f"SELECT {keys} FROM read_parquet($files) GROUP BY ALL HAVING count(*) > 1"
            query = f"SELECT * FROM read_parquet($files) SEMI JOIN ({repeated}) USING ({keys}) ORDER BY {by}"
            reader = database.sql(query, params={"files": files}).to_arrow_reader(GROUP_ROWS)
            yield from whole_keys(reader, key)

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


def whole_keys(batches: Iterator[pa.RecordBatch], key: Sequence[str]) -> Iterator[pa.Table]:
    """Sorted batches as tables that never cut a key in two."""
    held: pa.Table | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        table = table if held is None else pa.concat_tables([held, table])
        if table.num_rows:
            last = int(np.flatnonzero(key_starts(table, key))[-1])
            if last:
                yield table.slice(0, last)
            held = table.slice(last)
    if held is not None:
        yield held


def key_starts(table: pa.Table, key: Sequence[str]) -> np.ndarray:
    """Whether each row of a sorted table begins a new key, bool."""
    starts = np.zeros(table.num_rows, bool)
    if table.num_rows:
        starts[0] = True
        for name in key:
            values = table[name].combine_chunks()
            differ = pc.not_equal(values[1:], values[:-1])
            starts[1:] |= differ.to_numpy(zero_copy_only=False)
    return starts


def run_job(function: Callable[..., Any], job: Job) -> None:
    """Run one job and write its summary, which says that it is done."""
    storage.write_json(job.summary, function(**job.arguments), shared=True)


def workers_of(setting: int) -> int:
    """`prepare.workers`, or the cores that this process may use."""
    return setting or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
