"""Folders of checkpoints: their steps and their metadata. Nothing here needs orbax or jax."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from llmjax.config.chains import run_of
from llmjax.errors import UserError

FROZEN = "frozen"  # beside the checkpoints: the parameters that are not trained


class CheckpointError(UserError):
    """A checkpoint cannot be read; the message says which one and what to do."""


class CheckpointMismatch(CheckpointError):  # noqa: N818
    """A sound checkpoint has another model or optimizer than the config."""


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, newest first."""
    return sorted((int(p.name) for p in folder.glob("*") if p.is_dir() and p.name.isdigit()), reverse=True)


def read_meta(path: Path) -> dict:
    """The JSON part of the checkpoint folder `path`. Raises CheckpointError."""
    try:
        return json.loads((path / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({error.__class__.__name__}: {error})") from error


def newest(run: Path, *, folders: Iterable[str] = ("checkpoints",)) -> Path:
    """The newest checkpoint folder of a run, or `run` itself when it is a checkpoint.

    Raises:
        CheckpointError: when there is none.
    """
    run = run_of(run)
    if (run / "meta").is_dir() and (run / "params").is_dir():
        return run
    for name in folders:
        for step in steps_in(run / name):
            return run / name / str(step)
    if not run.exists():
        raise CheckpointError(
            f"there is no run or checkpoint {run}: train one with `llmjax train` or give another path"
        )
    raise CheckpointError(
        f"there is no checkpoint in {run}: train it first with `llmjax train --workdir {shlex.quote(str(run))}`"
    )


def newest_of(key: str, path: str) -> Path:
    """`newest` of the run that a setting names. Raises CheckpointError, which tells the setting."""
    try:
        return newest(Path(path))
    except CheckpointError as error:
        moved = (
            "" if Path(path).exists() else f"; if it was moved, set --config.{key} to its folder, and the run goes on"
        )
        raise CheckpointError(f"{key}={path}: {error}{moved}") from error
