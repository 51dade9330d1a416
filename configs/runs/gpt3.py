"""GPT-3 175B: on 1,024 chips of TPU v4, or as Megatron-LM planned it on 1,024 A100s (tensor 8 x pipeline 8 x data 16).

    llmjax plan --config configs/runs/gpt3.py --topology v4:8x8x16
    llmjax plan --config configs/runs/gpt3.py:a100 --topology a100:1024

Brown et al. 2020 publish the model and its batch of 3.2M tokens, not how it was spread (on V100s). Narayanan et al. 2021
give 140 TFLOP/s a GPU and 34 days for 300B tokens on 1,024 A100s, batch 1,536, everything recomputed. The vocabulary is
padded from 50,257 to 50,304 rows, which tensor divides. results/plans/ has what the plans say.
"""

from pathlib import Path

from llmjax import config
from llmjax.config import ConfigDict, parse_arg

MODEL = Path(__file__).parents[1] / "models" / "gpt3.py"


def get_config(arg: str = "") -> ConfigDict:
    """`v4` (the default) or `a100`."""
    where = parse_arg(arg, choices=("v4", "a100")).choice
    c = config.load(f"{MODEL}:175b").unlock()
    c.name = f"gpt3-175b-{where}"
    c.model.vocab_size = 50_304
    if where == "v4":
        c.parallel.mesh = "fsdp=64 tensor=16"
        c.parallel.sequence = True
        c.model.remat = "full"
        c.train.micro_batches = 5
        c.train.batch_start = 64
    else:
        c.parallel.mesh = "data=16 pipeline=8 tensor=8"
        c.parallel.sequence = True
        c.parallel.parts = 96
        c.model.attention = "cudnn"
        c.model.remat = "full"
        c.train.batch_size = 1536
        c.train.micro_batches = 1
        c.train.batch_ramp = "0 steps"
    return c
