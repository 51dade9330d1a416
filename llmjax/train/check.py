"""What the train stage refuses, found out before anything of the run is moved or deleted."""

from pathlib import Path

from ml_collections import ConfigDict

from llmjax.data import ramp
from llmjax.data.batches import TrainBatches
from llmjax.data.tokenizer import load_tokenizer
from llmjax.errors import UserError
from llmjax.objectives import corruption
from llmjax.parallel import mesh as meshes
from llmjax.train import folders, initial, pretrain


def check(c: ConfigDict, workdir: Path | None, *, fresh: bool) -> None:
    """Raise UserError for a training that cannot be begun or gone on with.

    Args:
        workdir: None: the tokens are yet to be made.
        fresh: the checkpoints of the run are to be moved away first.
    """
    if c.train.executable and not Path(c.train.executable).is_file():
        raise UserError(
            f"train.executable={c.train.executable!r} is not there; make it with `llmjax plan --save-executable`, or set "
            "train.executable='' to compile here"
        )
    tokenizer = load_tokenizer(workdir / "tokenizer") if workdir is not None else None
    if c.train.init_from:
        initial.check(c, tokenizer)
    if workdir is None or tokenizer is None:
        return
    c = pretrain.resolve(c, tokenizer)
    one_step = TrainBatches(c, workdir / "tokenizer" / "tokens", total_steps=1, corruption=corruption(c, tokenizer))
    sizes = ramp.batch_sizes(c.train, tokens_per_epoch=one_step.tokens_per_epoch)
    total = sizes.steps(c.train.duration)
    if total < 1:
        raise UserError(f"train.duration={c.train.duration!r} is less than one step of {sizes.tokens(1):,} tokens")
    trained = max(folders.steps_in(workdir / "checkpoints"), default=0) if not fresh else 0
    if total < trained:
        raise UserError(
            f"train.duration={c.train.duration!r} ends at step {total:,}, and the training in {workdir} has come to step "
            f"{trained:,}: give a duration that is not shorter, another --workdir, or --again, which moves that training "
            "away and starts anew"
        )
    pretrain.start_devices(c)
    mesh = meshes.make_mesh(c.parallel.mesh, slices=c.parallel.slices)
    check_rows(c, sizes, ways=meshes.row_ways(mesh))


def check_rows(c: ConfigDict, sizes: ramp.BatchSizes, *, ways: int) -> None:
    """Raise UserError unless the rows of every micro-batch can be spread over so many devices."""
    for stage in sizes.stages:
        rows = stage.rows // stage.micro_batches
        if rows % ways:
            ramp = f" of the stage of the batch ramp from step {stage.first_step:,}" if len(sizes.stages) > 1 else ""
            raise UserError(
                f"train.batch_size / train.micro_batches = {stage.rows} / {stage.micro_batches} = {rows} sequences{ramp} "
                f"cannot be spread over {ways} devices ({' x '.join(meshes.ROWS)} of parallel.mesh={c.parallel.mesh!r}): change "
                f"{'train.batch_start or ' if ramp else ''}one of them"
            )
