"""GPT-2: learned positions, LayerNorm before each branch, biases everywhere, tanh GELU, tied head.

    llmjax run --config configs/models/gpt2.py:tiny
    llmjax run --config configs/models/gpt2.py:small --config.data.sources='["corpus/"]'
    llmjax run --config configs/models/gpt2.py:xl --config.parallel.mesh='fsdp=-1'

Paper: Radford et al. 2019, which publishes the shapes. The recipe is that of GPT-3's table for the same sizes (Brown
et al. 2020) and of nanoGPT's reproduction: 0.5M tokens a step, AdamW with beta2 0.95, decay 0.1, clipping at 1.
Hardware: `tiny` trains on a laptop in seconds; `small` wants a GPU and `xl` 8. Run here: `tiny`. The parameters of the
other sizes are counted. The tokenizer is a BPE of the published size, trained on your text. That takes tens of MB of
prose; with less, an error says which size fits.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, peak learning rate of the GPT-3 model nearest in size
    "tiny": (2, 64, 4, 3e-3),
    "small": (12, 768, 12, 6e-4),
    "medium": (24, 1024, 16, 3e-4),
    "large": (36, 1280, 20, 2.5e-4),
    "xl": (48, 1600, 25, 2e-4),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `small`, `medium`, `large` or `xl`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"gpt2-{size}"
    c.model.layers, c.model.width, c.model.heads, rate = SIZES[size]
    c.model.activation = "gelu_tanh"
    c.model.norm = "layer"
    c.model.bias = ("qkv", "out", "mlp", "norm")
    c.model.position = "learned"
    c.model.max_length = 1024
    if size == "tiny":
        return tiny_run(c)

    large_run(c, vocab_size=50_257, sequence_length=1024, batch_size=512)
    c.parallel.mesh = "data=-1" if size in ("small", "medium") else "fsdp=-1"
    c.optimizer.learning_rate = rate
    c.schedule.warmup = "375M tokens"
    c.train.duration = "300B tokens"
    return c
