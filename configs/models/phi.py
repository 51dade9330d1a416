"""phi-1, 1.5 and 2: attention and MLP in parallel behind one LayerNorm, part of each head rotated, biases everywhere.

    llmjax run --config configs/models/phi.py:tiny
    llmjax run --config configs/models/phi.py:phi-1.5 --config.data.sources='["corpus/"]'

Papers: Gunasekar et al. 2023 (phi-1: 36,000 steps of 1,024 rows of 2,048 tokens, rate 1e-3, linear, warm-up of 750
steps, dropout 0.1 in residual and attention), Li et al. 2023 (phi-1.5: 150B tokens at a constant 2e-4, beta2 0.98,
epsilon 1e-7); Of phi-2 the 1.4T tokens are published; the rest of its recipe here is phi-1.5's. The head has a bias
and is not tied. Hardware: 23 GB of weights, gradients and moments for phi-1 and phi-1.5. Run here: `tiny`. The
parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, share of each head that is rotated
    "tiny": (2, 64, 4, 0.5),
    "phi-1": (24, 2048, 32, 0.5),
    "phi-1.5": (24, 2048, 32, 0.5),
    "phi-2": (32, 2560, 32, 0.4),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `phi-1`, `phi-1.5` or `phi-2`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = "phi-tiny" if size == "tiny" else size
    c.model.layers, c.model.width, c.model.heads, c.model.rotary_fraction = SIZES[size]
    c.model.block = "parallel"
    c.model.shared_norm = True
    c.model.activation = "gelu_tanh"
    c.model.norm = "layer"
    c.model.bias = ("qkv", "out", "mlp", "norm", "head")
    c.model.position = "rotary"
    c.model.tie_embeddings = False
    c.model.max_length = 2048
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=51_200, sequence_length=2048, batch_size=1024 if size == "phi-1" else 2048)
    if size == "phi-1":
        c.model.dropout = c.model.attention_dropout = 0.1
        c.optimizer.learning_rate = 1e-3
        c.schedule.name = "linear"
        c.schedule.final = 0.0
        c.schedule.warmup = "750 steps"
        c.train.duration = "36000 steps"
    else:
        c.optimizer.learning_rate = 2e-4
        c.optimizer.beta2 = 0.98
        c.optimizer.epsilon = 1e-7
        c.schedule.name = "constant"
        c.schedule.warmup = "0 steps"
        c.train.duration = "150B tokens" if size == "phi-1.5" else "1.4T tokens"
    return c
