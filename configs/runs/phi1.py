"""phi-1 1.3B: on eight A100s, as it was trained, or sixteen chips of TPU v5e.

    llmjax plan --config configs/runs/phi1.py --topology a100:8
    llmjax plan --config configs/runs/phi1.py --topology v5e:4x4

Gunasekar et al. 2023: under four days on eight A100s, 36,000 steps of 1,024 rows of 2,048 tokens, flash attention.
Dropout stays in the residual stream only: our fast attention kernels have none on the weights.
"""

from pathlib import Path

from llmjax import config
from llmjax.config import ConfigDict, parse_arg

MODEL = Path(__file__).parents[1] / "models" / "phi.py"


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    parse_arg(arg)
    c = config.load(f"{MODEL}:phi-1").unlock()
    c.name = "phi-1"
    c.model.attention_dropout = 0.0
    c.model.attention = "cudnn"  # elsewhere the fastest
    c.parallel.mesh = "fsdp=-1"
    c.train.micro_batches = 16
    return c
