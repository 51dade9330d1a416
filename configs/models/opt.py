"""OPT: GPT-3's shapes with ReLU, learned positions from the third row; 350m: post-norm and narrow embeddings.

    llmjax run --config configs/models/opt.py:tiny
    llmjax run --config configs/models/opt.py:tiny-350m
    llmjax run --config configs/models/opt.py:125m --config.data.sources='["corpus/"]'

Paper: Zhang et al. 2022: learning rates, batches, dropout 0.1 but not on embeddings, decay 0.1, N(0, 0.006) scaled by
1/sqrt(2N) where branches end, 300B tokens (180B of them different) with a linear decay to a tenth. Warm-up is over
2,000 steps in `175b` and 375M tokens in the smaller. `350m` is the odd one: norms after each sum and none at the end,
embeddings of 512 projected to 1,024. Hardware: `175b` took 992 GPUs of 80 GB for two months. Run here: `tiny` and
`tiny-350m`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, tokens a step, peak learning rate
    "tiny": (2, 64, 4, 0, 3e-3),
    "tiny-350m": (2, 64, 4, 0, 3e-3),
    "125m": (12, 768, 12, 2**19, 6e-4),
    "350m": (24, 1024, 16, 2**19, 3e-4),
    "1.3b": (24, 2048, 32, 2**20, 2e-4),
    "2.7b": (32, 2560, 32, 2**20, 1.6e-4),
    "6.7b": (32, 4096, 32, 2**21, 1.2e-4),
    "13b": (40, 5120, 40, 2**22, 1e-4),
    "30b": (48, 7168, 56, 2**22, 1e-4),
    "66b": (64, 9216, 72, 2**21, 0.8e-4),
    "175b": (96, 12288, 96, 2**21, 1.2e-4),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `tiny-350m`, or a published size such as `125m`: see SIZES."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"opt-{size}"
    m = c.model
    m.layers, m.width, m.heads, tokens, rate = SIZES[size]
    m.activation = "relu"
    m.norm = "layer"
    m.bias = ("qkv", "out", "mlp", "norm")
    m.position = "learned"
    m.max_length = 2048
    m.position_offset = 2
    if size.endswith("350m"):
        m.norm_place = "post"
        m.final_norm = False
        m.embedding_width = m.width // 2
    if size.startswith("tiny"):
        return tiny_run(c)

    large_run(c, vocab_size=50_272, sequence_length=2048, batch_size=tokens // 2048)
    m.dropout = 0.1
    m.init_std = 0.006
    c.optimizer.learning_rate = rate
    c.schedule.name = "linear"
    c.schedule.warmup = "2000 steps" if size == "175b" else "375M tokens"
    c.train.duration = "300B tokens"
    return c
