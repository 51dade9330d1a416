"""A verb of the command, which a room registers in the table of `llmjax/cli.py`."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from llmjax.errors import UserError

# Arguments of all verbs that name what is written; and texts that name a file to read, up to these characters.
WRITES = ("out", "to", "transcript", "write_config", "save_executable")
ENDS = {"config": ":", "tools": "@http", "json_schema": "\0", "grammar": "\0"}
FOLDERS = ("docs", "texts")  # arguments whose folders are read with all files in them


@dataclass(frozen=True)
class Verb:
    """A verb: its help, its arguments and its function. Nothing heavy is imported before it runs."""

    about: str
    add: Callable[[argparse.ArgumentParser], None]
    # (arguments, config) -> the exit status; None: run the stage of the same name. For a verb with a config,
    # `arguments.workdir` is the run's folder.
    run: Callable[[argparse.Namespace, ConfigDict], int | None]
    whole: bool = False  # when `run` returns None, the whole recipe runs, not the stage of the verb's name
    config: str = "run"  # "run": --config, or that of --workdir; "file": --config; "optional": or the base; "none"
    after: str = ""  # the help after `about`
    workdir: Callable[[argparse.Namespace], Path] | None = None  # the run where none is given; None: runs/NAME


def check_paths(args: argparse.Namespace, **more: Path) -> None:
    """Refuse a file that is to be written and is read too, or in a folder that is, or is to be written twice, whatever its path.

    Args:
        args: the arguments of a verb. Every path in them that `WRITES` does not name is read.
        more: files that the verb writes beside those of its arguments.

    Raises UserError. Nothing is read.
    """
    given = vars(args)
    writes = {name: path for name, path in given.items() if name in WRITES and path is not None} | more
    reads = [
        (name, Path(str(one).partition(ENDS.get(name, "\0"))[0]))
        for name, value in given.items()
        if name not in WRITES and name != "workdir"
        for one in (value if isinstance(value, list) else [value])
        if isinstance(one, Path) or (one and name in ENDS)
    ]
    earlier = list(reads)
    for name, path in writes.items():
        for other, known in earlier:
            if _same(path, known):
                what = "is read" if (other, known) in reads else "is written too"
                said = name.replace("_", " ") if name in more else f"--{name.replace('_', '-')}"
                raise UserError(f"{said} {path} is the file of {other}, which {what}: give another")
        earlier.append((name, path))
        for other, folder in reads if name not in more else ():
            if other in FOLDERS and folder.is_dir() and _within(path, folder):
                said = f"--{name} {path} lies in {folder}, the folder of {other}, and would be read there the next time"
                raise UserError(f"{said}: give another")


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are of one file or folder, which may not exist yet; a device such as /dev/null may be shared."""
    if one.exists() and not (one.is_file() or one.is_dir()):
        return False
    if one.exists() and other.exists():
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _within(path: Path, folder: Path) -> bool:
    """Whether a path, which may not exist yet, is below a folder."""
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
