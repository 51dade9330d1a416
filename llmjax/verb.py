"""A verb of the command, which a room registers in the table of `llmjax/cli.py`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from ml_collections import ConfigDict


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
