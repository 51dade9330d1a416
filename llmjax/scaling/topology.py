"""Pods by name, such as "v5p:8x16x16" or "h100:64": their devices for the compiler, and the speed of their links.

libtpu, the compiler for TPUs, describes TPU pods and needs no TPU. For GPUs there is no such description, and plans are by
formula (`analytic.py`).
"""

import contextlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from llmjax import storage
from llmjax.errors import UserError
from llmjax.parallel.chips import CHIPS, Chip
from llmjax.scaling.collectives import Collective, axes_of

# Without these libtpu asks the network for its location, and guesses the kind of machine.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}


@dataclass(frozen=True)
class Topology:
    """Chips and their arrangement."""

    name: str  # as in CHIPS
    shape: tuple[int, ...]  # of the torus of one slice; GPUs: (how many,)
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The properties of one chip."""
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        """The number of chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """The number of JAX devices."""
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        said = f"{self.name}:{'x'.join(map(str, self.shape))}"
        return f"{said}, {self.slices} slices" if self.slices > 1 else said


def parse_topology(text: str, *, slices: int = 1) -> Topology:
    """A topology from "v5p:8x16x16" (a TPU slice) or "h100:64" (GPUs).

    Raises UserError for an unknown chip, and for a shape that it cannot have.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology {text!r}: the chip {name!r} is not known; it can be {', '.join(CHIPS)}")
    chip = CHIPS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        example = "64" if not chip.torus else "x".join(["16"] * chip.torus)
        raise UserError(f"--topology {text!r}: write the chips as {name}:{example}")
    sizes = tuple(int(part) for part in shape.split("x"))
    if chip.torus and len(sizes) != chip.torus:
        raise UserError(
            f"--topology {text!r}: a slice of {chip.name} is a torus of {chip.torus} dimensions, such as "
            f"{name}:{'x'.join(['4'] * chip.torus)}"
        )
    if not chip.torus and (len(sizes) > 1 or slices > 1):
        raise UserError(f"--topology {text!r}: GPUs are given by their number, such as {name}:64, without --slices")
    return Topology(name, sizes, slices)


@contextlib.contextmanager
def compiler_lock() -> Iterator[None]:
    """Hold the lock of the TPU compiler: a large compilation takes all cores and gigabytes, so only one runs at a time."""
    path = Path(tempfile.gettempdir()) / f"llmjax-libtpu-{os.getuid()}.lock"
    with storage.locked(path, waiting="another plan holds the TPU compiler: waiting for it"):
        yield


def devices(topology: Topology) -> Sequence[Any]:
    """The devices of a TPU topology, for `parallel.mesh.make_mesh`. The caller holds `compiler_lock`.

    Raises UserError if libtpu is not installed, or does not know the topology.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # a plan needs no accelerator, and must not take one from a run
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(
            "planning for TPUs needs their compiler: pip install 'llmjax[plan]' (Linux on x86-64); "
            "plans for GPUs need none, such as --topology h100:64"
        ) from error
    if warning := mismatch():
        print(warning, file=sys.stderr)
    more: dict[str, Any] = {"chip_config_name": "megacore"} if topology.name == "v4" else {}
    if topology.slices > 1:
        more["num_slices"] = topology.slices
    name = f"{topology.name}:{'x'.join(map(str, topology.shape))}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
    except (RuntimeError, ValueError) as error:  # XLA's own is a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--topology {name}: the TPU compiler does not know it ({reason})") from error
    assert len(found) == topology.devices, f"{name} has {len(found)} devices, expected {topology.devices}"
    return found


def mismatch() -> str:
    """A warning if the installed libtpu is not the one that this jax asks for, else ""."""
    wanted = next((r for r in metadata.requires("jax") or () if r.startswith("libtpu")), "")
    match = re.match(r"libtpu ?\(?==([\d.]+?)\.?\*", wanted)
    installed = metadata.version("libtpu")
    if match is None or f"{installed}.".startswith(f"{match[1]}."):
        return ""
    return (
        f"libtpu {installed} is not the compiler of jax {metadata.version('jax')}, which is {match[1]}.*: plans are slower "
        f"and may fail; pip install 'libtpu=={match[1]}.*'"
    )


# ------------------------------------------------------------------ links


def wraps(topology: Topology) -> tuple[bool, ...]:
    """For each dimension whether the links of a slice form rings: with cubes of four in 3-D, with sides of 16 in 2-D."""
    multiple = 4 if len(topology.shape) == 3 else 16
    closed = all(size % 4 == 0 for size in topology.shape) if len(topology.shape) == 3 else True
    return tuple(closed and size % multiple == 0 for size in topology.shape)


def link_model(
    topology: Topology, mesh_devices: Sequence[Any], mesh: Mapping[str, int]
) -> tuple[Callable[[Collective], float], Callable[[Collective], tuple[object, ...]]]:
    """Two functions of a collective: its seconds, and the links it takes. `mesh_devices`: in the order of the mesh.

    A group that spans dimensions of the torus has two links for each dimension that is a ring, and one for each other.
    Between slices it has its share of the network. The partners of a permute count as neighbours.
    """
    chip = topology.chip
    rings = wraps(topology)

    def place(i: int) -> tuple[int, ...]:
        device = mesh_devices[i]
        return (getattr(device, "slice_index", None) or 0, *device.coords[: len(topology.shape)])

    def seconds(sent: Collective) -> float:
        if sent.kind == "send":
            return sent.moved / (chip.network / chip.devices)
        group = sent.groups[0] if sent.kind == "collective-permute" else max(sent.groups, key=len)
        if len(group) < 2:
            return 0.0
        places = np.array([place(i) for i in group[:4096]])
        distinct = [len(set(column.tolist())) for column in places.T]
        if distinct[0] > 1:  # the members in a slice share its network
            return sent.moved / (chip.network / chip.devices * max(1, len(group) // distinct[0]))
        if sent.kind == "collective-permute":
            return sent.moved / (chip.link / chip.devices)
        width = sum(
            2 if closed and count == size else 1
            for closed, count, size in zip(rings, distinct[1:], topology.shape, strict=True)
            if count > 1
        )
        # Cores of one chip communicate inside it, at least as fast as over a link.
        return sent.moved / (chip.link * max(width, 1) / chip.devices)

    def channels(sent: Collective) -> tuple[object, ...]:
        axes = axes_of(sent, mesh)
        if sent.kind == "send":
            return ("slices",)
        if sent.kind != "collective-permute":
            return tuple((axis, sign) for axis in axes for sign in (-1, 1))
        source, target = (np.unravel_index(i, tuple(mesh.values())) for i in sent.groups[0][:2])
        found = []
        for i, (axis, size) in enumerate(mesh.items()):
            if axis in axes:  # to the next device of the ring, or to the previous one
                found.append((axis, 1 if (target[i] - source[i]) % size <= size // 2 else -1))
        return tuple(found)

    return seconds, channels
