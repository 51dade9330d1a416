"""The preparation on a Spark cluster: the same tasks, the same queries and the same pure functions.

Parts are mapped by `mapInArrow`, Spark SQL answers the queries of keys, and `applyInArrow` brings the documents of an
output shard together. Data goes between machines by Spark's shuffle only. The run's folder must be on storage that all machines
share, under the same path. A task's files appear whole or not at all, so a task that runs twice, because Spark lost its
worker, does no harm. The output is byte for byte that of the local engine.
"""

import functools
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmjax import storage
from llmjax.errors import UserError
from llmjax.prepare import shards
from llmjax.prepare.documents import part_path, split_by_part, table_files, take_rows, write_table
from llmjax.prepare.engine import Job, run_job

SHARDS_AT_ONCE = 256  # output shards that one round of the shuffle brings together


@dataclass(frozen=True)
class Spark:
    """An engine on the cluster at `master`; see `engine.Engine`. UserError if pyspark is not installed."""

    master: str

    def __post_init__(self) -> None:
        if find_spec("pyspark") is None:
            raise UserError("prepare.engine=spark needs pyspark (and Java 17): pip install 'llmjax[spark]'")

    def map(self, function: Callable[..., Any], jobs: Sequence[Job], *, label: str) -> list[Any]:
        """See `Engine.map`."""
        left = [job for job in jobs if not job.summary.exists()]
        if left:
            session = _session(self.master)
            session.sparkContext.setJobDescription(label)
            rows = [(job.number, pickle.dumps((function, job))) for job in left]
            spread = session.sparkContext.parallelize(rows, numSlices=len(rows))
            frame = session.createDataFrame(spread, "number long, job binary")
            frame.mapInArrow(_run_jobs, "number long").collect()
        return [json.loads(job.summary.read_text(encoding="utf-8")) for job in jobs]

    def query(self, sql: str, *, keys: Sequence[str], out: Path) -> pa.Table:
        """See `Engine.query`."""
        if not out.exists():
            session = _session(self.master)
            session.sparkContext.setJobDescription(out.stem)
            files = (f"file://{Path(path).resolve()}" for path in keys)
            session.read.parquet(*files).createOrReplaceTempView("keys")
            write_table(session.sql(sql).toArrow(), out)
        return pq.read_table(out)

    def write(self, jobs: Sequence[Job]) -> list[Any]:
        """See `Engine.write`: a shuffle brings the documents of a shard together, and its task sorts them."""
        left = [job for job in jobs if not job.summary.exists()]
        for start in range(0, len(left), SHARDS_AT_ONCE):
            self._shuffle(left[start : start + SHARDS_AT_ONCE])
        return [json.loads(job.summary.read_text(encoding="utf-8")) for job in jobs]

    def close(self) -> None:
        """Leave the cluster."""
        _session(self.master).stop()
        _session.cache_clear()

    def _shuffle(self, jobs: Sequence[Job]) -> None:
        session = _session(self.master)
        session.sparkContext.setJobDescription("writing")
        plan = _plan(jobs)
        folder = jobs[0].summary.parent / f"places-{jobs[0].number:06d}"
        split_by_part(plan, folder)
        documents = jobs[0].arguments["documents"]
        parts = [(int(Path(path).stem), path, documents) for path in table_files(folder)]
        spread = session.sparkContext.parallelize(parts, numSlices=len(parts))
        frame = session.createDataFrame(spread, "number long, places string, documents string")
        kinds = {"id": "binary"}
        columns = ", ".join(f"`{name}` {kinds.get(name, 'string')}" for name in shards.COLUMNS)
        placed = frame.mapInArrow(_place, f"shard long, position long, piece long, {columns}")
        by_number = {job.number: job for job in jobs}
        write = _typed(functools.partial(write_bucket, jobs=by_number))
        placed.groupBy("shard").applyInArrow(write, "shard long").collect()


def write_bucket(table: pa.Table, *, jobs: dict[int, Job]) -> pa.Table:
    """Write one shard from its documents, in the order of their positions, and its summary."""
    number = table["shard"][0].as_py()
    job = jobs[number]
    table = table.sort_by("position")
    arguments = {name: job.arguments[name] for name in ("holdout", "split_name", "count_bias", "out")}
    described = shards.write_documents(table, table["piece"].to_numpy(), **arguments)
    storage.write_json(job.summary, described, shared=True)
    return pa.table({"shard": pa.array([number], pa.int64())})


def _plan(jobs: Sequence[Job]) -> pa.Table:
    """(ordinal, shard, position, piece) of every document of some shards."""
    tables = []
    for job in jobs:
        with np.load(job.arguments["rows"]) as rows:
            count = len(rows["ordinals"])
            columns = [rows["ordinals"], np.full(count, job.number), np.arange(count), rows["pieces"].astype(np.int64)]
        tables.append(pa.table([pa.array(column) for column in columns], ["ordinal", "shard", "position", "piece"]))
    return pa.concat_tables(tables)


def _place(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Documents, part by part, with the shard that each goes to and its position there."""
    for batch in batches:
        for row in batch.to_pylist():
            places = pq.read_table(row["places"])
            for start in range(0, places.num_rows, 1024):
                some = places.slice(start, 1024)
                rows = some["ordinal"].to_numpy() & 0xFFFFFFFF
                path = part_path(Path(row["documents"]), row["number"])
                table = take_rows(path, rows, columns=shards.COLUMNS)
                arrays = [some[name] for name in ("shard", "position", "piece")]
                for name in shards.COLUMNS:
                    kind = pa.binary() if name == "id" else pa.string()
                    arrays.append(table[name].cast(kind))
                names = ["shard", "position", "piece", *shards.COLUMNS]
                yield from pa.table(arrays, names).combine_chunks().to_batches()


def _run_jobs(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for data in batch["job"].to_pylist():
            function, job = pickle.loads(data)
            run_job(function, job)
        yield batch.select(["number"])


def _typed(function: Callable[..., pa.Table]) -> Callable[[pa.Table], pa.Table]:
    """`applyInArrow` reads a function's annotations, which a partial does not have."""

    def call(table: pa.Table) -> pa.Table:
        return function(table)

    return call


@functools.cache
def _session(master: str) -> Any:
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    session = (
        SparkSession.builder.master(master)
        .appName("llmjax prepare")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "1024")
        .config("spark.task.maxFailures", "8")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    return session
