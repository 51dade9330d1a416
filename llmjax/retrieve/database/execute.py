"""Queries in a process of their own, which can only read and ends at its limits. `child.py` is that process.

The layers, from outside: the process (no environment, limits of memory, CPU and time, files cannot grow), the file opened
for reading, one statement that begins with SELECT, WITH or VALUES, the authorizer with the tables and functions that are
allowed, limits of sizes inside the database, and limits of the rows that come back. None alone is enough:
`tests/test_ask_attacks.py` has a table of attacks and the layer that stops each.
"""

import functools
import json
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmjax.errors import UserError
from llmjax.retrieve.database.schema import Schema, Table

CHILD = Path(__file__).with_name("child.py")
SQLITE_HEADER, DUCKDB_MARK, PARQUET_MARK = b"SQLite format 3\0", b"DUCK", b"PAR1"
running: dict[threading.Thread, subprocess.Popen[bytes]] = {}  # by the threads that wait for them
_ended: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
DUCKDB_MEMORY = 4 << 30  # addresses, of which it uses a quarter: it reserves more than it uses


@dataclass(frozen=True)
class Limits:
    """Limits of one query."""

    seconds: float = 3.0  # after which the database is interrupted
    cpu_seconds: int = 5  # after which the kernel ends the process
    memory: int = 512 << 20  # bytes
    rows: int = 1000


@dataclass(frozen=True)
class Result:
    """The rows of a query, or why there are none."""

    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    cut: bool = False  # whether there were more rows, or longer ones, than the limits permit
    refused: str = ""  # the message of the layer that stopped it
    layer: str = (
        ""  # that layer: statement, syntax, schema, authorizer, functions, read-only, size, memory, time, process
    )


@dataclass(frozen=True)
class Database:
    """A database that questions are asked of: a SQLite or DuckDB file, a Parquet file, or a folder of these."""

    path: Path
    kind: str  # sqlite, duckdb or parquet
    files: tuple[str, ...] = field(default=())  # of Parquet

    @functools.cached_property
    def schema(self) -> Schema:
        """Its tables. Raises UserError for a database that cannot be read, or has no table."""
        reply = self._ask(Limits(seconds=20, cpu_seconds=30), task="describe")
        if "refused" in reply:
            raise UserError(f"{self.path}: {reply['refused']}")
        if not reply["tables"]:
            raise UserError(f"{self.path} has no tables")
        return Schema("sqlite" if self.kind == "sqlite" else "duckdb", tuple(map(Table.parse, reply["tables"])))

    def query(self, sql: str, *, limits: Limits | None = None, prepare: bool = False) -> Result:
        """Run one statement; with `prepare` only check that it could run."""
        reply = self._ask(limits or Limits(), task="query", sql=sql, prepare=prepare)
        if "refused" in reply:
            return Result(refused=reply["refused"], layer=reply["layer"])
        return Result(tuple(reply["columns"]), tuple(map(tuple, reply["rows"])), reply["cut"])

    def values_in(self, question: str) -> list[tuple[str, str, str]]:
        """(table, column, value) of the values of text columns that occur in the question."""
        reply = self._ask(Limits(seconds=20, cpu_seconds=30), task="find", question=question)
        return [(table, column, value) for table, column, value in reply.get("values", ())]

    def _ask(self, limits: Limits, **given: Any) -> dict[str, Any]:
        memory = limits.memory if self.kind == "sqlite" else max(limits.memory, DUCKDB_MEMORY)
        given |= {"path": str(self.path), "kind": self.kind, "files": self.files}
        given["limits"] = {**asdict(limits), "memory": memory}
        command = [sys.executable, "-I", *(["-S"] if self.kind == "sqlite" else []), str(CHILD)]
        thread, pipe = threading.current_thread(), subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, cwd="/") as child:
            running[thread] = child
            if thread in _ended:
                child.kill()
            try:
                out, errors = child.communicate(json.dumps(given).encode(), timeout=limits.cpu_seconds + 5.0)
            except subprocess.TimeoutExpired:
                return {"refused": f"it ran longer than {limits.cpu_seconds + 5:g} s", "layer": "time"}
            finally:
                child.kill()
                del running[thread]
        if child.returncode == 0:
            reply: dict[str, Any] = json.loads(out)
            return reply
        if child.returncode < 0:
            layer = "time" if -child.returncode in (24, 9) else "process"  # SIGXCPU, SIGKILL after it
            return {"refused": f"the process ended with signal {-child.returncode}", "layer": layer}
        raise RuntimeError(f"the database's process failed: {errors.decode('utf-8', 'replace')[-2000:]}")


def end(thread: threading.Thread) -> None:
    """End the query that a thread waits for, and each that it would begin: nobody waits for its answer."""
    _ended.add(thread)
    if (child := running.get(thread)) is not None:
        child.kill()


def open_database(path: Path) -> Database:
    """The database at a path; nothing of it is read but its first bytes.

    Raises UserError for a path that is no SQLite, DuckDB or Parquet file, and no folder of Parquet files.
    """
    path = path.expanduser().absolute()
    if path.is_dir():
        files = tuple(str(file) for file in sorted(path.glob("*.parquet")) if file.is_file())
        if not files:
            raise UserError(f"{path} has no .parquet files: give them, or a file of SQLite or DuckDB")
        return Database(path, "parquet", files)
    if not path.is_file():
        raise UserError(f"there is no database {path}: give a file of SQLite, DuckDB or Parquet")
    with path.open("rb") as file:
        head = file.read(16)
    if head == SQLITE_HEADER:
        return Database(path, "sqlite")
    if head[8:12] == DUCKDB_MARK:
        return Database(path, "duckdb")
    if head[:4] == PARQUET_MARK:
        return Database(path, "parquet", (str(path),))
    raise UserError(f"{path} is no file of SQLite, DuckDB or Parquet: give one of these")
