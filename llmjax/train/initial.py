"""`train.init_from`: start from the weights of another run, after checking that model and tokenizer fit.

The weights are those that the other run was evaluated with: its moving average, if it kept one. They mean nothing with
another tokenizer, so the tokenizer stage takes over the other run's (`data/tokens.py: inherited`).
"""

import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config import changes
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.model import transformer
from llmjax.parallel.placement import path_name
from llmjax.train import checkpoint, folders


def read(c: ConfigDict, abstract: Any) -> Any:
    """The weights of `train.init_from` in the shapes, types and places of `abstract`. Raises UserError if they do not fit."""
    folder = folders.newest(Path(c.train.init_from))
    return checkpoint.read_params(folder, abstract, item="ema" if (folder / "ema").is_dir() else "params", cast=True)


def check(c: ConfigDict, tokenizer: Tokenizer | None) -> None:
    """Raise UserError unless `train.init_from` is there, of the same shapes, and for the same tokenizer.

    Args:
        tokenizer: the run's own; None: it is yet to be made.
    """
    where = c.train.init_from
    folder = folders.newest(Path(where))
    run, meta = folder.parent.parent, folders.read_meta(folder)
    theirs = config.from_json(json.dumps(meta["config"]))
    known = meta.get("tokenizer")
    if known is None and (run / "tokenizer").is_dir():  # an older checkpoint does not say
        known = load_tokenizer(run / "tokenizer").fingerprint
    if tokenizer is not None and known not in (None, tokenizer.fingerprint):
        raise UserError(
            f"train.init_from={where} was trained with another tokenizer than this run has, so every id would mean "
            f"something else: set --config.tokenizer.path={run / 'tokenizer'}"
        )
    ours = c.copy_and_resolve_references()
    with ours.unlocked():
        ours.model.vocab_size = c.model.vocab_size or theirs.model.vocab_size
    wrong = _first_difference(_shapes(theirs.model), _shapes(ours.model))
    if not wrong:
        return
    differences = changes.changed(*(config.flatten({"model": m.to_dict()}) for m in (theirs.model, ours.model)))
    keys = [key for key in differences if changes.class_of(key) == changes.IDENTITY]
    told = ", ".join(f"{key} is {differences[key][0]!r} there and {differences[key][1]!r} here" for key in keys[:4])
    raise UserError(
        f"train.init_from={where} has a model of other shapes ({wrong}): {told}; give the settings of its model, for "
        f"instance by --config {run / 'config.json'}"
    )


def _shapes(model: ConfigDict) -> dict[str, tuple[int, ...]]:
    tree = transformer.param_shapes(transformer.build(model))
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _first_difference(theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]) -> str:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            return f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
    return ""
