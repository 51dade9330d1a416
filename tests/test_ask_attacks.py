"""No statement writes, leaks or lasts: each attack is stopped, by the layer that the table names."""

import hashlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from llmjax.retrieve.database.execute import CHILD, Database, Limits, open_database

QUICK = Limits(seconds=0.5, cpu_seconds=3)
LONG = "x" * 20_000
DEEP = "(" * 2_000 + "1" + ")" * 2_000
SUM = "+".join(["1"] * 2_000)
MANY = " UNION ALL ".join(["SELECT 1"] * 20)
WIDE = ",".join(["1"] * 4_000)
ARGUMENTS = ",".join(["1"] * 200)
DOUBLING = ", ".join(f"c{i} AS (SELECT a.x FROM c{i - 1} a, c{i - 1} b)" for i in range(1, 9))
ATTACKS: dict[str, list[str]] = {
    # It does not begin with SELECT, WITH or VALUES, or more follows it.
    "statement": [
        "DELETE FROM Song", "dElEtE FROM Song", "INSERT INTO Song VALUES (9, 'x', 1)", "INSERT OR REPLACE INTO Song SELECT * FROM Song",
        "REPLACE INTO Song VALUES (1, 'x', 1)", "UPDATE Song SET Title = 'x'", "UPDATE OR IGNORE Song SET Title = 'x'",
        "DELETE FROM Song RETURNING *", "UPDATE Song SET Title = 'x' RETURNING Title", "INSERT INTO Song SELECT * FROM Song RETURNING *",
        "DROP TABLE Song", "DROP VIEW Leak", "CREATE TABLE t (a)", "CREATE TABLE t AS SELECT * FROM Song", "CREATE TEMP TABLE t (a)",
        "CREATE VIEW v AS SELECT 1", "CREATE TEMP VIEW v AS SELECT 1", "CREATE INDEX i ON Song (Title)",
        "CREATE TRIGGER t AFTER INSERT ON Song BEGIN DELETE FROM Song; END", "CREATE VIRTUAL TABLE t USING fts5(a)",
        "ALTER TABLE Song RENAME TO x", "ALTER TABLE Song ADD COLUMN x", "ALTER TABLE Song DROP COLUMN Title",
        "ATTACH 'new.sqlite' AS new", "ATTACH ':memory:' AS m", "DETACH main", "VACUUM", "VACUUM INTO 'copy.sqlite'", "REINDEX", "ANALYZE",
        "BEGIN", "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK", "SAVEPOINT s", "RELEASE s",
        "PRAGMA writable_schema = 1", "PRAGMA journal_mode = DELETE", "PRAGMA user_version = 7", "PRAGMA query_only = 0",
        "PRAGMA trusted_schema = 1", "PRAGMA database_list", "PRAGMA table_info(Song)", "PRAGMA integrity_check", "PRAGMA optimize",
        "PRAGMA wal_checkpoint", "PRAGMA temp_store_directory = '/tmp'", "PRAGMA application_id = 1", "PRAGMA schema_version = 9",
        "EXPLAIN SELECT * FROM Song", "EXPLAIN QUERY PLAN SELECT * FROM Song", "EXPLAIN DELETE FROM Song",
        "/* SELECT */ DELETE FROM Song", "-- SELECT\nDROP TABLE Song", "/**/--\n/* */ UPDATE Song SET Title = 1", "(DELETE FROM Song)",
        "; DELETE FROM Song", "\ufeffDELETE FROM Song", "\u200bSELECT 1", "\uff33\uff25\uff2c\uff25\uff23\uff34 1",
        "SELECT 1; DROP TABLE Song", "SELECT 1; SELECT 2", "VALUES (1); DELETE FROM Song", "SELECT 1 /* ; */ ; DELETE FROM Song",
        "SELECT 1;; DELETE FROM Song", "SELECT ';' ; UPDATE Song SET Title = 1",
        ".shell ls", ".read /etc/passwd", ".import /etc/passwd Song", ".output x", "SHOW TABLES", "COPY Song TO 'x'", "LOAD 'x'",
        "INSTALL httpfs", "SET x = 1", "CALL f()", "GRANT ALL ON Song TO x", "EXEC xp_cmdshell 'ls'", "TRUNCATE Song", "MERGE INTO Song",
        "", "   ", "--", "Here is the SQL: SELECT 1",
    ],
    # It asks SQLite for what is not a SELECT of the listed tables and columns.
    "authorizer": [
        "WITH x AS (SELECT 1) DELETE FROM Song", "WITH x AS (SELECT 1) INSERT INTO Song SELECT * FROM Song",
        "WITH x AS (SELECT 1) UPDATE Song SET Title = 'x'", "WITH x AS (SELECT 1) REPLACE INTO Song SELECT * FROM Song",
        "WITH x AS (SELECT 1) DELETE FROM Song RETURNING *", "WITH x AS (SELECT 1) UPDATE Song SET Title = 'x' RETURNING *",
        "SELECT * FROM sqlite_master", "SELECT sql FROM sqlite_schema", "SELECT * FROM main.sqlite_master", "SELECT * FROM \"sqlite_master\"",
        "SELECT * FROM [sqlite_master]", "SELECT * FROM `sqlite_master`", "SELECT * FROM sqlite_temp_master", "SELECT * FROM sqlite_sequence",
        "SELECT count(*) FROM sqlite_master", "SELECT rootpage FROM sqlite_master", "SELECT (SELECT max(sql) FROM sqlite_master)",
        "VALUES ((SELECT max(sql) FROM sqlite_master))", "SELECT Title FROM Song UNION SELECT sql FROM sqlite_master",
        "SELECT 1 WHERE EXISTS (SELECT 1 FROM sqlite_master WHERE name = 'Song')", "SELECT * FROM Song JOIN sqlite_master",
        "WITH x AS (SELECT sql FROM sqlite_master) SELECT * FROM x", "SELECT 1 FROM Song ORDER BY (SELECT max(sql) FROM sqlite_master)",
        "SELECT 1 FROM Song LIMIT (SELECT count(*) FROM sqlite_master)", "SELECT * FROM Leak", "SELECT count(*) FROM Leak",
        "SELECT * FROM pragma_table_info('Song')", "SELECT file FROM pragma_database_list", "SELECT * FROM pragma_function_list",
        "SELECT * FROM pragma_compile_options", "SELECT * FROM Song, pragma_table_list", "SELECT * FROM pragma_module_list",
        "SELECT * FROM pragma_collation_list", "SELECT * FROM json_each('[1]')", "SELECT * FROM json_tree('[1]')",
        "SELECT count(*) FROM pragma_user_version", "SELECT * FROM pragma_journal_mode('DELETE')",
    ],
    # It calls what a query may not call.
    "functions": [
        "SELECT load_extension('x.so')", "SELECT printf('%.*c', 900000000, 'x')", "SELECT format('%.*c', 900000000, 'x')",
        "SELECT zeroblob(1000000000)", "SELECT randomblob(1000000000)", "SELECT hex(Title) FROM Song", "SELECT quote(Title) FROM Song",
        "SELECT random()", "SELECT char(0)", "SELECT unicode('x')", "SELECT sqlite_version()", "SELECT sqlite_source_id()",
        "SELECT sqlite_compileoption_get(1)", "SELECT changes()", "SELECT total_changes()", "SELECT last_insert_rowid()",
        "SELECT likelihood(1, 0.5)", "SELECT json('{}')", "SELECT json_object('a', 1)", "SELECT json_group_array(Title) FROM Song",
        "SELECT '{}' -> '$'", "SELECT '{}' ->> '$'", "SELECT sqlite_log(1, 'x')", "SELECT count(*) FILTER (WHERE load_extension('x')) FROM Song",
        "SELECT CASE WHEN 1 THEN zeroblob(9) END", "SELECT 1 FROM Song ORDER BY randomblob(9)", "SELECT length(printf('%d', 1))",
        "SELECT 1 WHERE load_extension('x') IS NULL", "SELECT max(zeroblob(9)) OVER () FROM Song", "SELECT * FROM Bomb",
        "SELECT CAST(zeroblob(9) AS TEXT)", "WITH x AS (SELECT hex(1) h) SELECT h FROM x", "SELECT 1 GROUP BY random()",
        "SELECT 'a' MATCH 'b'",
    ],
    # SQLite has no such thing, or not where Python built it.
    "schema": [
        "SELECT readfile('/etc/passwd')", "SELECT writefile('x', 'y')", "SELECT edit('x')", "SELECT eval('DROP TABLE Song')",
        "SELECT system('ls')", "SELECT pg_sleep(9)", "SELECT load_file('/etc/passwd')", "SELECT 'a' REGEXP 'b'",
        "SELECT * FROM information_schema.tables", "SELECT * FROM '/etc/passwd'", "SELECT * FROM fsdir('/')", "SELECT * FROM generate_series(1, 9)",
        "SELECT * FROM other.Song", "SELECT Secret FROM Song", "SELECT * FROM Song INDEXED BY missing",
    ],
    "syntax": [
        "SELECT * INTO new FROM Song", "SELECT * FROM Song FOR UPDATE", "SELECT * FROM Song WHERE 1 = (DELETE FROM Song)", "SELECT 'open",
        "SELECT /* open", "SELECT 1 \0; DROP TABLE Song", "SELECT * FROM Song INTO OUTFILE 'x'",
        "WITH x AS (DELETE FROM Song RETURNING *) SELECT * FROM x", "SELECT sum(count(*)) FROM Song",
    ],
    # It would be too large to hold.
    "size": [
        f"SELECT '{LONG}'", f"SELECT {SUM}", MANY, f"SELECT {WIDE}", f"SELECT max({ARGUMENTS})",
        "SELECT replace(replace(replace(replace(replace('aaaaaaaaaa','a','bbbbbbbbbbbbbbbbbbbb'),'b','cccccccccccccccccccc'),"
        "'c','dddddddddddddddddddd'),'d','eeeeeeeeeeeeeeeeeeee'),'e','ffffffffffffffffffff')",
        "WITH RECURSIVE r(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM r) SELECT length(max(x)) FROM r",
        "WITH RECURSIVE r(x) AS (SELECT 'aaaaaaaaaa' UNION ALL SELECT replace(x, 'a', 'aaaaaaaaaa') FROM r) SELECT length(max(x)) FROM r",
        f"SELECT Title LIKE '{'%a' * 500}' FROM Song",
    ],
    # It would go on without end.
    "time": [
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r",
        "WITH RECURSIVE r(x) AS (VALUES (1) UNION ALL SELECT x FROM r) SELECT x FROM r WHERE x = 2",
        "SELECT count(*) FROM " + ", ".join(f"Song s{i}" for i in range(9)),
        "SELECT max(a.Title || b.Title) FROM " + ", ".join(f"Song {n}" for n in "abcdefgh") + " ORDER BY 1",
        f"WITH c0 AS (SELECT 1 x UNION ALL SELECT 2), {DOUBLING} SELECT count(*) FROM c8",
        "SELECT count(*) OVER (PARTITION BY a.Title) FROM " + ", ".join(f"Song {n}" for n in "abcdefgh") + " LIMIT 1",
    ],
}  # fmt: skip
CASES = [(layer, sql) for layer, attacks in ATTACKS.items() for sql in attacks]


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Database:
    path = tmp_path_factory.mktemp("attacked") / "songs.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE Song (Id INTEGER PRIMARY KEY AUTOINCREMENT, Title TEXT, Length INTEGER)")
        db.executemany("INSERT INTO Song VALUES (?, ?, ?)", [(i, f"{'a' * 40}{i}", i * 10) for i in range(1, 31)])
        db.execute("CREATE INDEX Lengths ON Song (Length)")
        db.execute("CREATE VIEW Leak AS SELECT sql FROM sqlite_master")
        db.execute("CREATE VIEW Bomb AS SELECT printf('%.*c', 900000000, 'x') AS b FROM Song")
    db.close()
    return open_database(path)


@pytest.mark.parametrize("every", [pytest.param(8, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_every_attack_is_stopped_by_its_layer_and_nothing_is_written(database, every):
    assert len({sql for _, sql in CASES}) == len(CASES) >= 180
    folder = database.path.parent
    before = hashlib.sha256(database.path.read_bytes()).digest(), sorted(folder.iterdir()), sorted(Path.cwd().iterdir())
    found = {(layer, sql): database.query(sql, limits=QUICK) for layer, sql in CASES[::every]}
    wrong = [
        f"{sql[:90]!r}: {result.layer or result.rows[:2]}, not {layer}: {result.refused[:80]}"
        for (layer, sql), result in found.items()
        if result.layer != layer
    ]
    assert wrong == []
    assert not any(result.rows for result in found.values())
    after = hashlib.sha256(database.path.read_bytes()).digest(), sorted(folder.iterdir()), sorted(Path.cwd().iterdir())
    assert after == before


WITHOUT_FIRST_LAYER = """
import sys; sys.path.insert(0, sys.argv[1]); import child, json
given = json.load(sys.stdin)
for sql in given["statements"]:
    database = child.Sqlite(given)
    database.fence(database.tables())
    try:
        names, rows = database.run(sql)
        print("ran", sql, list(rows))
    except child.Refused:
        pass
"""


def test_the_authorizer_alone_stops_what_the_first_layer_stops(database):
    statements = [sql for sql in ATTACKS["statement"] if sql.strip(" -") and not sql.startswith("EXPLAIN")]
    given = {"path": str(database.path), "limits": {"seconds": 0.5}, "statements": statements}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_FIRST_LAYER, str(CHILD.parent)],
        input=json.dumps(given), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == ""


def test_what_may_be_read_is_read(database):
    for sql in (
        "SELECT count(*) FROM Song", "WITH x AS (SELECT 1) SELECT count(*) FROM x", "VALUES (1)", "SELECT Title FROM Song WHERE Id = 1;",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 5) SELECT sum(n) FROM r",
        "-- the titles\nSELECT Title, row_number() OVER (ORDER BY Length) FROM Song", "SELECT ';'",
        "SELECT substr(Title, 1, 3) || '...' FROM Song WHERE Title LIKE 'a%' AND Length BETWEEN 1 AND 99",
    ):  # fmt: skip
        result = database.query(sql)
        assert not result.refused and result.rows, (sql, result)


def test_rows_and_cells_are_cut_and_the_result_says_so(database):
    pairs = database.query("SELECT a.Id FROM Song a, Song b, Song c", limits=Limits(rows=7))
    assert len(pairs.rows) == 7 and pairs.cut
    whole = database.query("SELECT Id FROM Song", limits=Limits(rows=30))
    assert len(whole.rows) == 30 and not whole.cut
    long = database.query(
        "WITH RECURSIVE r(x) AS (SELECT 'ab' UNION ALL SELECT x || x FROM r WHERE length(x) < 200000) SELECT max(x) FROM r"
    )
    assert 60_000 < len(long.rows[0][0]) < 70_000


DUCKDB_ATTACKS: dict[str, list[str]] = {
    "statement": [
        "COPY Song TO 'x.csv'", "ATTACH 'x.db' AS x", "INSTALL httpfs", "LOAD httpfs", "PRAGMA database_list", "SET memory_limit = '9GB'",
        "CREATE TABLE t (a INT)", "INSERT INTO Song VALUES (9, 'x')", "UPDATE Song SET Title = 'x'", "DELETE FROM Song", "CHECKPOINT",
        "EXPORT DATABASE 'x'", "CALL duckdb_settings()", "DESCRIBE Song", "SUMMARIZE Song", "FROM Song", "SELECT 1; DROP TABLE Song",
        "WITH x AS (SELECT 1) INSERT INTO Song SELECT 1, 'x'",
    ],
    "authorizer": [
        "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM read_text('/etc/passwd')", "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM glob('/*')", "SELECT * FROM '/etc/passwd'", "SELECT * FROM 'x.parquet'", "SELECT * FROM read_parquet('x')",
        "SELECT * FROM duckdb_settings()", "SELECT * FROM duckdb_databases()", "SELECT * FROM information_schema.tables",
        "SELECT * FROM pg_catalog.pg_tables", "SELECT * FROM range(1000000000000)", "SELECT * FROM query('SELECT 1')",
        "SELECT * FROM query_table('Song')", "SELECT * FROM sniff_csv('/etc/passwd')", "SELECT * FROM sqlite_master",
        "SELECT (SELECT content FROM read_text('/etc/passwd'))",
    ],
    "functions": [
        "SELECT repeat('x', 10000000000)", "SELECT getenv('HOME')", "SELECT current_setting('memory_limit')", "SELECT version()",
        "SELECT list_transform([1], x -> getenv('HOME'))", "SELECT nextval('s')", "SELECT md5('x')", "SELECT range(1000000000)",
        "SELECT current_database()", "SELECT write_log('x')", "SELECT rpad('x', 2000000000, 'y')",
    ],
    "time": ["SELECT count(*) FROM " + ", ".join(f"Song s{i}" for i in range(12))],
}  # fmt: skip


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Database:
    import duckdb

    folder = tmp_path_factory.mktemp("parquet")
    make = "SELECT range AS Id, 'title' || range AS Title FROM range(30)"
    duckdb.sql(f"COPY ({make}) TO '{folder / 'Song.parquet'}' (FORMAT parquet)")
    with duckdb.connect(str(folder / "songs.duckdb")) as db:
        db.execute(f"CREATE TABLE Song AS {make}")
    return open_database(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "duckdb"])
def test_duckdb_attacks_are_stopped_by_their_layer(parquet, kind):
    database = parquet if kind == "parquet" else open_database(parquet.path / "songs.duckdb")
    before = sorted(database.path.parent.rglob("*"))
    wrong = []
    for layer, attacks in DUCKDB_ATTACKS.items():
        for sql in attacks:
            result = database.query(sql, limits=Limits(seconds=1.0))
            if result.layer != layer or result.rows:
                wrong.append(f"{sql[:90]!r}: {result.layer}, not {layer}: {result.refused[:80]}")
    assert wrong == []
    assert sorted(database.path.parent.rglob("*")) == before


def test_a_parquet_file_and_a_duckdb_file_are_databases(parquet):
    assert [table.name for table in parquet.schema.tables] == ["Song"]
    sql = "SELECT count(*), max(Title) FROM Song WHERE Id < 5"
    for path in (parquet.path / "Song.parquet", parquet.path / "songs.duckdb"):
        assert open_database(path).query(sql).rows == ((5, "title4"),)
