"""Keys and values: setting keys by dotted names, configs as JSON, durations."""

import ast
import difflib
import functools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from llmjax.config.settings import base
from llmjax.errors import UserError


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    if text.startswith("[") and text.endswith("]"):  # a shell strips the quotes of [a.txt,b.txt]
        return tuple(part.strip() for part in text[1:-1].split(",") if part.strip())
    return {"true": True, "false": False}.get(text.lower(), text)


@functools.cache
def _defaults() -> Mapping[str, Any]:
    """`base()` as dotted keys and values. Kept, because reading a config asks once for each key."""
    return MappingProxyType(flatten(base().to_dict()))


def set_key(c: ConfigDict, key: str, value: Any) -> None:
    """Set one dotted key in place, with its type in `base()`. Raises UserError that names the closest key."""
    default = _defaults().get(key)
    if default is None:
        raise UserError(unknown_key(key))
    *parents, last = key.split(".")
    node = c
    for parent in parents:
        node = node[parent]
    with node.unlocked():
        node[last] = _coerce(key, value, default)


def _coerce(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        if isinstance(value, str):
            value = (value,)
        if isinstance(value, (list, tuple)):
            return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(default, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():  # 1e6
            return int(value)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    kind = "list" if isinstance(default, tuple) else type(default).__name__
    example = list(default) if isinstance(default, tuple) else default
    raise UserError(f"{key}={value!r}: this key takes a {kind}, such as {example!r}")


def unknown_key(key: str) -> str:
    """The message for a key that does not exist."""
    known = list(_defaults())
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    last = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return (
        f"there is no config key {key}; the closest is {' or '.join(last or near)}. `llmjax config` lists all of them."
    )


def check_keys(tree: dict) -> None:
    """Raise UserError unless the keys of `tree` are exactly those of `base()`, each with a value of its type."""
    missing = _check_known(tree)
    if missing:
        raise UserError(f"the config lacks {', '.join(missing)}: start from llmjax.config.base(), which has every key")


def _check_known(tree: dict) -> list[str]:
    """The keys of `base()` that `tree` lacks. Raises UserError for unknown keys and for values of other types."""
    known, given = _defaults(), flatten(tree)
    for key, value in given.items():
        if key not in known:
            raise UserError(unknown_key(key))
        _coerce(key, value, known[key])
    return sorted(known.keys() - given.keys())


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def to_json(c: ConfigDict) -> str:
    """The config as JSON text that `from_json` reads back unchanged."""
    return json.dumps(c.to_dict(), indent=1) + "\n"


def from_json(text: str) -> ConfigDict:
    """A config from the text of `to_json`, also of an earlier version.

    Keys that the text lacks are newer. They get their defaults, by rule the behaviour of the earlier version, and one
    line on standard error says so, once a process.

    Raises UserError for keys that this version does not have.
    """
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise UserError(f"a config is a JSON object, not {text.strip()[:40]!r}")
    missing = _check_known(tree)
    if missing:
        _say_missing(tuple(missing))
    c = base()
    for key, value in flatten(tree).items():
        set_key(c, key, value)
    return c


@functools.cache
def _say_missing(keys: tuple[str, ...]) -> None:
    shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    print(f"the config is of an earlier version of llmjax: {shown} have their defaults, as before", file=sys.stderr)


def differences(a: ConfigDict, b: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """The keys on which two configs differ: key -> both values."""
    flat_a, flat_b = flatten(a.to_dict()), flatten(b.to_dict())
    return {k: (flat_a[k], flat_b[k]) for k in flat_a if flat_a[k] != flat_b[k]}


def parse_arg(arg: str, *, choices: Sequence[str] = (), **defaults: Any) -> ConfigDict:
    """The argument of a config file, `--config FILE:medium,width=64`, as a ConfigDict.

    `choices` are the bare words allowed, of which the one given (or the first) becomes `.choice`;
    `defaults` are the `key=value` pairs allowed. Raises UserError for anything left over.
    """
    result = ConfigDict({"choice": choices[0] if choices else "", **defaults})
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if not equals and key in choices:
            result.choice = key
        elif equals and key in defaults:
            result[key] = type(defaults[key])(literal(text))
        else:
            allowed = [*choices, *(f"{k}={v}" for k, v in defaults.items())]
            raise UserError(f"config argument {part!r} is not known; this file takes: {', '.join(allowed) or 'none'}")
    return result


SECONDS = {"s": 1, "second": 1, "minute": 60, "hour": 3600, "day": 86400}


def parse_duration(value: str | int) -> tuple[float, str]:
    """An amount and its unit: step, token, epoch, % or second.

    `value` is an integer (steps) or text: "500 steps", "30M tokens", "1.5 epochs", "10%", "5 minutes". Numbers may end in
    k, M, B or T. Units of time are s, seconds, minutes, hours and days. Raises UserError for anything else.
    """
    units = r"steps?|tokens?|epochs?|s|seconds?|minutes?|hours?|days?|%|"
    number = r"[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?(?:e[0-9]+)?"
    match = re.fullmatch(rf"({number})\s*([kMBT]?)\s*({units})", str(value).strip())
    if not match or not math.isfinite(float(match[1]) * 1e12):
        raise UserError(
            f"duration {value!r} is not understood: write 500, '500 steps', '30M tokens', '1.5 epochs', '10%' or "
            "'5 minutes'"
        )
    amount = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]]
    unit = match[3] if match[3] == "s" else match[3].rstrip("s") or "step"
    return (amount * SECONDS[unit], "second") if unit in SECONDS else (amount, unit)


def duration(value: str | int, *, tokens_per_step: int, tokens_per_epoch: int = 0, total_steps: int = 0) -> int:
    """A duration, as `parse_duration` reads it, in steps, rounded to the nearest; percentages are of `total_steps`.

    Raises UserError for text that cannot be read, and for a unit without its argument.
    """
    amount, unit = parse_duration(value)
    if unit == "token":
        return round(amount / tokens_per_step)
    if unit == "epoch":
        if not tokens_per_epoch:
            raise UserError(f"duration {value!r}: epochs are not known here; give steps or tokens")
        return round(amount * tokens_per_epoch / tokens_per_step)
    if unit == "second":
        raise UserError(
            f"duration {value!r}: only train.duration may be a time, which becomes a number of steps when training starts; "
            "give steps, tokens, epochs or a percentage here"
        )
    if unit == "%":
        if not total_steps:
            raise UserError(f"duration {value!r}: a percentage needs a total; give steps, tokens or epochs here")
        return round(amount / 100 * total_steps)
    return round(amount)
