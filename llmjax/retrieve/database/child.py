"""The program that `execute.py` starts: it opens one database for reading, does one task, prints JSON and ends.

    python -I child.py < '{"path": ..., "kind": "sqlite", "task": "query", "sql": ..., "limits": {...}}'

SQLite has an authorizer, which allows SELECT, the listed tables and columns, and the functions of `FUNCTIONS`. DuckDB has
none, so the parsed statement is searched for anything else before it runs. Each refusal names the layer that stopped the
statement. The program imports the standard library, and duckdb where the database needs it.
"""

import contextlib
import decimal
import json
import math
import os
import re
import resource
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

FUNCTIONS = frozenset([
    "abs", "avg", "ceil", "ceiling", "coalesce", "count", "cume_dist", "date", "datetime", "dense_rank", "exp",
    "first_value", "floor", "glob", "group_concat", "ifnull", "iif", "instr", "julianday", "lag", "last_value",
    "lead", "length", "like", "ln", "log", "log10", "lower", "ltrim", "max", "min", "mod", "nth_value", "ntile",
    "nullif", "percent_rank", "pow", "power", "rank", "replace", "round", "row_number", "rtrim", "sign", "sqrt",
    "strftime", "substr", "substring", "sum", "time", "total", "trim", "trunc", "typeof", "unixepoch", "upper",
])  # fmt: skip
DUCKDB_FUNCTIONS = FUNCTIONS - {"datetime", "glob", "iif", "julianday", "total", "unixepoch"} | frozenset([
    "+", "-", "*", "/", "//", "%", "||", "~~", "!~~", "~~*", "!~~*", "~~~", "any_value", "contains", "count_star",
    "date_diff", "date_part", "date_trunc", "datediff", "datepart", "day", "dayname", "epoch", "first", "greatest",
    "hour", "last", "least", "like_escape", "median", "minute", "mode", "month", "monthname", "not_like_escape",
    "prefix", "quantile_cont", "stddev", "string_agg", "strpos", "suffix", "variance", "week", "year",
])  # fmt: skip
CELL_BYTES, RESULT_BYTES, SQL_BYTES = 1 << 16, 4 << 20, 10_000
VALUE_BYTES = 1_000_000  # the longest text or blob that a query may make or read
OWN_TABLES = ("sqlite_", "pragma_", "json_", "jsonb_", "dbstat", "bytecode", "tables_used", "fts", "rtree", "generate_")
STATEMENTS = ("select", "with", "values")
SAMPLE_ROWS, DISTINCT_VALUES = 3, 2000


class Refused(Exception):  # noqa: N818
    """A statement that is not run, or not to its end: the layer that stopped it and its message."""

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(message)
        self.layer = layer


def main() -> None:
    """See the module."""
    given = json.load(sys.stdin)
    limits = given["limits"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file can be written, whatever the library is made to do
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))
    if sys.platform == "linux":  # macOS refuses to limit it
        resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
    try:
        database = (Sqlite if given["kind"] == "sqlite" else Duck)(given)
        reply = TASKS[given["task"]](database, given)
    except Refused as refused:
        reply = {"refused": str(refused), "layer": refused.layer}
    except MemoryError:
        reply = {"refused": "it needs more memory than a query may have", "layer": "memory"}
    os.write(1, json.dumps(reply).encode())


class Sqlite:
    """A SQLite file, opened for reading."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._denied = ""
        self._own_names: set[str] = set()  # of the statement's common table expressions
        self._limits = given["limits"]
        path = os.path.abspath(given["path"])
        # A database in WAL mode cannot be opened for reading only without its -shm file, unless it is said not to change.
        still = "&immutable=1" if not os.path.exists(f"{path}-wal") and _is_wal(path) else ""
        try:
            self._db = sqlite3.connect(
                f"file:{quote(os.fsencode(path))}?mode=ro{still}", uri=True, isolation_level=None
            )
            for setting in ("query_only=ON", "trusted_schema=OFF", "cell_size_check=ON", "temp_store=MEMORY"):
                self._db.execute(f"PRAGMA {setting}")
            self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()  # reads the schema before the limits hold
        except sqlite3.Error as error:
            raise Refused(
                "database", f"SQLite cannot read it: {error}; if it is cut or damaged, copy it again or restore it"
            ) from error
        self._db.text_factory = lambda data: data.decode("utf-8", "replace")
        if sys.version_info >= (3, 12):
            self._db.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
            self._db.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)
            self._db.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_TRIGGER, False)

    def tables(self) -> list[dict[str, Any]]:
        """The tables and views with their columns and foreign keys; not SQLite's own and not virtual ones."""
        found = []
        listed = "SELECT name, type, sql FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY rowid"
        try:
            known = self._db.execute(listed).fetchall()
        except sqlite3.Error as error:
            raise Refused(
                "database", f"SQLite cannot read it: {error}; if it is cut or damaged, copy it again or restore it"
            ) from error
        for name, kind, sql in known:
            if name.startswith("sqlite_") or re.match(r"\s*CREATE\s+VIRTUAL", sql or "", re.I):
                continue
            quoted = '"' + name.replace('"', '""') + '"'
            try:
                # Generated columns are among these; those that only virtual tables hide are left out.
                rows = [row for row in self._db.execute(f"PRAGMA table_xinfo({quoted})").fetchall() if row[6] != 1]
                links = self._db.execute(f"PRAGMA foreign_key_list({quoted})").fetchall()
            except sqlite3.Error:  # a view of a table that is gone
                continue
            columns = [{"name": row[1], "type": row[2] or "", "key": bool(row[5])} for row in rows]
            keys = [row[1] for row in sorted(rows, key=lambda row: row[5]) if row[5]]
            groups: dict[int, list[Any]] = {}
            for row in links:
                groups.setdefault(row[0], []).append(row)
            made = [
                {"columns": [row[3] for row in group], "table": group[0][2], "to": [row[4] for row in group]}
                for group in groups.values()
            ]
            found.append({"name": name, "kind": kind, "columns": columns, "keys": keys, "links": made})
        return found

    def fence(self, tables: Sequence[dict[str, Any]]) -> None:
        """From now on only SELECT runs, on these tables, within the limits."""
        columns = {table["name"].lower(): {c["name"].lower() for c in table["columns"]} for table in tables}
        allow, deny = sqlite3.SQLITE_OK, sqlite3.SQLITE_DENY

        def authorize(action: int, first: str | None, second: str | None, _: str | None, __: str | None) -> int:
            if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
                return allow
            if action == sqlite3.SQLITE_READ:
                known = columns.get((first or "").lower())
                if known is not None and (not second or second.lower() in known or second.upper() == "ROWID"):
                    return allow
                # Where no column of a common table expression is read, SQLite asks for its name without a column.
                if not second and (first or "").lower() in self._own_names:
                    return allow
                self._denied = self._denied or f"authorizer: reads {first}.{second}"
            elif action == sqlite3.SQLITE_FUNCTION:
                if (second or "").lower() in FUNCTIONS:
                    return allow
                self._denied = self._denied or f"functions: {second}() is not one of those that a query may call"
            else:
                self._denied = self._denied or f"authorizer: {ACTIONS.get(action, action)} {first or ''}".rstrip()
            return deny

        wanted = {
            "LENGTH": VALUE_BYTES, "SQL_LENGTH": SQL_BYTES, "COMPOUND_SELECT": 10, "EXPR_DEPTH": 100, "ATTACHED": 0,
            "LIKE_PATTERN_LENGTH": 200, "VARIABLE_NUMBER": 0, "TRIGGER_DEPTH": 0, "WORKER_THREADS": 0,
        }  # fmt: skip
        for name, value in wanted.items():
            self._db.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{name}"), value)
        self._db.set_authorizer(authorize)
        end = time.monotonic() + self._limits["seconds"]
        self._db.set_progress_handler(lambda: time.monotonic() > end, 10_000)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, sqlite3.Warning, OverflowError) as error:
            said = str(error)
            if self._denied:
                layer, _, said = self._denied.partition(": ")
                raise Refused(layer, said) from error
            raise Refused(_layer(said), said) from error

    def run(self, sql: str) -> tuple[list[str], Iterator[Sequence[Any]]]:
        """Names of the columns, and the rows."""
        self._own_names = _own_names(sql)
        with self._explained():
            cursor = self._db.execute(sql)
            names = [column[0] for column in cursor.description or ()]

        def rows() -> Iterator[Sequence[Any]]:
            with self._explained():
                yield from cursor

        return names, rows()

    def prepare(self, sql: str) -> None:
        """Check that the statement is one that could run; nothing runs."""
        self._own_names = _own_names(sql)
        with self._explained():
            self._db.execute(f"EXPLAIN {sql}").close()


class Duck:
    """A DuckDB file, or Parquet files as tables of the same names, opened for reading."""

    def __init__(self, given: dict[str, Any]) -> None:
        try:
            import duckdb
        except ImportError as error:
            raise Refused("database", "duckdb is not installed: pip install duckdb") from error
        self._error: Any = duckdb.Error
        self._tables: list[dict[str, Any]] = []
        self._seconds = given["limits"]["seconds"]
        fixed: dict[str, Any] = {
            "threads": "1",
            "memory_limit": f"{given['limits']['memory'] // 4 // (1 << 20)}MB",
            "temp_directory": "",
        }
        try:
            if given["kind"] == "duckdb":
                self._db = duckdb.connect(given["path"], read_only=True, config=fixed)
            else:
                self._db = duckdb.connect(":memory:", config=fixed)
                files = {os.path.basename(file).rsplit(".", 1)[0]: _plain_path(file) for file in given["files"]}
                for name, file in files.items():
                    name = name.replace('"', '""')
                    self._db.execute(f'CREATE VIEW "{name}" AS SELECT * FROM read_parquet({_quoted(file)})')
                self._db.execute(f"SET allowed_paths=[{', '.join(map(_quoted, files.values()))}]")
            for setting in ("enable_external_access=false", "autoinstall_known_extensions=false",
                            "autoload_known_extensions=false", "lock_configuration=true"):  # fmt: skip
                self._db.execute(f"SET {setting}")
        except (self._error, OSError) as error:
            raise Refused("database", f"DuckDB cannot read it: {_first_line(error)}") from error

    def tables(self) -> list[dict[str, Any]]:
        """The tables and views with their columns and foreign keys."""
        rows = self._db.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal AND schema_name = 'main' "
            "ORDER BY table_oid, column_index"
        ).fetchall()
        made: dict[str, dict[str, Any]] = {}
        for table, column, kind in rows:
            one = made.setdefault(table, {"name": table, "kind": "table", "columns": [], "keys": [], "links": []})
            one["columns"].append({"name": column, "type": kind, "key": False})
        links = self._db.execute(
            "SELECT table_name, constraint_type, constraint_column_names, referenced_table, referenced_column_names "
            "FROM duckdb_constraints() WHERE schema_name = 'main'"
        ).fetchall()
        for table, kind, columns, other, to in links:
            if kind == "PRIMARY KEY" and table in made:
                made[table]["keys"] = columns
            elif kind == "FOREIGN KEY" and table in made:
                made[table]["links"].append({"columns": columns, "table": other, "to": to})
        return list(made.values())

    def fence(self, tables: Sequence[dict[str, Any]]) -> None:
        """From now on only SELECT runs, on these tables, until the time is over."""
        self._tables = list(tables)
        clock = threading.Timer(self._seconds, self._db.interrupt)
        clock.daemon = True
        clock.start()

    def _check(self, sql: str) -> None:
        """Refuse what the parsed statement must not have. Raises Refused."""
        ((said,),) = self._db.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()
        parsed = json.loads(said)
        if parsed.get("error"):
            layer = "statement" if "Only SELECT" in parsed.get("error_message", "") else "syntax"
            raise Refused(layer, parsed.get("error_message", "it cannot be parsed"))
        if len(parsed["statements"]) != 1:
            raise Refused("statement", "there must be one statement")
        known, ctes = {table["name"].lower() for table in self._tables}, set[str]()
        nodes = list(_nodes(parsed["statements"]))
        for node in nodes:
            if isinstance(node.get("cte_map"), dict):
                ctes |= {entry["key"].lower() for entry in node["cte_map"].get("map", ())}
        for node in nodes:
            kind = node.get("type")
            if kind == "TABLE_FUNCTION" or kind in ("SHOW_REF", "COLUMN_DATA", "BOUND_TABLE_REF"):
                raise Refused("authorizer", f"{kind.lower()} is not allowed")
            if kind == "BASE_TABLE":
                name = str(node.get("table_name", "")).lower()
                place = str(node.get("schema_name") or "main").lower()
                if (name not in known and name not in ctes) or place != "main" or node.get("catalog_name"):
                    raise Refused("authorizer", f"reads {node.get('table_name')}")
            if "function_name" in node and str(node["function_name"]).lower() not in DUCKDB_FUNCTIONS:
                raise Refused("functions", f"{node['function_name']}() is not one of those that a query may call")

    def run(self, sql: str) -> tuple[list[str], Iterator[Sequence[Any]]]:
        """Names of the columns, and the rows."""
        try:
            self._check(sql)
            cursor = self._db.execute(sql)
        except self._error as error:
            raise Refused(_layer(str(error)), _first_line(error)) from error
        names = [column[0] for column in cursor.description or ()]

        def rows() -> Iterator[Sequence[Any]]:
            try:
                while some := cursor.fetchmany(100):
                    yield from some
            except self._error as error:
                raise Refused(_layer(str(error)), _first_line(error)) from error

        return names, rows()

    def prepare(self, sql: str) -> None:
        """Check that the statement is one that could run; nothing runs."""
        try:
            self._check(sql)
            self._db.execute(f"EXPLAIN {sql}")
        except self._error as error:
            raise Refused(_layer(str(error)), _first_line(error)) from error


Database = Sqlite | Duck


def describe(database: Database, given: dict[str, Any]) -> dict[str, Any]:
    """The schema, with the first rows of each table."""
    tables = database.tables()
    database.fence(tables)
    for table in tables:
        quoted = '"' + table["name"].replace('"', '""') + '"'
        with contextlib.suppress(Refused):  # a view that calls what a query may not
            _, rows = database.run(f"SELECT * FROM {quoted} LIMIT {SAMPLE_ROWS}")
            table["sample"] = [[_cell(value)[0] for value in row] for row in rows]
    return {"tables": tables}


def query(database: Database, given: dict[str, Any]) -> dict[str, Any]:
    """The rows of a statement, or only whether it could run."""
    sql = _statement(given["sql"])
    database.fence(database.tables())
    if given.get("prepare"):
        database.prepare(sql)
        return {"columns": [], "rows": [], "cut": False}
    names, rows = database.run(sql)
    kept: list[list[Any]] = []
    size, cut = 0, False
    for row in rows:
        if len(kept) == given["limits"]["rows"] or size > RESULT_BYTES:
            cut = True
            break
        cells = [_cell(value) for value in row]
        size += sum(length for _, length in cells)
        kept.append([value for value, _ in cells])
    return {"columns": names, "rows": kept, "cut": cut}


def find(database: Database, given: dict[str, Any]) -> dict[str, Any]:
    """The values of text columns that occur in a question, as [table, column, value]; long ones first."""
    tables, question = database.tables(), f" {_folded(given['question'])} "
    database.fence(tables)
    found = []
    for table in tables:
        for column in table["columns"]:
            if not re.search(r"char|text|clob|string|^$", column["type"], re.I):
                continue
            name, where = ('"' + text.replace('"', '""') + '"' for text in (column["name"], table["name"]))
            with contextlib.suppress(Refused):
                _, rows = database.run(f"SELECT DISTINCT {name} FROM {where} LIMIT {DISTINCT_VALUES}")
                for (value,) in rows:
                    if isinstance(value, str) and 2 < len(value) < 100 and f" {_folded(value)} " in question:
                        found.append([table["name"], column["name"], value])
    return {"values": sorted(found, key=lambda row: -len(row[2]))[:10]}


TASKS = {"describe": describe, "query": query, "find": find}
ACTIONS = {
    getattr(sqlite3, name): name.removeprefix("SQLITE_").replace("_", " ")
    for name in (
        "SQLITE_CREATE_INDEX", "SQLITE_CREATE_TABLE", "SQLITE_CREATE_TEMP_INDEX", "SQLITE_CREATE_TEMP_TABLE",
        "SQLITE_CREATE_TEMP_TRIGGER", "SQLITE_CREATE_TEMP_VIEW", "SQLITE_CREATE_TRIGGER", "SQLITE_CREATE_VIEW",
        "SQLITE_DELETE", "SQLITE_DROP_INDEX", "SQLITE_DROP_TABLE", "SQLITE_DROP_TRIGGER", "SQLITE_DROP_VIEW",
        "SQLITE_INSERT", "SQLITE_PRAGMA", "SQLITE_TRANSACTION", "SQLITE_UPDATE", "SQLITE_ATTACH", "SQLITE_DETACH",
        "SQLITE_ALTER_TABLE", "SQLITE_REINDEX", "SQLITE_ANALYZE", "SQLITE_CREATE_VTABLE", "SQLITE_DROP_VTABLE",
        "SQLITE_SAVEPOINT",
    )
}  # fmt: skip


def _statement(sql: str) -> str:
    """The text of one statement that reads. Raises Refused for others; EXPLAIN and PRAGMA are among them."""
    if len(sql.encode("utf-8", "replace")) > SQL_BYTES:
        raise Refused("size", f"a statement may have {SQL_BYTES:,} bytes")
    if "\0" in sql:
        raise Refused("syntax", "it has a NUL character")
    text = re.sub(r"^(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)+", "", sql, flags=re.S)
    word = (re.match(r"[A-Za-z]+", text.lstrip("( ")) or [""])[0].lower()
    if word not in STATEMENTS:
        raise Refused("statement", f"a query begins with {', '.join(STATEMENTS).upper()}, not with {word.upper()!r}")
    return text.rstrip().removesuffix(";")


def _own_names(sql: str) -> set[str]:
    """The names of common table expressions, but for those that could hide a table of SQLite's own."""
    found = re.findall(r"\b(\w+)\s*(?:\([^()]*\)\s*)?AS\s+(?:NOT\s+)?(?:MATERIALIZED\s*)?\(", sql, re.I)
    found += re.findall(r"\b(\w+)\s*(?:\([^()]*\)\s*)?AS\(", sql, re.I)
    return {name.lower() for name in found if not name.lower().startswith(OWN_TABLES)}


def _layer(message: str) -> str:
    """The layer of a database's own message."""
    lowered = message.lower()
    for layer, marks in {
        "time": ("interrupted",),
        "size": (
            "too big",
            "too large",
            "too many",
            "too deep",
            "too complex",
            "like or glob pattern",
            "expression tree",
        ),
        "memory": ("out of memory", "failed to allocate", "could not allocate"),
        "statement": ("one statement at a time", "only execute one"),
        "read-only": ("readonly", "read-only", "read only", "attempt to write"),
        "authorizer": ("not authorized", "prohibited", "external access", "disabled by configuration", "locked"),
        "schema": ("no such", "does not exist", "not found", "ambiguous", "referenced"),
        "syntax": ("syntax", "incomplete", "unrecognized", "misuse", "stack overflow", "number of"),
    }.items():
        if any(mark in lowered for mark in marks):
            return layer
    return "database"


def _cell(value: Any) -> tuple[Any, int]:
    """A value as JSON has it, and its bytes."""
    if value is None or isinstance(value, bool | int):
        return value, 8
    if isinstance(value, float):
        return (value, 8) if math.isfinite(value) else (str(value), 8)
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>", 16
    if isinstance(value, decimal.Decimal):
        return float(value), 8
    text = value if isinstance(value, str) else str(value)
    text = text.encode("utf-8", "replace").decode()
    return (text, len(text)) if len(text) <= CELL_BYTES else (f"{text[:CELL_BYTES]}\u2026", CELL_BYTES)


def _plain_path(path: str) -> str:
    """A path by which DuckDB opens this file and no other: some characters would stand for other names."""
    path = os.path.abspath(path)
    return f"/dev/fd/{os.open(path, os.O_RDONLY)}" if re.search(r"[\[*?\\]", path) else path


def _quoted(text: str) -> str:
    """The text as a string of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _nodes(one)


def _folded(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _is_wal(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(20)[18:20] == b"\x02\x02"
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


if __name__ == "__main__":
    main()
