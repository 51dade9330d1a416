"""How long a compiled program takes, by formula: the schedule is run through, one instruction after another.

An instruction takes as long as its products at the peak FLOP/s, or its bytes at the bandwidth of HBM, whichever is
longer (a roofline for each instruction). A collective or a copy that the compiler starts early runs beside the
instructions up to the one that waits for it. The rest of its time is *exposed*. A collective that is not started early
is exposed in full. The body of a loop counts once for each turn. Launch overheads and other losses do not count, so the
time is a lower bound. The table of benchmarks/plans.py shows how far real chips are from it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from llmjax.scaling.collectives import ASYNC_CALLS, KINDS, Collective, collective_of
from llmjax.scaling.hlo import Computation, Frame, Instruction, Program, product_flops, trip_count, unread

FREE = {"recv", "recv-done", "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "opt-barrier", "optimization-barrier", "domain", "add-dependency"}  # fmt: skip
NO_KERNELS = {
    "AllocateBuffer",
    "Sharding",
    "AssumeGatherIndicesInBound",
    "X64Combine",
    "X64SplitLow",
    "SliceId",
    "ZeroCrop",
}
HANDS_ON = {"tuple", "custom-call", *KINDS}
TRACED = {
    "while",
    "body",
    "cond",
    "closed_call",
    "checkpoint",
    "rematted_computation",
    "scan",
    "jit",
    "layers",
    "first",
    "last",
}
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Sent:
    """All equal collectives of a step."""

    collective: Collective
    count: float  # in a step
    seconds: float  # on the links, of all of them
    exposed: float  # seconds in which nothing else ran


@dataclass(frozen=True)
class Work:
    """What instructions of one name take in a step, beside collectives and waits."""

    seconds: float = 0.0
    at_peak: float = 0.0  # seconds that their products would take at the peak


@dataclass
class Cost:
    """The cost for one device of running a computation once."""

    seconds: float = 0.0
    flops: float = 0.0  # of products
    bytes: float = 0.0  # to and from HBM
    busy: float = 0.0  # seconds of instructions that are neither collectives nor waits
    waits: float = 0.0  # seconds of waiting for copies
    cycles: float = 0.0  # as the compiler estimates them
    sent: dict[Collective, Sent] = field(default_factory=dict)
    work: dict[tuple[str, str], Work] = field(default_factory=dict)  # by `named`
    kernels: dict[str, float] = field(default_factory=dict)  # custom calls of unknown FLOPs -> how often in a step
    unknown_loops: int = 0  # loops of unknown length, counted once

    def add(self, other: "Cost", times: float = 1.0) -> None:
        """Add another cost so many times."""
        for name in ("seconds", "flops", "bytes", "busy", "waits", "cycles"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for one in other.sent.values():
            self.send(replace(one, count=one.count * times, seconds=one.seconds * times, exposed=one.exposed * times))
        for key, work in other.work.items():
            self.do(key, times * work.seconds, times * work.at_peak)
        for name, count in other.kernels.items():
            self.kernels[name] = self.kernels.get(name, 0.0) + count * times
        self.unknown_loops += other.unknown_loops

    def do(self, key: tuple[str, str], seconds: float, at_peak: float) -> None:
        """Count work under a name."""
        before = self.work.get(key, Work())
        self.work[key] = Work(before.seconds + seconds, before.at_peak + at_peak)

    def send(self, one: Sent) -> None:
        """Count a collective."""
        before = self.sent.get(one.collective, Sent(one.collective, 0.0, 0.0, 0.0))
        self.sent[one.collective] = Sent(
            one.collective, before.count + one.count, before.seconds + one.seconds, before.exposed + one.exposed
        )


def named(instruction: Instruction) -> tuple[str, str]:
    """(forward, again, backward or other; the part of the network) of an instruction, by where JAX traced it.

    A fusion has the name of the operation that it ends with.
    """
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    path = found[1] if found else ""
    phase = next(
        (name for mark, name in (("rematted_computation", "again"), ("transpose(", "backward"), ("jvp(", "forward")) if mark in path),
        "other",
    )  # fmt: skip
    if kernel := re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{instruction.name} {path}"):
        return "backward" if kernel[1] != "fwd" else phase, f"splash {kernel[1]}"
    parts = [part for part in path.split("/") if re.fullmatch(r"[a-z]\w*", part) and part not in TRACED]
    return phase, "/".join(parts[-3:-1]) if len(parts) > 1 else instruction.opcode


@dataclass(frozen=True)
class Machine:
    """How fast one device is."""

    flops: float  # FLOP/s
    bandwidth: float  # bytes/s of HBM
    link_seconds: Callable[[Collective], float]
    channels: Callable[[Collective], tuple[object, ...]]  # the links that it takes; others wait for them
    clock: float = 0.0  # cycles a second; 0: do not use the compiler's own estimates of cycles


def walk(program: Program, machine: Machine) -> Cost:
    """The cost of a whole program for one device."""
    return _Walker(program, machine).run(program.entry, None)


class _Walker:
    def __init__(self, program: Program, machine: Machine) -> None:
        self.program, self.machine = program, machine
        self.flops_of: dict[str, float] = {}

    def run(self, computation: Computation, frame: Frame | None) -> Cost:
        """The cost of one computation, in the order of its schedule."""
        cost = Cost()
        ends: dict[str, tuple[float, Collective | None]] = {}  # started instruction -> when it is done
        free: dict[object, float] = {}  # channel -> when its links are free again
        for instruction in computation.instructions:
            opcode = instruction.opcode
            if opcode in FREE:
                continue
            if opcode == "while":
                self._loop(cost, computation, instruction, frame)
            elif opcode == "conditional":
                branches = [
                    c for role, c in instruction.called().items() if role.endswith("computation") or "branch" in role
                ]
                made = [self.run(self.program.computations[name], None) for name in branches]
                cost.add(max(made, key=lambda c: c.seconds))
            elif opcode.endswith("-done"):
                self._wait(cost, ends, instruction.operands)
            elif (sent := self._collective(computation, instruction)) is not None and sent.role != "middle":
                if sent.role == "done":
                    self._fused(cost, instruction)  # before the wait: the last steps of the collective are beside it
                    self._wait(cost, ends, (sent.channel,))
                else:
                    self._send(cost, ends, free, instruction, sent)
            elif opcode in ("copy-start", "slice-start", *ASYNC_CALLS):
                size = min(self._traffic(computation, instruction), 2 * sum(s.bytes for s in instruction.shapes[:1]))
                begin = max(cost.seconds, free.get("copies", 0.0))
                free["copies"] = begin + size / self.machine.bandwidth
                ends[instruction.name] = (free["copies"], None)
                cost.bytes += size
            elif opcode == "call":
                cost.add(self.run(self.program.computations[instruction.called()["to_apply"]], None))
            elif opcode.endswith("-update"):  # between start and done, under the name of the start
                ends[instruction.name] = ends[instruction.operands[0]]
            elif opcode.endswith("-start"):
                raise unread(f"the instruction {opcode}")
            else:
                self._compute(cost, computation, instruction)
        return cost

    def _collective(self, computation: Computation, instruction: Instruction) -> Collective | None:
        known, name = self.program.collectives, (computation.name, instruction.name)
        if name not in known:
            known[name] = collective_of(self.program, computation, instruction)
        return known[name]

    def _loop(self, cost: Cost, computation: Computation, loop: Instruction, frame: Frame | None) -> None:
        times = trip_count(self.program, computation, loop, frame)
        body = self.program.computations[loop.called()["body"]]
        once = self.run(body, Frame(computation, loop, frame))
        once.unknown_loops += times is None
        total = once.unknown_loops
        cost.add(replace(once, unknown_loops=0), 1 if times is None else times)
        cost.unknown_loops += total

    def _send(
        self,
        cost: Cost,
        ends: dict[str, tuple[float, Collective | None]],
        free: dict[object, float],
        instruction: Instruction,
        sent: Collective,
    ) -> None:
        seconds, channels = self.machine.link_seconds(sent), self.machine.channels(sent)
        key = replace(sent, role="whole", channel="")
        done = max([cost.seconds, *(free.get(channel, 0.0) for channel in channels)]) + seconds
        free.update(dict.fromkeys(channels, done))
        self._fused(cost, instruction)
        if sent.role == "start":
            ends[instruction.name] = ends[sent.channel] = (done, key)
            cost.send(Sent(key, 1.0, seconds, 0.0))
        else:
            exposed = max(done - cost.seconds, 0.0)
            cost.seconds += exposed
            cost.send(Sent(key, 1.0, seconds, exposed))

    def _fused(self, cost: Cost, instruction: Instruction) -> None:
        """Count the products that are fused with a collective, at the peak."""
        flops = self._inner_flops(instruction)
        if flops:
            seconds = flops / self.machine.flops
            cost.flops += flops
            cost.seconds += seconds
            cost.busy += seconds
            cost.do(named(instruction), seconds, seconds)

    def _wait(self, cost: Cost, ends: dict[str, tuple[float, Collective | None]], started: Sequence[str]) -> None:
        found = next((ends[name] for name in started if name in ends), None)
        if found is None:
            raise unread(f"a wait for {', '.join(started)}, which nothing starts")
        done, sent = found
        late = max(done - cost.seconds, 0.0)
        cost.seconds += late
        if sent is None:
            cost.waits += late
        elif late:
            cost.send(Sent(sent, 0.0, 0.0, late))

    def _compute(self, cost: Cost, computation: Computation, instruction: Instruction) -> None:
        flops = product_flops(computation, instruction) + self._inner_flops(instruction)
        size = self._traffic(computation, instruction)
        if instruction.opcode == "custom-call" and not flops and size:
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            name = target[1] if target else "?"
            if name in NO_KERNELS:
                size = 0.0
            else:
                cost.kernels[name] = cost.kernels.get(name, 0.0) + 1
        seconds = max(flops / self.machine.flops, size / self.machine.bandwidth)
        if match := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes):
            cost.cycles += float(match[1])
            if self.machine.clock:
                seconds = float(match[1]) / self.machine.clock
        cost.seconds += seconds
        cost.busy += seconds
        cost.flops += flops
        cost.bytes += size
        cost.do(named(instruction), seconds, flops / self.machine.flops)

    def _inner_flops(self, instruction: Instruction) -> float:
        """FLOPs of the products in the computation that a fusion calls."""
        name = instruction.called().get("calls")
        if name is None:
            return 0.0
        if name not in self.flops_of:
            inner = self.program.computations[name]
            self.flops_of[name] = sum(product_flops(inner, i) + self._inner_flops(i) for i in inner.instructions)
        return self.flops_of[name]

    # ------------------------------------------------------------------ bytes to and from HBM

    def _traffic(self, computation: Computation, instruction: Instruction) -> float:
        opcode, operands = instruction.opcode, [computation.by_name[name] for name in instruction.operands]
        made = _in_hbm(instruction)
        if opcode in SLICES:
            return made + (min(made, _in_hbm(operands[0])) if operands else 0.0)
        if opcode == "dynamic-update-slice":
            return _in_hbm(operands[1]) + min(made, sum(s.bytes for s in operands[1].shapes))
        name = instruction.called().get("calls")
        if opcode != "fusion" or name is None:
            return made + sum(_in_hbm(operand) for operand in operands)
        inner = self.program.computations[name]
        read = sum(
            min(_in_hbm(operand), self._read(inner, parameter))
            for operand, parameter in zip(operands, inner.parameters(), strict=True)
        )
        return read + min(made, self._written(inner, inner.root))

    def _read(self, computation: Computation, value: Instruction) -> float:
        """Bytes of a parameter that a fused computation reads: those of its slices where it reads only slices."""
        total = 0.0
        whole = sum(shape.bytes for shape in value.shapes)
        for user in computation.users.get(value.name, []):
            if user.opcode in SLICES and user.operands[0] == value.name:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue  # written in place
            elif user.opcode == "bitcast":
                total += self._read(computation, user)
            elif user.opcode in HANDS_ON:
                continue  # handed on, or read by the links
            elif user.opcode == "fusion":
                inner = self.program.computations[user.called()["calls"]]
                places = [i for i, name in enumerate(user.operands) if name == value.name]
                total += sum(self._read(inner, inner.parameters()[i]) for i in places)
            else:
                return whole
        return min(total, whole)

    def _written(self, computation: Computation, root: Instruction) -> float:
        """Bytes that a fused computation writes: of an update in place, only the update."""
        if root.opcode == "bitcast":
            return self._written(computation, computation.by_name[root.operands[0]])
        if root.opcode == "parameter":
            return 0.0
        if root.opcode == "tuple":
            return sum(self._written(computation, computation.by_name[name]) for name in root.operands)
        if root.opcode == "dynamic-update-slice":
            return sum(shape.bytes for shape in computation.by_name[root.operands[1]].shapes)
        if root.opcode == "fusion":
            inner = self.program.computations[root.called()["calls"]]
            return self._written(inner, inner.root)
        return sum(shape.bytes for shape in root.shapes)


def _in_hbm(instruction: Instruction) -> float:
    return sum(shape.bytes for shape in instruction.shapes if shape.space == 0)
