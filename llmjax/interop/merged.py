"""The model of a run as one without adapters, one layer of a matrix at a time: adapters are merged, kernels in few bits read.

Frozen parameters come from where the run has them: its own checkpoints, or its base. A kernel is merged onto what its adapter
was trained on: one that was read in int8 or nf4 stays rounded so.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llmjax import config
from llmjax.interop.stacked import StackedReader
from llmjax.interop.tensors import Tensor
from llmjax.model import adapters, blockwise
from llmjax.train import base, folders


class MergedReader:
    """Reads a checkpoint folder as `StackedReader` does, in float32 where something is merged."""

    def __init__(self, step: Path) -> None:
        """Raises CheckpointError when the checkpoint, or its base, is missing or damaged."""
        self.settings = config.from_json(json.dumps(folders.read_meta(step)["config"])).model.adapter
        self.own = StackedReader(step, base.item_of(step))
        self.base = base.read(step.parent)
        self._under = self.own
        if self.base is not None:
            self._under = StackedReader(self.base.folder(step.parent), self.base.item)
        self.counts = {
            "merged": 0,
            "numbers": 0,
            "lost": 0,
        }  # matrices, their changed numbers, and those lost in 16 bits
        stored = {**self._under.params, **self.own.params}
        self.adapted = sorted(path.rpartition("/")[0] for path in stored if path.endswith("/lora_a"))
        self.params = {path: tensor for path, tensor in stored.items() if self._is_plain(path)}
        for path in stored:
            for code in blockwise.CODES.values():
                if path.endswith(f"/{code}"):
                    module = path.rpartition("/")[0]
                    shape = self._codes(module, None, code).shape
                    self.params[f"{module}/kernel"] = Tensor(np.dtype(np.float32), shape)
        if "head/lora_a" in stored and "head/kernel" not in self.params:  # the base's head is tied
            V, D = stored["embedding"].shape
            self.params["head/kernel"] = Tensor(stored["embedding"].dtype, (D, V))

    @staticmethod
    def _is_plain(path: str) -> bool:
        return not adapters.is_adapter(path) and not path.endswith((blockwise.SCALE, *blockwise.CODES.values()))

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """A whole array, or one layer of a stacked one."""
        module, _, last = path.rpartition("/")
        if last != "kernel":
            return (self.own if path in self.own.params else self._under).read(path, layer)
        kernel = self._kernel(module, layer)
        return self._merged(module, layer, kernel) if module in self.adapted else kernel

    def _merged(self, module: str, layer: int | None, kernel: np.ndarray) -> np.ndarray:
        own = {"kernel": jnp.asarray(kernel)}
        own |= {
            name: jnp.asarray(self.own.read(f"{module}/{name}", layer))
            for name in adapters.ARRAYS
            if f"{module}/{name}" in self.own.params
        }
        made = np.asarray(adapters.merged_kernel(self.settings, module, own))
        changed = made != kernel.astype(np.float32)
        self.counts["merged"] += 1
        self.counts["numbers"] += int(changed.sum())
        self.counts["lost"] += int((changed & _same_in_16_bits(made, kernel)).sum())
        return made

    def _kernel(self, module: str, layer: int | None) -> np.ndarray:
        path = f"{module}/kernel"
        reader = self.own if path in self.own.params else self._under
        if path in reader.params:
            kernel = reader.read(path, layer)
            if self.base is not None and module in self.base.kernels:
                axis = blockwise.axis_of(f"{module}/", kernel.ndim + (layer is not None))
                codes = blockwise.quantize(jnp.asarray(kernel), self.base.form, axis)
                kernel = np.asarray(blockwise.dequantize(*codes, axis))
            return kernel
        for code in blockwise.CODES.values():
            if f"{module}/{code}" in self.own.params:
                return self._codes(module, layer, code)
        return np.ascontiguousarray(reader.read("embedding", None).T)  # of a head that was tied

    def _codes(self, module: str, layer: int | None, code: str) -> np.ndarray:
        codes, scale = (jnp.asarray(self.own.read(f"{module}/{name}", layer)) for name in (code, blockwise.SCALE))
        axis = blockwise.axis_of(f"{module}/", codes.ndim + (layer is not None))
        return np.asarray(blockwise.dequantize(codes, scale, axis))


def _same_in_16_bits(made: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(made, jnp.bfloat16) == jnp.asarray(kernel, jnp.bfloat16))
