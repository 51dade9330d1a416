"""The arrays of a checkpoint, one layer at a time: written so that train/checkpoint.py restores them, and read back.

orbax saves an array as a whole, and our layers are stacked on a leading axis: a stacked array of a 70B model has tens of
gigabytes. Here tensorstore writes the same format (zarr arrays and orbax's description of the tree) by slices, with the
chunks of the files cut per layer.
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from llmjax import storage
from llmjax.interop.tensors import Tensor
from llmjax.train import files
from llmjax.train.checkpoint import full_disk_is_an_os_error
from llmjax.train.folders import FROZEN, CheckpointError

CHUNK_BYTES = 1 << 28  # of one file; memory for one chunk is needed to write and to read it
CACHE_BYTES = 1 << 28  # decoded chunks kept while reading arrays whose chunks hold several layers
STANDARD = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
JSON = "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler"


class StackedWriter:
    """Writes the item `params` of a checkpoint folder, slice by slice. Raises OSError when the disk is full."""

    def __init__(self, checkpoint: Path, params: Mapping[str, Tensor], *, stacked: Collection[str]) -> None:
        """`params`: path, such as layers/mlp/up/kernel -> type and shape; `stacked`: those that are written by layers."""
        self._folder = checkpoint / "params"
        self._folder.mkdir(parents=True)
        self._params, self._stacked = params, stacked
        self._open: dict[str, ts.TensorStore] = {}

    def write(self, path: str, layer: int | None, array: np.ndarray) -> None:
        """Write a whole array, or one layer of a stacked one."""
        with full_disk_is_an_os_error(self._folder):
            target = self._array(path)
            part = target if layer is None else target[layer]
            part.write(array, can_reference_source_data_indefinitely=True).result()  # without a copy

    def _array(self, path: str) -> ts.TensorStore:
        if path not in self._open:
            tensor = self._params[path]
            spec = _spec(self._folder, path, ocdbt=False, driver="zarr")
            spec["metadata"] = {
                "shape": list(tensor.shape),
                "chunks": _chunks(tensor, stacked=path in self._stacked),
                "compressor": {"id": "zstd", "level": 1},  # as orbax compresses
            }
            # orbax takes a missing chunk for damage, so that chunks of zeros are written too.
            spec["store_data_equal_to_fill_value"] = True
            self._open[path] = ts.open(spec, create=True, open=False, dtype=_ts_dtype(tensor.dtype)).result()
        return self._open[path]

    def close(self, *, meta: Mapping[str, Any]) -> None:
        """Describe the arrays, and write `meta`, the checkpoint's JSON part."""
        tree = {}
        for path, tensor in self._params.items():
            keys = path.split("/")
            tree[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": list(tensor.shape),
                },
            }
        description = {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        handlers = {"item_handlers": {"meta": JSON, "params": STANDARD}}
        root = self._folder.parent
        storage.write_json(self._folder / "_METADATA", description, indent=None)
        files.write(self._folder, contents=True)
        storage.write_json(root / "meta" / "metadata", meta, indent=None)
        storage.write_json(root / "_CHECKPOINT_METADATA", handlers, indent=None)


class StackedReader:
    """Reads an item of a checkpoint folder (`params` or `ema`), whoever wrote it, slice by slice."""

    def __init__(self, checkpoint: Path, item: str = "params") -> None:
        """Raises CheckpointError when the item, or what the run froze, is missing or damaged."""
        frozen = checkpoint.parent / FROZEN
        files.require_whole(checkpoint, [checkpoint / item, frozen], contents=True)
        self._checkpoint = checkpoint
        self._specs: dict[str, dict[str, Any]] = {}
        self._cached = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._cached_arrays: dict[str, ts.TensorStore] = {}
        try:
            for folder in (checkpoint / item, *([frozen] if frozen.is_dir() else [])):
                described = json.loads((folder / "_METADATA").read_text())
                driver = "zarr3" if described.get("use_zarr3") else "zarr"
                ocdbt = (folder / "manifest.ocdbt").is_file()
                for entry in described["tree_metadata"].values():
                    path = "/".join(k["key"] for k in entry["key_metadata"])
                    self._specs[path] = _spec(folder, path, ocdbt=ocdbt, driver=driver)
            self._arrays = {path: self._array(path) for path in self._specs}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the checkpoint {checkpoint} cannot be read: {item} is damaged ({error})") from error
        self.params = {
            path: Tensor(np.dtype(array.dtype.numpy_dtype), tuple(array.shape)) for path, array in self._arrays.items()
        }

    def _array(self, path: str, context: ts.Context | None = None) -> ts.TensorStore:
        return ts.open(self._specs[path], open=True, read=True, context=context).result()

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """A whole array, or one layer of a stacked one. Raises CheckpointError for damaged files."""
        array = self._arrays[path]
        try:
            chunks = array.chunk_layout.read_chunk.shape or ()
            if layer is not None and chunks[:1] != (1,):
                if path not in self._cached_arrays:
                    self._cached_arrays[path] = self._array(path, self._cached)
                array = self._cached_arrays[path]
            return np.asarray((array if layer is None else array[layer]).read().result())
        except ValueError as error:
            reason = str(error).splitlines()[0][:300]
            raise CheckpointError(f"{path} in {self._checkpoint} is damaged ({reason})") from error


def _spec(folder: Path, path: str, *, ocdbt: bool, driver: str) -> dict[str, Any]:
    name = path.replace("/", ".")
    if ocdbt:
        store = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{folder.absolute()}/{name}/"}
    return {"driver": driver, "kvstore": store}


def _ts_dtype(dtype: np.dtype) -> ts.dtype:
    return ts.dtype(dtype.name)


def _chunks(tensor: Tensor, *, stacked: bool) -> list[int]:
    """One layer of a stacked array; and of what is larger than CHUNK_BYTES, so many rows as fit."""
    chunks = list(tensor.shape)
    if stacked:
        chunks[0] = 1
    for i, size in enumerate(tensor.shape):
        if math.prod(chunks) * tensor.dtype.itemsize <= CHUNK_BYTES:
            break
        if chunks[i] > 1:
            rest = math.prod(chunks) // chunks[i] * tensor.dtype.itemsize
            chunks[i] = max(1, min(size, CHUNK_BYTES // rest))
    return chunks
