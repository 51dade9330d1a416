"""Falcon: attention and MLP in parallel, multi-query (7b, one norm) or grouped (40b, 180b, two norms); rw-1b: ALiBi.

    llmjax run --config configs/models/falcon.py:tiny
    llmjax run --config configs/models/falcon.py:tiny-rw
    llmjax run --config configs/models/falcon.py:7b --config.data.sources='["corpus/"]'

Papers: Almazrouei et al. 2023, and Penedo et al. 2023 for `rw-1b`, whose blocks are serial with biases and ALiBi, its
slopes divided by sqrt(head size) like the scores. Published: learning rates and their floor, warm-up over 4B tokens
(500M for rw-1b), the batches and the tokens over which they grow, weight decay 0.1, the z-loss of 1e-4. The first
batch is not published; it is ours. `tiny`, `tiny-40b` and `tiny-rw` are 7b, 40b and rw-1b in miniature. Hardware:
training keeps 16 bytes a parameter, 2.9 TB for `180b`. Run here: the tiny ones. The parameters of the other sizes are
counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, key and value heads, first and full batch, ramp, peak learning rate, tokens
    "tiny": (2, 64, 4, 1, 0, 0, "", 3e-3, ""),
    "tiny-40b": (2, 64, 4, 2, 0, 0, "", 3e-3, ""),
    "tiny-rw": (2, 64, 4, 4, 0, 0, "", 3e-3, ""),
    "rw-1b": (24, 2048, 32, 32, 64, 512, "4B", 2e-4, "350B"),
    "7b": (32, 4544, 71, 1, 144, 2304, "30B", 6e-4, "1.5T"),
    "40b": (60, 8192, 128, 8, 144, 1152, "100B", 1.85e-4, "1T"),
    "180b": (80, 14848, 232, 8, 128, 2048, "100B", 1.25e-4, "3.5T"),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `tiny-40b`, `tiny-rw`, `rw-1b`, `7b`, `40b` or `180b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"falcon-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.kv_heads, first, batch, ramp, rate, tokens = SIZES[size]
    m.activation = "gelu"
    m.norm = "layer"
    m.max_length = 2048
    if size in ("rw-1b", "tiny-rw"):
        m.block = "serial"
        m.bias = ("qkv", "out", "mlp", "norm")
        m.position = "alibi"
        m.alibi_scale = (m.width // m.heads) ** -0.5
        m.alibi_rounded = True
    else:
        m.block = "parallel"
        m.shared_norm = size in ("7b", "tiny")
        m.bias = ("norm",)
        m.position = "rotary"
        m.tie_embeddings = size != "180b"
    if size.startswith("tiny"):
        return tiny_run(c)

    large_run(c, vocab_size=50_304 if size == "rw-1b" else 65_024, sequence_length=2048, batch_size=batch)
    c.optimizer.learning_rate = rate
    c.objective.z_loss = 0.0 if size == "rw-1b" else 1e-4
    c.schedule.warmup = "500M tokens" if size == "rw-1b" else "4B tokens"
    c.schedule.final = 0.02 if size == "7b" else 0.1
    c.train.batch_start = first
    c.train.batch_ramp = f"{ramp} tokens"
    c.train.duration = f"{tokens} tokens"
    return c
