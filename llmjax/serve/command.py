"""The verb serve."""

import argparse
import contextlib
import importlib.util
import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import storage
from llmjax.agents.command import add_budget, add_tools, add_writes, opened
from llmjax.config import run_of
from llmjax.config.ranges import Range, number
from llmjax.errors import UserError
from llmjax.infer.command import adapters_of, add_adapters
from llmjax.startup import timings
from llmjax.verb import Verb

NEEDED = ("starlette", "uvicorn", "httptools", "msgspec", "prometheus_client")
KEYS = "LLMJAX_API_KEYS"  # environment variable with API keys, with commas between


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--port", type=number(int, Range(0, 65535)), default=8000, metavar="N",
        help="the port to listen on; 0: a free one (default: 8000)",
    )  # fmt: skip
    verb.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help=f"requests need this key (Authorization: Bearer KEY); may be repeated; others can see arguments, {KEYS} not",
    )  # fmt: skip
    verb.add_argument(
        "--also", action="append", type=Path, default=[], metavar="DIR", help="serve the model of this run too; may be repeated"
    )  # fmt: skip
    add_adapters(
        verb,
        "serve these adapters of the model of --workdir too, under their names: a run, a folder in PEFT's format, or a persona; may be repeated",
    )
    verb.add_argument(
        "--db", action="append", type=Path, default=[], metavar="FILE",
        help="answer questions to this database too, see docs/ask.md: a file of SQLite, DuckDB or Parquet, or a folder of Parquet files; may be repeated",
    )  # fmt: skip
    verb.add_argument(
        "--docs", action="append", type=Path, default=[], metavar="DIR",
        help="answer questions to these documents too, which are read at the start if they changed; may be repeated",
    )  # fmt: skip
    add_tools(verb, needed=False)
    add_writes(verb)
    add_budget(verb)
    verb.add_argument("--name", metavar="NAME", help="what the model is called (default: the name of the run's folder)")
    verb.add_argument(
        "--log-texts", action="store_true", help="write prompts and answers to the log, which leaves them out"
    )


def _serve(args: argparse.Namespace, c: ConfigDict) -> int:
    """`llmjax serve --workdir RUN`."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"the server needs {', '.join(missing)}: pip install 'llmjax[serve]'")
    keys = [*args.api_key, *filter(None, (key.strip() for key in os.environ.get(KEYS, "").split(",")))]
    host = c.serve.host
    if not all(key and all("!" <= one <= "~" for one in key) for key in keys):
        raise UserError(
            "an API key is empty, or has other characters than ASCII letters, digits and signs: give one without spaces"
        )
    with timings.phase("import the library"):
        from llmjax.serve.app import make_app
        from llmjax.serve.guard import LOOPBACK
        from llmjax.serve.http import bind, serve
        from llmjax.serve.server import Server

    if host not in LOOPBACK and host != "::1" and not keys:
        raise UserError(
            f"serve.host={host} can be reached from other machines: give --api-key, or set {KEYS}, so that not everybody can use it"
        )
    listening = bind(host, args.port)
    with listening, _agents(args) as agents:
        port = listening.getsockname()[1]
        sources = _sources(args)
        models, make = _models(args, c)
        server = Server(
            models, make, c.serve, slots=c.infer.slots, sources=sources, agents=agents,
            feedback=args.workdir / "serve" / "preferences.jsonl", log_texts=args.log_texts,
        )  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        # A server for other machines has names that only its operator knows; there the keys protect it.
        hosts = {*LOOPBACK, shown, *c.serve.hosts} if host in LOOPBACK or c.serve.hosts else {"*"}
        app = make_app(server, hosts=hosts, keys=keys)
        names = ", ".join(server.models)
        serve(app, server, listening, lambda: print(f"serving {names} at http://{shown}:{port}", flush=True))
    return 0


def _models(args: argparse.Namespace, c: ConfigDict) -> tuple[list[Any], Any]:
    """The models to serve, and the function that makes their engines."""
    from llmjax.serve import personas
    from llmjax.serve.models import engines, open_model
    from llmjax.serve.server import with_adapters

    served: list[Any] = []
    adapters, found = _with_personas(args)
    for named in (args.named or args.workdir, *args.also):
        persona, first = personas.opened(named), not served
        folder = run_of(named) if persona is None else persona.model
        if not (folder / "config.json").is_file():
            raise UserError(f"{named} is not a run: it has no config.json")
        name = args.name if args.name and first else named.resolve().name
        one = open_model(folder, c, name=name, own=c if first else None, adapters=adapters if first else None)
        if persona is not None:
            one = replace(one, persona=persona)
        served += [one, *with_adapters(one)]
    served = personas.with_personas(served, found)
    if len({one.name for one in served}) < len(served):
        names = ", ".join(one.name for one in served)
        raise UserError(f"two of {names} have one name: rename a folder, or give --name or --adapter NAME=PATH")
    return served, lambda: engines(served, c)


def _with_personas(args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, Any]]:
    """The adapters of --adapter by name, those of personas among them, and the personas by name."""
    from llmjax.serve import personas

    given = adapters_of(args)
    found = {name: one for name, path in given.items() if (one := personas.opened(path)) is not None}
    base = str(run_of(args.named or args.workdir).resolve())
    for name, one in found.items():
        if (one.run and not one.adapters) or one.base != base:
            why = "has weights of its own" if one.base == base else f"stands on {one.base}, and not on {base}"
            raise UserError(f"the persona {name} {why}: give --also {shlex.quote(str(one.folder))}")
    runs = {name: found[name].folder / found[name].run if name in found else path for name, path in given.items()}
    return {name: path for name, path in runs.items() if name not in found or found[name].run}, found


def _sources(args: argparse.Namespace) -> list[Any]:
    """What questions can be asked of. Raises UserError for what cannot be read, and for two of one name."""
    from llmjax.retrieve.command import index_of
    from llmjax.serve import sources

    found = [sources.database(path) for path in args.db]
    found += [sources.documents(path, index_of(args.workdir, path)) for path in args.docs]
    names = [*(one.name for one in found), *(["tools"] if args.tools else [])]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two of --db, --docs and --tools have the name {twice[0]}: rename a file or a folder")
    return found


@contextlib.contextmanager
def _agents(args: argparse.Namespace) -> Iterator[Any]:
    """The agent with the tools of --tools, while their servers are connected; None: there are none."""
    if not args.tools:
        yield None
        return
    from llmjax.agents.react import Budget
    from llmjax.serve.agent import Agents

    folder = args.workdir / "agent"
    with storage.appending(folder / "transcript.jsonl"):  # or what tools did would be lost
        pass
    with opened(args, folder / "tools.json") as tools:
        budget = Budget(args.calls, args.seconds, args.tokens)
        yield Agents(tools, budget, args.allow_writes, folder / "transcript.jsonl")


VERBS = {
    "serve": Verb(
        "answer requests on this machine: OpenAI's interface, and a page to chat", _add, _serve,
        after=" It prints its URL when it is ready; Ctrl-C waits for the answers and ends it.",
    )
}  # fmt: skip
