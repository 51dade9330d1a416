"""From a config file, its argument and the command line to one locked ConfigDict."""

import difflib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax.config.checks import check
from llmjax.config.values import check_keys, from_json, literal, set_key
from llmjax.errors import UserError


def load(spec: str, *, overrides: Sequence[str] = ()) -> ConfigDict:
    """Read `FILE` or `FILE:ARG` (or a run's config.json), apply `key=value` overrides and return it locked.

    Args:
        spec: a Python file with `get_config(arg="")`, optionally followed by `:arg`; or a `config.json`. Without a
            checkout, configs/ are those of the installed package.
        overrides: strings like `"train.batch_size=8"`; values are Python literals, anything else is a string.

    Raises:
        UserError: for a file that is not there or has no `get_config`, an unknown key, a value of the wrong
            type, or settings that contradict each other; the message says how to mend it.
    """
    file, colon, arg = spec.partition(":")
    path = found(file)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " See the files in configs/."
        raise UserError(f"there is no config file {file}.{hint}")
    if path.suffix == ".json":
        try:
            c = from_json(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} is damaged ({error}): give --config with the file that it was made from"
            ) from error
    else:
        names = import_file(path).__dict__
        get_config = names.get("get_config")
        if get_config is None:
            if "get_chain" in names:
                raise UserError(
                    f"{file} is a chain of configs: give it to `llmjax run`, and to other verbs a link's --workdir"
                )
            raise UserError(f"{file} has no function get_config(arg=''); see configs/quickstart.py for an example")
        c = get_config(arg) if colon else get_config()
        check_keys(c.to_dict())
    return override(c, overrides)


def override(c: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Apply `key=value` to a config in place, check it, and return it locked. Raises UserError as `load` does."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE")
        set_key(c, key, literal(value))
    check(c)
    return c.lock()


def derivation(spec: str) -> str:
    """The derivation of a config file's values: its `table(arg)`; "" if it has none."""
    file, _, arg = spec.partition(":")
    table = None if file.endswith(".json") else import_file(found(file)).__dict__.get("table")
    return table(arg) if table is not None else ""


def sweep(spec: str) -> Any:
    """What a config file says of its sweep: the value of its `get_sweep(arg)`; None if it has none."""
    file, colon, arg = spec.partition(":")
    made = None if file.endswith(".json") else import_file(found(file)).__dict__.get("get_sweep")
    if made is None:
        return None
    return made(arg) if colon else made()


def found(file: str) -> Path:
    """The file of that name; outside of a checkout, configs/... of the installed package."""
    here, packaged = Path(file), Path(__file__).parents[1] / file
    return packaged if here.parts[:1] == ("configs",) and not here.parent.is_dir() else here


def import_file(path: Path) -> Any:
    """The module of a config file."""
    module_spec = importlib.util.spec_from_file_location(f"llmjax_config_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module
