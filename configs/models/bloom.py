"""BLOOM: ALiBi instead of positions, a norm after the embeddings, biases everywhere, 250,880 pieces.

    llmjax run --config configs/models/bloom.py:tiny
    llmjax run --config configs/models/bloom.py:560m --config.data.sources='["corpus/"]'

Paper: Le Scao et al. 2022, tables of shapes and recipes: warm-up over 375M tokens, cosine over 410B to a floor of 1e-5
(6e-6 in `176b`), decay 0.1, clipping at 1, 341B tokens (366B in `176b`; here the cosine ends with the run). Hardware:
`176b` took 384 GPUs of 80 GB for 3.5 months. Run here: `tiny`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, batch size, peak learning rate
    "tiny": (2, 64, 4, 0, 3e-3),
    "560m": (24, 1024, 16, 256, 3e-4),
    "1b1": (24, 1536, 16, 256, 2.5e-4),
    "1b7": (24, 2048, 16, 512, 2e-4),
    "3b": (30, 2560, 32, 512, 1.6e-4),
    "7b1": (30, 4096, 32, 512, 1.2e-4),
    "176b": (70, 14336, 112, 2048, 6e-5),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `560m`, `1b1`, `1b7`, `3b`, `7b1` or `176b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"bloom-{size}"
    c.model.layers, c.model.width, c.model.heads, batch, rate = SIZES[size]
    c.model.activation = "gelu_tanh"
    c.model.norm = "layer"
    c.model.bias = ("qkv", "out", "mlp", "norm")
    c.model.position = "alibi"
    c.model.embedding_norm = True
    c.model.max_length = 2048
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=250_880, sequence_length=2048, batch_size=batch)
    c.optimizer.learning_rate = rate
    c.schedule.warmup = "375M tokens"
    c.schedule.final = 0.1 if size == "176b" else 1e-5 / rate
    c.train.duration = "366B tokens" if size == "176b" else "341B tokens"
    return c
