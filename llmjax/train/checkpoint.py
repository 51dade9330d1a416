"""Checkpoints with orbax: written in the background, visible only when complete, restored onto any mesh.

A checkpoint is a folder `checkpoints/STEP/` with the items `params`, `rest` (optimizer state, counters), `ema` (the
moving average, if there is one), `source` (the state of the source of batches, if it has one) and `meta`: JSON with the
resolved config, the step, the clock and the tokens seen. The step is also the position in the data and, with the seed,
the random state. Parameters are an item of their own, so evaluation does not read the rest.

Parameters that are not trained (`optimizer.train`) are the same in every checkpoint, and often most of the model. A run
writes them once, to `checkpoints/frozen/`, before the first checkpoint. Those of a run with adapters are in its base, which
`checkpoints/base.json` names (base.py).
"""

import errno
import functools
import gc
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from llmjax import storage
from llmjax.parallel import processes
from llmjax.parallel.placement import path_name
from llmjax.train import base, derived, files
from llmjax.train.folders import FROZEN, CheckpointError, CheckpointMismatch, read_meta, steps_in
from llmjax.train.frozen import combine, divide
from llmjax.train.step import State

# orbax reports every save in a dozen lines, and every failure with pages of tracebacks before it raises it.
logging.getLogger("absl").setLevel(logging.CRITICAL)

LARGE_BYTES = 1 << 25  # arrays that are cut by layers


@contextmanager
def full_disk_is_an_os_error(folder: Path) -> Iterator[None]:
    """Raise OSError for a full disk, which orbax reports from its threads as a ValueError or RuntimeError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "No space left on device" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


class Manager(ocp.CheckpointManager):
    """Orbax's manager; a full disk is an OSError, raised by the next call of any method.

    Before a checkpoint gets its name, the first process writes down what its files hold (files.py).
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int) -> None:
        self._saving = 0  # the step that is being saved
        super().__init__(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                cleanup_tmp_directories=True,  # what a killed process left half-written
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_down),
            ),
        )

    def _write_down(self) -> None:
        named = Path(self.directory) / str(self._saving)
        unnamed = named.with_name(f"{named.name}{ocp.utils.TMP_DIR_SUFFIX}")  # a bucket has none: it cannot rename
        for item in sorted((unnamed if unnamed.is_dir() else named).iterdir()):
            if item.is_dir() and item.name != "meta":  # half a JSON file is none
                files.write(item, contents=processes.count() == 1)

    def save(self, step: int, *args: Any, **kwargs: Any) -> bool:
        self.wait_until_finished()
        self._saving = step
        with full_disk_is_an_os_error(Path(self.directory)):
            return super().save(step, *args, **kwargs)

    def wait_until_finished(self) -> None:
        with full_disk_is_an_os_error(Path(self.directory)):
            super().wait_until_finished()

    def close(self) -> None:
        with full_disk_is_an_os_error(Path(self.directory)):
            super().close()


def manager(folder: Path, *, keep: int, keep_every: int = 0) -> Manager:
    """A manager that saves in the background and keeps the newest `keep` checkpoints, and every `keep_every`-th step."""
    return Manager(folder.absolute(), keep=keep, keep_every=keep_every)


class Restored(NamedTuple):
    """The content of a checkpoint."""

    state: State
    meta: dict[str, Any]
    source: dict[str, np.ndarray]  # state of this process's source of batches; {}: none


def save(
    checkpoints: Manager, state: State, *, step: int, meta: dict, source: dict[str, np.ndarray] | None = None
) -> None:
    """Start saving. The arrays are copied before this returns, so the next step may reuse their memory.

    Args:
        source: the state of this process's source of batches: numeric arrays, of the same shapes in every process.

    Raises OSError (ENOSPC), before anything is written, when the disk has no room for the state.
    """
    needed = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state, state.ema)))
    processes.broadcast_from_first(
        lambda: storage.require_space(Path(checkpoints.directory), needed)
    )  # all save, or none
    items: dict[str, Any] = {
        "params": ocp.args.StandardSave(state.params, save_args=_by_layers(state.params)),
        "rest": ocp.args.StandardSave(_rest(state)),
    }
    if state.ema is not None:
        items["ema"] = ocp.args.StandardSave(state.ema, save_args=_by_layers(state.ema))
    if source:
        items["source"] = ocp.args.StandardSave(_of_all_processes(source))
    items["meta"] = ocp.args.JsonSave({**meta, "items": sorted(items)})
    checkpoints.save(step, args=ocp.args.Composite(**items), force=True)


def _of_all_processes(source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of all processes under their names, with a leading dimension of processes."""
    if processes.count() == 1:
        return {name: np.array(array)[None] for name, array in source.items()}
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(source))


def save_frozen(folder: Path, frozen: Any) -> None:
    """Write the parameters that are not trained, whole or not at all; {}: write nothing.

    Raises OSError (ENOSPC) when the disk has no room for them.
    """
    if not frozen:
        return
    needed = sum(x.nbytes for x in jax.tree.leaves(frozen))
    processes.broadcast_from_first(lambda: storage.require_space(folder, needed))
    with full_disk_is_an_os_error(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / FROZEN).absolute(), frozen, save_args=_by_layers(frozen), force=True)
    if processes.is_first():
        files.write(folder / FROZEN, contents=processes.count() == 1)


def _by_layers(params: Any) -> Any:
    """How the files cut the arrays: large stacks by layer, so that an export can read one layer at a time."""

    def args(path: Sequence[Any], leaf: jax.Array) -> ocp.SaveArgs:
        stacked = re.search(r"(^|/)(first|layers|last)/", path_name(path))
        return ocp.SaveArgs(shard_axes=(0,) if stacked and leaf.nbytes > LARGE_BYTES else ())

    return jax.tree_util.tree_map_with_path(args, params)


def _rest(state: State) -> dict:
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "bad_in_a_row": state.bad_in_a_row,
    }


def restore(folder: Path, abstract: State) -> Restored | None:
    """The newest checkpoint that can be read, or None when there is none at all.

    A damaged checkpoint is reported, and the one before it is read. If that succeeds, the damaged one is moved to
    `STEP.damaged`. If none can be read, all stay where they are, so that the next start is no silent restart. Several
    processes use the newest checkpoint that all of them can read.

    Args:
        folder: `checkpoints/`.
        abstract: shapes, types and shardings to restore into, on any mesh.

    Raises:
        CheckpointMismatch: when the newest sound checkpoint has other arrays than `abstract`.
        CheckpointError: when there are checkpoints and none can be read.
    """
    steps, damaged = processes.broadcast_from_first(lambda: steps_in(folder)), []
    for step in steps:
        found, reason = None, None
        try:
            found = restore_step(folder / str(step), abstract)
        except CheckpointMismatch:
            raise
        except CheckpointError as error:
            reason = str(error)
        if failed := processes.failures(reason):
            print(f"WARNING: {failed[0]}")
            damaged.append(folder / str(step))
            continue
        processes.broadcast_from_first(functools.partial(_move_aside, damaged, step))
        return found
    if steps:
        raise CheckpointError(
            f"none of the checkpoints in {folder} can be read (steps {', '.join(map(str, steps))}); "
            f"to start again from step 0, delete {folder}"
        )
    return None


def restore_step(path: Path, abstract: State) -> Restored:
    """The checkpoint folder `path`. Raises CheckpointError and CheckpointMismatch as `restore` does.

    Without a moving average in the checkpoint, it begins with the parameters.
    """
    asked = [path / "params", path / "rest", path / "source", path.parent / FROZEN]
    asked += [path / "ema"] if abstract.ema is not None else []
    compare = functools.partial(files.problem, path, asked, contents=processes.count() == 1)
    if said := processes.broadcast_from_first(compare):
        raise CheckpointError(said)
    meta = read_meta(path)
    items = meta.get("items") or [item for item in ("ema", "source") if (path / item).is_dir()]
    params = _read(path, "params", abstract.params)
    # Older checkpoints of bfloat16 parameters have moments and averages in bfloat16, which are float32 now.
    rest = _read(path, "rest", _rest(abstract), cast=True)
    ema = None
    if abstract.ema is not None:
        ema = _read(path, "ema" if "ema" in items else "params", abstract.ema, cast=True)
    frozen = _read_frozen(path.parent, abstract.frozen) if abstract.frozen else {}
    source = _read_source(path) if "source" in items else {}
    return Restored(State(params=params, frozen=frozen, ema=ema, **rest), meta, source)


def _read_source(path: Path) -> dict[str, np.ndarray]:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            kept = jax.tree.map(np.asarray, checkpointer.restore((path / "source").absolute()))
    except Exception as error:  # as in `_read`
        raise CheckpointError(f"the checkpoint {path} cannot be read: source is damaged ({error})") from error
    saved = len(next(iter(kept.values())))
    if saved != processes.count():
        raise CheckpointMismatch(
            f"the checkpoint {path} keeps the batches of {saved} processes, and there are {processes.count()}: go on with "
            f"{saved}"
        )
    return {name: array[processes.index()] for name, array in kept.items()}


def delete(path: Path) -> None:
    """Delete the checkpoint folder `path`: it is renamed first, so a kill leaves no half of it."""
    gone = path.with_name(f"{path.name}.deleted")
    storage.remove(gone)
    storage.rename(path, gone)
    storage.remove(gone)


def _move_aside(damaged: Sequence[Path], step: int) -> None:
    for path in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        storage.remove(aside)
        storage.rename(path, aside)
        print(f"WARNING: {path} was moved to {aside}; going on from the checkpoint before it, step {step:,}")


def read_params(path: Path, abstract: Any, *, item: str = "params", cast: bool = False, part: bool = False) -> Any:
    """The parameters of the checkpoint folder `path`, frozen ones included, in the given shapes and shardings.

    Args:
        item: "params", or "ema" for the moving average of what is trained.
        cast: convert to the given types; otherwise other types are a CheckpointMismatch.
        part: the checkpoint may have more parameters.
    """
    _require_whole(path, item)
    if not (path.parent / FROZEN).is_dir() and not (path.parent / base.FILE).is_file():
        return _read(path, item, abstract, cast=cast, part=part)
    trained, frozen = divide(abstract, stored(path, item).__contains__)
    found = _read(path, item, trained, cast=cast, part=part) if trained else {}
    return combine(found, _read_frozen(path.parent, frozen, cast=cast, part=part)) if frozen else found


def _read_frozen(checkpoints: Path, abstract: Any, *, cast: bool = False, part: bool = False) -> Any:
    """Parameters that a run did not train: of `checkpoints/frozen/`, or of its base."""
    found = base.read(checkpoints)
    if found is None:
        known = stored(checkpoints, FROZEN)
        return derived.read(abstract, known, functools.partial(_read, checkpoints, FROZEN, cast=cast, part=part))
    folder = found.folder(checkpoints)
    known = stored(folder, found.item) | (stored(folder.parent, FROZEN) if (folder.parent / FROZEN).is_dir() else set())
    read = functools.partial(read_params, folder, item=found.item, cast=True, part=True)
    return derived.read(abstract, known, read, form=found.form, kernels=found.kernels)


def stored(path: Path, item: str) -> set[str]:
    """The paths of the parameters in an item of the checkpoint folder `path`. Raises CheckpointError."""
    where = (path / item).absolute()
    _require_whole(path, item)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return set(_shapes(checkpointer.metadata(where).item_metadata.tree, types=False))
    except Exception as error:  # as in `_read`
        raise CheckpointError(f"{where} cannot be read ({error})") from error


def _require_whole(path: Path, item: str) -> None:
    """Raise CheckpointError for damaged parameters of a checkpoint folder. Of several processes the first looks."""
    if processes.is_first():
        files.require_whole(path, [path / item, path.parent / FROZEN], contents=processes.count() == 1)


def _read(path: Path, item: str, abstract: Any, *, cast: bool = False, part: bool = False) -> Any:
    where = (path / item).absolute()
    if not where.is_dir():
        raise CheckpointError(
            f"the checkpoint {path} has no {item}: it was made with other settings, or files are missing"
        )
    with _abandoned_coroutines_end_silently():
        try:
            # Each process reads its own part alone: a part that one cannot read must not hold up the others.
            me = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
            with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
                tree = checkpointer.metadata(where).item_metadata.tree
                there, here = _shapes(tree, types=not cast), _shapes(abstract, types=not cast)
                if part:
                    there = {name: shape for name, shape in there.items() if name in here}
                mismatch = _first_difference(there, here)
                if not mismatch and not part:
                    return jax.block_until_ready(checkpointer.restore(where, abstract))
            if not mismatch:
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)) as some:
                    how = ocp.checkpoint_utils.construct_restore_args(abstract)
                    asked = ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=True)
                    return jax.block_until_ready(some.restore(where, args=asked))
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files; all mean the same here
            reason = (str(error).strip() or error.__class__.__name__).splitlines()[0].partition(". See full")[0][:300]
            failure = CheckpointError(f"the checkpoint {path} cannot be read: {item} is damaged ({reason})")
        else:
            failure = CheckpointMismatch(
                f"the checkpoint {path} does not fit the config: {mismatch}. Give the settings it was made with "
                "(its run's config.json), or another --workdir"
            )
        raise failure


@contextmanager
def _abandoned_coroutines_end_silently() -> Iterator[None]:
    """Silence Python about coroutines: orbax drops those of all other arrays when one array cannot be read."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        gc.collect()  # here, where they are silent; it takes up to a second where many programs are traced
        raise
    finally:
        sys.unraisablehook = hook


def _shapes(tree: Any, *, types: bool) -> dict[str, str]:
    """Path -> shape of every array of a tree, and its type with `types`, as text."""
    leaves = [(p, leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree) if hasattr(leaf, "shape")]
    return {
        path_name(p): f"{leaf.dtype} {tuple(leaf.shape)}" if types else f"{tuple(leaf.shape)}" for p, leaf in leaves
    }


def _first_difference(stored: dict[str, str], wanted: dict[str, str]) -> str:
    """The first array that differs between a checkpoint and a config, in words; empty: none."""
    for name in sorted(stored.keys() | wanted.keys()):
        there, here = stored.get(name, "missing"), wanted.get(name, "missing")
        if here != there:
            return f"{name} is {there} in the checkpoint and {here} in the model or optimizer of the config"
    return ""
