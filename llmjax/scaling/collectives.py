"""What devices send each other in a compiled program: the kind, the mesh axes and the bytes of every collective.

Pure functions of `hlo.Program`. Devices are numbered as a partitioned program numbers them, by their place in the mesh.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from llmjax.scaling.hlo import Computation, Instruction, Program, Shape

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",  # between slices, where the compiler has taken a collective apart
)
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Collective:
    """One collective as one device sees it."""

    kind: str
    groups: Groups  # devices that take part together; of a permute the pairs (source, target)
    bytes: float  # of the largest array that it reads or makes
    role: str = "whole"  # or start, middle, done: parts of one, between which other instructions run
    channel: str = ""  # which parts belong together

    @property
    def size(self) -> int:
        """Devices in a group."""
        return 2 if self.kind in ("collective-permute", "send") else max(len(group) for group in self.groups)

    @property
    def moved(self) -> float:
        """Bytes that each device sends: what a ring needs, which is the least for large arrays."""
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
    """What the instruction sends, if it is a collective, or a fusion or asynchronous call around one."""
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if kind == "send":
        size = sum(shape.bytes for shape in computation.by_name[instruction.operands[0]].shapes)
        return Collective("send", (), size, "start", f"send {instruction.attribute('channel_id')}")
    if kind in KINDS:
        role = "start" if opcode.endswith("-start") else "whole"
        return _collective(computation, instruction, kind, program.partitions, role=role)
    if opcode in ("fusion", "async-start", "call"):
        inner = _inside(program, instruction)
        if inner is None:
            return None
        where, found = inner
        role = "start" if opcode == "async-start" else _role(where, found)
        made = _collective(where, found, found.opcode.removesuffix("-start"), program.partitions, role=role)
        if made.kind == "all-reduce" and _only_sliced(where, found):
            return replace(made, kind="reduce-scatter")  # each device keeps its part of the sum
        return made
    return None


def _role(computation: Computation, instruction: Instruction) -> str:
    """Which part of a collective this is: TPUs spread some over several fusions, the first and the last of which say so."""
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
        if found.opcode in ("fusion", "async-start", "call") and (inner := _inside(program, found)):
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
    found = re.search(r"source_target_pairs=\{(.*?\})\}", instruction.attributes)
    return _lists(found[1]) if found else ()


def _lists(text: str) -> Groups:
    return tuple(
        tuple(int(n) for n in part.split(",") if n.strip())
        for part in re.findall(r"\{([^{}]*)\}", text)
        if part.strip()
    )


def replica_groups(attributes: str, partitions: int) -> Groups:
    """The groups in the attributes of a collective, in either notation; no groups: all devices are one.

    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> replica_groups("replica_groups={{0,1},{2,3}}", 4)
    ((0, 1), (2, 3))
    """
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, sizes = ([int(n) for n in match[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if match[3]:
            ids = ids.transpose([int(n) for n in match[3].split(",")])
        return tuple(tuple(int(i) for i in group) for group in ids.reshape(shape[0], -1))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        return _mesh_groups(match[1], match[2], match[3])
    if (match := re.search(r"replica_groups=\{(\{.*?\})\}", attributes)) and (groups := _lists(match[1])):
        return groups
    return (tuple(range(partitions)),)


def _mesh_groups(axes: str, order: str, names: str) -> Groups:
    """Groups along axes of a mesh, such as mesh['a'=4,'b'=2] {'a'}; 'a':(2)2 is the part of `a` after its first 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if match := re.search(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        ids = ids.reshape([int(n) for n in match[2].split(",")])
        ids = ids.transpose([int(n) for n in match[3].split(",")]) if match[3] else ids
    taken = {name: (int(before or 1), int(size or 0)) for name, before, size in re.findall(
        r"'([^']*)'(?::\((\d+)\)(\d+))?", names
    )}  # fmt: skip
    shape: list[int] = []
    inside: list[int] = []  # where the groups' members are
    for name, size in sizes.items():
        before, part = taken.get(name, (1, 0))
        part = part or (size if name in taken else 1)
        inside.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    grouped = np.moveaxis(ids.reshape(shape), inside, range(-len(inside), 0))
    groups = grouped.reshape(-1, math.prod(shape[i] for i in inside))
    return tuple(tuple(int(i) for i in group) for group in groups)
