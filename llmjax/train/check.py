"""Checks of the train stage, made before anything of the run is moved or deleted."""

import math
from pathlib import Path

from ml_collections import ConfigDict

from llmjax import config
from llmjax.data import ramp
from llmjax.data.batches import TrainBatches, tokens_per_epoch
from llmjax.data.tokenizer_extension import read_extension
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.data.tokens import load_index
from llmjax.errors import UserError
from llmjax.objectives import OBJECTIVES, corruption
from llmjax.parallel import compiler_options
from llmjax.parallel import mesh as meshes
from llmjax.train import budget as budgets
from llmjax.train import folders, initial, pretrain, setup


def check(c: ConfigDict, workdir: Path | None, *, fresh: bool) -> None:
    """Raise UserError for a training that cannot begin or go on.

    Args:
        workdir: None: the tokens are yet to be made.
        fresh: the checkpoints of the run are to be moved away first.
    """
    if c.train.executable and not Path(c.train.executable).is_file():
        raise UserError(
            f"train.executable={c.train.executable!r} is not there; make it with `llmjax plan --config "
            "FILE --topology CHIP:SHAPE --save-executable FILE`, or set train.executable='' to compile here"
        )
    tokenizer = load_tokenizer(workdir / "tokenizer") if workdir is not None else None
    if c.train.init_from:
        extension = read_extension(workdir / "tokenizer") if workdir is not None else None
        initial.check(c, tokenizer, extension=extension)
    if workdir is None or tokenizer is None:
        _check_without_tokens(c)
        return
    c = pretrain.resolve(c, tokenizer)
    tokens, change = workdir / "tokenizer" / "tokens", corruption(c, tokenizer)
    index = load_index(tokens)
    OBJECTIVES[c.objective.name].check(c, [entry["languages"] for entry in index.splits["train"].values()])
    epoch = tokens_per_epoch(c, index, corruption=change)
    sizes = ramp.batch_sizes(c.train, tokens_per_epoch=epoch)
    budget = budgets.kept(c, workdir) if budgets.is_time(c) and not fresh else None
    # A time that is yet to be measured: 0 steps.
    total = (budget.steps if budget else 0) if budgets.is_time(c) else setup.steps_of(c, sizes)
    TrainBatches(c, tokens, total_steps=total, corruption=change)
    trained = max(folders.steps_in(workdir / "checkpoints"), default=0) if not fresh else 0
    if 0 < total < trained:
        raise UserError(
            f"train.duration={c.train.duration!r} ends at step {total:,}, and the training in {workdir} has come to step "
            f"{trained:,}: give a duration that is not shorter, another --workdir, or --again, which moves that training "
            "away and starts anew"
        )
    compiler_options.check(c.parallel.compiler)
    pretrain.start_devices(c)
    mesh = meshes.make_mesh(c.parallel.mesh, slices=c.parallel.slices)
    setup.check_rows(c, sizes, ways=meshes.row_ways(mesh))


def _check_without_tokens(c: ConfigDict) -> None:
    """Raise UserError for what is wrong whatever the text and the devices are."""
    axes = meshes.read_mesh(c.parallel.mesh)
    compiler_options.check(c.parallel.compiler)
    units = {config.parse_duration(value)[1] for value in (c.train.duration, c.train.batch_ramp)}
    if "epoch" in units and len(ramp.sizes(c.train)) > 1:
        return
    sizes = ramp.batch_sizes(c.train)
    if not units & {"epoch", "second"}:
        setup.steps_of(c, sizes)
    # An axis of -1 is at least 1: what its fellows do not divide, all of them together do not either.
    setup.check_rows(c, sizes, ways=math.prod(axes[axis] for axis in meshes.ROWS if axes[axis] > 0))
