"""Grammars of SQL made from a schema: what they accept names only tables, columns and functions that exist.

`full` accepts SELECT as people write it: joins with aliases, subqueries, common table expressions, windows. A grammar
without context cannot say to which table an alias belongs, so a sentence of it may still be wrong in that. `scoped` is
for writing: its tables are joined already, every column is one of theirs, aggregates stand where they may, and no part
repeats without end. Its sentences can all be run by SQLite.

The notation is Lark's, as llguidance reads it. Each space is a token of its own, because its lexer does not go back.
"""

import functools
import re
from collections.abc import Iterable, Sequence

from llmjax.data.tokenizer import byte_tokenizer
from llmjax.infer import constrained
from llmjax.retrieve.database.child import DUCKDB_FUNCTIONS, FUNCTIONS
from llmjax.retrieve.database.schema import KEYWORDS, Join, Schema, Table, quoted

NUMBER_TYPES = re.compile(r"int|real|num|dec|floa|doub|money", re.I)
DATE_TYPES = re.compile(r"date|time", re.I)
MOST_TABLES = 4

# Rules of expressions and queries; @ becomes the suffix of the set, TABLES what may stand behind FROM.
QUERY = r"""
query@: select@ (s sets s select@)* (s ORDER s BY s order@ (o "," o order@)*)? (s LIMIT s NUMBER (s OFFSET s NUMBER | o "," o NUMBER)?)?
select@: SELECT s (DISTINCT s)? item@ (o "," o item@)* (s FROM s sources@ where@? grouped@? (s WINDOW s ALIAS s AS o window@)? | where@)?
where@: s WHERE s expr@
grouped@: s GROUP s BY s expr@ (o "," o expr@)* (s HAVING s expr@)?
item@: "*" | name "." "*" | expr@ ((s AS)? s ALIAS)?
sources@: source@ (o "," o source@ | s JOIN s source@ (s ON s expr@ | s USING o "(" o COLUMN (o "," o COLUMN)* o ")")?)*
source@: (TABLES | "(" o query@ o ")") ((s AS)? s ALIAS)?
order@: expr@ (s COLLATE s COLLATION)? (s DIRECTION)? (s NULLS s LAST)?
expr@: both@ (s OR s both@)*
both@: negated@ (s AND s negated@)*
negated@: NOT s negated@ | compared@
compared@: sum@ | sum@ o COMPARE o sum@ | sum@ s (NOT s)? IN o "(" o (query@ | sum@ (o "," o sum@)*) o ")"
  | sum@ s (NOT s)? BETWEEN s sum@ s AND s sum@ | sum@ s (NOT s)? MATCH s sum@ (s ESCAPE s sum@)?
  | sum@ s IS s (NOT s)? (DISTINCT s FROM s)? sum@ | sum@ s COLLATE s COLLATION (o COMPARE o sum@)?
  | pair@ s (NOT s)? IN o "(" o query@ o ")"
  | (NOT s)? EXISTS o "(" o query@ o ")"
pair@: "(" o expr@ (o "," o expr@)+ o ")"
sum@: term@ (o OPERATOR o term@)*
term@: STRING | NUMBER | NULL | column | call@ (s FILTER o "(" o where_of@ o ")")? (s OVER (o window@ | s ALIAS))? | "-" term@ | SIGN o term@ | "(" o (expr@ | query@) o ")"
  | CASE (s expr@)? (s WHEN s expr@ s THEN s expr@)+ (s ELSE s expr@)? s END | CAST o "(" o expr@ s AS s TYPE o ")"
call@: FUNCTION o "(" o ("*" | (DISTINCT s)? expr@ (o "," o expr@)*)? o ")"
window@: "(" o (PARTITION s BY s expr@ (o "," o expr@)*)? o (ORDER s BY s order@ (o "," o order@)* (s frame)?)? o ")"
where_of@: WHERE s expr@
"""
WORDS = (
    "SELECT", "DISTINCT", "FROM", "WHERE", "GROUP", "BY", "HAVING", "ORDER", "LIMIT", "OFFSET", "AS", "ON", "USING", "AND", "OR",
    "NOT", "IN", "BETWEEN", "IS", "NULL", "EXISTS", "CASE", "WHEN", "THEN", "ELSE", "END", "CAST", "OVER", "PARTITION",
    "NULLS", "WITH", "RECURSIVE", "WINDOW", "FILTER", "COLLATE", "ESCAPE", "UNBOUNDED", "CURRENT", "ROW", "UNION", "ALL", "INTERSECT", "EXCEPT",
)  # fmt: skip
# An alias is short, so that it is no way to name a column that does not exist.
FULL = r"""
start: o (query | common) o ";"? o
common: WITH s (RECURSIVE s)? part (o "," o part)* s query_with
part: ALIAS (o "(" o ALIAS (o "," o ALIAS)* o ")")? s AS o "(" o query_with o ")"
name: ALIAS | TABLE
column: COLUMN | ALIAS ("." (COLUMN | ALIAS))? | {qualified}
frame: UNIT s (BETWEEN s bound s AND s bound | bound)
bound: (UNBOUNDED | NUMBER) s SIDE | CURRENT s ROW
sets: UNION (s ALL)? | INTERSECT | EXCEPT
s: SP
o: SP?
SP: /[ \t\n]{{1,8}}/
ALIAS: /[a-z]{{1,3}}[0-9]?/ & ~/{keywords}/
TABLE: /{tables}/
COLUMN: /{columns}/
FUNCTION: /(?i:{functions})/
COMPARE: /=|==|<>|!=|<=|>=|<|>/
OPERATOR: /\+|-|\*|\/|%|\|\||<<|>>|&|\|/
SIGN: /\+|~/
UNIT: /(?i:ROWS|RANGE|GROUPS)/
SIDE: /(?i:PRECEDING|FOLLOWING)/
MATCH: /(?i:LIKE|GLOB)/
COLLATION: /(?i:NOCASE|BINARY|RTRIM)/
JOIN: /(?i:JOIN|INNER JOIN|CROSS JOIN|NATURAL JOIN|(LEFT|RIGHT|FULL)( OUTER)? JOIN)/
DIRECTION: /(?i:ASC|DESC)/
LAST: /(?i:FIRST|LAST)/
TYPE: /(?i:INTEGER|REAL|TEXT|NUMERIC|FLOAT|DOUBLE|DATE)/
STRING: /'([^'\x00-\x1f]|''){{0,120}}'/
NUMBER: /([0-9]{{1,12}}(\.[0-9]{{0,8}})?|\.[0-9]{{1,8}})([eE][+-]?[0-9]{{1,2}})?/
"""

SCOPED = r"""
start: plain | totals | groups
plain: "SELECT " "DISTINCT "? value (", " value){{0,4}} FROM where? limit?
  | "SELECT " value (", " value){{0,4}} FROM where? " ORDER BY " COLUMN DIRECTION? (", " COLUMN DIRECTION?)? limit?
totals: "SELECT " aggregate (", " aggregate){{0,3}} FROM where?
groups: "SELECT " (value ", "){{1,3}} aggregate (", " aggregate){{0,2}} FROM where? {grouping} having? ordered? limit?
ordered: " ORDER BY " ({ordering}) DIRECTION?
where: " WHERE " predicate ((" AND " | " OR ") predicate){{0,3}}
having: " HAVING " aggregate COMPARE NUMBER
limit: " LIMIT " COUNT
value: COLUMN{dated}
aggregate: "COUNT(*)" | "COUNT(DISTINCT " COLUMN ")" | ("MIN" | "MAX") "(" COLUMN ")"{numeric}
predicate: COLUMN (" IS NULL" | " IS NOT NULL"){compared}
FROM: {source}
COLUMN: /{columns}/
COMPARE: / (=|<>|<=|>=|<|>) /
DIRECTION: / ASC| DESC/
COUNT: /[1-9][0-9]{{0,2}}/
DIGIT: /[0-2]/
STRING: /'([^'\x00-\x1f]|''){{0,40}}'/
NUMBER: /[0-9]{{1,9}}(\.[0-9]{{1,4}})?/
"""


def full(schema: Schema) -> str:
    """The grammar of SELECT over all tables of a schema."""
    columns = dict.fromkeys(name for table in schema.tables for name, _ in table.columns)
    tables = [table.name for table in schema.tables]
    sqlite = schema.dialect == "sqlite"
    named = functools.partial(_names, sqlite=sqlite)
    qualified = [
        f'/{named([table.name])}/ "." /{named([name for name, _ in table.columns])}/' for table in schema.tables
    ]
    functions = FUNCTIONS if sqlite else (f for f in DUCKDB_FUNCTIONS if f.isidentifier())
    head = FULL.format(
        qualified=" | ".join(qualified), tables=named(tables), columns=named(columns),
        functions="|".join(sorted(functions)), keywords="|".join(sorted(k for k in KEYWORDS if len(k) <= 4)),
    )  # fmt: skip
    words = "\n".join(f"{word}: /(?i:{word})/" for word in WORDS)
    sets = [QUERY.replace("@", suffix).replace("TABLES", names) for suffix, names in (("", "TABLE"), ("_with", "name"))]
    return "\n".join([head, words, *sets])


def scoped(schema: Schema, joins: Sequence[Join]) -> str:
    """The grammar of SELECT over tables that are joined already (`Schema.joined`)."""
    tables = [schema.table(join.table) for join in joins]
    columns = [(table, name, kind) for table in tables for name, kind in table.columns]
    alone, sqlite = len(tables) == 1, schema.dialect == "sqlite"

    def written(some: Iterable[tuple[Table, str, str]]) -> str:
        return "|".join(_escaped(_column(table.name, name, alone=alone)) for table, name, _ in some)

    numbers = [one for one in columns if NUMBER_TYPES.search(one[2]) and not DATE_TYPES.search(one[2])]
    dates = [one for one in columns if DATE_TYPES.search(one[2])]
    texts = [one for one in columns if one not in numbers and (one not in dates or sqlite)]
    year = ('"strftime(\'%Y\', " DATED ")"' if sqlite else '"year(" DATED ")"') if dates else ""
    compared = "".join(f" | {constrained.literal(text)}" for text in _memberships(schema, tables, alone=alone))
    rules = []
    if numbers:
        compared += ' | NUMERIC COMPARE NUMBER | NUMERIC " BETWEEN " NUMBER " AND " NUMBER | NUMERIC " = " extreme'
        extremes = [
            f"(SELECT {f}({quoted(name)}) FROM {quoted(table.name)})"
            for table, name, _ in numbers
            for f in ("MAX", "MIN")
        ]
        rules += [f"NUMERIC: /{written(numbers)}/", "extreme: " + " | ".join(map(constrained.literal, extremes))]
    if texts:
        compared += ' | TEXT COMPARE STRING | TEXT " LIKE " STRING'
        rules.append(f"TEXT: /{written(texts)}/")
    if dates:
        compared += f" | {year} COMPARE YEAR"
        rules += [f"DATED: /{written(dates)}/", f"YEAR: /{chr(39) if sqlite else ''}[12][0-9]{{3}}{chr(39) if sqlite else ''}/"]  # fmt: skip
    total = '("SUM" | "AVG") "(" NUMERIC (" * " NUMERIC)? ")"'
    head = SCOPED.format(
        grouping='" GROUP BY " value (", " value){0,2}' if sqlite else '" GROUP BY ALL"',
        ordering="COLUMN | aggregate" if sqlite else "aggregate",
        dated=f" | {year}" if dates else "",
        numeric=f' | {total} | "ROUND(" {total} ", " DIGIT ")"' if numbers else "",
        compared=compared,
        source=constrained.literal(" FROM " + source(joins)),
        columns=written(columns),
    )
    return "\n".join([head, *rules])


def choice(schema: Schema) -> str:
    """The grammar of the tables that a question needs, or "none"."""
    names = " | ".join(map(constrained.literal, _listed(schema)))
    return f'start: "none" | table (", " table){{0,{MOST_TABLES - 1}}}\ntable: {names}\n'


def chosen(schema: Schema, text: str) -> list[str]:
    """The tables in a sentence of `choice`, each once. A name that was cut off is left out."""
    names = _listed(schema)
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return list(dict.fromkeys(names[name] for name in re.findall(rf"({pattern})(?:, |$)", text)))


def _listed(schema: Schema) -> dict[str, str]:
    """How a list has the name of each table -> the name. One that could be read as something else is in quotes."""

    def written(name: str) -> str:
        return f'"{name}"' if name == "none" or "," in name or name.startswith('"') else name

    return {written(table.name): table.name for table in schema.tables}


def source(joins: Sequence[Join]) -> str:
    """What stands behind FROM for tables that are joined."""
    text = quoted(joins[0].table)
    for join in joins[1:]:
        on = " AND ".join(f"{_column(*a, alone=False)} = {_column(*b, alone=False)}" for a, b in join.pairs)
        text += f" JOIN {quoted(join.table)} ON {on}"
    return text


def accepts(grammar: str, text: str) -> bool:
    """Whether a text is a sentence of a grammar."""
    state = constrained.compiled(_bytes(), "grammar", grammar)
    ids = byte_tokenizer().encode(text)
    return state.try_consume_tokens(ids) == len(ids) and bool(state.is_accepting())


@functools.cache
def _bytes() -> object:
    return constrained.vocabulary(byte_tokenizer())


def _memberships(schema: Schema, tables: Sequence[Table], *, alone: bool) -> list[str]:
    """Conditions that a row has, or has not, rows of another table that name it."""
    found = []
    for table, link in schema.links():
        if len(link.columns) > 1:
            continue
        (own,), (other,) = link.columns, link.to
        there = schema.table(link.table)
        if there in tables and table not in tables:
            inner = f"(SELECT {quoted(own)} FROM {quoted(table.name)} WHERE {quoted(own)} IS NOT NULL)"
            column = _column(there.name, other, alone=alone)
            found += [f"{column} IN {inner}", f"{column} NOT IN {inner}"]
    return found


def _column(table: str, name: str, *, alone: bool) -> str:
    return quoted(name) if alone else f"{quoted(table)}.{quoted(name)}"


def _names(names: Iterable[str], *, sqlite: bool) -> str:
    """A regular expression for names in any case, bare where they may be, and quoted; SQLite knows three kinds of quotes."""
    bare, all_names = [], []
    for name in names:
        inside = _escaped(name.replace('"', '""'))
        all_names += [f'"{inside}"', *([f"`{inside}`", rf"\[{inside}\]"] if sqlite else [])]
        if quoted(name) == name:
            bare.append(_escaped(name))
    return "|".join([*([f"(?i:{'|'.join(bare)})"] if bare else []), *all_names])


def _escaped(text: str) -> str:
    """The text as a regular expression between slashes. A backslash may only stand before some characters of ASCII."""

    def one(found: re.Match[str]) -> str:
        return f"\\{found[0]}" if found[0].isprintable() else f"\\x{ord(found[0]):02x}"

    return re.sub(r"[^\w \"'<>\x80-\U0010ffff]", one, text)
