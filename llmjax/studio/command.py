"""The verb studio."""

import argparse
import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from llmjax.config.ranges import Range, number
from llmjax.errors import UserError
from llmjax.verb import Verb

IDLE_SECONDS = 900.0  # a model that nobody asks is freed after them
CONNECTIONS = 256


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "runs", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="the folder of runs (default: runs)"
    )
    verb.add_argument(
        "--data", action="append", type=Path, default=[], metavar="DIR", help="show the rows of data sets in this folder too; may be repeated"
    )  # fmt: skip
    verb.add_argument(
        "--port", type=number(int, Range(0, 65535)), default=8100, metavar="N",
        help="the port to listen on; 0: a free one (default: 8100)",
    )  # fmt: skip
    verb.add_argument(
        "--accelerator", action="store_true",
        help="load models of chats onto the accelerator (default: the processor, so that no run loses its device)",
    )  # fmt: skip


def _studio(args: argparse.Namespace, c: ConfigDict) -> int:
    """`llmjax studio DIR`."""
    from llmjax.serve.command import NEEDED

    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"the studio needs {', '.join(missing)}: pip install 'llmjax[serve]'")
    from llmjax.studio.places import Places
    from llmjax.studio.server import serve

    places = Places(args.runs, args.data)
    if not args.accelerator:
        from llmjax.sweep.cost import keep_off_accelerators

        keep_off_accelerators()
    serve(places, c, port=args.port, idle_seconds=IDLE_SECONDS, connections=CONNECTIONS)
    return 0


VERBS = {
    "studio": Verb(
        "show a folder of runs on this machine: live curves, batches, samples, sweeps, data, and a chat with any checkpoint",
        _add, _studio, config="optional", after=" It prints its URL; Ctrl-C ends it.",
    )
}  # fmt: skip
