"""PaLM 540B as it was trained: two slices of 3,072 TPU v4 chips, each tensor 12 x fsdp 256, data between them.

    llmjax plan --config configs/runs/palm.py --topology v4:12x16x16 --slices 2
    llmjax plan --config configs/runs/palm.py:features --topology v4:12x16x16 --slices 2

Chowdhery et al. 2022, section 4: 46.2% MFU, 57.8% of the peak with what is recomputed, at a batch of 2,048. The
vocabulary of 256,000 is padded to 256,512 rows, which 12 divides. The residual stream stays whole: 12 does not divide
the 2,048 positions, and parallel.sequence=True was planned to need twice the memory and twice the time.

With `features` a layer keeps its input divided over tensor by features, and its queries, keys and values. The batch then needs no
accumulation, and every parameter is gathered once for each pass.
"""

from pathlib import Path

from llmjax import config
from llmjax.config import ConfigDict, parse_arg

MODEL = Path(__file__).parents[1] / "models" / "palm.py"


def get_config(arg: str = "") -> ConfigDict:
    """`whole` (the default) or `features`: how a layer keeps its input."""
    kept = parse_arg(arg, choices=("whole", "features")).choice
    c = config.load(f"{MODEL}:540b").unlock()
    c.name = "palm-540b"
    c.model.vocab_size = 256_512
    c.model.remat = "full"
    c.parallel.mesh = "data=2 fsdp=256 tensor=12"
    c.train.micro_batches = 4
    if kept == "features":
        c.name = "palm-540b-features"
        c.model.remat = "save_qkv_proj"
        c.parallel.features = True
        c.parallel.compiler = ("overlap", "gathers")
        c.train.micro_batches = 1
    return c
