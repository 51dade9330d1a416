"""`train.init_from`: start from the weights of another run, after checking that model and tokenizer fit.

The weights are those that the other run was evaluated with: its moving average, if it kept one. They mean nothing with
another tokenizer, so the tokenizer stage takes over the other run's (`data/tokenizer_stage.py`, `chosen`).

Adapters of the other run go on where this run has the same ones. Otherwise they are merged into the weights, and adapters
of this run begin anew. New are also heads that the other model lacks, and a head of its own where the other's is tied to the
embedding, whose values it begins with.
"""

import functools
import json
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config import changes
from llmjax.data import tokenizer_stage
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_extension import Extension
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.model import adapters, blockwise, transformer
from llmjax.parallel import placement
from llmjax.parallel.placement import path_name
from llmjax.train import base, checkpoint, derived, folders, vocabulary
from llmjax.train.frozen import HEADS, split


def read(c: ConfigDict, abstract: Any, *, extension: Extension | None = None) -> Any:
    """The weights of `train.init_from` in the shapes, types and places of `abstract`; those that are new are left out.

    DoRA's magnitudes are never new: they begin with the norms of the kernels.

    Args:
        extension: what the run's tokenizer has beyond that of `train.init_from`.

    Raises UserError if they do not fit.
    """
    folder = folders.newest(Path(c.train.init_from))
    if extension is not None:
        stored = vocabulary.stored(abstract, rows=_model_of(folder, like=c).vocab_size)
        return vocabulary.extended(read(c, stored), abstract, extension)
    new, wanted = new_parameters(c), traverse_util.flatten_dict(abstract, sep="/")
    norms = {name for name in new if name.endswith("/magnitude")}
    asked = traverse_util.unflatten_dict({name: leaf for name, leaf in wanted.items() if name not in new}, sep="/")
    theirs, item = _model_of(folder, like=c), base.item_of(folder)
    if not asked:
        made: Any = {}
    elif _goes_on(theirs, c.model):
        known: Collection[str] = _shapes(theirs)
        made = derived.read(
            asked, known, functools.partial(checkpoint.read_params, folder, item=item, cast=True, part=True)
        )
    else:
        params = _merged(c, folder, theirs, asked)
        made = derived.read(asked, params, lambda part: _picked(params, part))
    flat = traverse_util.flatten_dict(made, sep="/")
    for name in norms & wanted.keys():
        flat[name] = _norms(flat, name, wanted[name])
    return traverse_util.unflatten_dict(flat, sep="/")


def begun(abstract: Any, found: Any) -> Any:
    """The parameters that were read, and new adapters as they compute at the start: what they add is 0."""
    made = traverse_util.flatten_dict(found, sep="/")
    for name, leaf in traverse_util.flatten_dict(abstract, sep="/").items():
        if name not in made and adapters.is_adapter(name):
            made[name] = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    return traverse_util.unflatten_dict(made, sep="/")


def base_of(c: ConfigDict, run: Path, frozen: Any) -> base.Base | None:
    """The checkpoint that has all frozen parameters of a run with adapters; None: the run must write them itself.

    Args:
        frozen: them, or their abstract form.
    """
    if c.model.adapter.kind == "none" or not c.train.init_from or tokenizer_stage.extends(c):
        return None
    folder = folders.newest(Path(c.train.init_from))
    names = traverse_util.flatten_dict(frozen, sep="/")
    kernels = tuple(sorted(name.rpartition("/")[0] for name in names if name.endswith(blockwise.SCALE)))
    form = c.model.adapter.base_format if kernels else "stored"
    theirs = _model_of(folder, like=c)
    if theirs.adapter.kind != "none":
        kept = base.read(folder.parent)
        moved = checkpoint.stored(folder, base.item_of(folder)) & names.keys()  # trained there, frozen here
        if kept is None or moved or not _goes_on(theirs, c.model):
            return None
        folder = kept.folder(folder.parent)
    return base.of_checkpoint(folder, run=run, form=form, kernels=kernels)


def _goes_on(theirs: ConfigDict, ours: ConfigDict) -> bool:
    """Whether the arrays of a model are read as they are: it has no adapters, or the same."""
    return theirs.adapter.kind == "none" or adapters.same_arrays(theirs.adapter, ours.adapter)


def _merged(c: ConfigDict, folder: Path, theirs: ConfigDict, like: Any) -> dict[str, Any]:
    """path -> the parameters of a run with adapters, which are merged."""
    shapes = transformer.param_shapes(transformer.build(theirs))
    mesh = jax.tree.leaves(like)[0].sharding.mesh
    places = placement.parameter_shardings(shapes, mesh, rules=c.parallel.rules)
    abstract = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    params = checkpoint.read_params(folder, abstract, item=base.item_of(folder), cast=True)
    whole = jax.jit(functools.partial(adapters.merged, theirs.adapter))(params)
    return traverse_util.flatten_dict(whole, sep="/")


def _picked(params: dict[str, Any], like: Any) -> Any:
    wanted = traverse_util.flatten_dict(like, sep="/")
    found = {name: jax.device_put(params[name].astype(leaf.dtype), leaf.sharding) for name, leaf in wanted.items()}
    return traverse_util.unflatten_dict(found, sep="/")


def _norms(flat: dict[str, Any], name: str, like: Any) -> jax.Array:
    """The magnitudes of a linear map whose adapter is new."""
    path = name.rpartition("/")[0]
    own = {key.rpartition("/")[2]: leaf for key, leaf in flat.items() if key.rpartition("/")[0] == path}
    return jax.jit(functools.partial(adapters.norms, path, shape=like.shape), out_shardings=like.sharding)(own)


def check(c: ConfigDict, tokenizer: Tokenizer | None, *, extension: Extension | None = None) -> None:
    """Raise UserError unless `train.init_from` is there, of the same shapes, and for the same tokenizer.

    Args:
        tokenizer: the run's own; None: it is yet to be made.
        extension: what it was extended from.
    """
    where = c.train.init_from
    folder = folders.newest_of("train.init_from", where)
    run, meta = folder.parent.parent, folders.read_meta(folder)
    theirs = config.from_json(json.dumps(meta["config"]))
    known = meta.get("tokenizer")
    if known is None and (run / "tokenizer").is_dir():  # an older checkpoint does not say
        known = load_tokenizer(run / "tokenizer").fingerprint
    before = extension.base if extension is not None else tokenizer.fingerprint if tokenizer is not None else known
    if known not in (None, before):
        raise UserError(
            f"train.init_from={where} was trained with another tokenizer than this run has, so every id would mean "
            f"something else: set --config.tokenizer.path={shlex.quote(str(run / 'tokenizer'))}"
        )
    ours = c.copy_and_resolve_references()
    with ours.unlocked():
        given = 0 if tokenizer_stage.extends(c) else c.model.vocab_size
        ours.model.vocab_size = given or theirs.model.vocab_size
    adapters.check_targets(ours.model, _shapes(ours.model))
    headed = ours.model.copy_and_resolve_references()
    with headed.unlocked():
        if c.objective.name == "classify":
            headed.classes = headed.classes or 1  # their number is yet to be read from the rows
    split(transformer.param_shapes(transformer.build(headed)), c)
    new, there, here = new_parameters(ours), *(_shapes(adapters.plain(model)) for model in (theirs.model, ours.model))
    here = {name: shape for name, shape in here.items() if name not in new and _is_read(name, there)}
    there = {name: shape for name, shape in there.items() if name in here or not HEADS.search(name)}
    wrong = _first_difference(there, here)
    if not wrong:
        return
    differences = changes.changed(*(config.flatten({"model": m.to_dict()}) for m in (theirs.model, ours.model)))
    keys = [key for key in differences if changes.class_of(key) == changes.IDENTITY]
    told = ", ".join(f"{key} is {differences[key][0]!r} there and {differences[key][1]!r} here" for key in keys[:4])
    raise UserError(
        f"train.init_from={where} has a model of other shapes ({wrong}): {told}; give the settings of its model, for "
        f"instance by --config {shlex.quote(str(run / 'config.json'))}"
    )


def new_parameters(c: ConfigDict) -> set[str]:
    """The paths of parameters that begin anew: those of adapters, and of heads that the other model lacks or has otherwise."""
    ours, theirs = _both(c)
    here, there = _shapes(ours), _shapes(theirs if _goes_on(theirs, ours) else adapters.plain(theirs))
    differ = {name for name, shape in here.items() if there.get(name) != shape}
    return {name for name in differ if HEADS.search(name) or (adapters.is_adapter(name) and name not in there)}


def _both(c: ConfigDict) -> tuple[ConfigDict, ConfigDict]:
    """The settings of this run's model and of that of `train.init_from`, with the size of the vocabulary."""
    theirs = _model_of(folders.newest(Path(c.train.init_from)), like=c)
    ours = c.model.copy_and_resolve_references()
    with ours.unlocked():
        ours.vocab_size = theirs.vocab_size
    return ours, theirs


def _is_read(name: str, known: Collection[str]) -> bool:
    """Whether a parameter is read as it is, or should be: it is not made from another one."""
    return derived.source_of(name, known) in (name, "")


def _model_of(folder: Path, *, like: ConfigDict | None = None) -> ConfigDict:
    """The settings under `model` of a checkpoint; `like`: a config that may know the size of the vocabulary."""
    model = config.from_json(json.dumps(folders.read_meta(folder)["config"])).model
    with model.unlocked():
        model.vocab_size = model.vocab_size or (like.model.vocab_size if like is not None else 0)
    return model


def inherited(c: ConfigDict, given: Collection[str], *, model: ConfigDict | None = None) -> ConfigDict:
    """The config with the settings under `model` of `train.init_from`, except those that are `given` (dotted keys).

    A setting of `c` that has not its default counts as given.

    Args:
        model: the settings of that run, where it is yet to be trained.
    """
    if not c.train.init_from:
        return c  # the stages that need it say so
    defaults = config.flatten({"model": config.base().model.to_dict()})
    ours = config.flatten({"model": c.model.to_dict()})
    model = _model_of(folders.newest(Path(c.train.init_from))) if model is None else model
    theirs = config.flatten({"model": model.to_dict()})
    if tokenizer_stage.extends(c):
        theirs.pop("model.vocab_size")
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
