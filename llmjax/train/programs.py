"""The compiled training steps of a run, one for each batch size."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llmjax.data.ramp import BatchSizes, Stage
from llmjax.model.transformer import Transformer
from llmjax.objectives import Objective
from llmjax.parallel import compiler_options
from llmjax.train import budget, executable
from llmjax.train.optimizer import make_optimizer
from llmjax.train.schedule import Milestones, milestones, schedule_of
from llmjax.train.step import Batch, State, init_state, lower_step, make_train_step

DROPOUT = 0x64726F70  # "drop": the stream of the seed from which the keys of the steps are made
ANY_STEPS = 1000  # stands for the number of steps where the compiled program does not depend on it


@dataclass(frozen=True)
class Programs:
    """Makes the state and the compiled steps of a run."""

    c: ConfigDict
    module: Transformer
    objective: Objective
    sizes: BatchSizes
    mesh: Mesh
    make_state: Callable[[jax.Array], State]  # from a random key
    abstract: State
    key: jax.Array  # of the run; a step folds its number into it

    def arguments(self, total_steps: int) -> tuple[Any, ...]:
        """The arguments of a compiled step after the state and the batch."""
        if not budget.is_time(self.c):
            return (self.key,)
        at = milestones(self.c.schedule, total_steps=total_steps, sizes=self.sizes)
        return self.key, jax.device_put(jax.tree.map(np.float32, at), self.key.sharding)

    def compile(self, stage: Stage, batch: Batch, *, rows: int, total_steps: int) -> Callable[..., Any]:
        """The step for a stage's batches.

        Args:
            batch: an example of `rows` rows; the stage may have another number of rows.

        Raises:
            UserError: for a `train.executable` that is not of this step.
        """
        like = {
            k: jax.ShapeDtypeStruct((len(v) * stage.rows // rows, *v.shape[1:]), v.dtype, sharding=v.sharding)
            for k, v in batch.items()
        }
        arguments = self.arguments(total_steps)
        if budget.is_time(self.c):

            def step(state: State, batch: Batch, key: jax.Array, at: Milestones) -> Any:
                return self._step(stage, at)(state, batch, key)
        else:
            step = self._step(stage, milestones(self.c.schedule, total_steps=total_steps, sizes=self.sizes))
        lowered = lower_step(step, self.abstract, like, *arguments, mesh=self.mesh, c=self.c)
        device = self.mesh.devices.flat[0]
        options = compiler_options.choose(self.c.parallel.compiler, device)
        if file := self.c.train.executable:
            return executable.load(Path(file), executable.name_of(stage), lowered, mesh=self.mesh, options=options)
        options = compiler_options.of_large_state(device, state=bytes_on_a_device(self.abstract)) | options
        return executable.compile_once(lowered, mesh=self.mesh, options=options)

    def _step(self, stage: Stage, at: Milestones) -> Callable[..., Any]:
        c, schedule = self.c, schedule_of(self.c.schedule, at)
        optimizer = make_optimizer(c.optimizer, schedule, model=c.model)
        return make_train_step(self.module, self.objective, optimizer, schedule, c, micro_batches=stage.micro_batches)


def bytes_on_a_device(abstract: Any) -> int:
    """Bytes of the arrays of a tree, with shardings, on one device."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)


def make_programs(c: ConfigDict, module: Transformer, objective: Objective, sizes: BatchSizes, mesh: Mesh) -> Programs:
    """The programs of a run. Raises UserError for a mesh that does not fit the model."""
    schedule = schedule_of(c.schedule, milestones(c.schedule, total_steps=ANY_STEPS, sizes=sizes))
    make_state, abstract = init_state(module, make_optimizer(c.optimizer, schedule, model=c.model), c, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def make_key() -> jax.Array:
        return jax.random.fold_in(jax.random.key(c.seed), DROPOUT)

    key = jax.jit(make_key, out_shardings=everywhere)()  # made in each process
    return Programs(c, module, objective, sizes, mesh, make_state, abstract, key)
