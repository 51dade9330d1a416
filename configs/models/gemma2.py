"""Gemma 2: local and global layers in turn, norms before and after each branch, soft caps on scores and logits.

    llmjax run --config configs/models/gemma2.py:tiny
    llmjax run --config configs/models/gemma2.py:2b --config.data.sources='["corpus/"]'

Paper: Riviere et al. 2024: tied embeddings times sqrt(width), GeGLU with the tanh form, zero-centred RMS scales, heads
of 256 (128 in `27b`, whose scores are scaled by the width of a head of 144), windows of 4,096. The tokens are
published (2T, 8T, 13T). `2b` and `9b` were distilled from a larger model. Learning rates and batches are not
published; they are ours. Hardware: training keeps 16 bytes a parameter, spread over fsdp. Run here: `tiny`. The
parameters of the other sizes are counted.
"""

import math

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, key and value heads, head size, MLP width, scores divided by the root of, tokens
    "tiny": (2, 64, 4, 2, 32, 176, 32, ""),
    "2b": (26, 2304, 8, 4, 256, 9216, 256, "2T"),
    "9b": (42, 3584, 16, 8, 256, 14336, 256, "8T"),
    "27b": (46, 4608, 32, 16, 128, 36864, 144, "13T"),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `2b`, `9b` or `27b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"gemma2-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.kv_heads, m.head_size, m.mlp_width, divisor, tokens = SIZES[size]
    m.pattern = ("local", "global")
    m.window = 16 if size == "tiny" else 4096
    m.activation = "geglu_tanh"
    m.norm = "rms"
    m.norm_place = "sandwich"
    m.norm_epsilon = 1e-6
    m.norm_zero_centered = True
    m.position = "rotary"
    m.attention_scale = divisor**-0.5
    m.attention_soft_cap = 50.0
    m.logit_soft_cap = 30.0
    m.embedding_scale = math.sqrt(m.width)
    m.max_length = 8192
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=256_000, sequence_length=8192, batch_size=512)
    c.optimizer.learning_rate = 3e-4
    c.schedule.warmup = "2000 steps"
    c.train.duration = f"{tokens} tokens"
    return c
