"""Questions to a database: the grammar has the schema, answers have their rows, what cannot be answered is refused."""

import contextlib
import errno
import json
import random
import shutil
import sqlite3
import types
from pathlib import Path

import numpy as np
import pytest
from networks import make, settings

from llmjax import cli, storage
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.errors import UserError
from llmjax.infer import asking, constrained, resuming
from llmjax.infer.asking import Ask
from llmjax.infer.engine import Engine
from llmjax.retrieve import questions
from llmjax.retrieve.database import ask, grammar
from llmjax.retrieve.database.execute import Database, open_database
from llmjax.retrieve.database.schema import quoted as quoted_name
from llmjax.retrieve.database.score import same_rows

pytest.importorskip("llguidance")
DATA = Path(__file__).parents[1] / ".." / "shared" / "data" / "apps"
RUN = Path(__file__).parent / "fixtures" / "run_c4ef595"
TODAY = "2025-01-31"


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Database:
    path = tmp_path_factory.mktemp("shop") / "shop #1?.sqlite"
    db = sqlite3.connect(path)
    db.executescript(
        """CREATE TABLE Customer (CustomerId INTEGER PRIMARY KEY, Name TEXT NOT NULL, Country TEXT);
        CREATE TABLE "Order Details" (Id INTEGER PRIMARY KEY, CustomerId INTEGER REFERENCES Customer, "Unit Price" REAL, "group" TEXT,
          OrderDate DATETIME);
        CREATE TABLE Note (Text TEXT);
        INSERT INTO Customer VALUES (1, 'Ana', 'Brazil'), (2, 'Ben', 'Kenya'), (3, 'Cai', 'Brazil'), (4, 'It''s me', NULL);
        INSERT INTO "Order Details" VALUES (1, 1, 2.5, 'a', '2024-05-01'), (2, 1, 4.0, 'b', '2025-01-01'), (3, 2, 1.0, 'a', '2025-01-02');
        INSERT INTO Note VALUES ('hello')"""
    )
    db.close()
    return open_database(path)


def answered(database: Database, question: str, *texts: str, form: str = "scoped") -> ask.Answer:
    """The answer when a script writes the texts, each of which its grammar must accept."""
    left = list(texts)

    def write(asked: Ask) -> str:
        text = left.pop(0)
        assert not asked.grammar or grammar.accepts(asked.grammar, text), f"{text} is no sentence of\n{asked.grammar}"
        return text

    answer, _ = asking.scripted(ask.ask(database, question, today=TODAY, form=form), write)
    assert not left
    return answer


def test_the_rows_of_the_statement_are_the_answer(database):
    sql = """SELECT Customer.Name, ROUND(SUM("Order Details"."Unit Price"), 2) FROM Customer JOIN "Order Details" ON \
"Order Details".CustomerId = Customer.CustomerId WHERE Customer.Country = 'Brazil' GROUP BY Customer.Name"""
    answer = answered(database, "What did customers in Brazil spend?", "Customer, Order Details", sql)
    assert answer.row() == {
        "sql": sql, "columns": ["Name", answer.columns[1]], "rows": [["Ana", 6.5]], "cut": False, "refused": False, "reason": "",
    }  # fmt: skip
    shown = ask.table_text(answer)
    assert sql in shown and "Ana" in shown and "6.5" in shown


@pytest.mark.parametrize(
    "question",
    ["Delete all customers", "please drop the notes!", "Update Ana's country to Kenya", "Could you insert a row?", "CREATE TABLE x (y)"],
)  # fmt: skip
def test_a_question_that_asks_for_a_change_is_refused_without_a_model(database, question):
    answer = answered(database, question)
    assert answer.refused and answer.sql is None and "only read" in answer.reason


def test_a_question_without_a_table_is_refused(database):
    answer = answered(database, "What is the shoe size of Ana?", "none")
    assert answer.refused and answer.rows is None


def test_a_statement_that_does_not_run_is_written_once_more_with_the_message(database):
    seen = []

    def write(asked: Ask) -> str:
        seen.append(asked.prompts[0][-1]["content"])
        return (
            "SELECT x.Name FROM Customer c"
            if len(seen) == 1
            else "SELECT c.Name FROM Customer c ORDER BY c.Name LIMIT 1"
        )

    answer, _ = asking.scripted(ask.ask(database, "Who is first?", today=TODAY, form="full"), write)
    assert answer.rows == (("Ana",),)
    assert "no such column: x.Name" in seen[1]
    answer, transcript = asking.scripted(
        ask.ask(database, "Who?", today=TODAY, form="none"), lambda asked: "SELECT Nam FROM Customer"
    )
    assert answer.refused and "no such column: Nam" in answer.reason and len(transcript) == 2


def test_the_prompt_has_the_schema_its_first_rows_and_the_values_of_the_question(database):
    seen = []
    asking.scripted(
        ask.ask(database, "Which customers live in brazil?", today=TODAY, form="full"),
        lambda asked: seen.append(asked.prompts) or "SELECT Name FROM Customer",
    )
    full, bare, short = (messages[-1]["content"] for messages in seen[0])
    assert "FOREIGN KEY (CustomerId) REFERENCES Customer (CustomerId)" in full and "-- 1 | Ana | Brazil" in full
    assert "Customer.Country has 'Brazil'" in short and "-- 1 | Ana" not in bare and TODAY in short


def test_full_grammar_accepts_what_people_write_and_no_invented_name(database):
    accepted = grammar.full(database.schema)
    for sql in (
        "SELECT COUNT(*) FROM Customer WHERE Country='Brazil'", "select name from customer",
        "SELECT c.Name, COUNT(*) n FROM Customer c LEFT JOIN \"Order Details\" o ON o.CustomerId=c.CustomerId GROUP BY c.CustomerId HAVING n>1",
        "SELECT Name FROM Customer WHERE NOT EXISTS (SELECT 1 FROM \"Order Details\" o WHERE o.CustomerId=Customer.CustomerId);",
        "WITH t AS (SELECT CustomerId, SUM(\"Unit Price\") s FROM \"Order Details\" GROUP BY CustomerId) SELECT MAX(s) FROM t",
        "SELECT CASE WHEN Country IS NULL THEN 'none' ELSE Country END FROM Customer ORDER BY 1 DESC LIMIT 3",
        "SELECT strftime('%Y', OrderDate) y, ROUND(AVG(\"Unit Price\"), 1) FROM \"Order Details\" WHERE \"group\" IN ('a','b') GROUP BY y",
        "SELECT Name FROM Customer UNION SELECT Text FROM Note", "SELECT Name FROM (SELECT Name, Country FROM Customer) WHERE Country = 'It''s'",
        "SELECT Name, RANK() OVER (PARTITION BY Country ORDER BY Name) FROM Customer", "SELECT -1 + 2.5 * (3 - 1)",
        "SELECT x.n FROM (SELECT COUNT(*) n FROM Customer GROUP BY Country) x WHERE x.n > 1e0", "SELECT 1 WHERE EXISTS (SELECT 1 FROM Note)",
        "SELECT COUNT(*) FILTER (WHERE Country = 'Peru'), ~1 | 2 << 1, +.5 FROM Customer", "SELECT [Name] FROM `Customer` LIMIT 1, 2",
        "SELECT Name FROM Customer WHERE Name GLOB 'A*' OR Name LIKE 'a!%' ESCAPE '!' OR Country IS DISTINCT FROM 'Peru'",
        "SELECT Name FROM Customer WHERE (Name, Country) IN (SELECT Name, Country FROM Customer) ORDER BY Name COLLATE NOCASE DESC",
        "SELECT c.Name FROM Customer c FULL OUTER JOIN \"Order Details\" o ON o.CustomerId = c.CustomerId",
        "SELECT COUNT(*) FROM Customer NATURAL JOIN \"Order Details\"",
        "SELECT SUM(CustomerId) OVER (ORDER BY Name ROWS BETWEEN 2 PRECEDING AND CURRENT ROW), LAG(Name) OVER w FROM Customer WINDOW w AS (ORDER BY Name)",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 5) SELECT SUM(x) FROM n",
    ):  # fmt: skip
        assert grammar.accepts(accepted, sql), sql
        assert not database.query(sql).refused, sql
    for sql in (
        "SELECT ShoeSize FROM Customer", "SELECT Name FROM Customers", "SELECT Name FROM sqlite_master", "SELECT printf('x')",
        "SELECT load_extension('x')", "DELETE FROM Customer", "SELECT 1; SELECT 2", "PRAGMA x", "SELECT", "SELECT Name FROM", "Name",
        "SELECT c.Salary FROM Customer c", "SELECT Customer.Text FROM Customer", "SELECT 1 -- x", "WITH t AS (DELETE FROM Note) SELECT 1",
    ):  # fmt: skip
        assert not grammar.accepts(accepted, sql), sql


def sentence(constraint: str, rng: random.Random) -> str:
    """A random sentence of a grammar: each byte is drawn from those that may come next."""
    tokenizer = byte_tokenizer()
    state = constrained.compiled(constrained.vocabulary(tokenizer), "grammar", constraint)
    ids: list[int] = []
    while not state.is_stopped() and len(ids) < 2000:
        bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
        able = np.flatnonzero(bits).tolist()
        token = rng.choice(able)
        if token == tokenizer.end_id:
            break
        state.consume_token(token)
        ids.append(token)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("count", [pytest.param(12, id="few"), pytest.param(200, id="many", marks=pytest.mark.slow)])
def test_whatever_is_written_under_the_scoped_grammar_runs(database, count):
    schema, rng = database.schema, random.Random(1)
    scopes = [["Customer"], ["Order Details", "Customer"], ["Note"]]
    for i in range(count):
        sql = sentence(grammar.scoped(schema, schema.joined(scopes[i % 3])), rng)
        result = database.query(sql)
        assert not result.refused, (sql, result)


def test_tables_are_joined_by_the_shortest_way(database):
    schema = database.schema
    assert [join.table for join in schema.joined(["Order Details", "Customer"])] == ["Order Details", "Customer"]
    assert [join.table for join in schema.joined(["Note", "Customer"])] == ["Note"]  # nothing connects them


def test_the_grammar_accepts_every_reference_of_chinook_and_they_give_their_rows():
    if not (DATA / "chinook_questions.jsonl").is_file():
        pytest.skip("the data folder is not here")
    rows = [json.loads(line) for line in (DATA / "chinook_questions.jsonl").read_text().splitlines()]
    database = open_database(DATA / "chinook.sqlite")
    accepted = grammar.full(database.schema)
    asked = [row for row in rows if row["sql"]]
    assert len(asked) >= 15
    assert [row["sql"] for row in asked if not grammar.accepts(accepted, row["sql"])] == []
    for row in asked:
        result = database.query(row["sql"])
        assert same_rows(result.rows, row["rows"], ordered=row["ordered"]), row["question"]


def test_results_are_compared_as_multisets_or_in_order():
    assert same_rows([(1, "a"), (2.0000001, "b")], [[2, "b"], [1.0, "a"]], ordered=False)
    assert not same_rows([(1,), (1,), (2,)], [[1], [2], [2]], ordered=False)
    assert not same_rows([(1,), (2,)], [[2], [1]], ordered=True)
    assert not same_rows([(1, 2)], [[2, 1]], ordered=False)
    assert not same_rows([(1,)], [[1], [1]], ordered=False)
    assert same_rows([(None, "x")], [[None, "x"]], ordered=True)


def test_a_random_model_answers_a_file_whose_answers_can_be_replayed(tmp_path):
    """Whatever the model, each statement runs; the same command again does nothing; the transcript gives the same answers."""
    db = sqlite3.connect(tmp_path / "pets.sqlite")
    db.executescript("CREATE TABLE Pet (Name TEXT, Age INT); INSERT INTO Pet VALUES ('Ada', 3), ('Bo', 5)")
    db.close()
    database = open_database(tmp_path / "pets.sqlite")
    module, params = make(settings(vocab_size=320))
    engine = Engine(module, params, byte_tokenizer(), slots=2, length=640, steps=8)
    file, out, kept = tmp_path / "q.jsonl", tmp_path / "a.jsonl", tmp_path / "t.jsonl"
    file.write_text('{"question": "Who is old?", "id": "k"}\n\n{"question": "How many pets?", "extra": 1}\n')

    def start(question, setting=None):
        return ask.ask(database, question, today=TODAY)

    given = questions.read(file)
    assert [question.id for question in given] == ["k", 3]
    counts = questions.answer_file(engine, given, start, out=out, transcript=kept, setting={"today": TODAY})
    assert counts["answered before"] == 0 and counts["failed"] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["id"] for row in rows} == {"k", 3}
    assert all({"question", "sql", "rows", "refused"} <= row.keys() for row in rows)
    counts = questions.answer_file(engine, given, start, out=out, transcript=kept, setting={"today": TODAY})
    assert counts == {"answered before": 2, "answered": 0, "refused": 0, "failed": 0}
    assert not resuming.before(out).exists() and out.read_text() == "".join(json.dumps(row) + "\n" for row in rows)
    assert [difference for _, difference in questions.replay(kept, start)] == ["", ""]
    changed = [json.loads(line) for line in kept.read_text().splitlines()]
    for row in changed:
        row["answer"]["rows"] = [["Someone else"]]
    kept.write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert all("Someone else" in difference for _, difference in questions.replay(kept, start))


@pytest.mark.parametrize("changed", ["question", "model", "documents"])
def test_an_answer_stays_only_as_long_as_what_it_was_made_from(tmp_path, monkeypatch, capsys, changed):
    """What has changed is answered again, once; its old answer is kept elsewhere, and answers that say nothing stay."""
    asked: list[str] = []

    def answers(engine, todo, start, **settings):
        for question in todo:
            asked.append(question.text)
            yield question, {"id": question.id, "question": question.text, "error": f"answer {len(asked)}"}, None

    monkeypatch.setattr(questions, "answers", answers)
    out, common = tmp_path / "a.jsonl", {"model": "m", "documents": "d"}
    out.write_text('{"id": "old", "question": "of an earlier version"}\n')
    given = [questions.Question("old", "now"), questions.Question(1, "one"), questions.Question(2, "two")]
    questions.answer_file(None, given, None, out=out, common=common)
    assert asked == ["one", "two"]
    with out.open("a") as file:
        file.write('{"id": 7, "ans')  # killed here
    if changed == "question":
        given[1] = questions.Question(1, "one?")
    else:
        common[changed] = "another"
    for again in (True, False):
        counts = questions.answer_file(None, given, None, out=out, common=common)
        said = capsys.readouterr().out
        assert (f"the {changed} changed" in said and str(resuming.before(out)) in said) == again
        assert counts["answered before"] == (3 if not again else 2 if changed == "question" else 1)
    assert asked[2:] == (["one?"] if changed == "question" else ["one", "two"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(str(row["id"]) for row in rows) == ["1", "2", "old"]
    old = [json.loads(line) for line in resuming.before(out).read_text().splitlines()]
    assert [row["error"] for row in old] == ["answer 1", "answer 2"][: len(old)] and len(old) == len(asked) - 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["database", "documents"])
def test_the_command_answers_again_what_is_asked_of_something_that_changed(kind, tmp_path, monkeypatch, capsys):
    """Both questions are refused without a model. The model is not read either, but its checkpoint counts."""
    monkeypatch.setattr("llmjax.infer.command.open_engine", lambda *_, **__: types.SimpleNamespace(count=1))
    run, docs, path = tmp_path / "run", tmp_path / "docs", tmp_path / "a.sqlite"
    shutil.copytree(RUN, run)
    docs.mkdir()

    def change(text):
        (docs / "a.txt").write_text(f"The {text} grows on trees.\n")
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute(f"CREATE TABLE {text} (Id INT)")

    change("apple")
    (tmp_path / "q.jsonl").write_text('{"question": "Delete all zebras"}\n{"question": "Drop the zebras"}\n')
    given = ["--db", str(path)] if kind == "database" else ["--docs", str(docs)]
    given += ["--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "a.jsonl"), "--workdir", str(run)]

    def said(*more):
        assert cli.main(["ask", *given, *more]) == 0
        return capsys.readouterr().out

    assert "2 refused" in said() and "2 answered before" in said()
    change("pear")
    assert f"2 answers are made again (of 2 the {kind} changed)" in said() and "2 answered before" in said()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [set(row["made_from"]) for row in rows] == [{"question", kind, "model", "settings"}] * 2
    assert "of 2 the settings changed" in said("--config.infer.weights=int8")
    (run / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    assert "of 2 the model changed" in said("--config.infer.weights=int8")


def test_a_full_disk_amid_an_answer_loses_none_and_a_link_stays_one(tmp_path, monkeypatch):
    def answers(engine, todo, start, **settings):
        yield from ((one, {"id": one.id, "question": one.text, "refused": False}, object()) for one in todo)

    appending = storage.appending

    @contextlib.contextmanager
    def full(path):
        with appending(path) as file:

            def write(text):
                left = 1 - len(path.read_text().splitlines())
                file.write(text if left else text[:20])
                if not left:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))

            yield types.SimpleNamespace(write=write)

    monkeypatch.setattr(questions, "answers", answers)
    (tmp_path / "disk").mkdir()
    out = tmp_path / "a.jsonl"
    out.symlink_to(tmp_path / "disk" / "a.jsonl")
    given = [questions.Question(1, "one"), questions.Question(2, "two")]
    with monkeypatch.context() as patch:
        patch.setattr(resuming.storage, "appending", full)
        with pytest.raises(OSError, match="No space left"):
            questions.answer_file(None, given, None, out=out)
    assert len(out.read_text().splitlines()) == 2 and not out.read_text().endswith("\n")
    assert questions.answer_file(None, given, None, out=out)["answered before"] == 1
    given[0] = questions.Question(1, "one?")
    assert questions.answer_file(None, given, None, out=out)["answered"] == 1
    assert sorted(json.loads(line)["question"] for line in out.read_text().splitlines()) == ["one?", "two"]
    assert out.is_symlink() and {path.name for path in tmp_path.rglob("*")} == {"disk", "a.jsonl", "a.before.jsonl"}
    with pytest.raises(UserError, match="disk is no file"):
        questions.answer_file(None, given, None, out=tmp_path / "disk")


def test_two_processes_do_not_write_the_same_answers(tmp_path):
    with (
        resuming.resuming(tmp_path / "a.jsonl", {}),
        pytest.raises(UserError, match="another process writes .*a.jsonl"),
    ):
        questions.answer_file(None, [questions.Question(1, "a")], None, out=tmp_path / "a.jsonl")


def test_a_replay_needs_no_more_than_the_transcript_which_names_its_run(database, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llmjax.infer.command.open_engine", lambda *_, **__: types.SimpleNamespace(count=1))
    monkeypatch.chdir(tmp_path)  # whose runs/assistant is none
    run = Path("runs") / "mine"
    run.mkdir(parents=True)
    (run / "config.json").write_text((RUN / "config.json").read_text())
    replay = ["ask", "--db", str(database.path), "--replay", str(run / "ask" / "transcript.jsonl")]
    assert cli.main(replay) == 2 and "there is no transcript" in capsys.readouterr().err
    assert cli.main(["ask", "--db", str(database.path), "--workdir", str(run), "Delete all customers"]) == 0
    (tmp_path / "below").mkdir()
    monkeypatch.chdir("below")
    replay[-1] = str(tmp_path / run / "ask" / "transcript.jsonl")
    assert cli.main(replay) == 0 and "1 answers are the same, 0 differ" in capsys.readouterr().out
    transcript = (tmp_path / run / "ask" / "transcript.jsonl").read_text()
    Path("t.jsonl").write_text(transcript + transcript.replace(str(run), "another"))
    replay[-1] = "t.jsonl"
    assert cli.main(replay) == 2 and "of several runs" in capsys.readouterr().err
    (tmp_path / run).rename(tmp_path / "away")
    Path("t.jsonl").write_text(transcript)
    assert cli.main(replay) == 2
    assert f"t.jsonl is of the run {tmp_path / run}, which is gone" in capsys.readouterr().err
    assert cli.main([*replay, "--workdir", str(tmp_path / "away")]) == 0
    older = json.loads(transcript)
    del older["setting"]["workdir"]
    Path("t.jsonl").write_text(json.dumps(older) + "\n")
    assert cli.main(replay) == 2 and "runs/assistant has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "q.jsonl:1: a row must be an object with a text in question"), ("x", "q.jsonl:1: this is no JSON"),
     ('{"question": "a", "id": 2}\n{"question": "b"}', "q.jsonl:2: the id 2 comes twice"), ("", "q.jsonl has no questions"), ("\n \n", "no questions"),
     ('{"question": "a", "id": "2"}\n{"question": "b", "id": 2}', "q.jsonl:2: the id 2 comes twice"), ('{"question": 7}', "a text in question"),
     ('{"question": " "}', "a text in question"), (json.dumps({"question": "x " * 500_000}), "1,000,000 characters"), ("[" * 100_000, "no JSON"), ('"a"', "an object")],
)  # fmt: skip
def test_a_wrong_row_is_an_error_with_its_line(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        questions.read(tmp_path / "q.jsonl")


def test_what_is_no_database_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_text("hello, this is text")
    for path, message in (
        (tmp_path / "x.txt", "no file of SQLite"),
        (tmp_path / "y", "there is no database"),
        (tmp_path, "no .parquet"),
    ):
        with pytest.raises(UserError, match=message):
            open_database(path)
    damaged = tmp_path / "d.sqlite"
    damaged.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)
    with pytest.raises(UserError, match="cannot read"):
        _ = open_database(damaged).schema


def test_a_database_in_wal_mode_is_read_without_a_trace(tmp_path):
    path = tmp_path / "wal.sqlite"
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("CREATE TABLE t (a)")
    db.execute("INSERT INTO t VALUES (5)")
    db.commit()
    db.close()
    assert open_database(path).query("SELECT a FROM t").rows == ((5,),)
    assert [p.name for p in tmp_path.iterdir()] == ["wal.sqlite"]


ODD = (
    "Price (€)",
    "a<b>",
    "Temp °C",
    "tab\tand\nline",
    'dq"x',
    "it's",
    "[b]",
    "back\\slash",
    "em—dash",
    "😀",
    "none",
    "Sales, 2024",
    "\x7f",
)


def test_names_of_any_characters_can_be_chosen_written_and_read(tmp_path):
    path = tmp_path / "odd.sqlite"
    with sqlite3.connect(path) as db:
        for name in ODD:
            quoted = '"' + name.replace('"', '""') + '"'
            db.execute(f"CREATE TABLE {quoted} ({quoted} INTEGER, twice INTEGER GENERATED ALWAYS AS ({quoted} * 2))")
            db.execute(f"INSERT INTO {quoted} VALUES (4)")
    db.close()
    odd = open_database(path)
    for name in ODD:
        (written,) = (one for one, table in grammar._listed(odd.schema).items() if table == name)
        sql = f"SELECT {quoted_name(name)}, twice FROM {quoted_name(name)}"
        assert answered(odd, "How many?", written, sql).rows == ((4, 8),), name
        assert grammar.accepts(grammar.full(odd.schema), sql)
        assert odd.schema.table(name).sample == ((4, 8),)
    both = ask.ask(odd, "How many?", today=TODAY)
    assert grammar.chosen(odd.schema, '"Sales, 2024", "none", a<b>, a<b>, Temp') == [
        "Sales, 2024",
        "none",
        "a<b>",
    ]  # cut
    assert asking.scripted(both, lambda asked: "Temp")[0].refused


def test_files_of_parquet_may_have_any_names(tmp_path):
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pytest.importorskip("duckdb")
    folder = tmp_path / "it's [1]"
    (folder / "folder.parquet").mkdir(parents=True)
    for name in ("it's", "sales [2024]", "star*"):
        parquet.write_table(pa.table({"n": [len(name)]}), folder / f"{name}.parquet")
    odd = open_database(folder)
    assert [(table.name, table.sample) for table in odd.schema.tables] == [
        ("it's", ((4,),)), ("sales [2024]", ((12,),)), ("star*", ((5,),)),
    ]  # fmt: skip


def test_a_database_that_is_damaged_behind_its_beginning_is_an_error(tmp_path):
    path = tmp_path / "d.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript("".join(f"CREATE TABLE t{i} (a, b, c, d, e, f, g, h);" for i in range(200)))
    db.close()
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    with pytest.raises(UserError, match="cannot read"):
        _ = open_database(path).schema


@pytest.mark.parametrize("text", ["", "\n", "words\n"])
def test_a_transcript_without_rows_is_said_to_have_none(tmp_path, capsys, text):
    (tmp_path / "tools.py").write_text('def look() -> str:\n    """Look."""\n    return ""\n')
    (tmp_path / "t.jsonl").write_text(text)
    for verb in (["ask", "--db", "none.sqlite"], ["agent", "--tools", str(tmp_path / "tools.py")]):
        assert cli.main([*verb, "--replay", str(tmp_path / "t.jsonl")]) == 2
        assert "has no row of a transcript: give the file" in capsys.readouterr().err


def test_a_database_that_was_cut_is_named_with_what_to_do(tmp_path):
    with sqlite3.connect(tmp_path / "whole.sqlite") as db:
        db.execute("CREATE TABLE t (a, b)")
        db.executemany("INSERT INTO t VALUES (?, ?)", [(i, "x" * 300) for i in range(300)])
    db.close()
    (tmp_path / "cut.sqlite").write_bytes((tmp_path / "whole.sqlite").read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"cut\.sqlite: SQLite cannot read it.*copy it again"):
        _ = open_database(tmp_path / "cut.sqlite").schema
