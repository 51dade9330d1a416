"""A question to a database: the model chooses tables and writes SQL under their grammar; the rows are the answer.

A question that asks to change the database, or for which the model needs none of the tables, is refused. A statement that
the database refuses is written once more with the database's message, and then refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmjax.data.chat import Message
from llmjax.infer.asking import Ask, Conversation
from llmjax.retrieve.database import grammar
from llmjax.retrieve.database.execute import Database, Limits, Result
from llmjax.retrieve.database.schema import Table, listed, shown

GRAMMARS = ("scoped", "full", "none")
MENDED = ("syntax", "schema", "authorizer", "functions", "statement")  # layers whose message may help to write it again
CHANGES = re.compile(
    r"\W*(?:please\s+|can you\s+|could you\s+|now\s+)*"
    r"(delete|drop|insert|update|alter|create|truncate|remove|rename|overwrite|erase|add|set|change|increase|decrease)\b",
    re.I,
)
CHOOSE = """You choose the tables that are needed to answer a question with SQL. Write their names with commas between, or \
none if the tables do not hold the answer."""
WRITE = "You write one {dialect} SELECT statement that answers the question. Write SQL only."
NAMES = {"sqlite": "SQLite", "duckdb": "DuckDB"}


@dataclass(frozen=True)
class Answer:
    """The rows that answer a question, with the SQL that found them; or why there are none."""

    sql: str | None = None
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] | None = None
    cut: bool = False  # there are more rows than are shown
    refused: bool = False
    reason: str = ""

    def row(self) -> dict[str, Any]:
        """The answer as a row of a file."""
        rows = None if self.rows is None else [list(row) for row in self.rows]
        return {
            "sql": self.sql, "columns": list(self.columns), "rows": rows, "cut": self.cut, "refused": self.refused,
            "reason": self.reason,
        }  # fmt: skip


def ask(
    database: Database, question: str, *, today: str, form: str = "scoped", limits: Limits | None = None
) -> Conversation[Answer]:
    """The conversation that answers a question.

    Args:
        today: the date, as the model is told it.
        form: the grammar of the SQL, one of GRAMMARS. "none" lets the model write freely, as a control.
    """
    if found := CHANGES.match(question):
        return Answer(
            refused=True, reason=f"the question asks to {found[1].lower()} something: the database is only read"
        )
    schema = database.schema
    tables: Sequence[Table] = schema.tables
    constraint = {"scoped": "", "full": grammar.full(schema), "none": ""}[form]
    if form == "scoped":
        text = yield Ask(
            "tables", (_messages(CHOOSE, f"Tables:\n{listed(tables)}\n\nQuestion: {question}\nTables:"),),
            grammar=grammar.choice(schema), max_new_tokens=64,
        )  # fmt: skip
        names = grammar.chosen(schema, text)
        if not names:
            return Answer(refused=True, reason="the model found no table that holds the answer")
        joins = schema.joined(names)
        tables, constraint = [schema.table(join.table) for join in joins], grammar.scoped(schema, joins)
    values = [
        f"{table}.{column} has '{value}'"
        for table, column, value in database.values_in(question)
        if table in {one.name for one in tables}
    ]
    system = WRITE.format(dialect=NAMES[schema.dialect])
    asked = "\n".join([f"Today is {today}.", *values, f"Question: {question}"])
    shapes = [shown(schema, tables, rows=3), shown(schema, tables, rows=0), listed(tables)]
    result, sql, complaint = Result(), "", ""
    for purpose in ("sql", "sql again"):
        prompts = tuple(_messages(system, f"{shape}\n\n{asked}{complaint}") for shape in shapes)
        text = yield Ask(purpose, prompts, grammar=constraint, max_new_tokens=256)
        sql = text.strip() if constraint else extracted(text)
        result = database.query(sql, limits=limits)
        if result.layer not in MENDED:
            break
        complaint = f"\n\nThis statement does not run:\n{sql}\nThe database says: {result.refused}"
    if result.refused:
        return Answer(sql=sql, refused=True, reason=f"{result.layer}: {result.refused}")
    return Answer(sql, result.columns, result.rows, result.cut)


def extracted(text: str) -> str:
    """The SQL in a text that was written freely: of the first code block, or from the first SELECT or WITH to a semicolon."""
    block = re.search(r"```(?:sql)?\s*\n(.*?)```", text, re.S | re.I)
    text = block[1] if block else text
    begun = re.search(r"\b(?:SELECT|WITH)\b.*", text, re.S | re.I)
    return (begun[0] if begun else text).partition(";")[0].strip()


def _messages(system: str, user: str) -> list[Message]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def table_text(answer: Answer, *, most: int = 20) -> str:
    """The SQL and the rows of an answer for a terminal."""
    if answer.refused:
        return f"not answered: {answer.reason}" + (f"\n{answer.sql}" if answer.sql else "")
    rows = answer.rows or ()
    cells = [list(answer.columns), *[[_cell(value) for value in row] for row in rows[:most]]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(answer.columns))]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "-+-".join("-" * width for width in widths))
    more = len(rows) - most
    end = [f"... {more:,} more rows"] if more > 0 else []
    return "\n".join([answer.sql or "", "", *lines, *end, *(["(there are more rows)"] if answer.cut else [])])


def _cell(value: Any) -> str:
    text = "NULL" if value is None else str(value)
    # Control characters of a cell must not reach a terminal.
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 60 else f"{text[:59]}\u2026"
