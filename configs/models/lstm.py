"""The LSTM: gates decide what a cell keeps, renews and shows; layers without a residual path.

    llmjax run --config configs/models/lstm.py:tiny
    llmjax run --config configs/models/lstm.py:ptb-medium --config.data.sources='["corpus/"]'

Papers: Hochreiter & Schmidhuber 1997; Zaremba et al. 2014 for the models of Penn Treebank: 2 layers of 200, 650 or
1,500 over 10,000 words, dropout of 0, 0.5 or 0.65 between layers, rows of 20 or 35 words, batches of 20, plain
gradient descent. AdamW, batches of 32, clipping at 1 and the initialisation are ours. As in the paper there is no
residual path, norm or MLP. Unlike the paper's, each layer has a linear map from its state to the next layer, so
model.recurrent.width may differ from the width. Hardware: any. Run here: `tiny`. The parameters of the other sizes are
counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, dropout, tokens a row, epochs
    "tiny": (2, 64, 0.0, 0, 0),
    "ptb-small": (2, 200, 0.0, 20, 13),
    "ptb-medium": (2, 650, 0.5, 35, 39),
    "ptb-large": (2, 1500, 0.65, 35, 55),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `ptb-small`, `ptb-medium` or `ptb-large`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"lstm-{size}"
    c.model.layers, c.model.width, c.model.dropout, length, epochs = SIZES[size]
    c.model.heads = 1
    c.model.pattern = ("lstm",)
    c.model.mlp = "none"
    c.model.norm = "none"
    c.model.residual_scale = 0.0  # layers follow each other without a residual path
    c.model.position = "none"
    c.model.tie_embeddings = False
    c.model.bias = ("head",)
    c.model.init = "xavier"
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=10_000, sequence_length=length, batch_size=32, micro_batches=1)
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.model.embedding_dropout = c.model.dropout
    c.parallel.mesh = "data=-1"
    c.optimizer.learning_rate = 1e-3
    c.train.duration = f"{epochs} epochs"
    return c
