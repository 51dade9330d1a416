"""Tensors by name in files: safetensors read one tensor at a time and written as they come, in one file or in shards.

The format is a length, a JSON header and the raw data, little-endian. It is read with plain reads, not through a memory
map, so that what was read does not stay in the process; and written by parts, so that a shard is never held as a whole.
"""

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from llmjax import storage
from llmjax.errors import UserError

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the format
ALIGNMENT = 8


@dataclass(frozen=True)
class Tensor:
    """What is known of a tensor before it is read."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """Where a model's tensors are read from."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All there are, by name."""

    def read(self, name: str) -> np.ndarray:
        """The tensor, in memory of its own."""


class Safetensors:
    """The tensors of a safetensors file, or of several. Raises UserError for files that are damaged or incomplete."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for file in files:
            for name, (tensor, offset) in _header(file).items():
                if name in self.tensors:
                    raise UserError(f"the tensor {name} is in {self._places[name][0]} and again in {file}: remove one")
                self.tensors[name], self._places[name] = tensor, (file, offset)

    def read(self, name: str) -> np.ndarray:
        file, offset = self._places[name]
        tensor = self.tensors[name]
        flat = np.fromfile(file, tensor.dtype, math.prod(tensor.shape), offset=offset)
        if flat.size != math.prod(tensor.shape):
            raise UserError(f"{file} was cut short while it was read: get it again")
        return flat.reshape(tensor.shape)


def _header(file: Path) -> dict[str, tuple[Tensor, int]]:
    """name -> (tensor, offset in the file)."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ValueError(f"its header is {length:,} bytes long and the file {size:,}")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        unknown = {name: entry["dtype"] for name, entry in entries.items() if entry["dtype"] not in DTYPES}
        if not unknown:
            return {name: _entry(name, entry, start=8 + length, size=size) for name, entry in entries.items()}
    except FileNotFoundError:
        raise UserError(f"there is no file {file}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no complete safetensors file ({error}): get it again") from error
    name, kind = next(iter(unknown.items()))
    raise UserError(
        f"{file} has {name} in the type {kind}; known are {', '.join(DTYPES)}: get the model in one of them"
    )


def _entry(name: str, entry: Mapping[str, Any], *, start: int, size: int) -> tuple[Tensor, int]:
    tensor = Tensor(DTYPES[entry["dtype"]], tuple(entry["shape"]))
    begin, end = entry["data_offsets"]
    if end - begin != tensor.nbytes:
        raise ValueError(f"{name} of shape {tensor.shape} takes {tensor.nbytes:,} bytes and has {end - begin:,}")
    if begin < 0 or start + end > size:
        raise ValueError(f"{name} ends at byte {start + end:,} and the file at {size:,}")
    return tensor, start + begin


def open_folder(folder: Path) -> Safetensors:
    """The tensors of a model folder. Raises UserError, with a way out, if there are none or a shard is missing."""
    if (folder / ONE_FILE).is_file():
        return Safetensors([folder / ONE_FILE])
    if (folder / INDEX).is_file():
        try:
            placed: dict[str, str] = dict(json.loads(storage.read_text(folder / INDEX))["weight_map"])
            files = [folder / name for name in sorted(set(placed.values()))]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / INDEX} is damaged ({error.__class__.__name__}: {error}): get it again"
            ) from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}")
        found = Safetensors(files)
        if lost := sorted(set(placed) - set(found.tensors)):
            raise UserError(f"{folder / INDEX} places {len(lost)} tensors that its shards lack: {', '.join(lost)}")
        return found
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} has its weights as pytorch_model.bin, a pickle that could run any code: convert it once with "
            "transformers, AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR), which writes safetensors"
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        raise UserError(
            f"{folder} has no safetensors; to import the GGUF file give it itself: --from {shlex.quote(str(ggufs[0]))}"
        )
    raise UserError(f"{folder} has neither {ONE_FILE} nor {INDEX}: is it the folder of a model?")


class Writer:
    """One safetensors file, whose tensors are written in the order in which they were announced."""

    def __init__(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # as transformers asks for
        offset = 0
        for name, tensor in tensors.items():
            header[name] = {
                "dtype": CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._waiting = list(tensors.items())[::-1]
        self._held = ExitStack()
        self._stream: BinaryIO = self._held.enter_context(storage.writing(file))
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> None:
        expected, tensor = self._waiting.pop()
        assert (name, array.dtype, array.shape) == (expected, tensor.dtype, tensor.shape), (name, array.shape, expected)
        self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Put the file in its place."""
        self._held.close()


def shard_names(count: int) -> list[str]:
    """The file names of a model in so many shards."""
    if count == 1:
        return [ONE_FILE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(folder: Path, shards: Sequence[Mapping[str, Tensor]]) -> None:
    """model.safetensors.index.json, for more than one shard."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards))
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    storage.write_json(folder / INDEX, index, indent=2)
