"""T5 and T5 v1.1: encoder and decoder, relative positions in buckets, RMS norms, unscaled scores, span corruption.

    llmjax run --config configs/models/t5.py:tiny
    llmjax run --config configs/models/t5.py:tiny-v1.1
    llmjax run --config configs/models/t5.py:small --config.data.sources='["corpus/"]'

Papers: Raffel et al. 2020 (15% of the tokens in spans of 3, 2^11 rows of 512 tokens, a million steps, Adafactor with
1e-2 for 10,000 steps and then 1 / sqrt(step), dropout 0.1) and Shazeer 2020 for v1.1 (gated GELU, untied output, no
dropout in pretraining). The rate rises during the first 10,000 steps, where theirs is constant. Tied logits are
divided by sqrt(width). Hardware: training keeps 16 bytes a parameter, spread over fsdp; `small` fits any GPU, `11b`
took 1,024 TPU v3 chips. Run here: the tiny ones. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers (of each half), width, heads, head size, MLP width
    "tiny": (2, 64, 4, 16, 128),
    "tiny-v1.1": (2, 64, 4, 16, 128),
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3b": (24, 1024, 32, 128, 16384),
    "11b": (24, 1024, 128, 128, 65536),
    "v1.1-small": (8, 512, 6, 64, 1024),
    "v1.1-base": (12, 768, 12, 64, 2048),
    "v1.1-large": (24, 1024, 16, 64, 2816),
    "v1.1-xl": (24, 2048, 32, 64, 5120),
    "v1.1-xxl": (24, 4096, 64, 64, 10240),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `tiny-v1.1`, or a published size such as `small` or `v1.1-small`: see SIZES."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"t5-{size}"
    m, newer = c.model, "v1.1" in size
    m.layers, m.width, m.heads, m.head_size, m.mlp_width = SIZES[size]
    m.encoder_layers = m.layers
    m.activation = "geglu_tanh" if newer else "relu"
    m.norm = "rms"
    m.norm_epsilon = 1e-6
    m.position = "t5"
    m.relative_buckets = 32
    m.relative_max_distance = 128
    m.attention_scale = 1.0
    m.tie_embeddings = not newer
    m.logit_scale = 1.0 if newer else m.width**-0.5
    m.init = "t5"
    m.max_length = 512
    c.objective.name = "span"
    c.objective.mask_rate = 0.15
    c.objective.span_length = 3.0
    if size.startswith("tiny"):
        return tiny_run(c)

    large_run(c, vocab_size=32_128, sequence_length=512, batch_size=2048, reserved=128)
    c.tokenizer.kind = "unigram"
    m.dropout = m.attention_dropout = 0.0 if newer else 0.1
    c.optimizer.name = "adafactor"
    c.optimizer.learning_rate = 1e-2
    c.optimizer.weight_decay = 0.0
    c.schedule.name = "inverse_sqrt"
    c.schedule.warmup = "10000 steps"
    c.train.duration = "1000000 steps"
    return c
