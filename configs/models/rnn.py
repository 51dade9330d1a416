"""The simple recurrent network: one state, renewed by a tanh of the token and itself.

    llmjax run --config configs/models/rnn.py:tiny
    llmjax run --config configs/models/rnn.py:small --config.data.sources='["corpus/"]'

Papers: Elman 1990, and Mikolov et al. 2010 for language models of 10,000 words, who trained with plain gradient
descent at 0.1, which is halved whenever held-out loss stops falling; here the optimizer is AdamW. `small` is their
state of 200, `medium` 600. Batches and rows are not published; they are ours. No size has a residual path, norm or
MLP. Hardware: any. Run here: `tiny`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width
    "tiny": (2, 64),
    "small": (1, 200),
    "medium": (1, 600),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `small` or `medium`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"rnn-{size}"
    c.model.layers, c.model.width = SIZES[size]
    c.model.heads = 1
    c.model.pattern = ("rnn",)
    c.model.mlp = "none"
    c.model.norm = "none"
    c.model.residual_scale = 0.0  # layers follow each other without a residual path
    c.model.position = "none"
    c.model.tie_embeddings = False
    c.model.bias = ("head",)
    c.model.init = "xavier"
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=10_000, sequence_length=64, batch_size=64, micro_batches=1)
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.parallel.mesh = "data=-1"
    c.optimizer.learning_rate = 1e-3
    c.train.duration = "10 epochs"
    return c
