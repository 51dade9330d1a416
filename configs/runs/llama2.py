"""Llama 2 70B on TPU v5p: 512 chips with copies of its state over 64, or the shape of a published row of MaxText.

    llmjax plan --config configs/runs/llama2.py --topology v5p:8x8x8
    llmjax plan --config configs/runs/llama2.py:maxtext --topology v5p:4x8x8

MaxText's documentation (models/tiering) gives 65.4% MFU and 692 tokens/s a chip at sequences of 4,096 on 512 of them, which are
most likely cores: its config `llama2_70b_v5p_128` has four rows for each chip, one copy of the state over all chips and no
accumulation, and 256 chips then have Llama 2's own batch of 4M tokens. It keeps the products that MaxText's policy
`save_dot_except_mlpwi` names. The compiler's options hide the gathers behind products, and keep it from making all-reduces of
whole matrices instead, because a chip has only 32 of a matrix's 8,192 rows. Both leave every number as it is. Barriers keep
activations and norms out of the products, which computed them again for every block.

Without options copies over 64 chips are the better choice: 8 such groups add up their gradients.
"""

from pathlib import Path

from llmjax import config
from llmjax.config import ConfigDict, parse_arg

MODEL = Path(__file__).parents[1] / "models" / "llama.py"


def get_config(arg: str = "") -> ConfigDict:
    """`copies` (the default) or `maxtext`."""
    shape = parse_arg(arg, choices=("copies", "maxtext")).choice
    c = config.load(f"{MODEL}:llama2-70b").unlock()
    c.name = "llama2-70b"
    c.train.sequence_length = 4096
    c.train.batch_size = 1024
    if shape == "maxtext":
        c.name = "llama2-70b-maxtext"
        c.model.remat = "save_dot_except_mlpwi"
        c.model.barriers = True
        c.parallel.mesh = "fsdp=-1"
        c.parallel.compiler = ("overlap", "gathers")
        c.train.micro_batches = 1
    else:
        c.parallel.mesh = "data=-1 fsdp=64"
        c.train.micro_batches = 2
    return c
