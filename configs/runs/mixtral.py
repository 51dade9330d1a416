"""Mixtral 8x7B on TPU v5p: 256 chips with copies of its state over 64, or the shape of a published row of MaxText.

    llmjax plan --config configs/runs/mixtral.py --topology v5p:4x8x8
    llmjax plan --config configs/runs/mixtral.py:maxtext --topology v5p:4x4x8

MaxText's documentation (models/tiering) gives 52.56% MFU and 2,909 tokens/s a chip at sequences of 4,096, on "256 chips (8x4x4)",
which are 128 chips of two cores. Its script has 36 rows for each chip, bfloat16 weights and moments of Adam, one copy of the
state over all chips, no accumulation, and keeps each layer's input alone. With `maxtext` a chip has 24 rows, the moments are
float32 as always, and experts are dropless. The compiler's options are those of llama2.py.
"""

from pathlib import Path

from llmjax import config
from llmjax.config import ConfigDict, parse_arg

MODEL = Path(__file__).parents[1] / "models" / "mixtral.py"


def get_config(arg: str = "") -> ConfigDict:
    """`copies` (the default) or `maxtext`."""
    shape = parse_arg(arg, choices=("copies", "maxtext")).choice
    c = config.load(f"{MODEL}:8x7b").unlock()
    c.name = "mixtral-8x7b"
    c.train.sequence_length = 4096
    if shape == "maxtext":
        c.name = "mixtral-8x7b-maxtext"
        c.model.param_dtype = "bfloat16"
        c.model.remat = "full"
        c.objective.loss_chunks = 16
        c.parallel.mesh = "fsdp=-1"
        c.parallel.compiler = ("overlap", "gathers")
        c.train.batch_size = 3072
        c.train.micro_batches = 1
    else:
        c.parallel.mesh = "data=-1 fsdp=64"
        c.train.batch_size = 1024
        c.train.micro_batches = 2
    return c
