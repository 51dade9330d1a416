"""Llama 2 70B on 512 chips of TPU v5p: the shape of a published row of MaxText.

    llmjax plan --config configs/runs/llama2.py --topology v5p:8x8x8

MaxText's documentation (models/tiering) gives 65.4% MFU and 692 tokens/s a chip at sequences of 4,096. It gives
neither batch nor sharding: the batch here is Llama 2's own, 4M tokens. 64 chips hold a copy of the model's state, and
8 such groups add up their gradients. With one copy over all 512 chips a chip has 16 of a matrix's 8,192 rows, and the
compiler then makes all-reduces of whole matrices instead of gathers (50% MFU by its own cycles, not 59%).
"""

from pathlib import Path

from llmjax import config
from llmjax.config import ConfigDict, parse_arg

MODEL = Path(__file__).parents[1] / "models" / "llama.py"


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    parse_arg(arg)
    c = config.load(f"{MODEL}:llama2-70b").unlock()
    c.name = "llama2-70b"
    c.parallel.mesh = "data=-1 fsdp=64"
    c.train.sequence_length = 4096
    c.train.batch_size = 1024
    c.train.micro_batches = 2
    return c
