"""The train stage for language models on packed text: what it hands to the loop."""

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
from llmjax.data.batches import TrainBatches, heldout_batches
from llmjax.data.score import Score, total_score
from llmjax.data.tokenizer import Tokenizer, load_tokenizer
from llmjax.errors import UserError
from llmjax.model import attention, transformer
from llmjax.objectives import OBJECTIVES, corruption, special_ids
from llmjax.parallel import mesh as meshes
from llmjax.parallel import processes
from llmjax.parallel.mesh import use_cpu_devices
from llmjax.train import initial, loop
from llmjax.train.step import batch_shardings, make_heldout_step

# (config, module, tokenizer, mesh) -> (parameters -> named numbers)
MakeMore = Callable[
    [ConfigDict, transformer.Transformer, Tokenizer, jax.sharding.Mesh], Callable[[Any], dict[str, float]]
]


def run(c: ConfigDict, workdir: Path, *, make_more: MakeMore | None = None) -> dict[str, float | int | str]:
    """Train the model of `c` on the token shards of WORKDIR/tokenizer, continuing from WORKDIR/checkpoints.

    Args:
        make_more: makes what is measured beside the held-out loss, whenever that is.
    """
    started = time.perf_counter()
    start_devices(c)
    tokens_folder = workdir / "tokenizer" / "tokens"
    tokenizer = load_tokenizer(workdir / "tokenizer")
    c = resolve(c, tokenizer)
    change = corruption(c, tokenizer)

    # Percentages of data.mixture need the number of steps, and durations in epochs need the size of the data.
    hosts: dict[str, int] = {}
    if processes.count() > 1:
        host, of = meshes.row_group(meshes.make_mesh(c.parallel.mesh, slices=c.parallel.slices))
        hosts = {"host": host, "hosts": of}
    tokens_per_epoch = TrainBatches(c, tokens_folder, total_steps=1, corruption=change, **hosts).tokens_per_epoch
    sizes = ramp.batch_sizes(c.train, tokens_per_epoch=tokens_per_epoch)
    total = sizes.steps(c.train.duration)
    batches = TrainBatches(c, tokens_folder, total_steps=total, corruption=change, **hosts)
    print(
        f"data: {tokens_per_epoch:,} training tokens, {sizes.tokens(total):,} to be seen "
        f"({sizes.tokens(total) / tokens_per_epoch:.2f} epochs), {sizes.describe()}"
    )
    if len(batches.languages) > 1:
        print("epochs: " + ", ".join(f"{name} {epochs:.2f}" for name, epochs in batches.epochs(total).items()))
    if c.objective.name == "translation" and all(len(names) == 1 for names in batches.languages):
        raise UserError(
            "objective.name=translation needs parallel text, and data.sources has none: give two files with as many "
            "lines, such as data.sources='[\"fr|en=french.txt|english.txt\"]', or set objective.name=masked"
        )
    print(f"attention: {attention.choose(c.model, platform=jax.default_backend(), any_mask=own_order(c))}")
    module = transformer.build(c.model)
    heldout = heldout_batches(c, tokens_folder, count=c.train.eval_batches, corruption=change)
    piece_sizes = np.array([len(piece) for piece in tokenizer.piece_bytes])

    def make_evaluate(mesh: jax.sharding.Mesh) -> Callable[[Any], dict[str, float]]:
        held = make_heldout(c, module, heldout, piece_sizes, mesh) if heldout else lambda params: {}
        more = make_more(c, module, tokenizer, mesh) if make_more else lambda params: {}
        return lambda params: held(params) | more(params)

    return loop.train(
        c,
        workdir,
        module=module,
        batches=lambda start: batches.iterate(start),
        tokens_per_epoch=tokens_per_epoch,
        make_evaluate=make_evaluate if heldout or make_more else None,
        initial_params=functools.partial(initial.read, c) if c.train.init_from else None,
        notes={"tokenizer": tokenizer.fingerprint},
        started=started,
    )


def start_devices(c: ConfigDict) -> None:
    """Make the CPU's devices, before JAX starts."""
    rows = math.gcd(*(size // ramp.micro_batches(c.train, size) for size in ramp.sizes(c.train)))
    use_cpu_devices(c.parallel.cpu_devices or processes.cpu_share(), batch_size=rows, work_bytes=work_bytes(c))


def work_bytes(c: ConfigDict) -> int:
    """About what a step keeps for the backward pass: 16 float32 numbers a token, layer and dimension of the width."""
    tokens = c.train.batch_size // c.train.micro_batches * c.train.sequence_length
    return 64 * tokens * c.model.width * c.model.layers


def resolve(c: ConfigDict, tokenizer: Tokenizer) -> ConfigDict:
    """The config with what depends on the tokenizer filled in: model.vocab_size, and objective.vocab_size if it is used.

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


def make_heldout(
    c: ConfigDict,
    module: transformer.Transformer,
    heldout: dict[str, list[dict[str, np.ndarray]]],
    piece_sizes: np.ndarray,
    mesh: jax.sharding.Mesh,
) -> Callable[[Any], dict[str, float]]:
    """parameters -> named numbers of fixed held-out batches, in total and by source.

    heldout_loss (nats a predicted token), heldout_accuracy (share of predictions whose likeliest token is right) and,
    where the objective predicts every token of the text, heldout_bits_per_byte.

    Args:
        heldout: global batches by source, as the objective changed them; each process puts its rows of them on its
            devices.
        piece_sizes: UTF-8 bytes of each id.
    """
    step = jax.jit(make_heldout_step(module, OBJECTIVES[c.objective.name], c))
    sharding = batch_shardings(mesh)
    in_bytes = OBJECTIVES[c.objective.name].predicts_all

    def sums_of(params: Any, batch: dict[str, np.ndarray]) -> dict[str, float]:
        on_mesh = {k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in batch.items()}
        return {name: float(value) for name, value in step(params, on_mesh).items()}

    def evaluate(params: Any) -> dict[str, float]:
        scores, correct = {}, {}
        for source, batches in heldout.items():
            sums = [sums_of(params, batch) for batch in batches]
            # Weights may be shares: a target counts as a token, and its bytes, as far as it has weight.
            size = sum(float(np.sum(piece_sizes[batch["targets"]] * batch["weights"])) for batch in batches)
            nats, correct[source], tokens = (sum(part[name] for part in sums) for name in ("nats", "correct", "tokens"))
            scores[source] = Score(nats=nats, tokens=tokens, bytes=size if in_bytes else 0)

        def numbers(score: Score, right: float, end: str = "") -> dict[str, float]:
            row = {
                f"heldout_loss{end}": score.loss,
                f"heldout_accuracy{end}": right / score.tokens if score.tokens else 0.0,
            }
            return row | ({f"heldout_bits_per_byte{end}": score.bits_per_byte} if in_bytes else {})

        rows = numbers(total_score(scores.values()), sum(correct.values()))
        for source, score in scores.items():
            rows |= numbers(score, correct[source], f"/{source}")
        return rows

    return evaluate
