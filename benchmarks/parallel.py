"""Gradients of every mesh axis, alone and together, against one device; bubble and memory of pipelines against formulas.

    python benchmarks/parallel.py [--out results/parallel.json]

64 fake devices, made of the CPU, say whether the numbers are right and what a device keeps; they say nothing about
speed. For gradients: the largest difference of any element, relative to the largest element of its parameter, float32.
For pipelines: how often the compiled loop turns against (parts x rounds) / (1 - bubble), and by how many bytes a
device's temporaries grow with each further part of a micro-batch, next to what a part's activations are at the border
of a stage.

Hardware: 2 CPU cores.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import make_parser, write

from llmjax import config
from llmjax.model import transformer
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import mesh as meshes
from llmjax.parallel import pipeline, placement
from llmjax.train.step import batch_shardings

LENGTH, ROWS = 32, 64
MOE = {"moe.experts": 8, "moe.active": 2, "moe.balance_loss": 0.0, "moe.z_loss": 0.0}
HYBRID = {"pattern": ("rglru", "rglru", "local"), "window": 8, "layers": 6}
RING = {"context": "ring"}

# name: (mesh, settings of the model, settings of parallel)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "data": ("data=64", {}, {}),
    "ZeRO-1": ("data=2 fsdp=8", {}, {"zero": 1}),
    "ZeRO-2": ("data=2 fsdp=8", {}, {"zero": 2}),
    "ZeRO-3": ("data=2 fsdp=16", {}, {}),
    "tensor": ("tensor=4", {}, {}),
    "tensor, sequence": ("data=4 tensor=4", {}, {"sequence": True}),
    "context, gather": ("data=2 context=8", {}, {}),
    "context, ring": ("data=2 context=8", {}, RING),
    "context, ring, window": ("context=8", {"pattern": ("local", "global"), "window": 9}, RING),
    "expert, dropless": ("data=2 expert=8", MOE, {}),
    "expert, capacity, all-to-all": ("data=2 expert=8", {**MOE, "moe.dispatch": "capacity"}, {}),
    "pipeline": ("pipeline=8", {}, {}),
    "pipeline, 11 layers": ("pipeline=4", {"layers": 11}, {}),
    "pipeline, 2 rounds": ("pipeline=4", {}, {"rounds": 2}),
    "pipeline, hybrid of recurrences and attention": ("data=2 pipeline=2", HYBRID, {}),
    "pipeline, experts": ("pipeline=4 expert=4", MOE, {}),
    "data x pipeline x tensor, ZeRO-1": ("data=2 pipeline=4 fsdp=2 tensor=4", {}, {"zero": 1}),
    "pipeline x fsdp x tensor, sequence, 2 rounds": ("pipeline=4 fsdp=4 tensor=4", {}, {"rounds": 2, "sequence": True}),
    "pipeline x context x tensor, ring": ("data=2 pipeline=4 context=4 tensor=2", {}, RING),
    "all six": ("data=2 pipeline=2 fsdp=2 expert=2 context=2 tensor=2", MOE, RING),
}


def settings(line: str, model: dict[str, Any], parallel: dict[str, Any], *, rows: int = ROWS) -> config.ConfigDict:
    """A small model on a mesh."""
    c = config.base()
    m = c.model
    m.layers, m.width, m.heads, m.mlp_width, m.vocab_size, m.attention = 8, 32, 4, 64, 320, "reference"
    c.train.batch_size, c.train.sequence_length = rows, LENGTH
    c.parallel.mesh = line
    for room, changes in (("model", model), ("parallel", parallel)):
        for key, value in changes.items():
            config.set_key(c, f"{room}.{key}", value)
    config.check(c)
    return c


def mesh_of(line: str) -> jax.sharding.Mesh:
    """The mesh of a line on as many devices as it needs."""
    count = int(np.prod([int(part.partition("=")[2]) for part in line.split()]))
    return meshes.make_mesh(line, devices=jax.devices()[:count])


def batch_of(rows: int) -> dict[str, np.ndarray]:
    """Random tokens in rows of several documents and some padding."""
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(4, 300, (rows, LENGTH)).astype(np.int32)
    starts_BL = rng.random((rows, LENGTH)) < 0.1
    starts_BL[:, 0] = True
    steps_L = np.arange(LENGTH)
    begun_BL = np.maximum.accumulate(np.where(starts_BL, steps_L[None], 0), axis=1)
    real_BL = steps_L[None] < rng.integers(LENGTH // 2, LENGTH + 1, (rows, 1))
    return {
        "tokens": tokens_BL,
        "targets": np.roll(tokens_BL, -1, axis=1),
        "positions": np.where(real_BL, steps_L[None] - begun_BL, 0).astype(np.int32),
        "segments": np.where(real_BL, np.cumsum(starts_BL, axis=1), 0).astype(np.int32),
        "weights": real_BL.astype(np.float32),
    }


def gradient_function(c: config.ConfigDict, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """A jitted (parameters, batch) -> (loss, gradients), and both arguments where they belong."""
    module = placement.on_mesh(transformer.build(c.model), mesh, c)
    params = jax.jit(functools.partial(transformer.init_params, module))(jax.random.key(0))
    whole = () if c.parallel.zero == 3 else ("fsdp",)
    params = jax.device_put(params, placement.parameter_shardings(params, mesh, whole=whole))
    batch = jax.device_put(batch_of(c.train.batch_size), batch_shardings(mesh))

    def loss(params: Any, batch: Any) -> jax.Array:
        return OBJECTIVES["causal"](module, params, batch, jax.random.key(1), c.objective).objective

    return jax.jit(jax.value_and_grad(loss)), params, batch


@functools.cache
def alone(model: tuple[tuple[str, Any], ...]) -> Any:
    """Loss and gradients on one device."""
    c = settings("data=1", dict(model), {})
    mesh = mesh_of("data=1")
    function, params, batch = gradient_function(c, mesh)
    with placement.active(mesh, c):
        return jax.device_get(function(params, batch))


def largest_difference(line: str, model: dict[str, Any], parallel: dict[str, Any]) -> float:
    """Of any gradient, relative to the largest element of its parameter's."""
    _, expected = alone(tuple(model.items()))
    c, mesh = settings(line, model, parallel), mesh_of(line)
    function, params, batch = gradient_function(c, mesh)
    with placement.active(mesh, c):
        _, found = jax.device_get(function(params, batch))
    worst = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)), found, expected)
    return max(jax.tree.leaves(worst))


def pipeline_numbers(stages: int, rounds: int, parts: int, remat: str) -> dict[str, float]:
    """Turns of the compiled loop, the bubble that was promised, and a device's temporaries."""
    line, model = f"pipeline={stages}", {"layers": stages * rounds * 2, "width": 128, "mlp_width": 512, "remat": remat}
    c, mesh = settings(line, model, {"rounds": rounds, "parts": parts}, rows=4 * parts), mesh_of(line)
    function, params, batch = gradient_function(c, mesh)
    with placement.active(mesh, c):
        traced = function.trace(params, batch)
        compiled = traced.lower().compile()
    busy = parts * rounds
    return {
        "ticks": longest_scan(traced.jaxpr.jaxpr),
        "bubble": pipeline.bubble(stages=stages, parts=parts, rounds=rounds),
        "ticks_promised": round(busy / (1 - pipeline.bubble(stages=stages, parts=parts, rounds=rounds))),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "border_bytes_of_a_part": 4 * LENGTH * 128 * jnp.dtype(c.model.dtype).itemsize,
    }


def longest_scan(jaxpr: Any) -> int:
    """Turns of the loop over ticks: the longest of all."""
    found = [0]
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation.params["length"])
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found.append(longest_scan(inner))
    return max(found)


def main() -> None:
    """Both tables."""
    parser = make_parser(__doc__, out=Path("results/parallel.json"))
    args = parser.parse_args()
    gradients: dict[str, Any] = {}
    print("| what | mesh | largest relative difference of a gradient |\n|---|---|---|")
    for name, (line, model, parallel) in CASES.items():
        gradients[name] = {"mesh": line, "largest_relative_difference": largest_difference(line, model, parallel)}
        print(f"| {name} | {line} | {gradients[name]['largest_relative_difference']:.1e} |", flush=True)
    pipelines = []
    print(
        "\n| stages | rounds | parts | remat | ticks | promised | bubble | temporaries a device | more a part, of border |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for stages, rounds, remat in ((4, 1, "none"), (4, 1, "full"), (8, 1, "full"), (4, 2, "full")):
        before: dict[str, float] = {}
        for parts in (8, 16, 32):
            row = pipeline_numbers(stages, rounds, parts, remat)
            more = ""
            if before:
                grown = (row["temporary_bytes"] - before["temporary_bytes"]) / (parts // 2)
                row["growth_a_part_in_borders"] = grown / row["border_bytes_of_a_part"]
                more = f"{row['growth_a_part_in_borders']:.1f}"
            before = row
            pipelines.append({"stages": stages, "rounds": rounds, "parts": parts, "remat": remat, **row})
            size = f"{row['temporary_bytes'] / 1e6:.1f} MB"
            print(
                f"| {stages} | {rounds} | {parts} | {remat} | {row['ticks']} | {row['ticks_promised']} | {row['bubble']:.1%} | "
                f"{size} | {more} |",
                flush=True,
            )
    write({"gradients": gradients, "pipelines": pipelines}, args.out)


if __name__ == "__main__":
    main()
