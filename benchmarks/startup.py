"""The time from `llmjax train` to the first step, what it is spent on, and compile time against depth.

    python benchmarks/startup.py [--layers 4 12 48] [--out results/startup.json]

Part one starts the command on a small prepared run and reads the times that it prints; imports and the checks of the
recipe are what remains. Part two compiles the training step of a narrow model (width 64) at each depth, with the
layers scanned, and unrolled up to 12 layers. Nothing is cached between compilations. Takes about two minutes on 2 cores.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from llmjax import config, recipe
from llmjax.model import transformer
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import mesh as meshes
from llmjax.parallel import placement
from llmjax.train.optimizer import make_optimizer
from llmjax.train.schedule import make_schedule
from llmjax.train.step import batch_shardings, init_state, make_train_step

UNROLLED_UP_TO = 12  # layers; beyond, compiling takes minutes
REPEATS = 3  # the fastest is reported, other programs only ever add time


def small_config(layers: int) -> config.ConfigDict:
    """A narrow model of that many layers, trained on rows of 128 tokens."""
    c = config.base()
    c.tokenizer.kind = "byte"
    c.model.layers, c.model.width, c.model.heads, c.model.vocab_size = layers, 64, 2, 320
    c.model.attention = "reference"
    c.train.batch_size, c.train.sequence_length, c.train.duration = 8, 128, "20 steps"
    return c


def first_step(folder: Path, layers: int) -> dict[str, float]:
    """Seconds from the start of the command to the end of its first step, and its parts."""
    rng = random.Random(0)
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for i in range(40):
        (text / f"{i:02}.txt").write_text(" ".join(str(rng.random()) for _ in range(400)))
    c = small_config(layers)
    c.data.sources = (str(text),)
    c.train.eval_every = "0 steps"
    with contextlib.redirect_stdout(io.StringIO()):
        recipe.run(c.lock(), folder / "run", ("prepare", "tokenizer"))
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "llmjax.cli", "train", "--workdir", str(folder / "run")]
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("first step"):
            total = time.perf_counter() - began
            break
    else:
        raise SystemExit(f"the command did not train:\n{printed}")
    process.communicate()
    parts = {name.strip(): float(seconds) for name, seconds in re.findall(r"[:,] ([a-z ]+) ([0-9.]+) s", line)}
    return {"total": total, "imports and recipe": total - sum(parts.values()), **parts}


def compile_time(layers: int, *, unroll: int) -> dict[str, float]:
    """Seconds to trace and to compile the training step, and the lines of its program."""
    c = small_config(layers)
    c.model.scan_unroll = unroll
    mesh = meshes.make_mesh("data=1", devices=jax.devices()[:1])
    module = transformer.build(c.model)
    schedule = make_schedule(c.schedule, total_steps=20, tokens_per_step=1)
    optimizer = make_optimizer(c.optimizer, schedule)
    _, abstract = init_state(module, optimizer, c, mesh)
    shape = (c.train.batch_size, c.train.sequence_length)
    kinds = {
        "tokens": jnp.int32,
        "targets": jnp.int32,
        "positions": jnp.int32,
        "segments": jnp.int32,
        "weights": jnp.float32,
    }
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=batch_shardings(mesh)) for name, kind in kinds.items()}
    began = time.perf_counter()
    with placement.active(mesh, c):
        step = jax.jit(make_train_step(module, OBJECTIVES[c.objective.name], optimizer, schedule, c), donate_argnums=0)
        lowered = step.lower(abstract, batch, jax.random.key(0))
    traced = time.perf_counter()
    lowered.compile()
    return {
        "layers": layers,
        "form": "scanned" if unroll == 1 else "unrolled",
        "trace_seconds": traced - began,
        "compile_seconds": time.perf_counter() - traced,
        "program_lines": lowered.as_text().count("\n"),
    }


def main() -> None:
    """Measure, print both tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 48])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    starts = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            starts.append(first_step(Path(folder), args.layers[0]))
    best = min(starts, key=lambda parts: parts["total"])
    print(f"\nfrom the command to the end of the first step, {args.layers[0]} layers of width 64:")
    for name, seconds in best.items():
        print(f"  {name:<20} {seconds:6.2f} s")
    cases = [(layers, 1) for layers in args.layers] + [(n, n) for n in args.layers if 1 < n <= UNROLLED_UP_TO]
    table = [
        min((compile_time(layers, unroll=unroll) for _ in range(REPEATS)), key=lambda row: row["compile_seconds"])
        for layers, unroll in cases
    ]
    print("\nlayers  form      trace     compile   program")
    for row in table:
        print(
            f"{row['layers']:>6}  {row['form']:<8}  {row['trace_seconds']:5.2f} s  {row['compile_seconds']:6.2f} s  {row['program_lines']:>6,} lines"
        )
    if args.out:
        command = f"python benchmarks/startup.py --layers {' '.join(map(str, args.layers))}"
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"command": command, "cores": os.cpu_count(), "first_step": best, "compile": table}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
