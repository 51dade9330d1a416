"""Mixtral: Mistral's block with eight experts for an MLP, two for each token; no window.

    llmjax run --config configs/models/mixtral.py:tiny
    llmjax run --config configs/models/mixtral.py:8x7b --config.data.sources='["corpus/"]'

Paper: Jiang et al. 2024, with the shapes: a softmax over the two chosen experts, dropless. The training is not
published; the recipe is LLaMA 2's, with the balance loss of its released code: 0.02 times one loss over the tokens of
all layers together. Hardware: 750 GB of weights, gradients and moments for `8x7b`, 2.3 TB for `8x22b`. Run here:
`tiny`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, key and value heads, MLP width of an expert, experts
    "tiny": (2, 64, 4, 2, 96, 4),
    "8x7b": (32, 4096, 32, 8, 14336, 8),
    "8x22b": (56, 6144, 48, 8, 16384, 8),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `8x7b` or `8x22b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"mixtral-{size}"
    c.model.layers, c.model.width, c.model.heads, c.model.kv_heads, c.model.mlp_width, experts = SIZES[size]
    c.model.activation = "swiglu"
    c.model.norm = "rms"
    c.model.norm_epsilon = 1e-5
    c.model.position = "rotary"
    c.model.rotary_base = 1e6
    c.model.tie_embeddings = False
    c.model.max_length = 65_536 if size == "8x22b" else 32_768
    c.model.moe.experts = experts
    c.model.moe.active = 2
    c.model.moe.balance_loss = 0.02
    c.model.moe.balance_over = "layers"
    c.model.moe.z_loss = 0.0
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=32_000, sequence_length=8192, batch_size=512)
    c.optimizer.learning_rate = 3e-4
    c.schedule.warmup = "2000 steps"
    c.train.duration = "2T tokens"
    return c
