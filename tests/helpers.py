"""A tiny model, a tiny run and its batches, and how to start the command: for the tests of training, recipes and the command."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from llmjax import config
from llmjax.data.source import Batch, Source, StatelessSource
from llmjax.model import transformer
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import mesh as meshes
from llmjax.parallel import placement, processes
from llmjax.train import budget, loop, programs, rewind, setup
from llmjax.train.optimizer import make_optimizer
from llmjax.train.schedule import make_schedule, milestones
from llmjax.train.step import State, batch_shardings, init_state, make_train_step

KEPT_STEPS = 16  # programs of prepare_steps, and of train
WORDS = ("the", "model", "reads", "a", "line", "and", "writes", "another", "one", "def", "return", "x", "=", "1")


def few(cases: Iterable[Any], keep: int = 1, slow: int | None = None) -> list[Any]:
    """The cases of a test whose promise the first ones hold; the others ask the same once more, and run as slow.

    A tuple is the values of several arguments; one that is a value goes in a tuple of its own.

    Args:
        slow: so many of the others are slow, the rest exhaustive; None: all are slow.
    """
    most = float("inf") if slow is None else keep + slow
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [[] if i < keep else [pytest.mark.slow if i < most else pytest.mark.exhaustive] for i in range(len(values))]
    return [pytest.param(*one, marks=own) for one, own in zip(values, marks, strict=True)]


def tiny_config(sources: Path | str = "stdlib", **changes: Any) -> config.ConfigDict:
    """A model and a run so small that a step takes milliseconds. `changes` are keys with "__" for the dot."""
    c = config.base()
    c.name = "tiny"
    c.data.sources = (str(sources),)
    c.data.min_bytes = 1
    c.data.holdout_percent = 20.0
    c.tokenizer.kind = "byte"
    c.model.layers, c.model.width, c.model.heads, c.model.mlp_width = 2, 32, 4, 64
    c.model.vocab_size = 320
    c.model.attention = "reference"
    c.train.duration, c.train.batch_size, c.train.sequence_length = "8 steps", 8, 16
    c.train.eval_every, c.train.eval_batches = "4 steps", 1
    c.checkpoint.every, c.checkpoint.every_seconds = "4 steps", 0.0
    c.eval.batch_size, c.eval.max_bytes = 4, 400
    c.generate.max_new_tokens = 4
    c.optimizer.learning_rate = 1e-2
    for key, value in changes.items():
        config.set_key(c, key.replace("__", "."), value)
    config.check(c)
    return c


def make_batch(c: config.ConfigDict, k: int) -> dict[str, np.ndarray]:
    """Batch k of a text that can be learnt: counting, with unequal padding at the ends of the rows."""
    rng = np.random.default_rng((c.seed, k))
    shape = (c.train.batch_size, c.train.sequence_length)
    windows = (rng.integers(0, 8, (shape[0], 1)) + np.arange(shape[1] + 1)[None, :]) % 24 + 4
    real = np.arange(shape[1])[None, :] < rng.integers(shape[1] // 4, shape[1] + 1, (shape[0], 1))
    return {
        "tokens": np.where(real, windows[:, :-1], 0).astype(np.int32),
        "targets": np.where(real, windows[:, 1:], 0).astype(np.int32),
        "positions": np.where(real, np.arange(shape[1])[None, :], 0).astype(np.int32),
        "segments": real.astype(np.int32),
        "weights": real.astype(np.float32),
    }


def train(
    c: config.ConfigDict,
    workdir: Path,
    *,
    batch: Callable[[int], Batch] | None = None,
    make_source: Callable[[int], Source] | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    **settings: Any,
) -> dict[str, float | int | str]:
    """The loop on the tiny problem, in this process: the final numbers. It goes back from spikes as a stage does.

    Its programs are kept, so that runs of equal settings trace them once: an empty `PROGRAMS` makes them anew.

    Args:
        batch: number -> batch; without it, and without `make_source`, `make_batch`.
        settings: of the loop.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    source = StatelessSource(batch or partial(make_batch, c), read_ahead=0)
    while True:
        try:
            with mock.patch.object(setup, "make_programs", _kept_programs):
                return loop.train(
                    c,
                    workdir,
                    module=transformer.build(c.model),
                    objective=OBJECTIVES[c.objective.name],
                    make_source=make_source or (lambda total: source),
                    tokens_per_epoch=10_000,
                    make_evaluate=None if evaluate is None else lambda mesh, params: evaluate,
                    **settings,
                )
        except rewind.Spike as spike:
            processes.broadcast_from_first(partial(rewind.go_back, workdir, c.train.rewind, spike))


PROGRAMS: dict[tuple[Any, ...], Any] = {}  # the least recently used first


def _kept(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    PROGRAMS[key] = PROGRAMS.pop(key, None) or make()
    while len(PROGRAMS) > KEPT_STEPS:
        PROGRAMS.pop(next(iter(PROGRAMS)))
    return PROGRAMS[key]


class _Programs(programs.Programs):
    """The programs of a run, whose steps are kept."""

    def compile(self, stage: Any, batch: Batch, *, rows: int, total_steps: int) -> Callable[..., Any]:
        at = milestones(self.c.schedule, total_steps=total_steps, sizes=self.sizes)
        at = at[:2] if self.c.schedule.name == "constant" else at  # the warm-up alone
        shapes = str(jax.tree.map(lambda x: (x.shape, x.dtype), batch))
        make = partial(super().compile, stage, batch, rows=rows, total_steps=total_steps)
        return _kept((_told(self.c), self.sizes, self.mesh, stage, shapes, rows, at), make)


def _kept_programs(c: config.ConfigDict, module: Any, objective: Any, sizes: Any, mesh: Mesh) -> programs.Programs:
    c = c.copy_and_resolve_references()

    def make() -> programs.Programs:
        return _Programs(**vars(programs.make_programs(c, module, objective, sizes, mesh)))

    return _kept((_told(c), sizes, mesh), make)


def _told(c: config.ConfigDict) -> str:
    """The settings that programs may follow from: all but when a run ends, saves and evaluates."""
    told = c.copy_and_resolve_references().unlock()
    told.checkpoint, told.train.eval_every = None, ""
    told.train.duration = "1 s" if budget.is_time(c) else "1 step"
    return config.to_json(told)


@functools.lru_cache(maxsize=32)
def first_params(module: transformer.Transformer) -> Any:
    """The parameters that a model starts with, made once for all tests."""
    return jax.jit(partial(transformer.init_params, module))(jax.random.key(0))


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def mesh_of(line: str) -> Mesh:
    """The mesh of a config line over as many of the fake devices as the line asks for."""
    sizes = [int(part.partition("=")[2]) for part in line.split()]
    return meshes.make_mesh(line, devices=jax.devices()[: int(np.prod(sizes))])


_STEPS: dict[tuple[str, Mesh], tuple[State, State, Any]] = {}  # the least recently used first


def prepare_steps(c: config.ConfigDict, mesh: Mesh) -> tuple[State, State, Any]:
    """The first state, its abstract form, and a function (state, batch of numpy arrays) -> (state, metrics).

    Those of the configs used last are kept, so that tests share what was traced and compiled.
    """
    key = config.to_json(c), mesh
    _STEPS[key] = _STEPS.pop(key, None) or _make_steps(c.copy_and_resolve_references(), mesh)
    while len(_STEPS) > KEPT_STEPS:
        _STEPS.pop(next(iter(_STEPS)))
    return _STEPS[key]


def abstract_state(c: config.ConfigDict, mesh: Mesh) -> State:
    """The shapes, types and places of the first state; nothing is compiled."""
    return _parts(c.copy_and_resolve_references(), mesh)[-1]


def _parts(c: config.ConfigDict, mesh: Mesh) -> tuple[Any, Any, Any, Any, State]:
    module = placement.on_mesh(transformer.build(c.model), mesh, c)
    total = config.duration(c.train.duration, tokens_per_step=1)
    schedule = make_schedule(c.schedule, total_steps=total, tokens_per_step=1)
    optimizer = make_optimizer(c.optimizer, schedule, model=c.model)
    return module, schedule, optimizer, *init_state(module, optimizer, c, mesh)


def _make_steps(c: config.ConfigDict, mesh: Mesh) -> tuple[State, State, Any]:
    module, schedule, optimizer, make_state, abstract = _parts(c, mesh)
    state = make_state(jax.random.key(c.seed))
    places = jax.tree.map(lambda x: x.sharding, abstract)
    step = jax.jit(
        make_train_step(module, OBJECTIVES[c.objective.name], optimizer, schedule, c), out_shardings=(places, None)
    )

    def run(state: State, batch: dict[str, np.ndarray]) -> tuple[State, dict[str, jax.Array]]:
        on_mesh = jax.device_put(batch, batch_shardings(mesh))
        with placement.active(mesh, c):
            return step(state, on_mesh, jax.random.key(1))

    return state, abstract, run


def losses_of(c: config.ConfigDict, mesh: Mesh, *, steps: int) -> tuple[np.ndarray, State]:
    """The losses of the first steps, and the state after them."""
    state, _, run = prepare_steps(c, mesh)
    losses = []
    for k in range(steps):
        state, values = run(state, make_batch(c, k))
        losses.append(float(values["loss"]))
    return np.array(losses), state


def assert_same_bits(a: Any, b: Any) -> None:
    """Two trees hold the same arrays, bit for bit."""
    paths = [placement.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(a)]
    for name, x, y in zip(paths, jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name, strict=True)


def start_command(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """`llmjax ARGUMENTS` as a process of its own, on one CPU device; its output can be read from `.stdout`."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    env = {**os.environ, "XLA_FLAGS": flags, **environment}
    command = [sys.executable, "-m", "llmjax", *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_command(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    """Run `llmjax ARGUMENTS` to its end: exit status and everything it printed."""
    process = start_command(*arguments, **environment)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def stopping_at(c, number):
    """Batches of which one ends the run as a kill would."""

    def batch(k):
        if k == number:
            raise KeyError("stop here")
        return make_batch(c, k)

    return batch
