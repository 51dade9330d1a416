"""UniLM: BERT's network trained under four masks: bidirectional, left-to-right, right-to-left, sequence-to-sequence.

    llmjax run --config configs/models/unilm.py:tiny
    llmjax run --config configs/models/unilm.py:large --config.data.sources='["corpus/"]'

Paper: Dong et al. 2019: a third of the rows bidirectional, a third sequence-to-sequence, a sixth each way; 15% masked;
330 rows of 512 tokens (here 336), 770,000 steps at 3e-5, warm-up of 40,000, linear to zero, decay 0.01, dropout 0.1,
started from BERT large. A kind of row has segment embeddings of its own, six in all. For `base` the recipe is large's.
Hardware: the paper's took 8 GPUs of 32 GB for 7 hours per 10,000 steps. Run here: `tiny`. The parameters of the other
sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads
    "tiny": (2, 64, 4),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `base` or `large`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"unilm-{size}"
    m = c.model
    m.layers, m.width, m.heads = SIZES[size]
    m.direction = "bidirectional"
    m.activation = "gelu"
    m.norm = "layer"
    m.norm_place = "post"
    m.norm_epsilon = 1e-12
    m.embedding_norm = True
    m.final_norm = False
    m.bias = ("qkv", "out", "mlp", "norm", "head")
    m.position = "learned"
    m.max_length = 512
    m.types = 6
    m.head_transform = True
    c.objective.name = "unilm"
    c.objective.modes = (1.0, 0.5, 0.5, 1.0)
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=28_996, sequence_length=512, batch_size=336, reserved=2)
    m.dropout = m.embedding_dropout = m.attention_dropout = 0.1
    c.optimizer.learning_rate = 3e-5
    c.optimizer.beta2 = 0.999
    c.optimizer.weight_decay = 0.01
    c.schedule.name = "linear"
    c.schedule.final = 0.0
    c.schedule.warmup = "40000 steps"
    c.train.duration = "770000 steps"
    return c
