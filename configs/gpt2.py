"""GPT-2 at its four published sizes: small (124M), medium (350M), large (774M), xl (1.5B).

    llmjax run --config configs/gpt2.py:small --config.data.sources='["corpus/"]'
    llmjax train --config configs/gpt2.py:xl --config.parallel.mesh='fsdp=-1'

The shapes are Radford et al. 2019's: learned positions, LayerNorm before each branch, biases, tanh GELU, tied head. The
recipe is that of nanoGPT's reproduction and of GPT-3's table 2.1 (Brown et al. 2020): 0.5M tokens a step, AdamW with
beta2 0.95, weight decay 0.1, clipping at 1, cosine to a tenth. For accelerators: bfloat16 compute with float32
parameters. Not trained here; the parameter counts are tested against the published ones. The tokenizer is a BPE of the
published size trained on your text, which must be large enough for it (tens of MB of prose): the error says what fits.
"""

from ml_collections import ConfigDict

from llmjax.config import base, parse_arg

# layers, width, heads, peak learning rate of the GPT-3 model of that size
SIZES = {
    "small": (12, 768, 12, 6e-4),
    "medium": (24, 1024, 16, 3e-4),
    "large": (36, 1280, 20, 2.5e-4),
    "xl": (48, 1600, 25, 2e-4),
}


def get_config(arg: str = "") -> ConfigDict:
    """`small` (the default), `medium`, `large` or `xl`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    layers, width, heads, learning_rate = SIZES[size]
    c = base()
    c.name = f"gpt2-{size}"
    c.tokenizer.vocab_size = 50_257
    c.tokenizer.train_bytes = 100_000_000

    c.model.layers = layers
    c.model.width = width
    c.model.heads = heads
    c.model.activation = "gelu_tanh"
    c.model.norm = "layer"
    c.model.position = "learned"
    c.model.max_length = 1024
    c.model.bias = True
    c.model.vocab_multiple = 128
    c.model.dtype = "bfloat16"
    c.model.remat = "none" if size == "small" else "selective"

    c.parallel.mesh = "data=-1" if size in ("small", "medium") else "fsdp=-1"
    c.optimizer.learning_rate = learning_rate
    c.schedule.warmup = "375M tokens"
    c.train.sequence_length = 1024
    c.train.batch_size = 512
    c.train.micro_batches = 16
    c.train.duration = "300B tokens"
    c.train.eval_every = "1000 steps"
    c.checkpoint.every = "1000 steps"
    c.checkpoint.keep_every = "50000 steps"
    return c
