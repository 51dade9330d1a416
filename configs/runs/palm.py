"""PaLM 540B as it was trained: two slices of 3,072 TPU v4 chips, each tensor 12 x fsdp 256, data between them.

    llmjax plan --config configs/runs/palm.py --topology v4:12x16x16 --slices 2

Chowdhery et al. 2022, section 4: 46.2% MFU, 57.8% of the peak with what is recomputed, at a batch of 2,048. The
vocabulary of 256,000 is padded to 256,512 rows, which 12 divides. The residual stream stays whole: 12 does not divide
the 2,048 positions, and parallel.sequence=True was planned to need twice the memory and twice the time.
"""

from pathlib import Path

from llmjax import config
from llmjax.config import ConfigDict, parse_arg

MODEL = Path(__file__).parents[1] / "models" / "palm.py"


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    parse_arg(arg)
    c = config.load(f"{MODEL}:540b").unlock()
    c.name = "palm-540b"
    c.model.vocab_size = 256_512
    c.model.remat = "full"
    c.parallel.mesh = "data=2 fsdp=256 tensor=12"
    c.train.micro_batches = 4
    return c
