"""Chains of configs: files with `get_chain(arg="")`, and the folders of their runs (recipe/chain.py)."""

import json
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from llmjax.config.files import found, import_file, override
from llmjax.config.settings import base
from llmjax.config.values import check_keys
from llmjax.errors import UserError

CHAIN = "chain.json"  # in the folder of a chain: its links, each a run in a folder of that name
NAME = re.compile(r"[a-z][a-z0-9_-]*")


def is_chain(spec: str) -> bool:
    """Whether a spec names a file with a chain of configs, `get_chain(arg="")`."""
    path = found(spec.partition(":")[0])
    return path.suffix == ".py" and path.is_file() and "get_chain" in import_file(path).__dict__


def load_chain(spec: str, *, overrides: Sequence[str] = ()) -> dict[str, ConfigDict]:
    """The configs of a chain by name, in order, locked; errors as of `load`.

    Args:
        overrides: "LINK.KEY=VALUE" for one link, or "KEY=VALUE" for all of them.
    """
    file, colon, arg = spec.partition(":")
    get_chain = import_file(found(file)).__dict__["get_chain"]
    links: dict[str, ConfigDict] = get_chain(arg) if colon else get_chain()
    if wrong := [name for name in links if name in base() or not NAME.fullmatch(name)]:
        raise UserError(
            f"{file}: a link cannot be called {wrong[0]!r}: give it a name of small letters that is no group of settings"
        )
    for name, c in links.items():
        check_keys(c.to_dict())
        override(c, of_link(name, links, overrides))
    return links


def of_link(name: str, links: Collection[str], overrides: Sequence[str]) -> list[str]:
    """The overrides of one link of a chain: its own, and those of all links."""
    parts = [(text, *text.partition(".")) for text in overrides]
    return [rest if first == name else text for text, first, _, rest in parts if first == name or first not in links]


def run_of(path: Path) -> Path:
    """The run that a folder stands for: of a chain the last finished link, else the folder itself.

    Raises:
        UserError: for a chain without a finished link.
    """
    if not (path / CHAIN).is_file():
        return path
    links = json.loads((path / CHAIN).read_text(encoding="utf-8"))["links"]
    finished = [path / name for name in links if is_finished(path / name)]
    if not finished:
        raise UserError(f"no link of the chain {path} is finished: run `llmjax run --workdir {shlex.quote(str(path))}`")
    return finished[-1]


def is_finished(run: Path) -> bool:
    """Whether the training of a run has come to its end, as its stages.json says."""
    file = run / "stages.json"
    entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return bool(entries.get("train", {}).get("done"))
