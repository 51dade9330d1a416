"""The command `llmjax agent`. Imports are late, so that --help is quick."""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import storage
from llmjax.config.ranges import AT_LEAST_1, Range, number
from llmjax.errors import UserError
from llmjax.eval import registered
from llmjax.startup import timings
from llmjax.verb import Verb, check_paths

WORKDIR = Path("runs/assistant")
METHODS = ("react", "vote", "dfs", "plan")  # those of `methods`, which imports jax
ENDS = {"gave up": "every way was given up"}
LENGTH = 4096  # tokens of a task, where infer.length and the model permit


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("goal", nargs="?", metavar="GOAL", help="what the agent is to do")
    add_tools(verb, needed=True)
    add_writes(verb)
    verb.add_argument("--probe", action="store_true", help="first call each tool that reads with the example of its OpenAPI file, and leave out those that fail")  # fmt: skip
    verb.add_argument(
        "--method", choices=METHODS, default="react", help="react: one way; vote: several tries, which only read; dfs: a search over "
        "calls, which goes back; plan: all calls are written before any result is read (default: react)",
    )  # fmt: skip
    verb.add_argument(
        "--tries", type=number(int, AT_LEAST_1), default=4, metavar="N", help="tries of a vote; of dfs the most calls that are tried at one place (default: 4)"
    )  # fmt: skip
    add_budget(verb)
    verb.add_argument(
        "--filters", type=Path, metavar="FILE.json", help="block, mask or log what the model reads and writes"
    )
    verb.add_argument(
        "--transcript", type=Path, metavar="FILE.jsonl", help="append all calls, verdicts and results here (default: WORKDIR/agent/transcript.jsonl)"
    )  # fmt: skip
    verb.add_argument(
        "--replay", type=Path, metavar="FILE.jsonl", help="make the answers of a transcript again, without a model and without running a tool"
    )  # fmt: skip


def add_writes(verb: argparse.ArgumentParser) -> None:
    """Add the argument that lets tools write."""
    verb.add_argument("--allow-writes", action="store_true", help="let tools that write run without a question, until text of a stranger was read")  # fmt: skip


def add_budget(verb: argparse.ArgumentParser) -> None:
    """Add the arguments that limit an agent."""
    verb.add_argument(
        "--calls", type=number(int, AT_LEAST_1), default=10, metavar="N", help="the most calls of an agent (default: 10)"
    )  # fmt: skip
    verb.add_argument(
        "--seconds", type=number(float, Range(0)), default=300.0, metavar="S", help="the most seconds of an agent (default: 300)"
    )  # fmt: skip
    verb.add_argument(
        "--tokens", type=number(int, AT_LEAST_1), default=4096, metavar="N", help="the most tokens that an agent writes (default: 4096)"
    )  # fmt: skip


def add_tools(verb: argparse.ArgumentParser, *, needed: bool) -> None:
    """Add the arguments that name tools."""
    verb.add_argument(
        "--tools", action="append", default=[], metavar="FILE", required=needed,
        help="a Python file whose functions are the tools, an OpenAPI file (FILE@URL: another base URL), or a JSON file of "
        "mcpServers; may be repeated; see docs/agents.md",
    )  # fmt: skip
    verb.add_argument(
        "--allow-host", action="append", default=[], metavar="HOST[:PORT]", help="a host that tools of OpenAPI files and MCP servers may call; may be repeated"
    )  # fmt: skip
    verb.add_argument(
        "--header", action="append", default=[], metavar="NAME=VARIABLE", help="send this header to APIs, with the value of an environment variable, which the model never sees; may be repeated"
    )  # fmt: skip
    verb.add_argument(
        "--permit", action="append", default=[], metavar="TOOL=EFFECT", help="treat a tool as one with the effect read, write or ask, or deny it; * fits any name; may be repeated"
    )  # fmt: skip


def opened(args: argparse.Namespace, pins: Path | None = None) -> Any:
    """The tools of a command while their servers are connected."""
    from llmjax.agents import sources

    headers = sources.headers_of(args.header)
    return sources.opened(args.tools, allowed=args.allow_host, headers=headers, permits=args.permit, pins=pins)


def _agent(args: argparse.Namespace, c: ConfigDict) -> int:
    if (args.goal is None) == (args.replay is None) or (args.goal is not None and not args.goal.strip()):
        raise UserError("give a goal, such as 'Which of my notes are of May?', or --replay FILE.jsonl")
    args.transcript = args.transcript or args.workdir / "agent" / "transcript.jsonl"
    if not args.replay:
        check_paths(args, log_of_filters=args.transcript.with_name("filters.jsonl"))
    with timings.phase("import the library"), opened(args, args.workdir / "agent" / "tools.json") as given:
        return _replay(args.replay, given) if args.replay else _act(args, c, _probed(given) if args.probe else given)


def _probed(given: Any) -> Any:
    """The tools without those that are broken."""
    from llmjax.agents import probes

    found = probes.probe(given)
    for one in found:
        print(f"{one.tool}: {one.verdict}{': ' * bool(one.error)}{_line(one.error)}", file=sys.stderr)
    if not (left := probes.without_broken(given, found)):
        raise UserError("every tool is broken")
    return left


def _act(args: argparse.Namespace, c: ConfigDict, given: Any) -> int:
    from llmjax.agents import methods, react
    from llmjax.infer import asking, filters
    from llmjax.infer.command import open_engine

    engine = open_engine(args.workdir, c, length=LENGTH, slots=1)
    budget = react.Budget(args.calls, args.seconds, args.tokens)
    setting = {"method": args.method, "tries": args.tries, "writes": args.allow_writes}

    def start() -> Any:
        return methods.run(goal=args.goal, world=methods.World(given), budget=budget, approve=_approve, **setting)

    rules = filters.load(args.filters) if args.filters else ()
    with storage.appending(args.transcript) as file:  # before a tool acts: what was done must be kept
        (one,) = asking.run(engine, [(None, start)], rules=rules, log=args.transcript.with_name("filters.jsonl"))
        trace = None if one.result is None else one.result[0]
        made = {"error": one.error} if trace is None else trace.row()
        kept = {**setting, "budget": vars(budget), "workdir": str(args.workdir.absolute())}
        row = {"goal": args.goal, "setting": kept, "asked": one.transcript, "answer": made}
        file.write(json.dumps(row) + "\n")
    if trace is None:
        raise UserError(one.error)
    for step in trace.steps:
        arguments = json.dumps(dict(step.call.arguments))
        print(f"{step.call.name}({arguments}): {step.verdict}: {_line(step.result)}", file=sys.stderr)
    if trace.ended != "answer":
        print(f"({ENDS.get(trace.ended, f'the budget of {trace.ended} is used up')})", file=sys.stderr)
    if trace.read:
        print(
            f"(the answer may repeat what others wrote: it was written after reading {', '.join(trace.read)})",
            file=sys.stderr,
        )
    print("".join(c if c.isprintable() or c in "\n\t" else " " for c in trace.answer))  # no control codes of a stranger
    return 0


def _approve(tool: Any, call: Any) -> bool:
    """Ask the user whether a call may run; without a terminal it may not."""
    if not sys.stdin.isatty():
        return False
    print(f"{call.name} ({tool.effect}) with {json.dumps(dict(call.arguments))}", file=sys.stderr)
    return input("run it? [y/N] ").strip().lower() in ("y", "yes")


def _replay(path: Path, given: Any) -> int:
    from llmjax.agents import methods, react
    from llmjax.infer import asking

    same = different = rows = 0
    for number_, line in enumerate(storage.read_lines(path), start=1):
        try:
            row = json.loads(line)
            goal, setting, asked, before = (row[name] for name in ("goal", "setting", "asked", "answer"))
            method = setting.pop("method")
            setting.pop("workdir", None)
            settings = {**setting, "budget": react.Budget(**setting["budget"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number_} is no row of a transcript: {error}") from error
        rows += 1
        if "error" in before:
            continue
        settings |= react.recorded(before)
        try:
            trace, _ = asking.replay(methods.run(method, goal, methods.World(given), **settings), asked)
            now: Any = json.loads(json.dumps(trace.row()))
        except UserError as error:
            now = str(error)
        same, different = same + (now == before), different + (now != before)
        if now != before:
            print(f"{path}:{number_}: {now}")
    asking.check_rows(path, rows)
    print(f"{path}: {same:,} answers are the same, {different:,} differ")
    return 1 if different else 0


def _add_mcp(verb: argparse.ArgumentParser) -> None:
    add_tools(verb, needed=False)
    verb.add_argument("--allow-writes", action="store_true", help="also offer tools that write")
    verb.add_argument("--docs", type=Path, metavar="DIR", help="offer a search in these documents")
    verb.add_argument(
        "--index", type=Path, metavar="DIR", help="keep the index of --docs here (default: it is made at each start)"
    )
    verb.add_argument("--workdir", type=Path, metavar="DIR", help="offer the model of this run")
    verb.add_argument(
        "--port", type=number(int, Range(0, 65535)), metavar="N", help="serve streamable HTTP on this machine; 0: a free port (default: stdio)"
    )  # fmt: skip


def _mcp(args: argparse.Namespace, c: ConfigDict) -> int:
    if not (args.tools or args.docs or args.workdir):
        raise UserError("say what to offer: --tools FILE, --docs DIR or --workdir RUN")
    from llmjax.agents import mcp_server

    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):  # over stdio the output belongs to the protocol
            found = [*stack.enter_context(opened(args)), *_documents(args, stack), *_model(args, c)]
            server = mcp_server.make_server(mcp_server.offered(found, writes=args.allow_writes))
        if args.port is None:
            mcp_server.serve_stdio(server)
        else:
            mcp_server.serve_http(server, args.port)
    return 0


def _documents(args: argparse.Namespace, stack: contextlib.ExitStack) -> list[Any]:
    """The tool that searches --docs, whose index is brought up to date."""
    if args.docs is None:
        return []
    from llmjax.agents import mcp_server
    from llmjax.retrieve.documents.index import Index

    folder = args.index or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    with Index(folder) as index:
        index.update(args.docs)
    return [mcp_server.documents_tool(folder)]


def _model(args: argparse.Namespace, c: ConfigDict) -> list[Any]:
    """The tool that asks the model of --workdir."""
    if args.workdir is None:
        return []
    from llmjax.agents import mcp_server
    from llmjax.config import run_of
    from llmjax.infer.command import open_engine

    engine = open_engine(run_of(args.workdir), c, length=LENGTH, slots=1)
    return [mcp_server.model_tool(engine, max_new_tokens=c.generate.max_new_tokens)]


def _line(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= 100 else f"{shown[:99]}\u2026"


def _workdir(args: argparse.Namespace) -> Path:
    """The run where none is given."""
    if args.replay is None:
        return WORKDIR
    from llmjax.infer.asking import run_of

    return run_of(args.replay) or WORKDIR


VERBS = {
    "agent": Verb(
        "let a model act by calling functions, APIs and MCP servers, within permissions and a budget",
        _add, _agent, after=" The model is the run's (default: runs/assistant, or with --replay that of the transcript).",
        workdir=_workdir,
    ),
    "mcp": Verb(
        "offer tools, a search in documents or a model to other programs, as an MCP server", _add_mcp, _mcp, config="optional",
    ),
}  # fmt: skip
registered.TASKS |= {
    "bfcl_simple": "llmjax.agents.bfcl:simple",
    "bfcl_multiple": "llmjax.agents.bfcl:multiple",
    "bfcl_parallel": "llmjax.agents.bfcl:parallel",
    "bfcl_parallel_multiple": "llmjax.agents.bfcl:parallel_multiple",
    "bfcl_irrelevance": "llmjax.agents.bfcl:irrelevance",
    "bfcl_live_simple": "llmjax.agents.bfcl:live_simple",
}
