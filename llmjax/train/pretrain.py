"""The train stage for language models on packed text: what it hands to the loop."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from llmjax import config
from llmjax.data.batches import TrainBatches, heldout_batches
from llmjax.data.score import Score, total_score
from llmjax.data.tokenizer import load_tokenizer
from llmjax.model import attention, decoder
from llmjax.parallel.mesh import use_cpu_devices
from llmjax.train import checkpoint, loop
from llmjax.train.step import batch_shardings, make_eval_step


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Train the model of `c` on the token shards of WORKDIR/tokenizer, continuing from WORKDIR/checkpoints."""
    started = time.perf_counter()
    rows = c.train.batch_size // c.train.micro_batches
    use_cpu_devices(c.parallel.cpu_devices, batch_size=rows, work_bytes=work_bytes(c))
    tokens_folder = workdir / "tokenizer" / "tokens"
    tokenizer = load_tokenizer(workdir / "tokenizer")
    c = resolve(c, tokenizer.vocab_size)
    tokens_per_step = c.train.batch_size * c.train.sequence_length

    # Percentages of data.mixture need the number of steps, and durations in epochs need the size of the data.
    hosts = {"host": jax.process_index(), "hosts": jax.process_count()}
    tokens_per_epoch = TrainBatches(c, tokens_folder, total_steps=1, **hosts).tokens_per_epoch
    total = config.duration(c.train.duration, tokens_per_step=tokens_per_step, tokens_per_epoch=tokens_per_epoch)
    batches = TrainBatches(c, tokens_folder, total_steps=total, **hosts)
    print(
        f"data: {tokens_per_epoch:,} training tokens, {total * tokens_per_step:,} to be seen "
        f"({total * tokens_per_step / tokens_per_epoch:.2f} epochs), {tokens_per_step:,} a step"
    )
    print(f"attention: {attention.resolve(c.model, platform=jax.default_backend())}")
    module = decoder.build(c.model)
    heldout = heldout_batches(c, tokens_folder, count=c.train.eval_batches)
    piece_sizes = np.array([len(piece) for piece in tokenizer.piece_bytes])

    def initial_params(abstract: Any) -> Any:
        return checkpoint.read_params(checkpoint.newest(Path(c.train.init_from)), abstract)

    return loop.train(
        c,
        workdir,
        module=module,
        batches=lambda start: batches.iterate(start),
        tokens_per_epoch=tokens_per_epoch,
        make_evaluate=(lambda mesh: make_heldout(c, module, heldout, piece_sizes, mesh)) if heldout else None,
        initial_params=initial_params if c.train.init_from else None,
        started=started,
    )


def work_bytes(c: ConfigDict) -> int:
    """About what a step keeps for the backward pass: 16 float32 numbers a token, layer and dimension of the width."""
    tokens = c.train.batch_size // c.train.micro_batches * c.train.sequence_length
    return 64 * tokens * c.model.width * c.model.layers


def resolve(c: ConfigDict, tokenizer_size: int) -> ConfigDict:
    """The config with what depends on the tokenizer filled in: model.vocab_size."""
    c = config.from_json(config.to_json(c))
    c.model.vocab_size = decoder.padded_vocab(c.model, tokenizer_size)
    return c.lock()


def make_heldout(
    c: ConfigDict,
    module: decoder.Decoder,
    heldout: dict[str, list[dict[str, np.ndarray]]],
    piece_sizes: np.ndarray,
    mesh: jax.sharding.Mesh,
) -> Callable[[Any], dict[str, float]]:
    """parameters -> held-out loss (nats a token) and bits per byte on fixed batches, in total and by source.

    Args:
        heldout: global batches by source; each process puts its rows of them on its devices.
        piece_sizes: UTF-8 bytes of each id.
    """
    step = jax.jit(make_eval_step(module, c))
    sharding = batch_shardings(mesh)

    def nats_of(params: Any, batch: dict[str, np.ndarray]) -> float:
        on_mesh = {k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in batch.items()}
        return float(step(params, on_mesh).sum())

    def evaluate(params: Any) -> dict[str, float]:
        scores = {}
        for source, batches in heldout.items():
            targets = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
            nats = sum(nats_of(params, batch) for batch in batches)
            scores[source] = Score(nats=nats, tokens=len(targets), bytes=int(piece_sizes[targets].sum()))
        whole = total_score(scores.values())
        rows = {"heldout_loss": whole.loss, "heldout_bits_per_byte": whole.bits_per_byte}
        for source, score in scores.items():
            rows |= {f"heldout_loss/{source}": score.loss, f"heldout_bits_per_byte/{source}": score.bits_per_byte}
        return rows

    return evaluate
