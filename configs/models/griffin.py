"""Griffin and RecurrentGemma: two gated linear recurrences (RG-LRU) to one local attention; Hawk: recurrences alone.

    llmjax run --config configs/models/griffin.py:tiny
    llmjax run --config configs/models/griffin.py:tiny-hawk
    llmjax run --config configs/models/griffin.py:1b --config.data.sources='["corpus/"]'

Papers: De et al. 2024 (table of shapes; windows of 1,024, one key and value head, gates in 16 blocks, 300B tokens of
rows of 2,048) and Botev et al. 2024 (`recurrentgemma-2b` and `-9b`, 2T tokens, windows of 2,048, half of each head
rotated). The vocabulary of Griffin (32,000 fits the sizes it names), batches, learning rates and initialisation are
not published; they are ours. Hardware: training keeps 16 bytes a parameter, spread over fsdp. Run here: the tiny ones.
The parameters of the other sizes are counted.
"""

import math

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, MLP width, width of the recurrence, blocks of its gates, vocabulary, window
    "tiny": (4, 64, 4, 192, 96, 4, 0, 16),
    "tiny-hawk": (2, 64, 4, 192, 96, 4, 0, 16),
    "100m": (12, 768, 6, 2304, 1024, 16, 32_000, 1024),
    "200m": (12, 1024, 8, 3072, 1536, 16, 32_000, 1024),
    "400m": (12, 1536, 12, 4608, 2048, 16, 32_000, 1024),
    "1b": (24, 2048, 16, 6144, 2560, 16, 32_000, 1024),
    "3b": (24, 3072, 24, 9216, 4096, 16, 32_000, 1024),
    "7b": (32, 4096, 32, 12288, 5632, 16, 32_000, 1024),
    "14b": (40, 5120, 40, 15360, 8192, 16, 32_000, 1024),
    "recurrentgemma-2b": (26, 2560, 10, 7680, 2560, 10, 256_000, 2048),
    "recurrentgemma-9b": (38, 4096, 16, 12288, 4096, 16, 256_000, 2048),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `tiny-hawk`, `100m` to `14b`, or `recurrentgemma-2b` or `-9b`: see SIZES."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = size if size.startswith("recurrent") else f"griffin-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.mlp_width, m.recurrent.width, m.recurrent.heads, vocab, m.window = SIZES[size]
    m.pattern = ("rglru",) if size == "tiny-hawk" else ("rglru", "rglru", "local")
    m.kv_heads = 1
    m.activation = "geglu_tanh"
    m.norm = "rms"
    m.norm_epsilon = 1e-6
    m.position = "none" if size == "tiny-hawk" else "rotary"
    m.recurrent.conv_width = 4
    m.max_length = 2048
    if size.startswith("recurrent"):
        m.embedding_scale = math.sqrt(m.width)  # the one change that Botev et al. name
        m.norm_zero_centered = True
        m.bias = ("out", "mlp")
        m.rotary_fraction = 0.5
        m.logit_soft_cap = 30.0
        m.max_length = 8192
    if size.startswith("tiny"):
        return tiny_run(c)

    large_run(c, vocab_size=vocab, sequence_length=m.max_length, batch_size=512)
    c.optimizer.learning_rate = 3e-4
    c.schedule.warmup = "1000 steps"
    c.train.duration = "2T tokens" if size.startswith("recurrent") else "300B tokens"
    return c
