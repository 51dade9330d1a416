"""GShard: the encoder-decoder of translation with experts in every other layer, two for each token.

    llmjax run --config configs/models/gshard.py:tiny
    llmjax run --config configs/models/gshard.py:128e-12l --config.data.sources='["corpus/"]'

Paper: Lepikhin et al. 2020: 12 or 36 layers of encoder and decoder together, width 1,024, MLPs of 8,192, 16 heads of
128, capacity 2N/E (an even share of each choice), 4M tokens a step, Adafactor with an inverse square root after 10,000
steps. The paper trained on translations into English. Here the text is in one language, and the objective is span
corruption. The paper draws the second expert at random in proportion to its score, and its balance loss counts first
choices. Here the second expert is always taken, and both choices count. Positions (T5's), the place of the norms
(before each branch) and the vocabulary of 32,000 are not published; they are ours. Hardware: `2048e-36l` took 2,048
TPU v3 cores for 4 days. Run here: `tiny`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers (of each half), width, heads, head size, MLP width, experts
    "tiny": (2, 64, 4, 16, 128, 4),
    "128e-12l": (6, 1024, 16, 128, 8192, 128),
    "512e-12l": (6, 1024, 16, 128, 8192, 512),
    "2048e-12l": (6, 1024, 16, 128, 8192, 2048),
    "128e-36l": (18, 1024, 16, 128, 8192, 128),
    "512e-36l": (18, 1024, 16, 128, 8192, 512),
    "2048e-36l": (18, 1024, 16, 128, 8192, 2048),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), or experts and layers such as `128e-12l`: see SIZES."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"gshard-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.head_size, m.mlp_width, m.moe.experts = SIZES[size]
    m.encoder_layers = m.layers
    m.activation = "relu"
    m.norm = "layer"
    m.bias = ("norm",)
    m.position = "t5"
    m.max_length = 1024
    m.moe.active = 2
    m.moe.every = 2
    m.moe.normalize = True
    m.moe.dispatch = "capacity"
    m.moe.capacity_factor = 1.0
    m.moe.balance_loss = 0.01
    m.moe.z_loss = 0.0
    c.objective.name = "span"
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=32_000, sequence_length=1024, batch_size=4096, micro_batches=64, reserved=128)
    c.tokenizer.kind = "unigram"
    m.dropout = 0.1
    c.optimizer.name = "adafactor"
    c.optimizer.learning_rate = 1e-2
    c.optimizer.weight_decay = 0.0
    c.schedule.name = "inverse_sqrt"
    c.schedule.warmup = "10000 steps"
    c.train.duration = "1T tokens"
    return c
