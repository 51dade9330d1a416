"""The schema of a database, and how its names are written in SQL and shown to a model."""

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
KEYWORDS = frozenset(
    [
        "abort",
        "action",
        "add",
        "after",
        "all",
        "alter",
        "analyze",
        "and",
        "as",
        "asc",
        "attach",
        "autoincrement",
        "before",
        "begin",
        "between",
        "by",
        "cascade",
        "case",
        "cast",
        "check",
        "collate",
        "column",
        "commit",
        "conflict",
        "constraint",
        "create",
        "cross",
        "current",
        "current_date",
        "current_time",
        "current_timestamp",
        "database",
        "default",
        "deferrable",
        "deferred",
        "delete",
        "desc",
        "detach",
        "distinct",
        "do",
        "drop",
        "each",
        "else",
        "end",
        "escape",
        "except",
        "exclude",
        "exclusive",
        "exists",
        "explain",
        "fail",
        "filter",
        "first",
        "following",
        "for",
        "foreign",
        "from",
        "full",
        "generated",
        "glob",
        "group",
        "groups",
        "having",
        "if",
        "ignore",
        "immediate",
        "in",
        "index",
        "indexed",
        "initially",
        "inner",
        "insert",
        "instead",
        "intersect",
        "into",
        "is",
        "isnull",
        "join",
        "key",
        "last",
        "left",
        "like",
        "limit",
        "match",
        "materialized",
        "natural",
        "no",
        "not",
        "nothing",
        "notnull",
        "null",
        "nulls",
        "of",
        "offset",
        "on",
        "or",
        "order",
        "others",
        "outer",
        "over",
        "partition",
        "plan",
        "pragma",
        "preceding",
        "primary",
        "query",
        "raise",
        "range",
        "recursive",
        "references",
        "regexp",
        "reindex",
        "release",
        "rename",
        "replace",
        "restrict",
        "returning",
        "right",
        "rollback",
        "row",
        "rows",
        "savepoint",
        "select",
        "set",
        "table",
        "temp",
        "temporary",
        "then",
        "ties",
        "to",
        "transaction",
        "trigger",
        "unbounded",
        "union",
        "unique",
        "update",
        "using",
        "vacuum",
        "values",
        "view",
        "virtual",
        "when",
        "where",
        "window",
        "with",
        "without",
    ]
)
CELL_SHOWN = 40  # characters of a value in a prompt


@dataclass(frozen=True)
class Link:
    """A foreign key: columns of one table that name a row of another."""

    columns: tuple[str, ...]
    table: str
    to: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table or a view."""

    name: str
    columns: tuple[tuple[str, str], ...]  # name and type
    keys: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()
    sample: tuple[tuple[Any, ...], ...] = ()  # its first rows

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Table":
        """The table as `child.describe` gives it."""
        links = tuple(Link(tuple(one["columns"]), one["table"], tuple(one["to"])) for one in given["links"])
        columns = tuple((one["name"], one["type"]) for one in given["columns"])
        return cls(given["name"], columns, tuple(given["keys"]), links, tuple(map(tuple, given.get("sample", ()))))


@dataclass(frozen=True)
class Join:
    """How a table is joined to one before it: pairs of columns (table, column) that are equal."""

    table: str
    pairs: tuple[tuple[tuple[str, str], tuple[str, str]], ...]


@dataclass(frozen=True)
class Schema:
    """The tables of a database; `dialect` is sqlite or duckdb."""

    dialect: str
    tables: tuple[Table, ...]

    def table(self, name: str) -> Table:
        """The table of this name."""
        return next(table for table in self.tables if table.name == name)

    def links(self) -> list[tuple[Table, Link]]:
        """The foreign keys between tables of the schema, their columns named on both sides."""
        names = {table.name.lower(): table for table in self.tables}
        found = []
        for table in self.tables:
            for link in table.links:
                other = names.get(link.table.lower())
                to = link.to if all(link.to) else other.keys if other else ()  # without names: the primary key
                if other is not None and len(to) == len(link.columns):
                    found.append((table, Link(link.columns, other.name, tuple(to))))
        return found

    def joined(self, tables: Sequence[str]) -> list[Join]:
        """The tables joined along foreign keys, with those that connect them.

        The first is joined to nothing. Each other is reached from those before it by the shortest way. A table that no
        foreign keys connect with the first is left out.
        """
        edges: dict[str, list[Join]] = {table.name: [] for table in self.tables}
        for table, link in self.links():
            pairs = tuple(((table.name, a), (link.table, b)) for a, b in zip(link.columns, link.to, strict=True))
            if table.name != link.table:
                edges[table.name].append(Join(link.table, pairs))
                edges[link.table].append(Join(table.name, pairs))
        made = [Join(tables[0], ())]
        for wanted in tables[1:]:
            reached = {join.table for join in made}
            ways: deque[list[Join]] = deque([join] for name in sorted(reached) for join in edges[name])
            seen = set(reached)
            while wanted not in reached and ways:
                way = ways.popleft()
                if way[-1].table == wanted:
                    made += way
                    break
                if way[-1].table not in seen:
                    seen.add(way[-1].table)
                    ways.extend([*way, join] for join in edges[way[-1].table])
        return made


def quoted(name: str) -> str:
    """A name as SQL has it: in double quotes if it must be."""
    if BARE.fullmatch(name) and name.lower() not in KEYWORDS:
        return name
    return '"' + name.replace('"', '""') + '"'


def shown(schema: Schema, tables: Sequence[Table], *, rows: int) -> str:
    """The tables as CREATE statements with their foreign keys, each with its first rows as comments."""
    links = schema.links()
    parts = []
    for table in tables:
        lines = [f"  {quoted(name)} {kind}".rstrip() for name, kind in table.columns]
        if table.keys:
            lines.append(f"  PRIMARY KEY ({', '.join(map(quoted, table.keys))})")
        for own, link in links:
            if own is table:
                columns, to = (", ".join(map(quoted, names)) for names in (link.columns, link.to))
                lines.append(f"  FOREIGN KEY ({columns}) REFERENCES {quoted(link.table)} ({to})")
        text = f"CREATE TABLE {quoted(table.name)} (\n" + ",\n".join(lines) + "\n);"
        for row in table.sample[:rows]:
            text += "\n-- " + " | ".join(str(value)[:CELL_SHOWN].replace("\n", " ") for value in row)
        parts.append(text)
    return "\n".join(parts)


def listed(tables: Sequence[Table]) -> str:
    """A line for each table with the names of its columns."""
    return "\n".join(f"{table.name}({', '.join(name for name, _ in table.columns)})" for table in tables)
