"""Texts that a model writes for held-out rows during training, and their similarity to the rows' answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llmjax.data.examples import Example
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.eval import text_metrics
from llmjax.infer.rollout import sample_rollouts
from llmjax.model.transformer import Transformer
from llmjax.parallel import processes
from llmjax.post.policies import make_engine
from llmjax.post.rows import Store
from llmjax.post.tables import Table, write_tables

Evaluate = Callable[[Any], dict[str, float]]
SHOWN = 24  # texts in the report


def check(c: ConfigDict) -> None:
    """Raise UserError for texts that cannot be measured."""
    text_metrics.check(c.eval.texts)
    if c.eval.texts and c.objective.name not in ("causal", "distill"):
        raise UserError(
            f"eval.texts compares what a model writes with held-out answers, and objective.name={c.objective.name} learns from "
            "other rows: set it to ()"
        )
    if c.eval.texts and processes.count() > 1:
        raise UserError(
            "the texts of eval.texts are written by one process: start this command once, on the devices of one host, or set it "
            "to (), and let `llmjax generate` write them afterwards"
        )


def make_heldout(
    c: ConfigDict, workdir: Path, module: Transformer, tokenizer: Tokenizer, store: Store, mesh: Mesh
) -> Evaluate:
    """parameters -> heldout_NAME for each metric of `eval.texts`, of greedy answers to the last turn of each held-out row.

    At most `eval.limit` rows that fit. Some texts are written for the report.
    """
    turns = [last_turn(store.example(e)) for e in range(len(store.sizes))]
    most = c.generate.max_new_tokens
    turns = [(asked, said) for asked, said in turns if len(asked) + most <= c.model.max_length][: c.eval.limit or None]
    if not turns:
        processes.say("eval.texts are not measured: no held-out prompt leaves generate.max_new_tokens room")
        return lambda params: {}
    references = [tokenizer.decode(said.tolist()) for _, said in turns]
    prompts = [asked.tolist() for asked, _ in turns]
    engine = make_engine(c, module, tokenizer, mesh, length=max(map(len, prompts)) + most)

    def evaluate(params: Any) -> dict[str, float]:
        engine.load(params, version=engine.version)
        made = sample_rollouts(engine, prompts, samples=1, max_new_tokens=most, seed=0, temperature=0.0)
        engine.release()
        written = [tokenizer.decode(row[:n].tolist()) for row, n in zip(made.tokens, made.lengths, strict=True)]
        shown = zip(map(tokenizer.decode, prompts[:SHOWN]), written, references, strict=False)
        write_tables(workdir, [Table("Texts for held-out rows", ["prompt", "written", "wanted"], list(shown))])
        return {f"heldout_{name}": text_metrics.METRICS[name](written, references) for name in c.eval.texts}

    return evaluate


def last_turn(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """The ids before the last run of learnt tokens, and that run."""
    learnt = np.flatnonzero(example.weights > 0)
    breaks = np.flatnonzero(np.diff(learnt) > 1)
    first = learnt[breaks[-1] + 1] if len(breaks) else learnt[0]
    return example.ids[:first], example.ids[first : learnt[-1] + 1]
