"""The train stage for language models on packed text: it makes the batches and the evaluation for the loop."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.config.objective_checks import own_order
from llmjax.data import ramp
from llmjax.data.batches import TrainBatches, heldout_batches, tokens_per_epoch
from llmjax.data.source import Source, StatelessSource
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_extension import read_extension
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.data.tokens import load_index
from llmjax.errors import UserError
from llmjax.model import attention, transformer
from llmjax.objectives import OBJECTIVES, corruption, special_ids
from llmjax.parallel import mesh as meshes
from llmjax.parallel import placement, processes
from llmjax.parallel.mesh import use_cpu_devices
from llmjax.train import initial, loop, metrics, rewind
from llmjax.train.heldout import Evaluate, make_heldout

# (config, module, tokenizer, mesh) -> (parameters -> named numbers)
MakeBenchmarks = Callable[[ConfigDict, transformer.Transformer, Tokenizer, jax.sharding.Mesh], Evaluate]


def run(c: ConfigDict, workdir: Path, *, make_benchmarks: MakeBenchmarks | None = None) -> dict[str, float | int | str]:
    """Train the model of `c` on the token shards of WORKDIR/tokenizer, continuing from WORKDIR/checkpoints.

    Args:
        make_benchmarks: makes what is measured at each evaluation beside the held-out loss.
    """
    started = time.perf_counter()
    start_devices(c)
    tokens_folder = workdir / "tokenizer" / "tokens"
    tokenizer, extension = load_tokenizer(workdir / "tokenizer"), read_extension(workdir / "tokenizer")
    c = resolve(c, tokenizer)
    change = corruption(c, tokenizer)
    index = load_index(tokens_folder)
    epoch = tokens_per_epoch(c, index, corruption=change)
    sizes = ramp.batch_sizes(c.train, tokens_per_epoch=epoch)
    processes.say(f"attention: {attention.choose(c.model, platform=jax.default_backend(), any_mask=own_order(c))}")
    module = transformer.build(c.model)
    heldout = heldout_batches(c, tokens_folder, count=c.train.eval_batches, corruption=change)
    piece_sizes = np.array([len(piece) for piece in tokenizer.piece_bytes])

    def make_source(total: int) -> Source:
        hosts: dict[str, int] = {}
        if processes.count() > 1:
            host, of = meshes.row_group(meshes.make_mesh(c.parallel.mesh, slices=c.parallel.slices))
            hosts = {"host": host, "hosts": of}
        batches = TrainBatches(c, tokens_folder, total_steps=total, corruption=change, **hosts)
        if total:
            processes.say(
                f"data: {epoch:,} training tokens, {sizes.tokens(total):,} to be seen "
                f"({sizes.tokens(total) / epoch:.2f} epochs), {sizes.describe()}"
            )
            if len(batches.languages) > 1:
                seen = batches.epochs(total)
                processes.say("epochs: " + ", ".join(f"{name} {epochs:.2f}" for name, epochs in seen.items()))
        return StatelessSource(batches.batch)

    def make_evaluate(mesh: jax.sharding.Mesh, params: Any) -> Evaluate:
        network = placement.on_mesh(module, mesh, c)
        held = make_heldout(c, network, heldout, piece_sizes, mesh, params) if heldout else lambda params: {}
        benchmarks = make_benchmarks(c, network, tokenizer, mesh) if make_benchmarks else lambda params: {}
        return lambda params: held(params) | benchmarks(params)

    while True:
        try:
            results = loop.train(
                c,
                workdir,
                module=module,
                objective=OBJECTIVES[c.objective.name],
                make_source=make_source,
                tokens_per_epoch=epoch,
                make_evaluate=make_evaluate if heldout or make_benchmarks else None,
                initial_params=functools.partial(initial.read, c, extension=extension) if c.train.init_from else None,
                notes={"tokenizer": tokenizer.fingerprint},
                started=started,
            )
        except rewind.Spike as spike:
            processes.broadcast_from_first(functools.partial(rewind.go_back, workdir, c.train.rewind, spike))
            continue
        return results | processes.broadcast_from_first(lambda: metrics.last_heldout(workdir / "metrics.jsonl"))


def first_batches(c: ConfigDict, workdir: Path, *, count: int) -> tuple[ConfigDict, list[dict[str, np.ndarray]]]:
    """The resolved config, and the first batches of a training on the token shards of WORKDIR/tokenizer."""
    tokenizer = load_tokenizer(workdir / "tokenizer")
    c = resolve(c, tokenizer)
    change = corruption(c, tokenizer)
    made = TrainBatches(c, workdir / "tokenizer" / "tokens", total_steps=count, corruption=change)
    return c, [made.batch(k) for k in range(count)]


def start_devices(c: ConfigDict, *, most: int = 0, keep_freed: bool = True) -> None:
    """Make the CPU's devices, before JAX starts.

    Args:
        most: devices, unless `parallel.cpu_devices` says; 0: one a core.
        keep_freed: whether malloc may keep the work space of steps, for up to three times their memory.
    """
    rows = math.gcd(*(size // ramp.micro_batches(c.train, size) for size in ramp.sizes(c.train)))
    count = c.parallel.cpu_devices or most or processes.cpu_share()
    use_cpu_devices(count, batch_size=rows, work_bytes=work_bytes(c) if keep_freed else 0)


def work_bytes(c: ConfigDict) -> int:
    """Bytes that a step keeps for the backward pass, roughly: 16 float32 numbers a token, layer and unit of width."""
    tokens = c.train.batch_size // c.train.micro_batches * c.train.sequence_length
    return 64 * tokens * c.model.width * c.model.layers


def resolve(c: ConfigDict, tokenizer: Tokenizer) -> ConfigDict:
    """The config with the settings that follow from the tokenizer: model.vocab_size, and objective.vocab_size if used.

    Raises:
        UserError: if a model.vocab_size that was given is too small for the tokenizer, or for it and the objective's
            special ids.
    """
    c = config.from_json(config.to_json(c))
    size = special_ids(c.objective, tokenizer).size
    if tokenizer.vocab_size <= c.model.vocab_size < size:
        raise UserError(
            f"model.vocab_size={c.model.vocab_size} has room for the tokenizer's {tokenizer.vocab_size} ids, but "
            f"objective.name={c.objective.name} needs special ones too, {size} together: set it to 0 to follow them"
        )
    c.model.vocab_size = transformer.padded_vocab(c.model, size)
    if c.objective.label_smoothing:
        c.objective.vocab_size = c.objective.vocab_size or size
    return c.lock()
