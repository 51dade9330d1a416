"""Read the text of a compiled program (optimized HLO): its computations, how often loops turn, the FLOPs of its products.

Pure functions of text, for programs of any backend. A program is a set of computations, each a list of instructions in
the order in which the compiler scheduled them; one device runs all of it, and every shape is that of one device's piece.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmjax.errors import UserError

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
SHAPE = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^=]*|\(.*)-> .*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
COMMENT = re.compile(r"/\*.*?\*/")
CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Shape:
    """One array: its type, its dimensions, and the memory it lives in (0 is HBM, others are on the chip)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        """Its size without the padding of its layout."""
        bits = BITS.get(self.dtype)
        if bits is None:  # s32, u8, f8e4m3fn, s4
            bits = int(re.search(r"\d+", self.dtype)[0])  # type: ignore[index]
        return math.prod(self.dims) * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shapes` are the arrays of its result, a tuple's in order."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str  # what stands between the parentheses
    attributes: str  # what follows them
    root: bool

    def called(self) -> dict[str, str]:
        """Role -> computation: calls, to_apply, body, condition, and branches by number."""
        found = dict(CALLED.findall(self.attributes))
        if match := BRANCHES.search(self.attributes):
            for i, name in enumerate(match[1].split(",")):
                found[f"branch {i}"] = name.strip().lstrip("%")
        return found

    def attribute(self, name: str) -> str:
        """The text of `name=...` up to the next comma outside of brackets; empty if there is none."""
        match = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if match is None:
            return ""
        return next(_pieces(self.attributes[match.end() :]), "")


@dataclass
class Computation:
    """Instructions in the order of the schedule."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    by_name: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.instructions if i.root)

    def parameters(self) -> list[Instruction]:
        """Its parameters in their order."""
        return sorted((i for i in self.instructions if i.opcode == "parameter"), key=lambda i: int(i.inside))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> the instructions that read it."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found


@dataclass
class Program:
    """A whole compiled module."""

    computations: dict[str, Computation]
    entry: Computation
    partitions: int
    collectives: dict[tuple[str, str], Any] = field(default_factory=dict)  # found by (computation, instruction), kept


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`. Raises UserError for text that is not HLO."""
    computations: dict[str, Computation] = {}
    entry, now = None, None
    for line in text.splitlines():
        if now is None:
            if line.endswith("{") and (match := HEAD.match(line)):
                now = computations.setdefault(match[2], Computation(match[2]))
                entry = now if match[1] else entry
        elif line == "}" or line.startswith("}, "):  # which may name the thread that runs it
            now = None
        elif match := LINE.match(line):
            instruction = _instruction(match[2], match[3], root=match[1] is not None)
            now.instructions.append(instruction)
            now.by_name[instruction.name] = instruction
        elif now.instructions:  # what a kernel says of itself may go over several lines
            last = now.instructions[-1]
            now.instructions[-1] = now.by_name[last.name] = replace(last, attributes=last.attributes + line)
    if entry is None:
        raise UserError("this is not the text of a compiled program: it has no ENTRY computation")
    match = re.search(r"num_partitions=(\d+)", text[:20_000])
    return Program(computations, entry, int(match[1]) if match else 1)


def _instruction(name: str, rest: str, *, root: bool) -> Instruction:
    rest = COMMENT.sub("", rest) if "/*" in rest else rest
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = re.findall(r"%([\w.\-]+)", inside)
    opcode = rest[:opening]
    if not operands and opcode not in ("parameter", "constant", "iota"):
        operands = [piece.split()[-1] for piece in _pieces(inside) if piece.split()]
    return Instruction(name, opcode, shapes_of(kind), tuple(operands), inside, rest[closing + 1 :], root)


def shapes_of(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, such as `(f32[8,4]{1,0:T(8,128)S(1)}, u32[])`, in order."""
    found = []
    for dtype, dims, layout in SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.strip().lstrip("<=")) for d in dims.split(",") if d.strip())
        found.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise UserError(f"a bracket is not closed in {text[start : start + 80]!r}")


def _pieces(text: str) -> Iterator[str]:
    """What commas outside of brackets separate."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    yield text[start:].strip()


# ------------------------------------------------------------------ loops


@dataclass(frozen=True)
class Frame:
    """Where a loop's body was entered from, for numbers that are carried into it unchanged."""

    computation: Computation
    loop: Instruction
    outer: "Frame | None" = None


def trip_count(program: Program, computation: Computation, loop: Instruction, outer: Frame | None = None) -> int | None:
    """How often a `while` turns: as the compiler says, or from its condition, start and step; None: not known."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    called, frame = loop.called(), Frame(computation, loop, outer)
    condition, body = program.computations[called["condition"]], program.computations[called["body"]]
    compare, names = condition.root, {}
    if compare.opcode in ("fusion", "call") and (
        inner := compare.called().get("calls") or compare.called().get("to_apply")
    ):
        fused = program.computations[inner]
        names = {p.name: o for p, o in zip(fused.parameters(), compare.operands, strict=True)}
        compare, where = fused.root, fused
    else:
        where = condition
    if compare.opcode != "compare":
        return None
    sides = []
    for name in compare.operands:
        holder, name = (condition, names[name]) if name in names else (where, name)
        index = _carried(holder, name)
        sides.append((index, _scalar(program, holder, name, frame if holder is condition else None)))
    direction = compare.attribute("direction")
    (i, _), (_, limit) = sides if direction in ("LT", "LE", "NE") else sides[::-1]
    if i is None or limit is None:
        return None
    start = _element(program, computation, loop.operands[0], i, outer)
    step = _step(program, body, i, frame)
    if start is None or not step:
        return None
    return max(0, -(-(limit - start + (direction in ("LE", "GE"))) // step))


def _carried(computation: Computation, name: str) -> int | None:
    """The index in the loop's tuple that a value is read from."""
    instruction = computation.by_name[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.by_name[instruction.operands[0]]
    if instruction.opcode != "get-tuple-element":
        return None
    source = computation.by_name[instruction.operands[0]]
    return int(instruction.attribute("index")) if source.opcode == "parameter" else None


def _step(program: Program, body: Computation, index: int, frame: Frame) -> int | None:
    root = body.root
    if root.opcode != "tuple":
        return None
    new = body.by_name[root.operands[index]]
    while new.opcode in ("copy", "bitcast"):
        new = body.by_name[new.operands[0]]
    names: dict[str, str] = {}
    holder = body
    if new.opcode == "fusion":
        holder = program.computations[new.called()["calls"]]
        names = {p.name: o for p, o in zip(holder.parameters(), new.operands, strict=True)}
        new = holder.root
    if new.opcode != "add":
        return None
    for name in new.operands:
        where, name = (body, names[name]) if name in names else (holder, name)
        value = _scalar(program, where, name, frame if where is body else None)
        if value is not None and _carried(where, name) != index:
            return value
    return None


def _scalar(program: Program, computation: Computation, name: str, frame: Frame | None) -> int | None:
    """The value of an integer that does not depend on data, or None."""
    instruction = computation.by_name[name]
    if instruction.opcode == "constant":
        return int(instruction.inside) if re.fullmatch(r"-?\d+", instruction.inside) else None
    if instruction.opcode in ("copy", "bitcast", "convert"):
        return _scalar(program, computation, instruction.operands[0], frame)
    if instruction.opcode == "get-tuple-element":
        return _element(program, computation, instruction.operands[0], int(instruction.attribute("index")), frame)
    if instruction.opcode in ("add", "subtract", "multiply"):
        a, b = (_scalar(program, computation, name, frame) for name in instruction.operands)
        if a is None or b is None:
            return None
        return {"add": a + b, "subtract": a - b, "multiply": a * b}[instruction.opcode]
    return None


def _element(program: Program, computation: Computation, name: str, index: int, frame: Frame | None) -> int | None:
    """The value of one element of a tuple, if it does not depend on data."""
    instruction = computation.by_name[name]
    if instruction.opcode == "tuple":
        return _scalar(program, computation, instruction.operands[index], frame)
    if instruction.opcode == "while":
        body = program.computations[instruction.called()["body"]]
        if _unchanged(body, index):
            return _element(program, computation, instruction.operands[0], index, frame)
    if instruction.opcode == "parameter" and frame is not None:
        body = program.computations[frame.loop.called()["body"]]
        if _unchanged(body, index):
            return _element(program, frame.computation, frame.loop.operands[0], index, frame.outer)
    return None


def _unchanged(body: Computation, index: int) -> bool:
    """Whether a loop hands an element of its tuple on as it got it."""
    return body.root.opcode == "tuple" and _carried(body, body.root.operands[index]) == index


# ------------------------------------------------------------------ products


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a dot or convolution: two for each pair of numbers multiplied and added; other instructions 0."""
    if instruction.opcode == "dot":
        left = computation.by_name[instruction.operands[0]].shapes[0]
        summed = [int(d) for d in instruction.attribute("lhs_contracting_dims").strip("{}").split(",") if d]
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(left.dims[d] for d in summed)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call":
        if match := re.search(r'"flops":"?(\d+)', instruction.attributes):
            return float(match[1])  # a kernel that says what it costs
        return _attention_flops(computation, instruction)
    return 0.0


# Products for each pair of a query and a key in JAX's splash attention: forward, for the queries' gradient, for the keys'.
SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}


def _attention_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a splash attention kernel, which names itself and does not say them; half of the pairs, as causality
    leaves (a window leaves fewer)."""
    named = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{instruction.name} {instruction.attributes}")
    if named is None:
        return 0.0
    arrays = [computation.by_name[name].shapes[0] for name in instruction.operands]
    q, k = [shape for shape in arrays if shape.dtype in ("bf16", "f32") and len(shape.dims) >= 3][:2]
    return 2.0 * SPLASH[named[1]] * math.prod(q.dims) * k.dims[-2] / 2


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Products of a convolution that fall inside its input: TPUs write matrix products, batched ones too, as convolutions
    whose padding and dilation leave most places of the window empty."""
    labels = instruction.attribute("dim_labels")
    match = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels)
    if match is None:
        raise UserError(f"the convolution {instruction.name} has dim_labels={labels!r}, which are not understood")
    left, right = (computation.by_name[name].shapes[0].dims for name in instruction.operands[:2])
    lhs, rhs = dict(zip(match[1], left, strict=True)), dict(zip(match[2], right, strict=True))
    out = dict(zip(match[3], instruction.shapes[0].dims, strict=True))
    window = _window(instruction)
    spatial = sorted(label for label in lhs if label.isdigit())
    places = 1.0
    for i, label in enumerate(spatial):
        places *= _valid_places(lhs[label], rhs[label], out[label], {k: v[i] for k, v in window.items()})
    groups = int(instruction.attribute("batch_group_count") or 1)
    # The kernel's input features are those of one feature group already.
    return 2.0 * rhs["i"] * rhs["o"] * lhs["b"] / groups * places


def _window(instruction: Instruction) -> dict[str, list[tuple[int, ...]]]:
    found = {}
    for part in instruction.attribute("window").strip("{}").split():
        name, _, text = part.partition("=")
        found[name] = [tuple(int(n) for n in piece.split("_")) for piece in text.split("x")]
    return found


def _valid_places(size: int, kernel: int, out: int, window: dict[str, tuple[int, ...]]) -> float:
    """Pairs of a place of the output and one of the kernel that meet a number of the input."""
    (stride,), (dilate,), (base,) = (window.get(name, (1,)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    low = window.get("pad", (0, 0))[0]
    at = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None, :] * dilate
    return float(np.sum((at >= 0) & (at <= (size - 1) * base) & (at % base == 0)))
