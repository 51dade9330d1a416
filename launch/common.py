"""What the launchers share: where their own options end and the command begins, quoting, dry runs, and asking first.

Every launcher is called the same way, LAUNCHER OPTIONS -- VERB ...: what follows the two dashes is what one would type
after `llmjax` on a single machine. `--dry-run` prints exactly what would run, as text that a shell understands.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PORT = 8476  # of the coordinator, on machines that are the job's own
# With this variable a training that was told to stop, and has saved, ends with that status: not done, start it again.
STOPPED = {"LLMJAX_STOPPED_STATUS": "75"}
VERBS = ("run", "prepare", "tokenizer", "train", "eval", "generate", "report")


class Mistake(SystemExit):
    """Something to mend in the call: the launcher ends with the message and status 2."""

    def __init__(self, message: str) -> None:
        print(f"launch: {message}", file=sys.stderr)
        super().__init__(2)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options and the llmjax command behind `--`.

    Raises:
        Mistake: when there is no command, or its verb is none that can be launched.
    """
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and do nothing")
    words = list(argv)
    where = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:where])
    command = words[where + 1 :]
    if not command:
        raise Mistake("the command is missing: give it behind two dashes, such as -- run --config FILE --workdir DIR")
    if command[0] not in VERBS:
        raise Mistake(f"{command[0]!r} cannot be launched; write one of {', '.join(VERBS)} behind the two dashes")
    return args, command


def workdir(command: Sequence[str]) -> str:
    """The run's folder that the command names; launched jobs must, because all their processes share it."""
    for i, word in enumerate(command):
        if word.startswith("--workdir="):
            return word.partition("=")[2]
        if word == "--workdir" and i + 1 < len(command):
            return command[i + 1]
    raise Mistake("the command needs --workdir DIR, a folder that every process sees")


def line(words: Sequence[str], *, env: Mapping[str, str] | None = None) -> str:
    """A command as one line of shell, with the variables it is given in front."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()), shlex.join(words)])


def scalar(value: Any) -> str:
    """A value as YAML; JSON's scalars and lists are YAML's too."""
    return json.dumps(value)


def approve(what: str, *, yes: bool) -> None:
    """Ask before something that costs money. Raises Mistake when the answer is not yes."""
    if yes:
        return
    print(f"This costs money: {what}.", file=sys.stderr)
    if not sys.stdin.isatty():
        raise Mistake("give --yes to do it, or --dry-run to see what would run")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Mistake("nothing was done")


def call(words: Sequence[str], *, stdin: str | None = None) -> None:
    """Run a command, its output shown. Raises Mistake when it is not there, CalledProcessError when it fails."""
    print(f"launch: {line(words)}", file=sys.stderr, flush=True)
    try:
        subprocess.run(words, input=stdin, text=True, check=True)
    except FileNotFoundError:
        raise Mistake(f"{words[0]} is not installed, or not on the PATH") from None


def ask(words: Sequence[str]) -> str:
    """The output of a command, stripped; empty when it fails or says nothing."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        raise Mistake(f"{words[0]} is not installed, or not on the PATH") from None


def write(text: str, path: Path, *, executable: bool = False) -> None:
    """Write a file that the launcher made, and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if executable:
        path.chmod(0o755)
    print(f"launch: wrote {path}", file=sys.stderr)
