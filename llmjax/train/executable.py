"""Compiled steps in a file, so that the first step of a run on a pod starts in seconds.

`llmjax plan --save-executable FILE` compiles on a laptop for devices that it does not have, and `train.executable=FILE`
loads the file. Before a program is used the step is traced again, which takes seconds, and its text must have the hash
that the file names: a file can make a run start faster but never make it another run.

A file is one line of JSON and the programs behind it. It holds pickled objects: load only files that you made.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from llmjax import storage
from llmjax.data.ramp import Stage
from llmjax.errors import UserError
from llmjax.parallel.compiler_options import Options, compile_with

FORMAT = 2
KEPT_PROGRAMS = 8  # compiled steps of this process, for a loop that starts again
_compiled: dict[tuple[Any, ...], Any] = {}  # the least recently used first


def name_of(stage: Stage) -> str:
    """The name of the program for the batches of one stage of the run."""
    return f"{stage.rows} rows in {stage.micro_batches}"


def _compiled_for(mesh: Mesh, options: Options) -> dict[str, Any]:
    """What a compiled program depends on beside the traced step: versions, the compiler's options, the devices."""
    devices = mesh.devices.flat
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": devices[0].device_kind,
        "devices": mesh.size,
        "slices": len({getattr(device, "slice_index", 0) or 0 for device in devices}),
        "options": dict(sorted(options.items())),
    }


def program_hash(lowered: jax.stages.Lowered) -> str:
    """A hash of the traced step."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def compile_once(lowered: jax.stages.Lowered, *, mesh: Mesh, options: Options) -> Any:
    """`compile_with`, or the program that this process last compiled from the same text for the same devices.

    A run that goes back from a spike starts its loop again without compiling again.
    """
    key = (
        program_hash(lowered),
        tuple(device.id for device in mesh.devices.flat),
        str(jax.tree.structure(lowered.args_info)),
        str(lowered.out_tree),
        tuple(sorted(options.items())),
    )
    _compiled[key] = _compiled.pop(key, None) or compile_with(lowered, options)
    while len(_compiled) > KEPT_PROGRAMS:
        _compiled.pop(next(iter(_compiled)))
    return _compiled[key]


def save(path: Path, programs: Mapping[str, tuple[jax.stages.Lowered, Any]], *, mesh: Mesh, options: Options) -> int:
    """Write compiled steps by name, with the hashes of their traced programs; returns the size in bytes."""
    payloads, entries, offset = [], {}, 0
    for name, (lowered, compiled) in programs.items():
        payload, _, _ = serialize_executable.serialize(compiled)
        payloads.append(payload)
        entries[name] = {"hash": program_hash(lowered), "offset": offset, "size": len(payload)}
        offset += len(payload)
    header = json.dumps({"format": FORMAT, "for": _compiled_for(mesh, options), "programs": entries}).encode() + b"\n"
    with storage.writing(path) as file:
        file.write(header)
        for payload in payloads:
            file.write(payload)
    return len(header) + offset


def load(path: Path, name: str, lowered: jax.stages.Lowered, *, mesh: Mesh, options: Options) -> Any:
    """The compiled step of that name, to be called as `lowered.compile()` would be.

    Raises UserError when the file is missing or damaged, or was made with other versions, for other devices, or of
    another step: other settings, another mesh or other code.
    """
    again = (
        "; make it again with `llmjax plan --config FILE --topology CHIP:SHAPE --save-executable FILE`, or set "
        "train.executable='' to compile here"
    )
    if not path.is_file():
        raise UserError(f"train.executable={str(path)!r} is not there{again}")
    with path.open("rb") as file:
        try:
            header = json.loads(file.readline())
            known, entries = header["format"] == FORMAT, header["programs"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"train.executable={str(path)!r} is damaged{again}") from error
        start = file.tell()
        if not known:
            raise UserError(f"train.executable={str(path)!r} was written by another version of llmjax{again}")
        before = {"options": {}} | header["for"]  # older files were made without
        if differing := [
            f"{key} was {before[key]!r} and is {value!r}"
            for key, value in _compiled_for(mesh, options).items()
            if before[key] != value
        ]:
            raise UserError(
                f"train.executable={str(path)!r} was compiled for something else: {', '.join(differing)}{again}"
            )
        if name not in entries:
            raise UserError(
                f"train.executable={str(path)!r} has no program for {name}, only {', '.join(entries)}{again}"
            )
        entry = entries[name]
        if entry["hash"] != program_hash(lowered):
            raise UserError(
                f"train.executable={str(path)!r} is of another step than this one: the settings, the mesh or the code are others{again}"
            )
        file.seek(start + entry["offset"])
        payload = file.read(entry["size"])
    if len(payload) != entry["size"]:
        raise UserError(f"train.executable={str(path)!r} is cut off{again}")
    devices = list(mesh.devices.flat)
    return serialize_executable.deserialize_and_load(
        payload,
        jax.tree.structure(lowered.args_info),
        lowered.out_tree,
        backend=devices[0].client,
        execution_devices=devices,
    )
