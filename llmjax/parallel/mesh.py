"""The device mesh, from one line of config such as "data=-1 fsdp=4 tensor=2"; README says what the axes do."""

import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llmjax.errors import UserError
from llmjax.startup import accelerators, malloc

AXES = ("data", "pipeline", "fsdp", "expert", "context", "tensor")  # from the slowest to the fastest links
ROWS = ("data", "fsdp", "expert")  # the axes over which the rows of a batch are spread


def read_mesh(line: str, *, key: str = "parallel.mesh") -> dict[str, int]:
    """Axis sizes as the line gives them, every axis present; one axis may be -1.

    Args:
        key: the setting that holds the line, for messages.

    Raises UserError for an unknown axis, one given twice, or two -1.
    """
    sizes = dict.fromkeys(AXES, 1)
    given: set[str] = set()
    for part in line.split():
        match = re.fullmatch(r"([a-z]+)=(-1|[1-9][0-9]*)", part)
        if not match or match[1] not in AXES:
            raise UserError(f"{key}={line!r}: {part!r} is not understood; write AXIS=SIZE, axes {', '.join(AXES)}")
        if match[1] in given:
            raise UserError(f"{key}={line!r} gives the axis {match[1]} twice; write each axis once")
        given.add(match[1])
        sizes[match[1]] = int(match[2])
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"{key}={line!r} has {len(free)} axes of size -1; at most one can take what is left")
    return sizes


def parse_mesh(line: str, *, devices: int, key: str = "parallel.mesh") -> dict[str, int]:
    """Axis sizes for that many devices, every axis present; an axis of -1 takes the devices that are left.

    Raises UserError as `read_mesh` does, and for sizes that do not multiply to the number of devices.
    """
    sizes = read_mesh(line, key=key)
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    elif free or fixed != devices:
        raise UserError(
            f"{key}={line!r} asks for {fixed} devices{' or a multiple' if free else ''} and there are {devices}; "
            "change a size, or set one axis to -1"
        )
    return sizes


def slice_sizes(sizes: dict[str, int], *, slices: int) -> dict[str, int]:
    """How many slices (pods joined by the data-centre network) each axis spans: the outermost axes span them.

    Raises UserError when the sizes of the axes cannot be divided so.
    """
    left, spans = slices, {}
    for axis, size in sizes.items():
        spans[axis] = math.gcd(size, left)
        left //= spans[axis]
        if spans[axis] < size:
            break
    if left > 1:
        line = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        raise UserError(
            f"the mesh {line} cannot be laid over {slices} slices: the product of its first axes must be a multiple of "
            f"{slices}, so that only they cross the network between slices; for instance begin with data={slices}"
        )
    return dict.fromkeys(sizes, 1) | spans


def make_mesh(
    line: str, *, devices: Sequence[jax.Device] | None = None, slices: int = 0, key: str = "parallel.mesh"
) -> Mesh:
    """The mesh over `devices` (default: all), axes in the order of `AXES`, the closest neighbours on the last axis.

    Args:
        slices: pods joined by the data-centre network, which the first axes cross; 0: as the devices report.
        key: the setting that holds the line, for messages.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(line, devices=len(devices), key=key)
    axis_types = (AxisType.Auto,) * len(sizes)
    told = len({getattr(device, "slice_index", 0) for device in devices})
    spans = slice_sizes(sizes, slices=slices or told)
    if slices not in (0, told) and told > 1:
        raise UserError(f"parallel.slices={slices}, and the devices are in {told} slices: set it to 0")
    try:
        if told == 1:  # one slice, or devices that do not report one
            return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices)
        inside = [sizes[axis] // spans[axis] for axis in sizes]
        arranged = mesh_utils.create_hybrid_device_mesh(inside, list(spans.values()), devices=devices)
    except NotImplementedError as error:  # what JAX raises for a torus whose sides do not make the axes
        places = [device.coords for device in devices if hasattr(device, "coords")]
        sides = "x".join(str(len(set(side))) for side in zip(*places, strict=True))
        raise UserError(
            f"{key}={line!r} cannot be laid over the torus {sides}: the size of each axis must be the product of "
            "some of its sides"
        ) from error
    return Mesh(arranged, tuple(sizes), axis_types=axis_types)


def row_ways(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def row_group(mesh: Mesh) -> tuple[int, int]:
    """(number, count): which part of a batch's rows this process reads, and how many parts there are.

    Processes whose devices differ only along pipeline, context or tensor work on the same rows and read the same part.

    Raises UserError when the devices of a process hold rows that another process has only some of.
    """
    names = list(mesh.shape)
    rows = [names.index(axis) for axis in ROWS]
    by_row = np.moveaxis(mesh.devices, rows, range(len(rows))).reshape(row_ways(mesh), -1)
    of_process: dict[int, set[int]] = {}
    for row, devices in enumerate(by_row):
        for device in devices:
            of_process.setdefault(device.process_index, set()).add(row)
    groups = sorted({tuple(sorted(held)) for held in of_process.values()})
    if sum(map(len, groups)) != len(by_row) or len({len(group) for group in groups}) > 1:
        raise UserError(
            "the mesh cuts the rows of a batch through the middle of a process: choose sizes of parallel.mesh such that "
            f"data x fsdp x expert={len(by_row)} is a multiple or a divisor of the number of processes"
        )
    return groups.index(tuple(sorted(of_process[jax.process_index()]))), len(groups)


LARGEST_KEPT = 64 << 20  # bytes; what glibc's arenas of threads can hold as one piece


def use_cpu_devices(count: int, *, batch_size: int, work_bytes: int) -> None:
    """Split this machine's CPU into devices, before JAX starts; without effect where there is an accelerator.

    One device a core runs a small model faster than one device with all cores: most of its operations are too short to be
    worth spreading, while the parts of a batch run side by side for the whole step.

    Args:
        count: devices to make; 0: the largest number of cores by which the batch can be divided.
        batch_size: sequences in one micro-batch.
        work_bytes: about what a step needs beside the state, on all devices.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return  # the user has decided
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = count or max(n for n in range(1, cores + 1) if batch_size % n == 0)
    if work_bytes > LARGEST_KEPT and not accelerators.present():
        malloc.keep_freed()
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started already, in a test or a notebook: its devices stay as they are
        if jax.default_backend() == "cpu" and jax.device_count() != count:
            print(f"JAX is already running with {jax.device_count()} CPU devices (asked for: {count})")


def describe(mesh: Mesh) -> str:
    """One line that says the devices and how they are arranged."""
    device = mesh.devices.flat[0]
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    return f"{mesh.size} {device.device_kind} device{'s' if mesh.size > 1 else ''}, {axes}"
