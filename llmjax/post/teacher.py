"""Distillation: batches with a teacher's distributions of the next token, for given answers or the student's own."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llmjax import config
from llmjax.data.examples import Example
from llmjax.data.generators import generator
from llmjax.data.packing import packed
from llmjax.data.source import Batch, Source, StatelessSource
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.engine import Engine
from llmjax.infer.rollout import sample_rollouts
from llmjax.model import transformer
from llmjax.objectives import chunks, losses
from llmjax.objectives.distill import Teacher, teacher_of
from llmjax.parallel import mesh as meshes
from llmjax.parallel import placement, processes
from llmjax.post import batches
from llmjax.post.policies import make_engine
from llmjax.post.reference import reference_params
from llmjax.post.rows import Store
from llmjax.train import folders
from llmjax.train.step import batch_shardings


class Ask(Protocol):
    """rows -> the same rows with the teacher's distributions."""

    def __call__(self, rows: Batch, *, whole: bool = False) -> Batch: ...


def check(c: ConfigDict) -> None:
    """Raise UserError unless the teacher is there, and reads the ids that the student reads."""
    if not c.objective.distill.teacher:
        raise UserError("distillation needs a teacher: give --config.objective.distill.teacher=RUN")
    named = (("objective.distill.teacher", c.objective.distill.teacher), ("train.init_from", c.train.init_from))
    teacher, student = (folders.read_meta(folders.newest_of(key, path)) for key, path in named)
    if teacher.get("tokenizer") != student.get("tokenizer"):
        raise UserError(
            f"objective.distill.teacher={c.objective.distill.teacher} has another tokenizer than the model of train.init_from, so "
            "its ids mean something else: let it write answers (llmjax generate --prompts FILE --out FILE) and learn "
            "those with llmjax sft"
        )


def _folder(run: str) -> Path:
    return folders.newest(Path(run))


def make_ask(c: ConfigDict, mesh: Mesh) -> Ask:
    """Read the teacher onto the mesh. It computes rows in the micro-batches of the training.

    With several processes, all call it together, each with its own rows of a batch, or with `whole` each with all rows.
    """
    d, theirs = c.objective.distill, c.copy_and_resolve_references()
    with theirs.unlocked():
        theirs.train.init_from = d.teacher
        theirs.model = config.from_json(json.dumps(folders.read_meta(_folder(d.teacher))["config"])).model
    module = transformer.build(theirs.model)
    params = reference_params(theirs, module, mesh)
    network, sharding = placement.on_mesh(module, mesh, theirs), batch_shardings(mesh)
    size = c.train.batch_size // c.train.micro_batches
    hosts = meshes.row_group(mesh)[1] if processes.count() > 1 else 1

    def step(params: Any, batch: Any) -> Teacher:
        def of(logits_BLV: jax.Array, targets_BL: jax.Array) -> Teacher:
            return teacher_of(logits_BLV, top=d.top, vocab_size=c.objective.vocab_size, temperature=d.temperature)

        made: Teacher = chunks.token_values(of, losses.predict(network, params, batch, None), c.objective.loss_chunks)
        return made

    run = jax.jit(step, out_shardings=sharding)
    run_whole = jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))  # for every process

    def ask(rows: Batch, *, whole: bool = False) -> Batch:
        parts, each = [], size if whole else size // hosts
        with placement.active(mesh, theirs):
            for first in range(0, len(rows["tokens"]), each):
                part = {name: x[first : first + each] for name, x in rows.items()}
                if whole and hosts > 1:
                    on_mesh = {
                        k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in part.items()
                    }
                    parts.append(jax.tree.map(np.asarray, run_whole(params, on_mesh)))
                else:
                    on_mesh = {k: jax.make_array_from_process_local_data(sharding, v) for k, v in part.items()}
                    parts.append(jax.tree.map(_own_rows, run(params, on_mesh)))
        ids, log_probs = (np.concatenate(found) for found in zip(*parts, strict=True))
        return {**rows, "teacher_ids": ids, "teacher_log_probs": log_probs}

    return ask


def _own_rows(values: jax.Array) -> np.ndarray:
    """The rows of an array that this process has, in their order."""
    if values.is_fully_addressable:
        return np.asarray(values)
    found = {shard.index[0].start or 0: shard.data for shard in values.addressable_shards}
    return np.concatenate([np.asarray(found[start]) for start in sorted(found)])


def make_source(
    c: ConfigDict,
    module: transformer.Transformer,
    tokenizer: Tokenizer,
    rows: batches.Rows,
    ask: Ask,
    mesh: Mesh,
    *,
    host: int = 0,
    hosts: int = 1,
) -> Source:
    """This host's rows of batches, or, as often as `distill.on_policy` says, of answers that the student samples to their prompts."""
    given = batches.batches_of(rows, c, host=host, hosts=hosts)
    if not c.objective.distill.on_policy:
        return StatelessSource(lambda k: ask(given(k)), read_ahead=0)  # the teacher needs the devices
    prompts = prompts_of(rows.store)
    longest = max(map(len, prompts)) + c.rollout.tokens
    if longest > c.train.sequence_length:
        raise UserError(
            f"the longest prompt and rollout.tokens={c.rollout.tokens} are {longest} tokens together, more than "
            f"train.sequence_length={c.train.sequence_length}: raise it, or lower rollout.tokens"
        )
    return StudentSource(c, make_engine(c, module, tokenizer, mesh, length=longest), prompts, given, ask)


def prompts_of(store: Store) -> list[list[int]]:
    """The ids before the first learnt token of each example."""
    examples = (store.example(e) for e in range(len(store.sizes)))
    return [example.ids[: example.prompt_tokens].tolist() for example in examples]


class StudentSource:
    """Batches of which some are answers that the trained parameters sample (Agarwal et al. 2023, GKD).

    Which ones, their prompts and their random numbers are functions of (config, seed, k), so no state is kept.
    """

    stateless = False

    def __init__(
        self, c: ConfigDict, engine: Engine, prompts: Sequence[Sequence[int]], given: Callable[[int], Batch], ask: Ask
    ) -> None:
        self._c, self._engine, self._prompts, self._given, self._ask = c, engine, prompts, given, ask
        self._metrics: dict[str, float] = {}

    def batch(self, k: int, params: Any) -> Batch:
        random = generator("on-policy", self._c.seed, k)
        own = random.random() < self._c.objective.distill.on_policy
        self._metrics = {"rollout/on_policy": float(own)}
        if not own:
            return self._ask(self._given(k))
        r, length = self._c.rollout, self._c.train.sequence_length
        chosen = [self._prompts[i] for i in random.integers(len(self._prompts), size=self._c.train.batch_size)]
        self._engine.load(params, version=k)
        seed = int(random.integers(2**32 - 1))
        made = sample_rollouts(
            self._engine, chosen, samples=1, max_new_tokens=r.tokens, seed=seed, temperature=r.temperature
        )
        self._engine.release()
        self._metrics["rollout/length"] = float(made.lengths.mean())
        rows = []
        for prompt, tokens, size in zip(chosen, made.tokens, made.lengths, strict=True):
            learnt = np.r_[np.zeros(len(prompt)), np.ones(size)].astype(np.float32)
            rows.append(packed([Example(np.array([*prompt, *tokens[:size]], np.int32), learnt)], length=length))
        return self._ask(batches.stacked(rows))

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        if state:
            raise UserError(
                f"the checkpoint keeps {', '.join(state)}, which distillation does not: choose another --workdir"
            )

    def metrics(self) -> dict[str, float]:
        return self._metrics
