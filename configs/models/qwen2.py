"""Qwen2 and Qwen2.5: LLaMA's block with biases on queries, keys and values, and a base of a million in its positions.

    llmjax run --config configs/models/qwen2.py:tiny
    llmjax run --config configs/models/qwen2.py:7b --config.data.sources='["corpus/"]'

Papers: Yang et al. 2024 (Qwen2: 0.5b, 1.5b, 7b, 72b) and Qwen Team 2024 (Qwen2.5, which adds 3b, 14b and 32b). Shapes
and tokens (7T, 12T for 0.5b) are published. Learning rates and batches are not; they are LLaMA 3's. The small ones tie
their embeddings. Hardware: training keeps 16 bytes a parameter, spread over fsdp; 0.5b fits one GPU. Run here: `tiny`.
The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, key and value heads, MLP width, vocabulary, tied
    "tiny": (2, 64, 4, 2, 176, 0, True),
    "0.5b": (24, 896, 14, 2, 4864, 151_936, True),
    "1.5b": (28, 1536, 12, 2, 8960, 151_936, True),
    "3b": (36, 2048, 16, 2, 11008, 151_936, True),
    "7b": (28, 3584, 28, 4, 18944, 152_064, False),
    "14b": (48, 5120, 40, 8, 13824, 152_064, False),
    "32b": (64, 5120, 40, 8, 27648, 152_064, False),
    "72b": (80, 8192, 64, 8, 29568, 152_064, False),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `0.5b`, `1.5b`, `3b`, `7b`, `14b`, `32b` or `72b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"qwen2-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.kv_heads, m.mlp_width, vocab, m.tie_embeddings = SIZES[size]
    m.bias = ("qkv",)
    m.activation = "swiglu"
    m.norm = "rms"
    m.norm_epsilon = 1e-6
    m.position = "rotary"
    m.rotary_base = 1e6
    m.max_length = 32_768
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=vocab, sequence_length=4096, batch_size=1024)
    c.optimizer.learning_rate = 3e-4
    c.schedule.warmup = "2000 steps"
    c.train.duration = "12T tokens" if size == "0.5b" else "7T tokens"
    return c
