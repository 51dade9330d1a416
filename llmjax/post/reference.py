"""The reference of a policy: the model that the training starts from."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llmjax import storage
from llmjax.model import transformer
from llmjax.parallel import placement, processes
from llmjax.post import heldout
from llmjax.post.batches import Rows
from llmjax.train import folders, initial
from llmjax.train.frozen import divide, is_trained


def with_reference(
    c: ConfigDict, workdir: Path, module: transformer.Transformer, packed: Mapping[str, Rows], mesh: Mesh
) -> dict[str, Rows]:
    """The rows with the log-probabilities of their answers by the model that the training starts from.

    They are computed once and kept in WORKDIR/rows/reference.npz, under a key of the model and the rows.
    """
    key = _reference_key(c, packed)
    kept_in = workdir / "rows" / "reference.npz"
    kept = _kept(kept_in, key)
    if kept is None:
        processes.say("reference: the log-probabilities of every answer by the model that the training starts from")
        params = reference_params(c, module, mesh)
        kept = {split: heldout.reference_log_probs(c, module, params, made, mesh) for split, made in packed.items()}
        if processes.is_first():
            with storage.writing(kept_in) as file:
                arrays: dict[str, Any] = {"key": np.array(key), **kept}
                np.savez(file, **arrays)
    return {split: dataclasses.replace(made, reference=kept[split]) for split, made in packed.items()}


def reference_params(c: ConfigDict, module: transformer.Transformer, mesh: Mesh) -> Any:
    """The parameters of the model that the training starts from, in the places and types of `abstract_params`.

    New adapters have their values of the first step, so the policy starts exactly at the reference.
    """
    abstract = abstract_params(c, module, mesh)
    return initial.begun(abstract, initial.read(c, abstract))


def own_params(c: ConfigDict, module: transformer.Transformer, mesh: Mesh) -> Any:
    """The reference's own parameters: the trained ones, with their values at the start of the training.

    Policy and reference share the frozen parameters. New adapters and heads are 0 here, so the reference is the base.
    The policy's program computes the reference, so both have the same bits at the first step.
    """
    trained, abstract = is_trained(c), abstract_params(c, module, mesh)
    own, _ = divide(abstract, trained)
    # New magnitudes of DoRA are norms of frozen kernels.
    asks_frozen = any(name.endswith("/magnitude") for name in initial.new_parameters(c))
    found = traverse_util.flatten_dict(initial.read(c, abstract if asks_frozen else own), sep="/")
    made = {
        name: found[name] if name in found else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in traverse_util.flatten_dict(own, sep="/").items()
    }
    return traverse_util.unflatten_dict(made, sep="/")


def abstract_params(c: ConfigDict, module: transformer.Transformer, mesh: Mesh) -> Any:
    """The parameters as a training from given weights has them: their shapes and places on the mesh; trained ones float32."""
    shapes, trained = transformer.param_shapes(module), is_trained(c)
    places = placement.parameter_shardings(shapes, mesh, rules=c.parallel.rules)

    def abstract(path: Any, shape: Any, place: Any) -> jax.ShapeDtypeStruct:
        dtype = "float32" if trained(placement.path_name(path)) else shape.dtype
        return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(abstract, shapes, places)


def _reference_key(c: ConfigDict, packed: Mapping[str, Rows]) -> str:
    """The key of the reference's log-probabilities: the checkpoint, the ids and the settings of the computation."""
    digest = hashlib.blake2b(digest_size=16)
    folder = folders.newest(Path(c.train.init_from))
    model = {k: v for k, v in c.model.to_dict().items() if k not in ("attention", "remat", "barriers", "scan_unroll")}
    weighted = c.objective.preference.length_weight if c.objective.name == "preference" else 1.0
    told = [str(folder.resolve()), folders.read_meta(folder), model, *([weighted] if weighted != 1 else [])]
    digest.update(json.dumps(told, default=str).encode())
    for made in packed.values():
        digest.update(made.store.ids.tobytes() + made.store.weights.tobytes() + made.store.start.tobytes())
    return digest.hexdigest()


def _kept(file: Path, key: str) -> dict[str, np.ndarray] | None:
    try:
        with np.load(file) as found:
            arrays = dict(found)
    except (OSError, ValueError, EOFError):  # none yet, or one of a process that was killed: it is computed again
        return None
    return arrays if str(arrays.pop("key", "")) == key else None
