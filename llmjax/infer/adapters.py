"""Adapters by name in an engine: every slot has its own, and a batch has requests of several.

The matrices A and B of all adapters of a linear map are stacked, padded to the same rank, and each row of a batch gathers its
own (`weights.computing`). Number 0 is the model without an adapter. Other arrays of the same shapes compile nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from llmjax import config
from llmjax.errors import UserError
from llmjax.infer.weights import GAIN, A, B, served
from llmjax.model import adapters
from llmjax.train import base, folders


@dataclass(frozen=True)
class Adapter:
    """The adapters of one training."""

    settings: ConfigDict  # `model.adapter`
    arrays: Mapping[str, np.ndarray]  # path -> array; lora_a, lora_b, magnitude of linear maps, stacked as in training


class Named:
    """The adapters of an engine by name, and their arrays."""

    def __init__(self, given: Mapping[str, Adapter], *, rank: int, count: int) -> None:
        """
        Args:
            given: the first ones. Later ones have the same linear maps, or fewer, and DoRA only where one of these has.
            rank: the largest that fits; 0: the largest of those given.
            count: how many there may be; 0: as many as are given.
        """
        self.given: dict[str, Adapter] = {}
        self.numbers: dict[str, int] = {}
        self._version = 0
        self._versions: dict[str, int] = {}
        self.rank = rank or max((one.settings.rank for one in given.values()), default=1)
        self.count = count or len(given)
        self._sizes: dict[str, tuple[tuple[int, ...], int, int]] = {}  # path -> layers, inputs, outputs
        for one in given.values():
            for name, array in one.arrays.items():
                path, _, kind = name.rpartition("/")
                if kind == "lora_a":
                    outputs = one.arrays[f"{path}/lora_b"].shape[-1]
                    self._sizes[path] = array.shape[:-2], array.shape[-2], outputs
        self._gains = any(name.endswith("/magnitude") for one in given.values() for name in one.arrays)
        for name, one in given.items():
            self.put(name, one)

    def put(self, name: str, adapter: Adapter) -> None:
        """Add an adapter, or replace the one of this name. Raises UserError for one that does not fit."""
        if not name or not isinstance(name, str):
            raise UserError(f"an adapter needs a name, not {name!r}")
        if adapter.settings.rank > self.rank:
            raise UserError(
                f"the adapter {name} has rank {adapter.settings.rank}, and this engine has room for {self.rank}: give the "
                "engine a larger adapter_rank"
            )
        if unknown := sorted({path.rpartition("/")[0] for path in adapter.arrays} - self._sizes.keys()):
            raise UserError(
                f"the adapter {name} is of {unknown[0]}, where the engine's first adapters have none: give it to the engine "
                "with the first ones"
            )
        if not self._gains and any(path.endswith("/magnitude") for path in adapter.arrays):
            raise UserError(f"the adapter {name} is DoRA: give one of DoRA to the engine with the first adapters")
        if name not in self.numbers:
            free = set(range(1, self.count + 1)) - set(self.numbers.values())
            if not free:
                raise UserError(f"this engine has room for {self.count} adapters: give it a larger adapter_slots")
            self.numbers[name] = min(free)
        self._version += 1
        self.given[name], self._versions[name] = adapter, self._version

    def drop(self, name: str) -> None:
        """Remove an adapter."""
        self.number(name)
        del self.given[name], self.numbers[name], self._versions[name]

    def number(self, name: str) -> int:
        """The number of an adapter; "": 0. Raises UserError for a name that there is not."""
        if not name:
            return 0
        if name not in self.numbers:
            known = ", ".join(sorted(self.numbers)) or "none"
            raise UserError(f"no adapter is called {name!r}; there are {known}")
        return self.numbers[name]

    def salt(self, name: str) -> bytes:
        """What tells the prefixes of prompts read with an adapter from those of others."""
        return f"{name}\0{self._versions[name]}".encode() if name else b""

    def stacks(self, params: Any) -> dict[str, dict[str, np.ndarray]]:
        """path of each linear map -> its arrays, as `weights` reads them, with layers in front where it is stacked.

        Args:
            params: the model's, whose kernels DoRA's norms are of.
        """
        flat, found = traverse_util.flatten_dict(params, sep="/"), {}
        for path, (lead, inputs, outputs) in self._sizes.items():
            S = self.count + 1
            made = {
                A: np.zeros((*lead, S, inputs, self.rank), np.float32),
                B: np.zeros((*lead, S, self.rank, outputs), np.float32),
            }
            if self._gains:
                made[GAIN] = np.ones((*lead, S, outputs), np.float32)
            for name, number in self.numbers.items():
                one = self.given[name]
                own = {
                    k: jnp.asarray(one.arrays[f"{path}/{k}"]) for k in adapters.ARRAYS if f"{path}/{k}" in one.arrays
                }
                if not own:
                    continue
                rank = one.settings.rank
                kernel = {n.rpartition("/")[2]: x for n, x in flat.items() if n.rpartition("/")[0] == path}
                ready = {k: np.asarray(x) for k, x in served(one.settings, path, {**kernel, **own}).items()}
                made[A][..., number, :, :rank], made[B][..., number, :rank, :] = ready[A], ready[B]
                if GAIN in ready:
                    made[GAIN][..., number, :] = ready[GAIN]
            found[path] = made
        return found


def inserted(tree: dict[str, Any], path: list[str], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of parameters with more arrays in a linear map; a stack of layers may be a tuple of them."""
    name, *rest = path
    part = tree[name]
    if isinstance(part, tuple):
        layers = [inserted(layer, rest, {k: x[i] for k, x in arrays.items()}) for i, layer in enumerate(part)]
        return {**tree, name: tuple(layers)}
    return {**tree, name: inserted(part, rest, arrays) if rest else {**part, **arrays}}


def read(path: Path, under: Path, model: ConfigDict) -> Adapter:
    """The adapters of a run, or of a folder in PEFT's format, for the model of another run.

    Args:
        under: the checkpoint folder of the model that they are used with.
        model: its settings (`config.model`).

    Raises UserError when they are of another model, or there is more than adapters.
    """
    from llmjax.interop import peft
    from llmjax.interop.stacked import StackedReader
    from llmjax.train import checkpoint

    if peft.is_peft(path):
        imported = folders.read_meta(under).get("imported", {}).get("model_type", "")
        found = peft.read_peft(path, adapters.plain(model), model_type=imported)
        if found.whole:
            raise UserError(
                f"{path} has {', '.join(sorted(found.whole))} beside adapters: import it as a run of its own"
            )
        settings = adapters.plain(model).adapter
        settings.update(found.settings)
        return Adapter(settings, found.arrays)
    step = folders.newest(path)
    named = base.read(step.parent)
    if named is None:
        raise UserError(f"{path} has no adapters on a base of another run: load it as a model of its own")
    if named.fingerprint != base.fingerprint(under, base.item_of(under)):
        raise UserError(
            f"the adapters of {path} were trained on {named.absolute}, and not on {under}: use them with that"
        )
    if named.form != "stored":
        raise UserError(
            f"the adapters of {path} were trained on kernels in {named.form}, and would compute something else here: load "
            f"{path} as a model of its own"
        )
    reader = StackedReader(step, base.item_of(step))
    names = checkpoint.stored(step, base.item_of(step))
    if whole := sorted(name for name in names if not adapters.is_adapter(name)):
        raise UserError(f"{path} has {', '.join(whole)} beside adapters: load it as a model of its own")
    settings = config.from_json(json.dumps(folders.read_meta(step)["config"])).model.adapter
    return Adapter(settings, {name: reader.read(name, None) for name in sorted(names)})
