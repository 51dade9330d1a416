"""Frozen parameters: the tree of parameters split in two, trained and frozen.

Frozen parameters have no gradient, no optimizer state and no moving average, and are written once a run (checkpoint.py).
"""

import re
from collections.abc import Callable
from typing import Any

from flax import traverse_util

from llmjax.errors import UserError


def split(params: Any, pattern: str) -> tuple[Any, Any]:
    """(trained, frozen): each parameter is in one of the two trees.

    Args:
        params: nested dicts of parameters.
        pattern: a regular expression; it selects the parameters to train by their paths (names joined by slashes).
            Empty: all are trained, and the second tree is {}.

    Raises:
        UserError: when no parameter matches.
    """
    if not pattern:
        return params, {}
    trained, frozen = divide(params, lambda name: bool(re.search(pattern, name)))
    if not trained:
        paths = list(traverse_util.flatten_dict(params, sep="/"))
        raise UserError(
            f"optimizer.train={pattern!r} is in the path of no parameter, so nothing would be trained: paths are "
            f"{', '.join(paths[:4])}, ..."
        )
    return trained, frozen


def divide(params: Any, chosen: Callable[[str], bool]) -> tuple[Any, Any]:
    """(chosen, others): two trees, divided by the paths of the parameters."""
    flat = traverse_util.flatten_dict(params, sep="/")
    parts = [{name: leaf for name, leaf in flat.items() if chosen(name) == wanted} for wanted in (True, False)]
    return traverse_util.unflatten_dict(parts[0], sep="/"), traverse_util.unflatten_dict(parts[1], sep="/")


def combine(trained: Any, frozen: Any) -> Any:
    """The whole tree, for the model: the inverse of `split`."""
    if not frozen:
        return trained
    flat = traverse_util.flatten_dict(trained, sep="/") | traverse_util.flatten_dict(frozen, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
