"""Qwen3, dense and sparse: queries and keys normalised per head, no biases, heads of 128 whatever the width.

    llmjax run --config configs/models/qwen3.py:tiny
    llmjax run --config configs/models/qwen3.py:tiny-moe
    llmjax run --config configs/models/qwen3.py:8b --config.data.sources='["corpus/"]'

Paper: Yang et al. 2025, with the shapes and the 36T tokens. Learning rates and batches are not published; they are
LLaMA 3's. The sparse ones (`30b-a3b`, `235b-a22b`) choose 8 of 128 experts and normalise their scores; their balance
loss is that of the released code, one over the tokens of all layers and devices together. Hardware: training keeps 16
bytes a parameter, spread over fsdp. Run here: `tiny` and `tiny-moe`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, key and value heads, head size, MLP width (of an expert), experts, tied
    "tiny": (2, 64, 4, 2, 32, 176, 0, True),
    "tiny-moe": (2, 64, 4, 2, 32, 48, 8, False),
    "0.6b": (28, 1024, 16, 8, 128, 3072, 0, True),
    "1.7b": (28, 2048, 16, 8, 128, 6144, 0, True),
    "4b": (36, 2560, 32, 8, 128, 9728, 0, True),
    "8b": (36, 4096, 32, 8, 128, 12288, 0, False),
    "14b": (40, 5120, 40, 8, 128, 17408, 0, False),
    "32b": (64, 5120, 64, 8, 128, 25600, 0, False),
    "30b-a3b": (48, 2048, 32, 4, 128, 768, 128, False),
    "235b-a22b": (94, 4096, 64, 4, 128, 1536, 128, False),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `tiny-moe`, or a published size such as `8b` or `30b-a3b`: see SIZES."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"qwen3-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.kv_heads, m.head_size, m.mlp_width, m.moe.experts, m.tie_embeddings = SIZES[size]
    m.qk_norm = True
    m.activation = "swiglu"
    m.norm = "rms"
    m.norm_epsilon = 1e-6
    m.position = "rotary"
    m.rotary_base = 1e6
    m.max_length = 40_960
    m.moe.active = 2 if size == "tiny-moe" else 8
    m.moe.balance_loss = 0.001
    m.moe.balance_over = "layers"
    m.moe.z_loss = 0.0
    if size.startswith("tiny"):
        return tiny_run(c)

    large_run(c, vocab_size=151_936, sequence_length=4096, batch_size=1024)
    c.optimizer.learning_rate = 3e-4
    c.schedule.warmup = "2000 steps"
    c.train.duration = "36T tokens"
    return c
