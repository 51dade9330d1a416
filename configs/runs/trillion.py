"""A dense model of a trillion parameters: on 2,048 chips of TPU v5p, or as Megatron-LM ran it on 3,072 A100s.

    llmjax plan --config configs/runs/trillion.py --topology v5p:8x16x16
    llmjax plan --config configs/runs/trillion.py:a100 --topology a100:3072

Shape and batch of Narayanan et al. 2021, table 1: 128 layers of width 25,600, 160 heads, sequences of 2,048, batch 3,072,
tensor 8 x pipeline 64 x data 6, 163 TFLOP/s a GPU with everything recomputed. MaxText's documentation has 64.8% MFU for
1024B parameters on 2,048 chips of v5p, of another shape. The 20T tokens are Hoffmann et al. 2022's twenty a parameter.
"""

from llmjax.config import ConfigDict, base, large_run, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`v5p` (the default) or `a100`."""
    where = parse_arg(arg, choices=("v5p", "a100")).choice
    c = base()
    c.name = f"trillion-{where}"
    m = c.model
    m.layers, m.width, m.heads = 128, 25_600, 160
    m.activation = "gelu_tanh"
    m.norm = "layer"
    m.bias = ("qkv", "out", "mlp", "norm")
    m.position = "learned"
    m.max_length = 2048
    large_run(c, vocab_size=51_200, sequence_length=2048, batch_size=3072)
    c.optimizer.learning_rate = 6e-5
    c.train.duration = "20T tokens"
    if where == "v5p":
        c.parallel.mesh = "fsdp=256 tensor=8"
        c.parallel.sequence = True
        c.train.micro_batches = 4
    else:
        c.parallel.mesh = "data=6 pipeline=64 tensor=8"
        c.parallel.sequence = True
        c.parallel.parts = 512
        m.remat = "full"
        c.train.micro_batches = 1
    return c
