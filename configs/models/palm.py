"""PaLM: parallel blocks with SwiGLU of four times the width, one key and value head, no biases, rotary positions.

    llmjax run --config configs/models/palm.py:tiny
    llmjax run --config configs/models/palm.py:8b --config.data.sources='["corpus/"]'

Paper: Chowdhery et al. 2022: shapes, LayerNorm without bias, one for both branches; tied embeddings drawn from N(0, 1)
and logits divided by sqrt(width), kernels from N(0, 1 / fan-in); Adafactor without factoring (which is Adam with its
update scaled by the parameter; here Adafactor), 1e-2 for 10,000 steps and then 1 / sqrt(step), z-loss 1e-4, 780B
tokens. Batches double from 512 rows to 2,048 by step 115,000 (in the paper the first time at step 50,000). Not
expressed: weight decay by the squared rate, a beta2 that grows, and that the rate is constant, not rising, in the
first 10,000 steps. Hardware: `540b` took 6,144 TPU v4 chips for 1,200 hours. Run here: `tiny`. The parameters of the
other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, head size
    "tiny": (2, 64, 4, 32),
    "8b": (32, 4096, 16, 256),
    "62b": (64, 8192, 32, 256),
    "540b": (118, 18432, 48, 256),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `8b`, `62b` or `540b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"palm-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.head_size = SIZES[size]
    m.kv_heads = 1
    m.mlp_width = 4 * m.width
    m.block = "parallel"
    m.shared_norm = True
    m.activation = "swiglu"
    m.norm = "layer"
    m.position = "rotary"
    m.logit_scale = m.width**-0.5
    m.max_length = 2048
    m.init = "lecun"
    c.objective.z_loss = 1e-4
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=256_000, sequence_length=2048, batch_size=2048)
    c.tokenizer.kind = "unigram"
    c.optimizer.name = "adafactor"
    c.optimizer.learning_rate = 1e-2
    c.optimizer.weight_decay = 0.0
    c.schedule.name = "inverse_sqrt"
    c.schedule.warmup = "10000 steps"
    c.train.batch_start = 512
    c.train.batch_ramp = "115000 steps"
    c.train.duration = "780B tokens"
    return c
