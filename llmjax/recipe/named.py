"""Runs that settings name: a start, a teacher, reward models. A run that was moved is known by its weights.

stages.json keeps a fingerprint of the weights of each, beside the path by which the settings name it.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmjax.errors import UserError

KEYS = ("train.init_from", "objective.distill.teacher")
REWARDS, MODEL = "rollout.rewards", "model:"  # of the rewards those that are "model:RUN" or "model:RUN=weight"


def paths(settings: Mapping[str, Any]) -> list[str]:
    """The paths of the runs that settings (dotted keys) name, each once."""
    found = [settings.get(key, "") for key in KEYS]
    found += [reward_path(text) for text in settings.get(REWARDS, ())]
    return list(dict.fromkeys(filter(None, found)))


def reward_path(text: str) -> str:
    """The run of an entry of `rollout.rewards`; "" for a function."""
    where = text.rpartition("=")[0] or text
    return where.removeprefix(MODEL) if where.startswith(MODEL) else ""


def fingerprints(settings: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """path -> the fingerprint that is known, or that is now, of the runs that settings name."""
    return {path: known.get(path) or fingerprint(path) for path in paths(settings)}


def fingerprint(path: str) -> str:
    """What tells the weights of a run from others; "" if it has none, or is not there."""
    from llmjax.train import base, folders

    try:
        folder = folders.newest(Path(path))
    except UserError:
        return ""
    item = base.item_of(folder)
    return base.fingerprint(folder, item) if (folder / item).is_dir() else ""


def as_before(
    settings: Mapping[str, Any], before: Mapping[str, Any], known: Mapping[str, str], now: Callable[[str], str]
) -> dict[str, Any]:
    """The settings with the paths that they had before, where these mean the same folders or the same weights.

    Args:
        known: path -> the fingerprint that was noted.
        now: path -> its fingerprint now.
    """
    moved = dict(_moved(settings, before, known, now))
    found = {key: moved.get(value, value) if key in KEYS else value for key, value in settings.items()}
    if REWARDS in found:
        found[REWARDS] = [_with_path(text, moved) for text in found[REWARDS]]
    return found


def _moved(
    settings: Mapping[str, Any], before: Mapping[str, Any], known: Mapping[str, str], now: Callable[[str], str]
) -> Iterator[tuple[str, str]]:
    """(path now, path before) of runs that are named by another path than before."""
    named = paths(before)
    for path in paths(settings):
        if path in named:
            continue
        for old in named:
            if Path(old).resolve() == Path(path).resolve() or (
                known.get(old) and known[old] == (now(path) or known.get(path))
            ):
                yield path, old
                break


def _with_path(text: str, moved: Mapping[str, str]) -> str:
    path = reward_path(text)
    return text.replace(f"{MODEL}{path}", f"{MODEL}{moved[path]}", 1) if path in moved else text
