"""Mamba-2: a state space in every layer, whose scan is a matrix product in chunks; no attention, no MLP, no positions.

    llmjax run --config configs/models/mamba2.py:tiny
    llmjax run --config configs/models/mamba2.py:130m --config.data.sources='["corpus/"]'

Paper: Dao & Gu 2024: inner width twice the width, heads of 64, states of 128, one group, a convolution of 4 tokens,
tied embeddings, 300B tokens of the Pile; learning rates are five times those of GPT-3's models of the size, batches of
0.5M to 1M tokens, decay 0.1, clipping at 1, beta2 0.95, cosine to 1e-5. Hardware: training keeps 16 bytes a parameter;
up to `780m` fits one GPU of 80 GB. Run here: `tiny`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, tokens a step, peak learning rate
    "tiny": (2, 64, 0, 3e-3),
    "130m": (24, 768, 2**19, 3e-3),
    "370m": (48, 1024, 2**19, 1.5e-3),
    "780m": (48, 1536, 2**19, 1.25e-3),
    "1.3b": (48, 2048, 2**20, 1e-3),
    "2.7b": (64, 2560, 2**20, 0.8e-3),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `130m`, `370m`, `780m`, `1.3b` or `2.7b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"mamba2-{size}"
    m = c.model
    m.layers, m.width, tokens, rate = SIZES[size]
    m.pattern = ("mamba2",)
    m.mlp = "none"
    m.norm = "rms"
    m.norm_epsilon = 1e-5
    m.position = "none"
    m.recurrent.width = 2 * m.width
    m.recurrent.heads = 2 * m.width // (16 if size == "tiny" else 64)
    m.recurrent.state_size = 16 if size == "tiny" else 128
    m.recurrent.groups = 1
    m.recurrent.conv_width = 4
    m.recurrent.chunk = 16 if size == "tiny" else 256
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=50_288, sequence_length=2048, batch_size=tokens // 2048)
    c.optimizer.learning_rate = rate
    c.schedule.warmup = "375M tokens"
    c.schedule.final = 1e-5 / rate
    c.train.duration = "300B tokens"
    return c
