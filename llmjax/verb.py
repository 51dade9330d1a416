"""A verb of the command: what a room registers in the table of `llmjax/cli.py`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from ml_collections import ConfigDict


@dataclass(frozen=True)
class Verb:
    """What a verb is for, which arguments it takes, and what it does. Nothing heavy is imported before it runs."""

    about: str
    add: Callable[[argparse.ArgumentParser], None]
    # (arguments, config) -> the exit status, or None: the stage of the same name is to run. Where the verb has a config,
    # `arguments.workdir` is the run's folder.
    run: Callable[[argparse.Namespace, ConfigDict], int | None]
    config: str = "run"  # "run": --config, or that of --workdir; "file": --config; "optional": or the base; "none"
    after: str = ""  # what the help says behind `about`
