"""`train.init_from`: start from the weights of another run, after checking that model and tokenizer fit.

The weights are those that the other run was evaluated with: its moving average, if it kept one. They mean nothing with
another tokenizer, so the tokenizer stage takes over the other run's (`data/tokens.py: inherited`).
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config import changes
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.model import transformer
from llmjax.parallel.placement import path_name
from llmjax.train import checkpoint, folders
from llmjax.train.frozen import divide

HEAD = re.compile(r"^(value|classifier|pooler)/")  # parameters that a trained model may get, or lose


def read(c: ConfigDict, abstract: Any) -> Any:
    """The weights of `train.init_from` in the shapes, types and places of `abstract`; those that are new are left out.

    Raises UserError if they do not fit.
    """
    folder = folders.newest(Path(c.train.init_from))
    new, unused = _heads(c)
    wanted = traverse_util.flatten_dict(divide(abstract, new.__contains__)[1], sep="/")
    everywhere = NamedSharding(next(iter(wanted.values())).sharding.mesh, PartitionSpec())
    whole = wanted | {n: jax.ShapeDtypeStruct(shape, "float32", sharding=everywhere) for n, shape in unused.items()}
    item = "ema" if (folder / "ema").is_dir() else "params"
    found = checkpoint.read_params(folder, traverse_util.unflatten_dict(whole, sep="/"), item=item, cast=True)
    return divide(found, unused.__contains__)[1]


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
    new, unused = _heads(ours)
    there = {name: shape for name, shape in _shapes(theirs.model).items() if name not in unused}
    wrong = _first_difference(there, {name: shape for name, shape in _shapes(ours.model).items() if name not in new})
    if not wrong:
        return
    differences = changes.changed(*(config.flatten({"model": m.to_dict()}) for m in (theirs.model, ours.model)))
    keys = [key for key in differences if changes.class_of(key) == changes.IDENTITY]
    told = ", ".join(f"{key} is {differences[key][0]!r} there and {differences[key][1]!r} here" for key in keys[:4])
    raise UserError(
        f"train.init_from={where} has a model of other shapes ({wrong}): {told}; give the settings of its model, for "
        f"instance by --config {run / 'config.json'}"
    )


def _heads(c: ConfigDict) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """The paths of parameters of heads that begin anew, and the shapes of those of `train.init_from` that are not used."""
    theirs = _model_of(folders.newest(Path(c.train.init_from)))
    with theirs.unlocked():
        theirs.vocab_size = theirs.vocab_size or c.model.vocab_size
    ours = c.model.copy_and_resolve_references()
    with ours.unlocked():
        ours.vocab_size = theirs.vocab_size
    there, here = _shapes(theirs), _shapes(ours)
    differ = {name for name in there.keys() | here.keys() if HEAD.search(name) and there.get(name) != here.get(name)}
    return differ & here.keys(), {name: there[name] for name in differ & there.keys()}


def _model_of(folder: Path) -> ConfigDict:
    """The settings under `model` of a checkpoint."""
    return config.from_json(json.dumps(folders.read_meta(folder)["config"])).model


def inherited(c: ConfigDict, given: Collection[str]) -> ConfigDict:
    """The config with the settings under `model` of `train.init_from`, except those that are `given` (dotted keys).

    A setting of `c` that has not its default counts as given.
    """
    if not c.train.init_from:
        return c  # the stages that need it say so
    defaults = config.flatten({"model": config.base().model.to_dict()})
    ours = config.flatten({"model": c.model.to_dict()})
    theirs = config.flatten({"model": _model_of(folders.newest(Path(c.train.init_from))).to_dict()})
    taken = {key: value for key, value in theirs.items() if key not in given and ours[key] == defaults[key]}
    return config.override(c, [f"{key}={value!r}" for key, value in taken.items()])


def _shapes(model: ConfigDict) -> dict[str, tuple[int, ...]]:
    tree = transformer.param_shapes(transformer.build(model))
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _first_difference(theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]) -> str:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            return f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
    return ""
