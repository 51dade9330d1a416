"""Compile the real train step for devices that are not here, and read its memory.

The step is that of `train/loop.py`: the same functions make its state and trace it. Only the arrays are abstract.
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llmjax import config
from llmjax.data.batches import pack
from llmjax.data.hf_tokenizer import no_tokenizer
from llmjax.data.ramp import BatchSizes, Stage, batch_sizes
from llmjax.errors import UserError
from llmjax.model import attention, transformer
from llmjax.objectives import OBJECTIVES, corruption
from llmjax.parallel import compiler_options, placement
from llmjax.parallel import mesh as meshes
from llmjax.train.frozen import combine
from llmjax.train.heldout import lower_heldout_step
from llmjax.train.optimizer import make_optimizer
from llmjax.train.schedule import make_schedule
from llmjax.train.step import State, batch_shardings, init_state, lower_step, make_train_step, trained_dtype

UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFitError(Exception):
    """The compiler refuses a program: `needed` bytes of HBM on each device, of `available` (0: it does not say)."""

    def __init__(self, needed: float, available: float, message: str) -> None:
        super().__init__(message)
        self.needed, self.available = needed, available


@dataclass(frozen=True)
class Compiled:
    """A compiled step and its parts."""

    stage: Stage
    abstract: State
    lowered: jax.stages.Lowered
    compiled: Any
    trace_seconds: float
    compile_seconds: float


def resolve(c: ConfigDict, *, platform: str) -> ConfigDict:
    """The config with the settings that depend on tokenizer and platform: vocabulary sizes, model.attention."""
    c = c.copy_and_resolve_references().unlock()
    size = 260 if c.tokenizer.kind == "byte" else c.tokenizer.vocab_size
    c.model.vocab_size = c.model.vocab_size or transformer.padded_vocab(c.model, size)
    if c.objective.label_smoothing:
        c.objective.vocab_size = c.objective.vocab_size or min(size, c.model.vocab_size)
    c.model.attention = attention.resolve(c.model, platform=platform)
    return c.lock()


def stages(c: ConfigDict) -> BatchSizes:
    """The batches of the run. Raises UserError for durations in epochs or time, because a plan reads no data."""
    if config.parse_duration(c.train.duration)[1] == "second":
        raise UserError(
            f"train.duration={c.train.duration!r}: a plan measures no steps, so it cannot convert times: give train.duration "
            "in tokens or steps"
        )
    try:
        sizes = batch_sizes(c.train)
        sizes.steps(c.train.duration)
    except UserError as error:
        raise UserError(f"{error}. A plan reads no data: give train.duration in tokens or steps") from error
    return sizes


def check_rows(c: ConfigDict, stage: Stage, sizes: dict[str, int]) -> None:
    """Raise UserError if a micro-batch cannot be divided over the devices."""
    ways = math.prod(sizes.get(axis, 1) for axis in meshes.ROWS)
    rows = stage.rows // stage.micro_batches
    if rows % ways:
        raise UserError(
            f"train.batch_size / train.micro_batches = {stage.rows} / {stage.micro_batches} = {rows} sequences cannot be "
            f"spread over {ways} devices ({' x '.join(meshes.ROWS)} of parallel.mesh={c.parallel.mesh!r}): change one of them"
        )


def abstract_mesh(c: ConfigDict, *, devices: int) -> AbstractMesh:
    """The mesh of a config over so many unknown devices."""
    sizes = meshes.parse_mesh(c.parallel.mesh, devices=devices)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def abstract_batch(c: ConfigDict, mesh: Mesh, *, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of the config's objective."""
    change = corruption(c, dataclasses.replace(
        no_tokenizer(c.model.vocab_size), piece_bytes=(b"a",) * c.model.vocab_size, pad_id=0, bos_id=1, eos_id=2
    ))  # fmt: skip
    length = c.train.sequence_length if change is None else change.tokens
    row = pack([np.full(length + 1, 3, np.int32)], length=length)
    if c.model.languages:
        row["languages"] = np.zeros_like(row["tokens"])
    if change is not None:
        one = change.transform({k: v[0] for k, v in row.items()}, np.random.default_rng(0))
        row = {k: np.asarray(v)[None] for k, v in one.items()}
    sharding = batch_shardings(mesh)
    return {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype, sharding=sharding) for k, v in row.items()}


def parts(c: ConfigDict, sizes: BatchSizes) -> tuple[Any, Any, Any]:
    """The module, the optimizer and the schedule of a run."""
    total = sizes.steps(c.train.duration)
    schedule = make_schedule(c.schedule, total_steps=total, sizes=sizes)
    return transformer.build(c.model), make_optimizer(c.optimizer, schedule, model=c.model), schedule


def shapes_key(c: ConfigDict) -> dict[str, Any]:
    """The settings under `model` that shapes depend on."""
    return {k: v for k, v in c.to_dict().items() if k not in ("remat", "attention", "barriers", "scan_unroll")}


_STATES: dict[tuple[str, AbstractMesh], State] = {}  # a cache, for searches


def abstract_state(c: ConfigDict, mesh: AbstractMesh) -> State:
    """The shapes of the state of a run, on a mesh with known sizes."""
    rest = (c.optimizer.to_dict(), c.parallel.zero, c.parallel.rules, c.train.ema, trained_dtype(c))
    key = (json.dumps([shapes_key(c.model), *rest]), mesh)
    if key not in _STATES:
        module, optimizer, _ = parts(c, stages(c))
        _STATES[key] = init_state(module, optimizer, c, mesh)[1]  # type: ignore[arg-type]
    return _STATES[key]


def compile_stage(c: ConfigDict, mesh: Mesh, sizes: BatchSizes, stage: Stage) -> Compiled:
    """The step for the batches of one stage, compiled for the mesh's devices.

    Raises:
        UserError: for a mesh that does not fit the model or the batch.
        DoesNotFitError: if the program does not fit the devices.
    """
    check_rows(c, stage, dict(mesh.shape))
    module, optimizer, schedule = parts(c, sizes)
    module = placement.on_mesh(module, mesh, c)
    start = time.perf_counter()
    _, abstract = init_state(module, optimizer, c, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    step = make_train_step(
        module, OBJECTIVES[c.objective.name], optimizer, schedule, c, micro_batches=stage.micro_batches
    )
    batch = abstract_batch(c, mesh, rows=stage.rows)
    lowered = lower_step(step, abstract, batch, key, mesh=mesh, c=c)
    traced = time.perf_counter()
    compiled = _compile(lowered, c, mesh)
    return Compiled(stage, abstract, lowered, compiled, traced - start, time.perf_counter() - traced)


def evaluation_bytes(c: ConfigDict, mesh: Mesh, made: Compiled) -> float:
    """Bytes of one device, with the whole state, while held-out text is measured.

    Raises:
        DoesNotFitError: if the program alone does not fit the devices.
    """
    stage, state = made.stage, made.abstract
    params = combine(state.params if state.ema is None else state.ema, state.frozen)
    batch = abstract_batch(c, mesh, rows=stage.rows // stage.micro_batches)
    module = placement.on_mesh(transformer.build(c.model), mesh, c)
    said = compiled_bytes(_compile(lower_heldout_step(c, module, params, batch, mesh=mesh), c, mesh))
    return shard_bytes(state) + said["peak"] - shard_bytes(params)


def _compile(lowered: jax.stages.Lowered, c: ConfigDict, mesh: Mesh) -> Any:
    try:
        return compiler_options.compile_with(
            lowered, compiler_options.choose(c.parallel.compiler, mesh.devices.flat[0])
        )
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(str(error))
        if refusal is None:
            raise
        raise refusal from error


def read_refusal(message: str) -> DoesNotFitError | None:
    """The refusal in a compiler's error, or None for another error.

    >>> refusal = read_refusal("RESOURCE_EXHAUSTED: ... total memory required (38.84G) exceeds available HBM (30.74G)")
    >>> round(refusal.needed / 2**30, 2), round(refusal.available / 2**30, 2)
    (38.84, 30.74)
    """
    if not re.search(r"RESOURCE_EXHAUSTED|HbmOom|out of memory|exceed", message, re.IGNORECASE):
        return None
    size = r"\(?([\d.]+) ?([KMGT]?)i?B?\)?"
    for pattern in (
        rf"memory required[^(]*{size} exceeds available HBM {size}",
        rf"Used {size} of {size} hbm",
        rf"required[^\d]{{0,40}}{size}[^\d]{{0,60}}{size}",
    ):
        if match := re.search(pattern, message):
            needed, available = (float(match[i]) * UNITS[match[i + 1]] for i in (1, 3))
            return DoesNotFitError(needed, available, match[0])
    if "HbmOom" in message or "RESOURCE_EXHAUSTED" in message:
        return DoesNotFitError(0.0, 0.0, message.strip().splitlines()[0])
    return None


# ------------------------------------------------------------------ memory


def shard_bytes(tree: Any) -> float:
    """Bytes of a tree of arrays on one device, by their shardings."""
    return float(
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    )


def state_bytes(abstract: State) -> dict[str, float]:
    """Exact bytes of the state on one device: trained and frozen parameters, optimizer, average."""
    return {
        "parameters": shard_bytes(abstract.params),
        "frozen": shard_bytes(abstract.frozen),
        "optimizer": shard_bytes(abstract.opt_state),
        "average": shard_bytes(abstract.ema),
    }


def compiled_bytes(compiled: Any) -> dict[str, float]:
    """The compiler's bytes of HBM of one device: arguments, temporaries, code, and their sum (`peak`)."""
    said = compiled.memory_analysis()
    if said is None:
        raise UserError("the compiler of this backend gives no memory analysis")
    names = ("argument", "output", "alias", "temp", "generated_code")
    size = {name: float(getattr(said, f"{name}_size_in_bytes")) for name in names}
    return {
        "arguments": size["argument"],
        "outputs": size["output"] - size["alias"],  # without those that replace an argument
        "temporaries": size["temp"],
        "code": size["generated_code"],
        "peak": size["argument"] + size["output"] - size["alias"] + size["temp"] + size["generated_code"],
    }


def device_order(mesh: Mesh) -> Sequence[Any]:
    """The devices of a mesh, in the order in which a partitioned program numbers them."""
    return list(mesh.devices.flat)
