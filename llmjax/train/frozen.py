"""What training leaves as it is: the tree of parameters as two trees without a common path, trained and frozen.

What is frozen has no gradient, no optimizer state and no moving average, and is written once a run (checkpoint.py).
"""

import re
from collections.abc import Callable
from typing import Any

from flax import traverse_util

from llmjax.errors import UserError


def split(params: Any, pattern: str) -> tuple[Any, Any]:
    """(trained, frozen): two trees of which each parameter is in one.

    Args:
        params: nested dicts of parameters.
        pattern: a regular expression; parameters in whose path (names joined by slashes) it is found are trained.
            Empty: all are, and the second tree is {}.

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
    """The parameters whose paths are chosen, and the others, as two trees."""
    flat = traverse_util.flatten_dict(params, sep="/")
    parts = [{name: leaf for name, leaf in flat.items() if chosen(name) == wanted} for wanted in (True, False)]
    return traverse_util.unflatten_dict(parts[0], sep="/"), traverse_util.unflatten_dict(parts[1], sep="/")


def combine(trained: Any, frozen: Any) -> Any:
    """The whole tree again, for the model: the inverse of `split`."""
    if not frozen:
        return trained
    flat = traverse_util.flatten_dict(trained, sep="/") | traverse_util.flatten_dict(frozen, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
