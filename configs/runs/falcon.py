"""Falcon-40B as it was trained: 384 A100s of 40 GB, tensor 8 x pipeline 4 x data 12 with ZeRO.

    llmjax plan --config configs/runs/falcon.py --topology a100-40gb:384

The model's card and Almazrouei et al. 2023: P4d nodes, 1T tokens in about two months, batch 1,152. The twelve copies
are data 3 x fsdp 4 here, and ZeRO-1 divides the optimizer state over the four: 12 does not divide the width of 8,192.
All 96 parts of a batch are in the pipeline at once, so the residual stream is divided over tensor. The paper does not
say so.
"""

from pathlib import Path

from llmjax import config
from llmjax.config import ConfigDict, parse_arg

MODEL = Path(__file__).parents[1] / "models" / "falcon.py"


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    parse_arg(arg)
    c = config.load(f"{MODEL}:40b").unlock()
    c.name = "falcon-40b"
    c.parallel.mesh = "data=3 pipeline=4 fsdp=4 tensor=8"
    c.parallel.zero = 1
    c.parallel.sequence = True
    c.parallel.parts = 96
    c.model.attention = "cudnn"
    c.model.remat = "full"
    c.train.micro_batches = 1
    c.train.batch_ramp = "0 steps"
    return c
