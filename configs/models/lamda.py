"""LaMDA: a decoder with T5's relative positions and a gated GELU of eight times the width.

    llmjax run --config configs/models/lamda.py:tiny
    llmjax run --config configs/models/lamda.py:2b --config.data.sources='["corpus/"]'

Paper: Thoppilan et al. 2022: layers, widths and heads of 128 (twice the width together), 256k tokens a step, 2.81T BPE
tokens of a vocabulary of 32k. The published sizes do not count the embedding. The norms (RMS before each branch, as in
T5), the untied output, initialisation, optimizer and learning rate are not published; they are ours. Hardware: `137b`
took 1,024 TPU v3 chips for 57.7 days. Run here: `tiny`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, head size
    "tiny": (2, 64, 4, 32),
    "2b": (10, 2560, 40, 128),
    "8b": (16, 4096, 64, 128),
    "137b": (64, 8192, 128, 128),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `2b`, `8b` or `137b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"lamda-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.head_size = SIZES[size]
    m.mlp_width = 8 * m.width
    m.activation = "geglu"
    m.norm = "rms"
    m.norm_epsilon = 1e-6
    m.position = "t5"
    m.relative_buckets = 32
    m.relative_max_distance = 128
    m.tie_embeddings = False
    m.max_length = 1024
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=32_000, sequence_length=1024, batch_size=256)
    c.optimizer.learning_rate = 1e-4
    c.train.duration = "2.81T tokens"
    return c
