"""The train stage of post-training: it gives the one loop its objective, batches and evaluation.

The objective decides what a row is (`rows.groups_of`) and where batches come from: fixed rows for supervised answers,
preferences and rewards, sampled ones for policies.
"""

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llmjax.data.ramp import batch_sizes
from llmjax.data.source import Source, StatelessSource
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.model import attention, transformer
from llmjax.model.count import param_count
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import compiler_options, processes
from llmjax.parallel import mesh as meshes
from llmjax.post import (
    batches,
    calibration,
    classes,
    heldout,
    policies,
    reference,
    rows,
    teacher,
    texts,
)
from llmjax.train import initial, loop, pretrain, setup
from llmjax.train.heldout import Evaluate

STATE_BYTES = 16  # a parameter: itself, its gradient and AdamW's two moments, in float32


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Train the model of `train.init_from` on WORKDIR/rows, going on from WORKDIR/checkpoints.

    Raises UserError as `loop.train` does, and for rows that the objective cannot use.
    """
    started = time.perf_counter()
    tokenizer = load_tokenizer(workdir / "tokenizer")
    c = resolve(c, tokenizer)
    pretrain.start_devices(c, most=most_devices(c), keep_freed=False)
    if c.objective.name == "classify":
        c = classes.resolve(c, workdir)
    objective, module = OBJECTIVES[c.objective.name], transformer.build(c.model)
    processes.say(f"attention: {attention.choose(c.model, platform=jax.default_backend(), any_mask=False)}")
    stores = {split: store for split in rows.SPLITS if len(store := rows.load(workdir, split))}
    mesh = meshes.make_mesh(c.parallel.mesh, slices=c.parallel.slices)
    if c.objective.name == "policy":
        given = policies.stage(c, workdir, module, tokenizer, stores, mesh)
    else:
        given = _fixed(c, workdir, module, tokenizer, stores, mesh)
    results = loop.train(
        c,
        workdir,
        module=module,
        objective=objective,
        initial_params=partial(initial.read, c),
        notes={"tokenizer": tokenizer.fingerprint},
        started=started,
        **given,
    )
    return results | processes.broadcast_from_first(lambda: heldout.figures(workdir / "metrics.jsonl"))


def most_devices(c: ConfigDict) -> int:
    """Devices of a CPU for a training, unless `parallel.cpu_devices` says; 0: one a core.

    The steps of decoding are too short to be divided. Each device holds the whole state and adds up all gradients, which
    pays as long as the state is smaller than the work space of a step.
    """
    state = STATE_BYTES * param_count(c.model)
    return 1 if c.objective.name == "policy" or state > pretrain.work_bytes(c) else 0


def check(c: ConfigDict, workdir: Path | None, *, fresh: bool) -> None:
    """Raise UserError for a model that cannot be trained further by this config, or not on these processes and meshes."""
    own = c.objective.name == "distill" and c.objective.distill.on_policy > 0
    sampled = c.objective.name == "policy" or own
    if sampled and processes.count() > 1:
        mend = ", or set objective.distill.on_policy=0" if own else ""
        raise UserError(
            f"the answers of a {'student' if own else 'policy'} are sampled by one process: start this command once, on the "
            f"devices of one host{mend}"
        )
    if sampled and c.rollout.tokens >= c.train.sequence_length:
        raise UserError(
            f"rollout.tokens={c.rollout.tokens} leaves no room for a prompt in train.sequence_length="
            f"{c.train.sequence_length}: lower it, or raise the length"
        )
    axes = meshes.read_mesh(c.parallel.mesh)
    compiler_options.check(c.parallel.compiler)
    # An axis of -1 is at least 1: what its fellows do not divide, all of them together do not either.
    ways = math.prod(axes[axis] for axis in meshes.ROWS if axes[axis] > 0)
    setup.check_rows(c, batch_sizes(c.train), ways=ways)
    if c.objective.name == "policy":
        policies.check_groups(c, ways=ways)
    if c.objective.name == "distill":
        teacher.check(c)
    texts.check(c)
    tokenizer = load_tokenizer(workdir / "tokenizer") if workdir is not None else None
    initial.check(c, tokenizer)


def resolve(c: ConfigDict, tokenizer: Tokenizer) -> ConfigDict:
    """The config with the settings that follow from the tokenizer: model.vocab_size, and the ids that a policy never
    samples."""
    c = pretrain.resolve(c, tokenizer)
    if c.objective.name == "policy" or OBJECTIVES[c.objective.name].needs_reference:
        with c.unlocked():  # an adapter that goes on may have it; the policy would not be what it is compared with
            c.model.adapter.dropout = 0.0
    if c.objective.name not in ("policy", "distill"):
        return c
    with c.unlocked():
        p = c.objective.policy
        c.objective.vocab_size = c.objective.vocab_size or tokenizer.vocab_size
        if c.objective.name == "distill":
            return c
        p.never = p.never or tuple(tokenizer.unsampled_ids)
        p.temperature = p.temperature or c.rollout.temperature
        p.length = p.length or c.rollout.tokens
    return c


def _fixed(
    c: ConfigDict,
    workdir: Path,
    module: transformer.Transformer,
    tokenizer: Tokenizer,
    stores: Mapping[str, rows.Store],
    mesh: Mesh,
) -> dict[str, Any]:
    """The source and the evaluation of rows that are there before the training."""
    packed = {split: batches.rows_of(store, c) for split, store in stores.items()}
    if OBJECTIVES[c.objective.name].needs_reference:
        packed = reference.with_reference(c, workdir, module, packed, mesh)
    train = packed["train"]
    processes.say(
        f"data: {len(stores['train']):,} examples in {len(train.groups):,} rows of {train.length:,} tokens, {train.padding:.1%} "
        "of them padding"
    )
    host, hosts = meshes.row_group(mesh) if processes.count() > 1 else (0, 1)
    ask = teacher.make_ask(c, mesh) if c.objective.name == "distill" else None

    def make_source(total: int) -> Source:
        if ask is not None:
            return teacher.make_source(c, module, tokenizer, train, ask, mesh, host=host, hosts=hosts)
        return StatelessSource(batches.batches_of(train, c, host=host, hosts=hosts))

    def make_evaluate(mesh: Mesh, params: Any) -> Evaluate:
        held = batches.heldout_batches_of(packed["heldout"], c, count=c.train.eval_batches)
        if ask is not None:
            held = [ask(batch, whole=True) for batch in held]
        beside = None
        if c.objective.name == "classify":
            beside = classes.beside(c, workdir, held)
        elif c.objective.name == "reward":
            beside = calibration.beside(workdir, held)
        figures = heldout.make_heldout(c, module, OBJECTIVES[c.objective.name], held, mesh, params, beside=beside)
        if not c.eval.texts:
            return figures
        of_texts = texts.make_heldout(c, workdir, module, tokenizer, stores["heldout"], mesh)
        return lambda params: figures(params) | of_texts(params)

    return {
        "make_source": make_source,
        "tokens_per_epoch": len(train.groups) * train.length,
        "make_evaluate": make_evaluate if "heldout" in packed else None,
    }
