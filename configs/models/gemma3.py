"""Gemma 3 (text): five local layers to one global, queries and keys normalised, another rotary base in each kind.

    llmjax run --config configs/models/gemma3.py:tiny
    llmjax run --config configs/models/gemma3.py:270m --config.data.sources='["corpus/"]'

Paper: Kamath et al. 2025: no soft caps any more, windows of 512 or 1,024, a base of 10,000 in local layers and of a
million in global ones, whose positions are stretched 8 times from `4b` on. The tokens are published (6T for `270m`,
then 2T, 4T, 12T, 14T). All sizes were distilled. Learning rates and batches are not published; they are ours. The
image encoder of `4b` and up is left out. Hardware: training keeps 16 bytes a parameter, spread over fsdp; `270m` fits
one GPU. Run here: `tiny`. The parameters of the other sizes are counted.
"""

import math

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, key and value heads, head size, MLP width, window, scores over the root of, tokens
    "tiny": (7, 64, 4, 1, 32, 128, 16, 32, ""),
    "270m": (18, 640, 4, 1, 256, 2048, 512, 256, "6T"),
    "1b": (26, 1152, 4, 1, 256, 6912, 512, 256, "2T"),
    "4b": (34, 2560, 8, 4, 256, 10240, 1024, 256, "4T"),
    "12b": (48, 3840, 16, 8, 256, 15360, 1024, 256, "12T"),
    "27b": (62, 5376, 32, 16, 128, 21504, 1024, 168, "14T"),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `270m`, `1b`, `4b`, `12b` or `27b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"gemma3-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.kv_heads, m.head_size, m.mlp_width, m.window, divisor, tokens = SIZES[size]
    stretched = size in ("tiny", "4b", "12b", "27b")
    m.pattern = ("local",) * 5 + ("global",)
    m.activation = "geglu_tanh"
    m.norm = "rms"
    m.norm_place = "sandwich"
    m.norm_epsilon = 1e-6
    m.norm_zero_centered = True
    m.qk_norm = True
    m.position = "rotary"
    m.rotary_base = 1e6
    m.rotary_local_base = 10_000.0
    m.rotary_scaling = "linear" if stretched else "none"
    m.rotary_factor = 8.0 if stretched else 1.0
    m.attention_scale = divisor**-0.5
    m.embedding_scale = math.sqrt(m.width)
    m.max_length = 131_072 if stretched else 32_768
    if size == "tiny":
        return tiny_run(c)

    vocab = 262_208 if stretched else 262_144  # the first has rows for the tokens of images
    large_run(c, vocab_size=vocab, sequence_length=8192, batch_size=512)
    c.optimizer.learning_rate = 3e-4
    c.schedule.warmup = "2000 steps"
    c.train.duration = f"{tokens} tokens"
    return c
