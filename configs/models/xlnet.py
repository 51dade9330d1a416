"""XLNet: permutation language modelling with two streams, Transformer-XL's relative positions and memory.

    llmjax run --config configs/models/xlnet.py:tiny
    llmjax run --config configs/models/xlnet.py:base --config.data.sources='["corpus/"]'

Paper: Yang et al. 2019, table 8 (`large`): 8,192 rows of 512 tokens, 500,000 steps, rate 4e-4, warm-up of 40,000,
linear to zero, epsilon 1e-6, decay 0.01, dropout 0.1, the last 1/6 of each order predicted, rows in two parts of which
the second sees the first's memory. The recipe of `base` is not published; it is large's. Norms come after each sum.
Hardware: the paper's took 512 TPU v3 chips for 5.5 days. Run here: `tiny`. The parameters of the other sizes are
counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, MLP width
    "tiny": (2, 64, 4, 256),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `base` or `large`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"xlnet-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.mlp_width = SIZES[size]
    m.direction = "bidirectional"
    m.two_stream = True
    m.activation = "gelu"
    m.norm = "layer"
    m.norm_place = "post"
    m.norm_epsilon = 1e-12
    m.final_norm = False
    m.bias = ("mlp", "norm", "head")
    m.position = "xlnet"
    m.max_length = 512
    m.types = 2
    c.objective.name = "permutation"
    c.objective.predict_share = 0.1667
    c.objective.recurrence = 2
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=32_000, sequence_length=512, batch_size=8192, micro_batches=64)
    c.tokenizer.kind = "unigram"
    m.dropout = m.embedding_dropout = m.attention_dropout = 0.1
    c.optimizer.learning_rate = 4e-4
    c.optimizer.beta2 = 0.999
    c.optimizer.epsilon = 1e-6
    c.optimizer.weight_decay = 0.01
    c.schedule.name = "linear"
    c.schedule.final = 0.0
    c.schedule.warmup = "40000 steps"
    c.train.duration = "500000 steps"
    return c
