"""Supervised fine-tuning of Llama 3 8B, all parameters, on 8 GPUs of 80 GB.

    llmjax plan --config configs/post/llama3_8b_sft.py --topology h100:8
    llmjax import --from FOLDER --to /shared/runs/llama3-8b
    python launch/slurm.py --nodes 1 --gpus 8 --time 24:00:00 -- sft --config configs/post/llama3_8b_sft.py --config.train.init_from=/shared/runs/llama3-8b --config.data.sources='["chats.jsonl"]' --workdir /shared/runs/llama3-8b-sft

Parameters, gradients and optimizer state are float32 and divided over all devices, and products are in bfloat16. Each
device has one row of 4,096 tokens at a time, keeps the input of each layer and computes the rest again.

Hardware: by the plan, 8 H100; for more, raise train.batch_size with them. Not run at this size.
"""

from pathlib import Path

from ml_collections import ConfigDict

from llmjax import config

MODEL = Path(__file__).parents[1] / "models" / "llama.py"


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    assert not arg, "this config has no variants"
    c = config.post_run("llama3-8b-sft")
    c.model = config.load(f"{MODEL}:llama3-8b").model.copy_and_resolve_references()
    c.model.remat = "full"
    c.objective.loss_chunks = 8
    c.train.inherit_model = False
    c.train.init_from = "runs/llama3-8b"
    c.parallel.mesh = "fsdp=-1"
    c.optimizer.learning_rate = 1e-5
    c.train.duration = "1000 steps"
    c.train.batch_size, c.train.micro_batches, c.train.sequence_length = 64, 8, 4096
    return c
