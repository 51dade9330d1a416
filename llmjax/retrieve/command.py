"""The command `llmjax ask`. Imports are late, so that --help is quick."""

import argparse
import datetime
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.eval import registered
from llmjax.startup import timings
from llmjax.verb import Verb, check_paths

WORKDIR = Path("runs/assistant")
LENGTH = 2048  # tokens of a prompt and an answer, where infer.length and the model permit


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("question", nargs="?", metavar="QUESTION", help="one question; the answer is printed")
    verb.add_argument(
        "--db", type=Path, metavar="FILE", help="ask a database: a file of SQLite, DuckDB or Parquet, or a folder of Parquet files"
    )  # fmt: skip
    verb.add_argument(
        "--docs", type=Path, metavar="DIR", help="ask documents: a file, or a folder of text, Markdown, HTML, PDF and mail; changed files are read again"
    )  # fmt: skip
    verb.add_argument(
        "--index", type=Path, metavar="DIR", help="the folder of the documents' index (default: one for each --docs in WORKDIR/ask)"
    )  # fmt: skip
    verb.add_argument(
        "--encoder", type=Path, metavar="RUN", help="also search by the vectors of this run, for instance an imported sentence encoder"
    )  # fmt: skip
    verb.add_argument(
        "--questions", type=Path, metavar="FILE", help="answer the questions of a JSONL file; its rows have question and maybe id"
    )  # fmt: skip
    verb.add_argument(
        "--out", type=Path, metavar="FILE.jsonl",
        help="write the answers here; the same command again answers only questions without an answer, and those that changed as did the model, the settings, or what is asked",
    )  # fmt: skip
    verb.add_argument(
        "--transcript", type=Path, metavar="FILE.jsonl",
        help="write here what each answer is made from (default: beside --out, else WORKDIR/ask/transcript.jsonl)",
    )  # fmt: skip
    verb.add_argument(
        "--filters", type=Path, metavar="FILE.json", help="block, mask or log what the model reads and writes, by rules; see docs/ask.md"
    )  # fmt: skip
    verb.add_argument(
        "--replay", type=Path, metavar="FILE.jsonl", help="make the answers of a transcript again, without a model, and compare them"
    )  # fmt: skip


def _ask(args: argparse.Namespace, c: ConfigDict) -> int:
    if (args.db is None) == (args.docs is None):
        raise UserError("say what to ask: --db FILE for a database, or --docs DIR for documents")
    if args.db and (args.index or args.encoder):
        raise UserError("--index and --encoder belong to --docs")
    if bool(args.question) + bool(args.questions) + bool(args.replay) != 1:
        raise UserError("give one question, or --questions FILE.jsonl with --out FILE.jsonl, or --replay FILE.jsonl")
    if bool(args.questions) != bool(args.out):
        raise UserError("--questions and --out belong together: the answers to the questions are written to --out")
    if not args.replay:
        args.transcript = args.transcript or (
            args.out.with_suffix(".transcript.jsonl") if args.out else args.workdir / "ask" / "transcript.jsonl"
        )
        with timings.phase("import the library"):
            from llmjax.infer import resuming

        more = {"answers_before": resuming.before(args.out)} if args.out else {}
        more |= {"transcript": args.transcript, "log_of_filters": args.transcript.with_name("filters.jsonl")}
        check_paths(args, **more)
    with timings.phase("import the library"):
        from llmjax.infer import filters
        from llmjax.infer.command import made_from, open_engine
        from llmjax.retrieve import questions

    given = questions.read(args.questions) if args.questions else [questions.Question(1, args.question)]
    questions.check_length(args.question or "", "the question")
    rules = filters.load(args.filters) if args.filters else ()
    start, show, source = _database(args) if args.db else _documents(args)
    if args.replay:
        return _replay(args, start)
    setting = {"today": datetime.date.today().isoformat(), "workdir": str(args.workdir.absolute())}
    engine = open_engine(args.workdir, c, length=LENGTH, slots=len(given))
    settings = {"transcript": args.transcript, "setting": setting, "rules": rules}
    started = functools.partial(_started, start, setting)
    if args.questions:
        common = made_from(args.workdir, c, args.filters and resuming.file_digest(args.filters))
        common = {"database" if args.db else "documents": source(), **common}
        counts = questions.answer_file(engine, given, started, out=args.out, common=common, **settings)
        print(f"{args.out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
        return 0
    for _, row, made in questions.answers(engine, given, started, **settings):
        if made is None:
            raise UserError(row["error"])
        print(show(made))
    return 0


def _started(start: Any, setting: dict[str, Any], question: str) -> Any:
    return start(question, setting)


def _database(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """How a question to a database is answered, how the answer is shown, and a hash of the database's content."""
    from llmjax.retrieve.database import ask
    from llmjax.retrieve.database.execute import open_database

    database = open_database(args.db)
    _ = database.schema  # fails before the model is loaded

    def content() -> str:
        from llmjax.infer.resuming import file_digest

        return file_digest(*map(Path, database.files or (database.path, Path(f"{database.path}-wal"))))

    return lambda question, setting: ask.ask(database, question, today=setting["today"]), ask.table_text, content


def _documents(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """As `_database`, of documents. Their index is brought up to date first."""
    from llmjax.progress import counter
    from llmjax.retrieve.documents import ask
    from llmjax.retrieve.documents.index import Index

    index = Index(args.index or index_of(args.workdir, args.docs))
    done = index.update(args.docs, tell=counter("reading", " files"))
    documents, blocks = index.counts()
    unreadable = f", {done.unreadable:,} documents unreadable" if done.unreadable else ""
    print(
        f"{args.docs}: {documents:,} documents in {blocks:,} passages; {done.read:,} files read, {done.unchanged:,} "
        f"unchanged, {done.removed:,} removed{unreadable}", file=sys.stderr,
    )  # fmt: skip
    encoder = None
    if args.encoder:
        from llmjax.infer.language_model import load
        from llmjax.retrieve.documents import embed

        model = load(args.encoder)
        encoder = ask.Encoder(embed.name_of(args.encoder, model), functools.partial(embed.encode, model))
        index.embed(encoder.name, encoder.encode, tell=counter("embedding", " passages"))

    def content() -> str:
        from llmjax.infer.resuming import digest, model_digest

        return digest(index.content(), args.encoder and model_digest(args.encoder))

    return lambda question, setting: ask.ask(index, question, encoder=encoder), ask.text_of, content


def index_of(workdir: Path, documents: Path) -> Path:
    """The folder of the index that a run has of documents."""
    own = hashlib.blake2b(str(documents.resolve()).encode(), digest_size=8).hexdigest()
    return workdir / "ask" / own


def _replay(args: argparse.Namespace, start: Any) -> int:
    from llmjax.retrieve import questions

    same = different = 0
    for own, difference in questions.replay(args.replay, start):
        same, different = same + (not difference), different + bool(difference)
        if difference:
            print(f"{own}: {difference}")
    print(f"{args.replay}: {same:,} answers are the same, {different:,} differ")
    return 1 if different else 0


def _workdir(args: argparse.Namespace) -> Path:
    """The run where none is given."""
    if args.replay is None:
        return WORKDIR
    from llmjax.infer.asking import run_of

    return run_of(args.replay) or WORKDIR


VERBS = {
    "ask": Verb(
        "answer questions from documents, with citations, or from a database, with SQL and rows",
        _add, _ask, after=" The model is the run's (default: runs/assistant, or with --replay that of the transcript).",
        workdir=_workdir,
    ),
}  # fmt: skip
registered.TASKS |= {
    "retrieval": "llmjax.retrieve.documents.task:retrieval",
    "citations": "llmjax.retrieve.documents.task:citations",
}
