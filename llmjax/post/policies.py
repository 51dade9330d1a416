"""The parts of policy optimisation for the loop: an engine on the training's mesh, a source of rounds, an
evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llmjax.data.source import Source
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.engine import Engine
from llmjax.model import head
from llmjax.model.transformer import Transformer
from llmjax.objectives import losses
from llmjax.objectives.log_probs import log_probs
from llmjax.parallel import placement
from llmjax.parallel.mesh import row_ways
from llmjax.post import rewards, tools
from llmjax.post.reference import abstract_params, own_params
from llmjax.post.rewards import Reward
from llmjax.post.rollouts import Forward, RolloutSource, sample_answers
from llmjax.post.rollouts import Score as MakeForward
from llmjax.post.rows import Store
from llmjax.post.tools import Tool
from llmjax.train.heldout import Evaluate
from llmjax.train.step import batch_shardings


def check_groups(c: ConfigDict, *, ways: int) -> None:
    """Raise UserError unless the rows of `data.share_prompts` can be spread over so many devices."""
    rows = c.train.batch_size // c.train.micro_batches // c.rollout.samples
    if c.data.share_prompts and rows % ways:
        raise UserError(
            f"data.share_prompts makes {rows} rows of a micro-batch, one for each prompt, which cannot be spread over {ways} "
            f"devices (parallel.mesh={c.parallel.mesh!r}): change train.batch_size, rollout.samples or the mesh, or set "
            "data.share_prompts=False"
        )


def stage(
    c: ConfigDict, workdir: Path, module: Transformer, tokenizer: Tokenizer, stores: Mapping[str, Store], mesh: Mesh
) -> dict[str, Any]:
    """The source and the evaluation of a policy. Raises UserError for prompts that are too long."""
    longest = max(int(store.sizes.max()) for store in stores.values()) + c.rollout.tokens
    if longest > c.train.sequence_length:
        raise UserError(
            f"the longest prompt and rollout.tokens={c.rollout.tokens} are {longest} tokens together, more than "
            f"train.sequence_length={c.train.sequence_length}: raise it, or lower rollout.tokens"
        )
    check_groups(c, ways=row_ways(mesh))
    functions, called = rewards.parse(c.rollout.rewards), tools.parse(c.rollout.tools)
    forward = make_forward(c, module, mesh)
    engine = make_engine(c, module, tokenizer, mesh, length=longest)

    def make_source(total: int) -> Source:
        needs = c.rollout.kl_weight or c.rollout.kl_target or c.objective.policy.kl_weight
        reference = own_params(c, module, mesh) if needs else None
        return RolloutSource(
            c,
            workdir,
            engine=engine,
            tokenizer=tokenizer,
            prompts=stores["train"],
            forward=forward,
            functions=functions,
            called=called,
            reference=reference,
        )

    def make_evaluate(mesh: Mesh, params: Any) -> Evaluate:
        return make_heldout(c, engine, tokenizer, stores["heldout"], functions, called)

    return {"make_source": make_source, "make_evaluate": make_evaluate if "heldout" in stores else None}


def make_engine(c: ConfigDict, module: Transformer, tokenizer: Tokenizer, mesh: Mesh, *, length: int) -> Engine:
    """An engine for the training's parameters. It has none: every round loads them, and releases them behind the sampling."""
    like = abstract_params(c, module, mesh)
    places = jax.tree.map(lambda x: x.sharding, like)
    params = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), out_shardings=places)()
    engine = Engine(
        module, params, tokenizer, slots=c.rollout.slots, length=length, prefixes=c.rollout.slots,
        weight_format=c.infer.weights, mesh=mesh, context=lambda: placement.active(mesh, c),
    )  # fmt: skip
    engine.release()
    return engine


def make_forward(c: ConfigDict, module: Transformer, mesh: Mesh) -> MakeForward:
    """The trainer's own forward pass of rows, a micro-batch at a time."""
    sharding, network, p = batch_shardings(mesh), placement.on_mesh(module, mesh, c), c.objective.policy
    answers = c.rollout.samples if c.data.share_prompts else 1  # in a row
    size = c.train.batch_size // c.train.micro_batches // answers

    def step(params: Any, batch: Any) -> tuple[jax.Array, jax.Array | None]:
        made = losses.predict(network, params, batch, None)
        found = log_probs(
            made, loss_chunks=c.objective.loss_chunks, vocab_size=c.objective.vocab_size, never=tuple(p.never),
            temperature=p.temperature,
        )  # fmt: skip
        return found.targets, head.values(module, params, made.hidden) if "value" in params else None

    run = jax.jit(step)

    def forward(params: Any, rows: Mapping[str, np.ndarray]) -> Forward:
        read = {"tokens", "targets", "positions", "segments", "weights", "places", "until"} & rows.keys()
        parts = []
        with placement.active(mesh, c):
            for first in range(0, len(rows["tokens"]), size):
                batch = {name: jax.device_put(rows[name][first : first + size], sharding) for name in read}
                parts.append(jax.tree.map(np.asarray, run(params, batch)))
        found, values = zip(*parts, strict=True)
        return Forward(np.concatenate(found), None if values[0] is None else np.concatenate(values))

    return forward


def make_heldout(
    c: ConfigDict,
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Store,
    functions: Mapping[str, Reward],
    called: Mapping[str, Tool],
) -> Evaluate:
    """parameters -> heldout_reward and each reward's own mean, of greedy answers to held-out prompts."""
    count = min(len(prompts), c.train.eval_batches * c.train.batch_size)
    ids = [prompts.example(int(prompts.first[g])).ids.tolist() for g in range(count)]

    def evaluate(params: Any) -> dict[str, float]:
        engine.load(params, version=engine.version)
        _, texts, columns = sample_answers(
            engine, tokenizer, ids, prompts.columns[:count], c=c, called=called, samples=1, seed=0, temperature=0.0
        )
        engine.release()
        scored = rewards.score(functions, texts, columns)
        return {f"heldout_reward{'/' * bool(name)}{name}": mean for name, mean in rewards.means(scored).items()}

    return evaluate
