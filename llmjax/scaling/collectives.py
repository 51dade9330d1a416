"""The collectives of a compiled program: the kind of each, its mesh axes and its bytes.

Pure functions of `hlo.Program`. A partitioned program numbers devices by their place in the mesh.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from llmjax.scaling.hlo import Computation, Instruction, Program, Shape, unread

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",  # between slices, where the compiler has split a collective
)
ASYNC_CALLS = ("async-start", "call-start")  # of a computation that runs beside others, up to its "-done"
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Collective:
    """One collective as one device sees it."""

    kind: str
    groups: Groups  # of devices; of a permute the pairs (source, target)
    bytes: float  # of the largest array that it reads or makes
    role: str = "whole"  # or start, middle, done: a part of a collective, with other instructions between the parts
    channel: str = ""  # names the collective that a part belongs to

    @property
    def size(self) -> int:
        """Devices in a group."""
        return 2 if self.kind in ("collective-permute", "send") else max(len(group) for group in self.groups)

    @property
    def moved(self) -> float:
        """Bytes that each device sends in a ring, the fewest possible for large arrays."""
        if self.kind in ("collective-permute", "send"):
            return self.bytes
        n = self.size
        return self.bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


def axes_of(collective: Collective, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    if collective.kind == "send":
        return ("slices",)
    sizes = tuple(mesh.values())
    members = collective.groups
    if collective.kind != "collective-permute":
        members = tuple(group for group in members if len(group) > 1)[:1]
    varying = np.zeros(len(sizes), bool)
    for group in members:
        places = np.stack(np.unravel_index(np.array(group), sizes))
        varying |= np.any(places != places[:, :1], axis=1)
    return tuple(axis for axis, varies in zip(mesh, varying, strict=True) if varies)


def collective_of(program: Program, computation: Computation, instruction: Instruction) -> Collective | None:
    """The collective of an instruction that is one, or is a fusion or an asynchronous call around one; else None."""
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if kind == "send":
        size = sum(shape.bytes for shape in computation.by_name[instruction.operands[0]].shapes)
        return Collective("send", (), size, "start", f"send {instruction.attribute('channel_id')}")
    if kind in KINDS:
        role = "start" if opcode.endswith("-start") else "whole"
        return _collective(computation, instruction, kind, program.partitions, role=role)
    if opcode in ("fusion", "call", *ASYNC_CALLS):
        inner = _inside(program, instruction)
        if inner is None:
            return None
        where, found = inner
        role = "start" if opcode in ASYNC_CALLS else _role(where, found)
        made = _collective(where, found, found.opcode.removesuffix("-start"), program.partitions, role=role)
        if made.kind == "all-reduce" and _only_sliced(where, found):
            return replace(made, kind="reduce-scatter")  # each device keeps its part of the sum
        return made
    return None


def _role(computation: Computation, instruction: Instruction) -> str:
    """Which part of a collective this is. TPUs spread some over several fusions, and name the first and the last."""
    if "chain_id" not in instruction.attributes:
        return "whole"
    targets = " ".join(i.attributes for i in computation.instructions if i.opcode == "custom-call")
    if "AsyncCollectiveStart" in targets:
        return "start"
    return "done" if "AsyncCollectiveDone" in targets else "middle"


def _inside(program: Program, instruction: Instruction) -> tuple[Computation, Instruction] | None:
    """The collective in the computation that an instruction calls, and the computation it is in."""
    called = instruction.called()
    name = called.get("calls") or called.get("to_apply")
    where = program.computations.get(name or "")
    for found in where.instructions if where is not None else ():
        if found.opcode.removesuffix("-start") in KINDS:
            return where, found  # type: ignore[return-value]
        if found.opcode in ("fusion", "call", *ASYNC_CALLS) and (inner := _inside(program, found)):
            return inner
    return None


def _only_sliced(computation: Computation, instruction: Instruction) -> bool:
    users = computation.users.get(instruction.name, [])
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _collective(
    computation: Computation, instruction: Instruction, kind: str, partitions: int, *, role: str
) -> Collective:
    read = sum((computation.by_name[name].shapes for name in instruction.operands), ())
    made = instruction.shapes
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        made = made[len(read) : 2 * len(read)] or made  # (what is read, what is made, flags)
    size = max(_bytes(read), _bytes(made))
    groups = replica_groups(instruction.attributes, partitions) if kind != "collective-permute" else _pairs(instruction)
    return Collective(kind, groups, size, role, instruction.attribute("channel_id"))


def _bytes(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes)


def _pairs(instruction: Instruction) -> Groups:
    text = instruction.attribute("source_target_pairs")
    if not re.fullmatch(r"\{(\{\d+,\d+\},?)*\}", text):
        raise unread(f"{instruction.name} with source_target_pairs={text!r}")
    return _lists(text)


def _lists(text: str) -> Groups:
    """The groups of {{0,1},{2,3}}."""
    return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # 0, 1, 2, ... in this shape, with its dimensions in this order
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,? *device_ids=\(([^{}]*)\))?,? *\{([^{}]*)\}")
AXIS = re.compile(r"'([^']+)'=(\d+)")
TAKEN = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def replica_groups(attributes: str, partitions: int) -> Groups:
    """The groups in the attributes of a collective, in any of the compilers' notations. Without groups all devices are one.

    Raises UserError for another notation.

    >>> replica_groups("replica_groups={{0,1},{2,3}}", 4)
    ((0, 1), (2, 3))
    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> replica_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4)
    ((0, 2), (1, 3))
    >>> replica_groups("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", 4)
    ((0, 1), (2, 3))
    """
    given = re.search(r"(?:^|[ ,])(replica_groups=.*)", attributes)
    if given is None or re.match(r"replica_groups=\{\}", given[1]):
        return (tuple(range(partitions)),)
    if match := re.match(rf"replica_groups=\[([\d,]+)\]<={IOTA}(?:,|$)", given[1]):
        return _tuples(_iota(match[2], match[3]).reshape(_numbers(match[1])[0], -1))
    if match := MESH.match(given[1]):
        return _mesh_groups(*match.groups())
    if match := re.match(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", given[1]):
        return _lists(match[1])
    raise unread(given[1])


def _mesh_groups(axes: str, order: str | None, taken: str) -> Groups:
    """Groups along some axes of a mesh.

    Args:
        axes: 'a'=4,'b'=2, the sizes of the mesh.
        order: the devices of the mesh, listed or as an iota; None: 0, 1, 2, ...
        taken: 'a','b', the axes along which a group lies; 'a':(2)2 is the part of `a` after its first factor of 2.
    """
    sizes = {name: int(size) for name, size in AXIS.findall(axes)}
    if order is None:
        ids = np.arange(math.prod(sizes.values()))
    elif match := re.fullmatch(IOTA, order):
        ids = _iota(match[1], match[2])
    elif re.fullmatch(r"\d+(,\d+)*", order):
        ids = np.array(_numbers(order))
    else:
        raise unread(f"a mesh with device_ids=({order})")
    parts = {name: (int(before or 1), int(size or sizes.get(name, 0))) for name, before, size in TAKEN.findall(taken)}
    read = AXIS.sub("", axes) + TAKEN.sub("", taken)
    if read.strip(", ") or ids.size != math.prod(sizes.values()) or not parts.keys() <= sizes.keys():
        raise unread(f"groups along {{{taken}}} of mesh[{axes}]")
    shape: list[int] = []
    inside: list[int] = []  # dimensions along which a group's members lie
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        inside.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    grouped = np.moveaxis(ids.reshape(shape), inside, range(-len(inside), 0))
    return _tuples(grouped.reshape(-1, math.prod(shape[i] for i in inside)))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return ids.transpose(_numbers(order)) if order else ids


def _tuples(groups: np.ndarray) -> Groups:
    return tuple(tuple(int(i) for i in group) for group in groups)
