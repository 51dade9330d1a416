"""Compiled steps kept in a file, so that the first step of a run on a pod starts in seconds.

`llmjax plan --save-executable FILE` compiles on a laptop for devices that it does not have; `train.executable=FILE` loads
what it wrote. A file says what it was made from. Before a program is used the step is traced again, which takes
seconds, and both must be the same text: a file can make a run start faster but never make it another run.

A file is one line of JSON and the programs behind it. It holds pickled objects: load only files that you made.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llmjax import config, storage
from llmjax.data.ramp import Stage
from llmjax.errors import UserError

FORMAT = 1
KEPT_PROGRAMS = 8  # compiled steps of this process, for a loop that starts again
PARTS = (
    "model",
    "objective",
    "optimizer",
    "schedule",
    "parallel",
    "train",
)  # of the config, which the step is made from
IRRELEVANT = (
    "train.executable",
    "train.log_every",
    "train.tensorboard",
    "train.eval_every",
    "train.eval_batches",
    "train.init_from",
    "model.attention",  # the traced step says which one it is
    "parallel.cpu_devices",
)


_compiled: dict[tuple[Any, ...], Any] = {}  # the least recently used first


def name_of(stage: Stage) -> str:
    """The name of the program for the batches of one stage of the run."""
    return f"{stage.rows} rows in {stage.micro_batches}"


def described(c: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """What a program depends on, in words: versions, devices, mesh, settings."""
    versions = {name: _version(name) for name in ("jax", "jaxlib", "flax", "optax", "llmjax")}
    flat = config.flatten({part: c[part].to_dict() for part in PARTS})
    settings = {k: v for k, v in flat.items() if k not in IRRELEVANT}
    first = mesh.devices.flat[0]
    return json.loads(
        json.dumps(
            {
                "versions": versions,
                "device": first.device_kind,
                "mesh": dict(mesh.shape),
                "slices": len({getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat}),
                "settings": settings,
            }
        )
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def program_hash(lowered: jax.stages.Lowered) -> str:
    """A hash of the traced step."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def compile_once(lowered: jax.stages.Lowered, *, mesh: Mesh) -> Any:
    """`lowered.compile()`, or what it gave when this process last compiled the same program for the same devices.

    A run that goes back from a spike starts its loop again and need not wait for the compiler again.
    """
    key = (
        program_hash(lowered),
        tuple(device.id for device in mesh.devices.flat),
        str(jax.tree.structure(lowered.args_info)),
        str(lowered.out_tree),
    )
    _compiled[key] = _compiled.pop(key, None) or lowered.compile()
    while len(_compiled) > KEPT_PROGRAMS:
        _compiled.pop(next(iter(_compiled)))
    return _compiled[key]


def save(path: Path, programs: Mapping[str, tuple[jax.stages.Lowered, Any]], *, c: ConfigDict, mesh: Mesh) -> int:
    """Write compiled steps by name, with the traced steps that they are of; the size in bytes."""
    payloads, entries, offset = [], {}, 0
    for name, (lowered, compiled) in programs.items():
        payload, _, _ = serialize_executable.serialize(compiled)
        payloads.append(payload)
        entries[name] = {"hash": program_hash(lowered), "offset": offset, "size": len(payload)}
        offset += len(payload)
    header = json.dumps({"format": FORMAT, **described(c, mesh), "programs": entries}).encode() + b"\n"
    with storage.writing(path) as file:
        file.write(header)
        for payload in payloads:
            file.write(payload)
    return len(header) + offset


def load(path: Path, name: str, lowered: jax.stages.Lowered, *, c: ConfigDict, mesh: Mesh) -> Any:
    """The compiled step of that name, to be called as `lowered.compile()` would be.

    Raises UserError when the file is missing or damaged, or was made with other versions, for other devices, another
    mesh or other settings, or from other code: the message says which.
    """
    again = "; make it again with `llmjax plan --save-executable`, or set train.executable='' to compile here"
    if not path.is_file():
        raise UserError(f"train.executable={str(path)!r} is not there{again}")
    with path.open("rb") as file:
        try:
            header = json.loads(file.readline())
            entries = header.pop("programs")
        except (ValueError, KeyError, UnicodeDecodeError) as error:
            raise UserError(f"train.executable={str(path)!r} is damaged{again}") from error
        start = file.tell()
        if header.pop("format") != FORMAT:
            raise UserError(f"train.executable={str(path)!r} was written by another version of llmjax{again}")
        differing = _differences(header, described(c, mesh))
        if differing:
            raise UserError(f"train.executable={str(path)!r} is of another run: {', '.join(differing[:4])}{again}")
        if name not in entries:
            raise UserError(
                f"train.executable={str(path)!r} has no program for {name}, only {', '.join(entries)}{again}"
            )
        entry = entries[name]
        if entry["hash"] != program_hash(lowered):
            raise UserError(f"train.executable={str(path)!r} was made from other code than this{again}")
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


def _differences(a: Any, b: Any, name: str = "") -> list[str]:
    """The leaves on which two trees of JSON differ: "key: the file's, here ours"."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for key in keys for d in _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)]
    short = name.removeprefix("settings.").removeprefix("versions.")
    return [] if a == b else [f"{short} was {a!r} and is {b!r}"]
