"""Shared by the launchers: parsing, quoting, dry runs, and the question before anything that costs money.

Every launcher is called as LAUNCHER OPTIONS -- VERB ...; behind the two dashes are the words that follow `llmjax` on a
single machine. `--dry-run` prints exactly what would run, as text for a shell. `--commands FILE` in place of the two
dashes launches every line of a file, as `llmjax sweep --launcher` writes it.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PORT = 8476  # of the coordinator, on machines that only this job uses
# With this variable a training that was told to stop ends with that status after it has saved: it is to start again.
STOPPED = {"LLMJAX_STOPPED_STATUS": "75"}
VERBS = (
    "run", "prepare", "tokenizer", "train", "eval", "generate", "report", "sweep", "rows",
    "cpt", "sft", "task", "reward", "dpo", "kto", "distill", "grpo", "ppo",
)  # fmt: skip


class Mistake(SystemExit):
    """A mistake of the user: the launcher prints the message and ends with status 2."""

    def __init__(self, message: str) -> None:
        print(f"launch: {message}", file=sys.stderr)
        super().__init__(2)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the launcher, and the llmjax command behind `--`.

    Raises:
        Mistake: if there is no command, or its verb cannot be launched.
    """
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and do nothing else")
    words = list(argv)
    where = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:where])
    command = words[where + 1 :]
    if not command:
        raise Mistake("the command is missing: write it behind two dashes, such as -- run --config FILE --workdir DIR")
    if command[0] not in VERBS:
        raise Mistake(f"{command[0]!r} cannot be launched; write one of {', '.join(VERBS)} behind the two dashes")
    return args, command


def each(main: Callable[[Sequence[str]], int], argv: Sequence[str], *, unnamed: bool = False) -> int:
    """Launch one command, or with `--commands FILE` each line of a file: the words behind `--`, a command a line.

    The jobs of a file are named NAME-0, NAME-1, ... after --name, unless they are `unnamed`. The first that
    fails ends the list with its status.
    """
    words = list(argv)
    if "--commands" not in words:
        return main(words)
    place = words.index("--commands")
    if "--" in words or place + 1 == len(words):
        raise Mistake("write --commands FILE, or one command behind two dashes, but not both")
    lines = Path(words[place + 1]).read_text(encoding="utf-8").splitlines()
    options = [*words[:place], *words[place + 2 :]]
    name = options[options.index("--name") + 1] if "--name" in options else "llmjax"
    for index, text in enumerate(lines):
        status = main([*options, *([] if unnamed else ["--name", f"{name}-{index}"]), "--", *shlex.split(text)])
        if status:
            return status
    return 0


def workdir(command: Sequence[str]) -> str:
    """The --workdir of the command. A launched job needs one, because all its processes share it."""
    for i, word in enumerate(command):
        if word.startswith("--workdir="):
            return word.partition("=")[2]
        if word == "--workdir" and i + 1 < len(command):
            return command[i + 1]
    raise Mistake("the command needs --workdir DIR, a folder that every process sees")


def line(words: Sequence[str], *, env: Mapping[str, str] | None = None) -> str:
    """A command as one line for a shell, with its environment variables in front."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()), shlex.join(words)])


def scalar(value: Any) -> str:
    """A value as YAML, of which JSON is a part."""
    return json.dumps(value)


def approve(what: str, *, yes: bool) -> None:
    """Ask before something that costs money. Raises Mistake unless the answer is yes."""
    if yes:
        return
    print(f"This costs money: {what}.", file=sys.stderr)
    if not sys.stdin.isatty():
        raise Mistake("give --yes to do it, or --dry-run to see what would run")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Mistake("nothing was done")


def call(words: Sequence[str], *, stdin: str | None = None) -> None:
    """Run a command and show its output. Raises Mistake if it does not exist, CalledProcessError if it fails."""
    print(f"launch: {line(words)}", file=sys.stderr, flush=True)
    try:
        subprocess.run(words, input=stdin, text=True, check=True)
    except FileNotFoundError:
        raise Mistake(f"{words[0]} is not installed, or not on the PATH") from None


def ask(words: Sequence[str]) -> str:
    """The output of a command, stripped; "" if it fails. Raises Mistake if it does not exist."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        raise Mistake(f"{words[0]} is not installed, or not on the PATH") from None


def write(text: str, path: Path, *, executable: bool = False) -> None:
    """Write a file and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if executable:
        path.chmod(0o755)
    print(f"launch: wrote {path}", file=sys.stderr)
