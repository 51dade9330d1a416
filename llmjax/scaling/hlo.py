"""Read the text of a compiled program (optimized HLO): its computations, the lengths of its loops, the FLOPs of its products.

Pure functions of text, for programs of any backend. A program is a set of computations. Each is a list of instructions
in the order of the compiler's schedule. One device runs all of it, and every shape is that of one device's shard. Text
that these functions do not know is an error, because a plan that skips it would be wrong.
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
STATEMENT = re.compile(r"^\s+(ROOT )?%[^ ]+ = ")
COMMENT = re.compile(r"/\*.*?\*/")
CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def unread(what: str) -> UserError:
    """The error for text of a compiler that is not understood."""
    return UserError(
        f"the compiled program has {what[:300]}, which is not understood: use the compiler that plans are tested with, "
        "pip install -r requirements-plan.lock"
    )


@functools.cache
def bits_of(dtype: str) -> int:
    """Bits of one number of a type, such as s32, f8e4m3fn or bf16."""
    if dtype in BITS:
        return BITS[dtype]
    if match := re.match(r"[suf](\d+)", dtype):
        return int(match[1])
    raise unread(f"the type {dtype!r}")


@dataclass(frozen=True)
class Shape:
    """The type and dimensions of an array, and the memory it is in: 0 is HBM, others are on the chip."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        """Its size without the padding of its layout."""
        return math.prod(self.dims) * bits_of(self.dtype) / 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shapes` are the arrays of its result, a tuple's in order."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses
    attributes: str  # the text behind them
    root: bool

    def called(self) -> dict[str, str]:
        """Role -> name of the computation: calls, to_apply, body, condition, and branches by number."""
        found = dict(CALLED.findall(self.attributes))
        if match := BRANCHES.search(self.attributes):
            for i, name in enumerate(match[1].split(",")):
                found[f"branch {i}"] = name.strip().lstrip("%")
        return found

    def attribute(self, name: str) -> str:
        """The value of `name=...`, up to the next comma outside brackets; "" if there is none."""
        match = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if match is None:
            return ""
        return next(_pieces(self.attributes[match.end() :]), "")


@dataclass
class Computation:
    """Instructions, in the order of the schedule."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    by_name: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The instruction that makes the computation's result."""
        return next(i for i in self.instructions if i.root)

    def parameters(self) -> list[Instruction]:
        """Its parameters, in order."""
        return sorted((i for i in self.instructions if i.opcode == "parameter"), key=lambda i: int(i.inside))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name of an instruction -> the instructions that read its result."""
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
    collectives: dict[tuple[str, str], Any] = field(default_factory=dict)  # cache, by (computation, instruction)


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`. Raises UserError for text that is not HLO, or is not understood."""
    computations: dict[str, Computation] = {}
    entry, now = None, None
    for line in text.splitlines():
        if now is None:
            if match := HEAD.match(line) if line.endswith("{") else None:
                now = computations.setdefault(match[2], Computation(match[2]))
                entry = now if match[1] else entry
            elif line.endswith("{") or LINE.match(line):
                raise unread(f"the line {line.strip()!r} outside of its computations")
        elif line == "}" or line.startswith("}, "):  # which may name the thread that runs it
            now = None
        elif match := LINE.match(line):
            instruction = _instruction(match[2], match[3], root=match[1] is not None)
            now.instructions.append(instruction)
            now.by_name[instruction.name] = instruction
        elif STATEMENT.match(line) or not now.instructions:
            raise unread(f"the instruction {line.strip()!r}")
        else:  # the attributes of a kernel may continue on several lines
            last = now.instructions[-1]
            now.instructions[-1] = now.by_name[last.name] = replace(last, attributes=last.attributes + line)
    if entry is None:
        raise UserError("this is not the text of a compiled program: it has no ENTRY computation")
    match = re.search(r"num_partitions=(\d+)", text[:20_000])
    return Program(computations, entry, int(match[1]) if match else 1)


def _instruction(name: str, rest: str, *, root: bool) -> Instruction:
    rest = COMMENT.sub("", rest) if "/*" in rest else rest
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if end < 0 or opening < 0:
        raise unread(f"the instruction {name} = {rest!r}")
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
    if SHAPE.sub("", text).strip("(), "):
        raise unread(f"the type {text!r}")
    for dtype, dims, layout in SHAPE.findall(text):
        bits_of(dtype)
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.strip().lstrip("<=")) for d in dims.split(",") if d.strip())
        found.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """The index of the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise unread(f"an open bracket in {text[start : start + 80]!r}")


def _pieces(text: str) -> Iterator[str]:
    """The pieces between commas that are outside brackets."""
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
    """The loop whose body is being read. Numbers that a loop hands on unchanged are looked up before it."""

    computation: Computation
    loop: Instruction
    outer: "Frame | None" = None


def trip_count(program: Program, computation: Computation, loop: Instruction, outer: Frame | None = None) -> int | None:
    """How often a `while` runs its body, by the compiler's note or by its condition, start and step; None: not known."""
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
    if direction not in ("LT", "LE", "NE", "GT", "GE"):
        return None
    (i, _), (_, limit) = sides if direction in ("LT", "LE", "NE") else sides[::-1]
    if i is None or limit is None:
        return None
    start = _element(program, computation, loop.operands[0], i, outer)
    step = _step(program, body, i, frame)
    if start is None or not step:
        return None
    return max(0, -(-(limit - start + (direction in ("LE", "GE"))) // step))


def _carried(computation: Computation, name: str) -> int | None:
    """The index in the loop's tuple from which a value is read; None: it is not."""
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
    """Whether a loop hands an element of its tuple on unchanged."""
    return body.root.opcode == "tuple" and _carried(body, body.root.operands[index]) == index


# ------------------------------------------------------------------ products


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a dot, a convolution or a kernel: two for each pair of numbers multiplied and added. Of others 0."""
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


# Matrix products for each pair of a query and a key in JAX's splash attention: forward, gradient of queries, of keys.
SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}


def _attention_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a splash attention kernel, which is known by its name. Half of the pairs count, as the kernel is causal;
    a window leaves fewer."""
    named = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{instruction.name} {instruction.attributes}")
    if named is None:
        return 0.0
    arrays = [computation.by_name[name].shapes[0] for name in instruction.operands]
    large = [shape for shape in arrays if shape.dtype in ("bf16", "f32") and len(shape.dims) >= 3]
    if len(large) < 2:
        raise unread(f"the kernel {instruction.name} without queries and keys among its operands")
    q, k = large[:2]
    return 2.0 * SPLASH[named[1]] * math.prod(q.dims) * k.dims[-2] / 2


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a convolution inside its input. TPUs write matrix products, also batched ones, as convolutions whose
    padding and dilation leave most places of the window empty."""
    labels = instruction.attribute("dim_labels")
    match = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels)
    if match is None:
        raise unread(f"the convolution {instruction.name} with dim_labels={labels!r}")
    left, right = (computation.by_name[name].shapes[0].dims for name in instruction.operands[:2])
    lhs, rhs = dict(zip(match[1], left, strict=True)), dict(zip(match[2], right, strict=True))
    out = dict(zip(match[3], instruction.shapes[0].dims, strict=True))
    window = _window(instruction)
    spatial = sorted(label for label in lhs if label.isdigit())
    places = 1.0
    for i, label in enumerate(spatial):
        places *= _valid_places(lhs[label], rhs[label], out[label], {k: v[i] for k, v in window.items()})
    groups = int(instruction.attribute("batch_group_count") or 1)
    # The kernel's input features are those of one feature group.
    return 2.0 * rhs["i"] * rhs["o"] * lhs["b"] / groups * places


def _window(instruction: Instruction) -> dict[str, list[tuple[int, ...]]]:
    found = {}
    for part in instruction.attribute("window").strip("{}").split():
        name, _, text = part.partition("=")
        found[name] = [tuple(int(n) for n in piece.split("_")) for piece in text.split("x")]
    return found


def _valid_places(size: int, kernel: int, out: int, window: dict[str, tuple[int, ...]]) -> float:
    """How many pairs of a place of the output and a place of the kernel meet a number of the input."""
    (stride,), (dilate,), (base,) = (window.get(name, (1,)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    low = window.get("pad", (0, 0))[0]
    at = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None, :] * dilate
    return float(np.sum((at >= 0) & (at <= (size - 1) * base) & (at % base == 0)))
