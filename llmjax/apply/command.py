"""The command `llmjax apply`. Imports are late, so that --help is quick."""

import argparse
import functools
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax.config.ranges import AT_LEAST_1, number
from llmjax.errors import UserError
from llmjax.startup import timings
from llmjax.verb import Verb, check_paths

WORKDIR = Path("runs/assistant")
LENGTH, SLOTS = 2048, 8  # tokens of a prompt and what follows, where infer.length and the model permit; rows at a time
TASKS = ("summarize", "translate", "classify", "code")


def _add(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(workdir=WORKDIR)
    verb.add_argument(
        "task", choices=TASKS, help="summarize: a summary whose sentences quote the text; translate; classify: one of --labels; "
        "code: a function from its docstring, with its tests run in a sandbox",
    )  # fmt: skip
    verb.add_argument("--rows", type=Path, required=True, metavar="FILE", help="rows with text and maybe id: JSON lines, JSON, CSV or Parquet")  # fmt: skip
    verb.add_argument(
        "--out", type=Path, required=True, metavar="FILE.jsonl",
        help="write what is made of each row here; the same command again goes on with the rows that are missing, or that changed as did the model or the settings",
    )  # fmt: skip
    verb.add_argument("--field", default="text", metavar="NAME", help="the field of the text (default: text)")
    verb.add_argument("--sentences", type=number(int, AT_LEAST_1), default=5, metavar="N", help="the most sentences of a summary (default: 5)")  # fmt: skip
    verb.add_argument("--language", metavar="NAME", help="the language to translate into, such as German")
    verb.add_argument("--labels", metavar="A,B,...", help="the classes")
    verb.add_argument("--about", default="", metavar="TEXT", help="what the classes mean")
    verb.add_argument("--tries", type=number(int, AT_LEAST_1), default=3, metavar="N", help="how often code that fails is written again (default: 3)")  # fmt: skip
    verb.add_argument("--allow-code-execution", action="store_true", help="run programs that the model writes, in a sandbox")  # fmt: skip


def _apply(args: argparse.Namespace, c: ConfigDict) -> int:
    start = _start(args)
    with timings.phase("import the library"):
        from llmjax.apply import rows
        from llmjax.infer import resuming
        from llmjax.infer.command import made_from, open_engine

    check_paths(args, answers_before=resuming.before(args.out))
    given = rows.read(args.rows, args.field)
    if args.task == "code":
        from llmjax.eval import sandbox

        print(sandbox.describe())
    engine = open_engine(args.workdir, c, length=LENGTH, slots=max(1, min(len(given), SLOTS)))
    settings = [args.task, args.field, args.sentences, args.language, args.labels, args.about, args.tries]
    common = made_from(args.workdir, c, settings)
    counts = rows.answer_file(engine, given, start, args.out, common=common)
    print(f"{args.out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return 0


def _start(args: argparse.Namespace) -> Any:
    """How the conversation of a row begins. Raises UserError for an option that the task needs."""
    labels = [label.strip() for label in (args.labels or "").split(",") if label.strip()]
    if args.task == "translate" and not args.language:
        raise UserError("say which language to translate into, such as --language German")
    if args.task == "classify" and len(labels) < 2:
        raise UserError("give at least two classes, such as --labels positive,negative")
    if args.task == "code" and not args.allow_code_execution:
        from llmjax.eval.code import REFUSAL

        raise UserError(REFUSAL)
    from llmjax.apply import programs, texts

    if args.task == "code":
        return functools.partial(programs.programmed, field=args.field, tries=args.tries)
    way: Any = {
        "summarize": functools.partial(texts.summarized, sentences=args.sentences),
        "translate": functools.partial(texts.translated, language=args.language),
        "classify": functools.partial(texts.classified, labels=labels, about=args.about),
    }[args.task]
    return lambda row: way(row[args.field])


VERBS = {
    "apply": Verb(
        "summarise, translate or classify the texts of a file, or write code for its docstrings, by prompt",
        _add, _apply, after=" The model is the run's (default: runs/assistant).",
    ),
}  # fmt: skip
