"""The command `llmjax agent`. Imports are late, so that --help is quick."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import storage
from llmjax.config.ranges import AT_LEAST_1, Range, number
from llmjax.errors import UserError
from llmjax.startup import timings
from llmjax.verb import Verb

WORKDIR = Path("runs/assistant")
LENGTH = 4096  # tokens of a task, where infer.length and the model permit


def _add(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(workdir=WORKDIR)
    verb.add_argument("goal", nargs="?", metavar="GOAL", help="what the agent is to do")
    verb.add_argument(
        "--tools", type=Path, metavar="FILE.py", required=True, help="a Python file whose functions are the tools; see docs/agents.md"
    )  # fmt: skip
    verb.add_argument("--allow-writes", action="store_true", help="let tools that write run without a question, until text of a stranger was read")  # fmt: skip
    verb.add_argument(
        "--calls", type=number(int, AT_LEAST_1), default=10, metavar="N", help="the most calls (default: 10)"
    )
    verb.add_argument(
        "--seconds", type=number(float, Range(0)), default=300.0, metavar="S", help="the most seconds (default: 300)"
    )
    verb.add_argument(
        "--tokens",
        type=number(int, AT_LEAST_1),
        default=4096,
        metavar="N",
        help="the most tokens written (default: 4096)",
    )
    verb.add_argument(
        "--filters", type=Path, metavar="FILE.json", help="block, mask or log what the model reads and writes"
    )
    verb.add_argument(
        "--transcript", type=Path, metavar="FILE.jsonl", help="append all calls, verdicts and results here (default: WORKDIR/agent/transcript.jsonl)"
    )  # fmt: skip
    verb.add_argument(
        "--replay", type=Path, metavar="FILE.jsonl", help="make the answers of a transcript again, without a model and without running a tool"
    )  # fmt: skip


def _agent(args: argparse.Namespace, c: ConfigDict) -> int:
    if (args.goal is None) == (args.replay is None):
        raise UserError("give a goal, such as 'Which of my notes are of May?', or --replay FILE.jsonl")
    with timings.phase("import the library"):
        from llmjax.agents import react, tools

    given = tools.load(args.tools)
    if args.replay:
        return _replay(args.replay, given)
    from llmjax.infer import asking, filters
    from llmjax.infer.command import open_engine

    engine = open_engine(args.workdir, c, length=LENGTH, slots=1)
    budget = react.Budget(args.calls, args.seconds, args.tokens)
    transcript = args.transcript or args.workdir / "agent" / "transcript.jsonl"
    setting = {"budget": vars(budget), "writes": args.allow_writes}

    def start() -> Any:
        return react.react(args.goal, given, budget=budget, writes=args.allow_writes, approve=_approve)

    rules = filters.load(args.filters) if args.filters else ()
    (one,) = asking.run(engine, [(None, start)], rules=rules, log=transcript.with_name("filters.jsonl"))
    made = {"error": one.error} if one.result is None else one.result.row()
    row = {"goal": args.goal, "setting": setting, "asked": one.transcript, "answer": made}
    with storage.appending(transcript) as file:
        file.write(json.dumps(row) + "\n")
    if one.result is None:
        raise UserError(one.error)
    for step in one.result.steps:
        print(
            f"{step.call.name}({json.dumps(dict(step.call.arguments))}): {step.verdict}: {_line(step.result)}",
            file=sys.stderr,
        )
    if one.result.ended != "answer":
        print(f"(the budget of {one.result.ended} is used up)", file=sys.stderr)
    print(one.result.answer)
    return 0


def _approve(tool: Any, call: Any) -> bool:
    """Ask the user whether a call may run; without a terminal it may not."""
    if not sys.stdin.isatty():
        return False
    print(f"{call.name} ({tool.effect}) with {json.dumps(dict(call.arguments))}", file=sys.stderr)
    return input("run it? [y/N] ").strip().lower() in ("y", "yes")


def _replay(path: Path, given: Any) -> int:
    from llmjax.agents import react
    from llmjax.infer import asking

    same = different = 0
    for number_, line in enumerate(storage.read_lines(path), start=1):
        try:
            row = json.loads(line)
            goal, setting, asked, before = (row[name] for name in ("goal", "setting", "asked", "answer"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number_} is no row of a transcript: {error}") from error
        if "error" in before:
            continue
        budget = react.Budget(**setting["budget"])
        conversation = react.replayed(before, goal, given, budget=budget, writes=setting["writes"])
        try:
            now = json.loads(json.dumps(asking.replay(conversation, asked).row()))
        except UserError as error:
            now = str(error)
        same, different = same + (now == before), different + (now != before)
        if now != before:
            print(f"{path}:{number_}: {now}")
    print(f"{path}: {same:,} answers are the same, {different:,} differ")
    return 1 if different else 0


def _line(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= 100 else f"{shown[:99]}\u2026"


VERBS = {
    "agent": Verb(
        "let a model act by calling your Python functions, within permissions and a budget",
        _add, _agent, after=" The model is the run's (default: runs/assistant).",
    ),
}  # fmt: skip
