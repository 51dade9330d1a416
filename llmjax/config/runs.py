"""Settings that config files share: the run of a `tiny` model on a laptop, of a published size, of a model taught further,
and of an ablation."""

from pathlib import Path

from ml_collections import ConfigDict

from llmjax.config.files import load
from llmjax.config.settings import base

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


def tiny_run(c: ConfigDict) -> ConfigDict:
    """Everything but the model, for a model that any laptop trains offline: short rows of this Python's own sources."""
    c.data.min_bytes = 64
    c.tokenizer.kind = "byte"
    c.train.sequence_length = 64
    c.train.batch_size = 16
    c.train.duration = "60 steps"
    c.train.eval_every = "50%"
    c.train.eval_batches = 2
    c.optimizer.learning_rate = 3e-3
    c.schedule.warmup = "10%"
    c.eval.max_bytes = 4096
    c.generate.max_new_tokens = 32
    return c


def large_run(
    c: ConfigDict,
    *,
    vocab_size: int,
    sequence_length: int,
    batch_size: int,
    micro_batches: int = 16,
    reserved: int = 0,
) -> ConfigDict:
    """Settings of every published size: its exact vocabulary and batch, bfloat16 compute, sharded weights.

    Args:
        vocab_size: rows of the embedding. A tensor axis needs a round number: --config.model.vocab_size=0 rounds the
            tokenizer's size up to model.vocab_multiple.
        sequence_length: tokens a row.
        batch_size: rows a step, over all devices.
        micro_batches: parts of a step; raise it until they fit the memory.
        reserved: rows for the special ids of the objective.
    """
    c.tokenizer.vocab_size = vocab_size - reserved
    c.tokenizer.train_bytes = 100_000_000
    c.model.vocab_size = vocab_size
    c.model.dtype = "bfloat16"
    c.model.remat = "selective"
    c.parallel.mesh = "fsdp=-1"
    c.train.sequence_length = sequence_length
    c.train.batch_size = batch_size
    c.train.micro_batches = micro_batches
    c.train.eval_every = "1000 steps"
    c.checkpoint.every = "1000 steps"
    c.checkpoint.keep_every = "50000 steps"
    return c


def post_run(name: str, *, objective: str = "causal") -> ConfigDict:
    """A config that trains the model of `train.init_from` further, on conversations, with AdamW and no weight decay."""
    c = base()
    c.name = name
    c.stages = ("rows", "train", "report")
    c.data.format = "conversations"
    c.objective.name = objective
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0
    c.schedule.warmup = "3%"
    c.schedule.final = 0.1
    c.train.inherit_model = True
    c.train.eval_every = "10%"
    return c


def ablation_run() -> ConfigDict:
    """The control of all ablations: the quickstart with 140 steps, about a minute of two cores, and a short evaluation.

    Steps take the place of minutes, so that an arm that is slower, or shares the machine, is not shorter. All ablations
    have one name and therefore one folder, where they share the control's runs.
    """
    c = load(str(QUICKSTART)).copy_and_resolve_references().unlock()
    c.name = "ablations"
    c.train.duration = "140 steps"
    c.checkpoint.every = "100%"
    c.eval.max_bytes = 300_000
    c.eval.xz = False
    return c
