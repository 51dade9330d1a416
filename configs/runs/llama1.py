"""LLaMA 65B as it was trained: 2,048 A100s of 80 GB, everything divided over all of them.

    llmjax plan --config configs/runs/llama1.py --topology a100:2048
    llmjax plan --config configs/runs/llama1.py --topology v5p:8x16x16

Touvron et al. 2023: 380 tokens/s a GPU, 21 days for 1.4T tokens, batches of 4M tokens, the outputs of linear layers kept.
"""

from pathlib import Path

from llmjax import config
from llmjax.config import ConfigDict, parse_arg

MODEL = Path(__file__).parents[1] / "models" / "llama.py"


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    parse_arg(arg)
    c = config.load(f"{MODEL}:llama1-65b").unlock()
    c.name = "llama1-65b"
    c.model.attention = "cudnn"  # elsewhere the fastest
    c.parallel.mesh = "data=-1 fsdp=128"  # with all 2,048 to a copy a piece of a matrix has 4 rows: see llama2.py
    c.train.batch_size = 2048
    c.train.micro_batches = 1
    return c
