"""The time from a command to its first result: the first training step, two answers, the first token of a chat.

    python benchmarks/startup.py [--layers 4 12 48] [--base DIR --runs RUN ... [--turns 5]] [--out results/startup.json]

Part one starts `llmjax train` on a small prepared run and reads the times that it prints. The rest is imports and the
checks of the recipe. Part two compiles the training step of a narrow model (width 64) at each depth, with the layers
scanned, and unrolled up to 12 layers. Nothing is cached between compilations. Takes about two minutes on 2 cores.

Part three takes turns with another checkout, --base DIR with its own .venv, on the same runs. The older of the two has
to have made them, so that it can read them. It times `llmjax generate --prompts` with two short answers, and for chat
models `llmjax chat` up to the first character of an answer. A turn starts the other checkout's command, this one with
an empty cache ("first"), and this one again ("second"). The report has medians of wall seconds and of CPU seconds, and
the phases that `--timings` prints.
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import make_parser, write

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
    command = [sys.executable, "-m", "llmjax", "train", "--workdir", str(folder / "run")]
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


def compile_time(layers: int, *, unroll: int) -> dict[str, Any]:
    """Seconds to trace and to compile the training step, and the lines of its program."""
    c = small_config(layers)
    c.model.scan_unroll = unroll
    mesh = meshes.make_mesh("data=1", devices=jax.devices()[:1])
    module = placement.on_mesh(transformer.build(c.model), mesh, c)
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


QUESTIONS = ("Why is the sky blue?", "Name three colours.")
SHORT = 24  # tokens of an answer
# Python keeps what it compiled, as it does for everybody who does not forbid it; in no checkout's own folders.
BYTECODE = {
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "llmjax-startup-pyc"),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a command: seconds to what it is for, of all cores to its end, and by phase."""

    seconds: float
    cores: float
    phases: dict[str, float]


def start(python: Path, arguments: list[str], *, cache: Path, say: str = "") -> Start:
    """Run `llmjax` of an environment. With `say`, a line for the command to read, the time is that of the first answer."""
    env = {**os.environ, "LLMJAX_CACHE": str(cache), "PYTHONUNBUFFERED": "1", **BYTECODE}
    before, began = os.times(), time.perf_counter()
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([python.with_name("llmjax"), *arguments], env=env, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    if say:
        process.stdin.write(f"{say}\n/quit\n".encode())
        process.stdin.flush()
        process.stdout.read(1)
    seconds = time.perf_counter() - began
    _, told = process.communicate()
    if process.returncode:
        raise SystemExit(told.decode())
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    found = re.findall(r"^(\S.*?) {2,}([0-9.]+) {2,}[0-9.]+$", told.decode(), re.MULTILINE)
    phases = {name: float(value) for name, value in found if name != "together"}
    return Start(seconds if say else time.perf_counter() - began, used, phases)


def by_turns(run: Path, base: Path, *, turns: int) -> list[dict[str, Any]]:
    """Two answers, and the first token of a chat, of both checkouts."""
    pythons = {"base": base / ".venv" / "bin" / "python", "here": Path(sys.executable)}
    chats = any("chat_template" in path.name or "chat_template" in path.read_text() for path in tokenizer_files(run))
    rows = []
    for what in ("two answers", *(["first token of a chat"] if chats else [])):
        starts: dict[str, list[Start]] = {"base": [], "first": [], "second": []}
        for turn in range(turns + 1):
            with tempfile.TemporaryDirectory() as folder:
                for name in starts:
                    out = Path(folder) / f"{name}.jsonl"
                    prompts = Path(folder) / "prompts.jsonl"
                    rows_of = [{"prompt": text, "max_new_tokens": SHORT, "temperature": 0.0} for text in QUESTIONS]
                    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows_of))
                    more = ["--workdir", str(run), *([] if name == "base" else ["--timings"])]
                    if what == "two answers":
                        arguments, say = ["generate", "--prompts", str(prompts), "--out", str(out), *more], ""
                        arguments += ["--chat"] if chats else []
                    else:
                        arguments, say = ["chat", *more, f"--config.generate.max_new_tokens={SHORT}"], QUESTIONS[0]
                    python = pythons["base" if name == "base" else "here"]
                    one = start(python, arguments, cache=Path(folder) / "cache", say=say)
                    if turn:  # the first turn fills the system's cache of files
                        starts[name].append(one)
        rows.append({"run": run.name, "what": what, **{name: summary(of) for name, of in starts.items()}})
        seconds = {name: rows[-1][name]["seconds"] for name in starts}
        print(
            f"{run.name}, {what}: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), flush=True
        )
    return rows


def tokenizer_files(run: Path) -> list[Path]:
    return [path for path in (run / "tokenizer").glob("*") if path.suffix in (".json", ".jinja")]


def summary(starts: list[Start]) -> dict[str, Any]:
    """Medians; the phases of the start in the middle."""
    middle = sorted(starts, key=lambda one: one.seconds)[len(starts) // 2]
    return {
        "seconds": statistics.median(one.seconds for one in starts),
        "core_seconds": statistics.median(one.cores for one in starts),
        "phases": middle.phases,
    }


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--layers", type=int, nargs="*", default=[4, 12, 48], help="of parts one and two; none: neither"
    )
    parser.add_argument("--base", type=Path, help="the other checkout")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="of part three")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    if args.layers:
        result |= {"first_step": print_first_step(args.layers[0]), "compile": print_compile_times(args.layers)}
    if args.runs:
        rows = []
        for run in args.runs:
            rows += by_turns(run.absolute(), args.base.absolute(), turns=args.turns)
        result["by_turns"] = rows
    write(result, args.out)


def print_first_step(layers: int) -> dict[str, float]:
    """The fastest of several trainings: see `first_step`."""
    starts = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            starts.append(first_step(Path(folder), layers))
    best = min(starts, key=lambda parts: parts["total"])
    print(f"\nfrom the command to the end of the first step, {layers} layers of width 64:")
    for name, seconds in best.items():
        print(f"  {name:<20} {seconds:6.2f} s")
    return best


def print_compile_times(layers: list[int]) -> list[dict[str, Any]]:
    """Rows of `compile_time`, the fastest of several each."""
    jax.config.update("jax_enable_compilation_cache", False)
    cases = [(count, 1) for count in layers] + [(n, n) for n in layers if 1 < n <= UNROLLED_UP_TO]
    table: list[dict[str, Any]] = [
        min((compile_time(count, unroll=unroll) for _ in range(REPEATS)), key=lambda row: row["compile_seconds"])
        for count, unroll in cases
    ]
    print("\nlayers  form      trace     compile   program")
    for row in table:
        print(
            f"{row['layers']:>6}  {row['form']:<8}  {row['trace_seconds']:5.2f} s  {row['compile_seconds']:6.2f} s  {row['program_lines']:>6,} lines"
        )
    return table


if __name__ == "__main__":
    main()
