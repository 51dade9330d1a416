"""Frozen parameters: the tree of parameters split in two, trained and frozen.

Frozen parameters have no gradient, no optimizer state and no moving average. They are written once a run (checkpoint.py),
or not at all where they are another checkpoint's (base.py).
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.model import adapters

HEADS = re.compile(
    r"^(value|classifier|pooler)/"
)  # heads that a trained model may lack; adapters are trained with them


def is_trained(c: ConfigDict) -> Callable[[str], bool]:
    """Whether the parameter of a path (names joined by slashes) is trained, by a config.

    With adapters these are their arrays, new heads, and what `optimizer.train` matches; without them what it matches, or
    all where it is empty. What `optimizer.freeze` matches is not trained.
    """
    wanted, never = c.optimizer.train, c.optimizer.freeze

    def trained(path: str) -> bool:
        if never and re.search(never, path):
            return False
        if c.model.adapter.kind == "none":
            return not wanted or re.search(wanted, path) is not None
        return adapters.is_adapter(path) or bool(HEADS.search(path) or (wanted and re.search(wanted, path)))

    return trained


def split(params: Any, c: ConfigDict) -> tuple[Any, Any]:
    """(trained, frozen): each parameter is in one of the two trees. The second is {} where all are trained.

    Raises:
        UserError: when no parameter is trained, `optimizer.train` matches none, or one to be trained is in few bits.
    """
    trained, frozen = divide(params, is_trained(c))
    paths, wanted = list(traverse_util.flatten_dict(params, sep="/")), c.optimizer.train
    if not trained or (wanted and not any(re.search(wanted, path) for path in paths)):
        asked = (
            f"optimizer.freeze={c.optimizer.freeze!r} matches all that would be trained"
            if not wanted or any(re.search(wanted, path) for path in paths)
            else f"optimizer.train={wanted!r} is in the path of no parameter"
        )
        raise UserError(f"{asked}, so nothing would be trained: paths are {', '.join(paths[:4])}, ...")
    for path, leaf in traverse_util.flatten_dict(trained, sep="/").items():
        if np.issubdtype(leaf.dtype, np.integer):
            raise UserError(
                f"optimizer.train={wanted!r} is in the path of {path}, which is in few bits and cannot be trained: narrow it, "
                "or set model.adapter.base_format=stored"
            )
    return trained, frozen


def divide(params: Any, chosen: Callable[[str], bool]) -> tuple[Any, Any]:
    """(chosen, others): two trees, divided by the paths of the parameters."""
    flat = traverse_util.flatten_dict(params, sep="/")
    parts = [{name: leaf for name, leaf in flat.items() if chosen(name) == wanted} for wanted in (True, False)]
    return traverse_util.unflatten_dict(parts[0], sep="/"), traverse_util.unflatten_dict(parts[1], sep="/")


def combine(trained: Any, frozen: Any) -> Any:
    """The whole tree, for the model: the inverse of `split`. A parameter that is in both is that of `frozen`."""
    if not frozen:
        return trained
    flat = traverse_util.flatten_dict(trained, sep="/") | traverse_util.flatten_dict(frozen, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
