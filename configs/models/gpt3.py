"""GPT-3: GPT-2's blocks with every other layer attending to a band of recent tokens only.

    llmjax run --config configs/models/gpt3.py:tiny
    llmjax run --config configs/models/gpt3.py:175b --config.data.sources='["corpus/"]'

Paper: Brown et al. 2020, table 2.1 and appendix B: shapes, batches, learning rates, warm-up over 375M tokens, cosine
to a tenth over 260B of 300B tokens (here over all), decay 0.1, clipping at 1. It says "alternating dense and locally
banded sparse attention patterns"; the width of the band is not published; 256 is ours. Table 2.1 gives `xl` 24 heads
of 128 and `13b` a width of 5140, which contradict its own parameter counts. 16 heads and 5120 give 1,320M and 12,850M.
Batches grow from 32k tokens over the first 4 to 12B. The paper does not say how many for which size: 4B here, 12B for
`175b`. Raise train.batch_start to what the mesh divides. Hardware: training keeps 16 bytes a parameter, 2.8 TB for
`175b`, spread over fsdp. Run here: `tiny`. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, tokens a step, peak learning rate
    "tiny": (4, 64, 4, 1024, 3e-3),
    "small": (12, 768, 12, 2**19, 6e-4),
    "medium": (24, 1024, 16, 2**19, 3e-4),
    "large": (24, 1536, 16, 2**19, 2.5e-4),
    "xl": (24, 2048, 16, 2**20, 2e-4),
    "2.7b": (32, 2560, 32, 2**20, 1.6e-4),
    "6.7b": (32, 4096, 32, 2**21, 1.2e-4),
    "13b": (40, 5120, 40, 2**21, 1e-4),
    "175b": (96, 12288, 96, 1600 * 2048, 0.6e-4),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `small`, `medium`, `large`, `xl`, `2.7b`, `6.7b`, `13b` or `175b`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"gpt3-{size}"
    c.model.layers, c.model.width, c.model.heads, tokens, rate = SIZES[size]
    c.model.pattern = ("global", "local")
    c.model.window = 16 if size == "tiny" else 256
    c.model.activation = "gelu_tanh"
    c.model.norm = "layer"
    c.model.bias = ("qkv", "out", "mlp", "norm")
    c.model.position = "learned"
    c.model.max_length = 2048
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=50_257, sequence_length=2048, batch_size=tokens // 2048)
    c.optimizer.learning_rate = rate
    c.schedule.warmup = "375M tokens"
    c.schedule.by = "tokens"
    c.train.batch_ramp = "12B tokens" if size == "175b" else "4B tokens"
    c.train.batch_start = 16
    c.train.duration = "300B tokens"
    return c
