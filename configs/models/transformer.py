"""The Transformer of 2017: encoder and decoder, sinusoidal positions, norms after each sum, one embedding for all uses.

    llmjax run --config configs/models/transformer.py:tiny
    llmjax run --config configs/models/transformer.py:base --config.data.sources='["corpus/"]'

Paper: Vaswani et al. 2017: Adam with beta2 0.98 and epsilon 1e-9, rate 1/sqrt(width) times the inverse square root of
the step after a warm-up of 4,000, label smoothing 0.1, dropout 0.1 (0.3 in `big`), 25,000 tokens each side a step,
100,000 or 300,000 steps. The paper trained on translations. Here the text is in one language, and the objective is
span corruption. Biases are in the MLPs and norms only, as in the authors' code; initialisation is Xavier's, with
embeddings of N(0, 1/width) times sqrt(width). Hardware: 8 GPUs for 12 hours (`base`) or 3.5 days (`big`) in 2017. Run
here: `tiny`. The parameters of the other sizes are counted.
"""

import math

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers (of each half), width, heads, dropout, steps
    "tiny": (2, 64, 4, 0.0, 0),
    "base": (6, 512, 8, 0.1, 100_000),
    "big": (6, 1024, 16, 0.3, 300_000),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `base` or `big`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"transformer-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.dropout, steps = SIZES[size]
    m.encoder_layers = m.layers
    m.activation = "relu"
    m.norm = "layer"
    m.norm_place = "post"
    m.final_norm = False
    m.norm_epsilon = 1e-6
    m.bias = ("mlp", "norm")
    m.position = "sinusoidal"
    m.embedding_scale = math.sqrt(m.width)
    m.init = "xavier"
    m.max_length = 512
    c.objective.name = "span"
    c.objective.label_smoothing = 0.1
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=37_000, sequence_length=256, batch_size=96, micro_batches=1, reserved=128)
    m.embedding_dropout = m.dropout
    c.parallel.mesh = "data=-1"
    c.optimizer.learning_rate = round(m.width**-0.5 * 4000**-0.5, 7)
    c.optimizer.beta2 = 0.98
    c.optimizer.epsilon = 1e-9
    c.optimizer.weight_decay = 0.0
    c.schedule.name = "inverse_sqrt"
    c.schedule.warmup = "4000 steps"
    c.train.duration = f"{steps} steps"
    return c
