"""Chinchilla 70B on 1,024 chips of TPU v4.

    llmjax plan --config configs/runs/chinchilla.py --topology v4:8x8x16

Hoffmann et al. 2022: 80 layers of width 8,192 with 64 heads of 128, RMSNorm, AdamW, rate 1e-4, 1.4T tokens in batches
of 1.5M that double to 3M midway. The model has relative positions as Gopher does. Here they are rotary, which cost the
same products. These shapes have 64.7B parameters. The number of chips is not published; 1,024 is ours.
"""

from llmjax.config import ConfigDict, base, large_run, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    parse_arg(arg)
    c = base()
    c.name = "chinchilla-70b"
    m = c.model
    m.layers, m.width, m.heads, m.head_size = 80, 8192, 64, 128
    m.activation = "gelu"
    m.max_length = 2048
    large_run(c, vocab_size=32_000, sequence_length=2048, batch_size=1536, micro_batches=6)
    c.parallel.mesh = "fsdp=128 tensor=8"
    c.tokenizer.kind = "unigram"
    c.optimizer.learning_rate = 1e-4
    c.train.batch_start = 768
    c.train.batch_ramp = "700B tokens"
    c.train.duration = "1.4T tokens"
    return c
