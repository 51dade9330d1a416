"""RoBERTa: BERT without segments and pooler, with a larger vocabulary and positions that start at the third row.

    llmjax run --config configs/models/roberta.py:tiny
    llmjax run --config configs/models/roberta.py:base --config.data.sources='["corpus/"]'

Paper: Liu et al. 2019, table 9: 8,000 rows of 512 tokens (8,192 here), 500,000 steps, rates 6e-4 and 4e-4, warm-up of
24,000 and 30,000 steps, linear to zero, beta2 0.98, epsilon 1e-6, decay 0.01, dropout 0.1, no clipping. Masks are
drawn anew for every batch. Hardware: the paper's took 1,024 GPUs of 32 GB for a day per 100,000 steps. Run here:
`tiny`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, peak learning rate, warm-up
    "tiny": (2, 64, 4, 3e-3, ""),
    "base": (12, 768, 12, 6e-4, "24000 steps"),
    "large": (24, 1024, 16, 4e-4, "30000 steps"),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `base` or `large`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"roberta-{size}"
    m = c.model
    m.layers, m.width, m.heads, rate, warmup = SIZES[size]
    m.direction = "bidirectional"
    m.activation = "gelu"
    m.norm = "layer"
    m.norm_place = "post"
    m.norm_epsilon = 1e-5
    m.embedding_norm = True
    m.final_norm = False
    m.bias = ("qkv", "out", "mlp", "norm", "head")
    m.position = "learned"
    m.max_length = 512
    m.position_offset = 2
    m.types = 1
    m.head_transform = True
    c.objective.name = "masked"
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=50_265, sequence_length=512, batch_size=8192, micro_batches=64, reserved=1)
    m.dropout = m.embedding_dropout = m.attention_dropout = 0.1
    c.optimizer.learning_rate = rate
    c.optimizer.beta2 = 0.98
    c.optimizer.epsilon = 1e-6
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 0.0
    c.schedule.name = "linear"
    c.schedule.final = 0.0
    c.schedule.warmup = warmup
    c.train.duration = "500000 steps"
    return c
