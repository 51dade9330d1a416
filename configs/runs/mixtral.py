"""Mixtral 8x7B on 256 chips of TPU v5p: the shape of a published row of MaxText.

    llmjax plan --config configs/runs/mixtral.py --topology v5p:4x8x8

MaxText's documentation (models/tiering) gives 52.56% MFU and 2,909 tokens/s a chip at sequences of 4,096, but neither
batch nor sharding. Here a batch has 1,024 rows, experts are dropless, and 64 chips hold a copy of the state, for the
reason in llama2.py.
"""

from pathlib import Path

from llmjax import config
from llmjax.config import ConfigDict, parse_arg

MODEL = Path(__file__).parents[1] / "models" / "mixtral.py"


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    parse_arg(arg)
    c = config.load(f"{MODEL}:8x7b").unlock()
    c.name = "mixtral-8x7b"
    c.parallel.mesh = "data=-1 fsdp=64"
    c.train.sequence_length = 4096
    c.train.batch_size = 1024
    c.train.micro_batches = 2
    return c
