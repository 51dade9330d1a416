"""BERT: a bidirectional encoder that fills in masked tokens; norms after each sum, segment embeddings, pooler.

    llmjax run --config configs/models/bert.py:tiny
    llmjax run --config configs/models/bert.py:base --config.data.sources='["corpus/"]'

Paper: Devlin et al. 2019. 15% of the tokens are predicted; of those 80% are masked, 10% random, 10% kept. Adam at 1e-4
with decay 0.01, warm-up of 10,000 steps, linear to zero, dropout 0.1, 256 rows of 512 tokens, a million steps. The
second objective of the paper (do two segments follow each other?) is left out, since RoBERTa showed that it does not
help. Segment embeddings and pooler are there, but only fine-tuning trains them. Not expressed: 90% of the steps on
rows of 128 tokens. The tokenizer is a BPE of the published size, not WordPiece. Hardware: `base` fits one GPU; the
paper's training took 16 TPU chips for 4 days. Run here: `tiny`. The parameters of the other sizes are counted.
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
    c.name = f"bert-{size}"
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
    m.types = 2
    m.head_transform = True
    m.pooler = True
    c.objective.name = "masked"
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=30_522, sequence_length=512, batch_size=256, micro_batches=4, reserved=1)
    m.dropout = m.embedding_dropout = m.attention_dropout = 0.1
    c.optimizer.learning_rate = 1e-4
    c.optimizer.beta2 = 0.999
    c.optimizer.epsilon = 1e-6
    c.optimizer.weight_decay = 0.01
    c.schedule.name = "linear"
    c.schedule.final = 0.0
    c.schedule.warmup = "10000 steps"
    c.train.duration = "1000000 steps"
    return c
