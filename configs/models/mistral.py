"""Mistral 7B v0.1: LLaMA's block with grouped keys and a sliding window of 4,096 tokens in every layer.

    llmjax run --config configs/models/mistral.py:tiny
    llmjax run --config configs/models/mistral.py:7b --config.data.sources='["corpus/"]'

Paper: Jiang et al. 2023, with the shapes. The training is not published; the recipe here is LLaMA 2's. Hardware: 116
GB of weights, gradients and moments for `7b`, spread over fsdp: 8 accelerators of 80 GB. Run here: `tiny`, whose
window is 16 tokens of rows of 64. The parameters of `7b` are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, key and value heads, MLP width
    "tiny": (2, 64, 4, 2, 176),
    "7b": (32, 4096, 32, 8, 14336),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default) or `7b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"mistral-{size}"
    c.model.layers, c.model.width, c.model.heads, c.model.kv_heads, c.model.mlp_width = SIZES[size]
    c.model.pattern = ("local",)
    c.model.window = 16 if size == "tiny" else 4096
    c.model.activation = "swiglu"
    c.model.norm = "rms"
    c.model.norm_epsilon = 1e-5
    c.model.position = "rotary"
    c.model.tie_embeddings = False
    c.model.max_length = 32_768
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=32_000, sequence_length=8192, batch_size=512)
    c.optimizer.learning_rate = 3e-4
    c.schedule.warmup = "2000 steps"
    c.train.duration = "2T tokens"
    return c
