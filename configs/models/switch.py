"""Switch Transformer: T5 with experts in every other layer of encoder and decoder, one for each token.

    llmjax run --config configs/models/switch.py:tiny
    llmjax run --config configs/models/switch.py:base-8 --config.data.sources='["corpus/"]'

Paper: Fedus et al. 2021: capacity 1.25, balance loss 0.01, the router's input jittered by 1%, span corruption,
Adafactor, a million tokens a step. The sizes are those released; base and large have T5's shapes; the learning rate is
T5's inverse square root. Not expressed: dropout of 0.4 inside experts, which the paper uses in fine-tuning only.
`tiny` drops tokens beyond an expert's capacity, as they do. Hardware: training keeps 16 bytes a parameter, spread over
fsdp: 10 GB for `base-8`, 419 GB for `large-128`. Run here: `tiny`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers (of each half), width, heads, head size, MLP width, experts
    "tiny": (2, 64, 4, 16, 128, 4),
    "base-8": (12, 768, 12, 64, 3072, 8),
    "base-16": (12, 768, 12, 64, 3072, 16),
    "base-32": (12, 768, 12, 64, 3072, 32),
    "base-64": (12, 768, 12, 64, 3072, 64),
    "base-128": (12, 768, 12, 64, 3072, 128),
    "base-256": (12, 768, 12, 64, 3072, 256),
    "large-128": (24, 1024, 16, 64, 4096, 128),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `base-8` to `base-256`, or `large-128`: see SIZES."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"switch-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.head_size, m.mlp_width, m.moe.experts = SIZES[size]
    m.encoder_layers = m.layers
    m.activation = "relu"
    m.norm = "rms"
    m.norm_epsilon = 1e-6
    m.position = "t5"
    m.attention_scale = 1.0
    m.logit_scale = m.width**-0.5
    m.init = "t5"
    m.max_length = 512
    m.moe.active = 1
    m.moe.every = 2
    m.moe.normalize = False
    m.moe.dispatch = "capacity"
    m.moe.capacity_factor = 1.25
    m.moe.balance_loss = 0.01
    m.moe.z_loss = 0.001
    m.moe.jitter = 0.01
    c.objective.name = "span"
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=32_128, sequence_length=512, batch_size=2048, reserved=128)
    c.tokenizer.kind = "unigram"
    m.dropout = 0.1
    c.optimizer.name = "adafactor"
    c.optimizer.learning_rate = 1e-2
    c.optimizer.weight_decay = 0.0
    c.schedule.name = "inverse_sqrt"
    c.schedule.warmup = "10000 steps"
    c.train.duration = "500000 steps"
    return c
