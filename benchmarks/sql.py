"""Questions to a database: valid SQL, execution accuracy and refusals, of the references and of a model with and without grammar.

    python benchmarks/sql.py --questions FILE.jsonl [--db FILE] [--workdir RUN] [--out results/sql.json]

A row of the questions has question, sql (null: to be refused), maybe ordered, and maybe rows, the result of sql. Without --db, the
database is the .sqlite file beside the questions whose name begins theirs. The ceiling is a script that writes the
reference statements: it must reach 1. With --workdir, the model of that run answers with the grammar of the chosen tables
("scoped"), with the grammar of all SELECT ("full") and without ("none"). A statement is valid if the database can
prepare it; its rows are compared as multisets, in order where the question asks for one, floats to 1e-6.
"""

import datetime
import functools
import json
import os
from pathlib import Path
from typing import Any

import common

from llmjax.eval.statistics import mean
from llmjax.infer import asking
from llmjax.retrieve.database import grammar
from llmjax.retrieve.database.ask import GRAMMARS, Answer, ask
from llmjax.retrieve.database.execute import Database, open_database
from llmjax.retrieve.database.score import same_rows


def main() -> None:
    parser = common.make_parser(__doc__, out=common.ROOT / "results" / "sql.json")
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--db", type=Path, metavar="FILE")
    parser.add_argument("--workdir", type=Path, metavar="RUN", help="a chat model, for instance an imported one")
    args = parser.parse_args()
    rows = common.read_rows(args.questions, "question", "sql")
    database = open_database(args.db or beside(args.questions))
    results: dict[str, Any] = {"questions": len(rows), "answerable": sum(row["sql"] is not None for row in rows)}
    accepted = grammar.full(database.schema)
    refused = [row["sql"] for row in rows if row["sql"] and not grammar.accepts(accepted, row["sql"])]
    results["grammar_accepts_all_references"] = not refused
    results["references_not_accepted"] = refused
    results["ceiling"] = judged(database, rows, [reference(database, row) for row in rows])
    if args.workdir:
        for form in GRAMMARS:
            results[f"model_{form}"] = judged(database, rows, answers_of_model(args.workdir, database, rows, form))
    for name, found in results.items():
        print(f"{name}: {json.dumps(found)}")
    common.write(results, args.out)


def beside(questions: Path) -> Path:
    """The database of a file of questions."""
    found = [p for p in sorted(questions.parent.glob("*.sqlite")) if questions.name.startswith(p.stem)]
    if not found:
        raise SystemExit(f"there is no database beside {questions} whose name begins its own: give --db FILE")
    return found[0]


def reference(database: Database, row: dict[str, Any]) -> Answer:
    """The answer of a script that writes the reference statement under the full grammar."""

    def write(asked: asking.Ask) -> str:
        return row["sql"]

    if row["sql"] is None:
        return Answer(refused=True, reason="the reference refuses")
    return asking.scripted(ask(database, row["question"], today="2025-01-01", form="full"), write)[0]


def answers_of_model(workdir: Path, database: Database, rows: list[dict[str, Any]], form: str) -> list[Answer]:
    """The answers of a run's model. What could not be asked counts as refused."""
    import llmjax

    model = llmjax.load(workdir)
    engine = model.engine(slots=4, length=min(2048, model.config.model.max_length))
    today = datetime.date.today().isoformat()
    jobs = [
        (i, functools.partial(ask, database, row["question"], today=today, form=form)) for i, row in enumerate(rows)
    ]
    found = {one.key: one.result or Answer(refused=True, reason=one.error) for one in asking.run(engine, jobs)}
    return [found[i] for i in range(len(rows))]


def judged(database: Database, rows: list[dict[str, Any]], answers: list[Answer]) -> dict[str, Any]:
    """Shares of valid statements, right answers and right refusals, with standard errors."""
    valid, right, refusals, wrong_refusals = [], [], [], 0
    for row, made in zip(rows, answers, strict=True):
        if made.sql is not None:
            valid.append(float(not database.query(made.sql, prepare=True).refused))
        if row["sql"] is None:
            refusals.append(float(made.refused))
            continue
        wanted = database.query(row["sql"])
        wrong_refusals += made.refused
        same = made.rows is not None and same_rows(made.rows, wanted.rows, ordered=bool(row.get("ordered")))
        right.append(float(same and (row.get("rows") is None or same_rows(wanted.rows, row["rows"], ordered=bool(row.get("ordered"))))))  # fmt: skip
    found: dict[str, Any] = {"written": len(valid), "answerable_refused": wrong_refusals}
    for name, values in (("valid", valid), ("accuracy", right), ("unanswerable_refused", refusals)):
        if values:
            one = mean(values)
            found[name] = {"value": one.value, "error": None if one.count < 2 else one.error, "count": one.count}
    return found


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
