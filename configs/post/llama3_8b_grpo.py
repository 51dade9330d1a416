"""Group relative policy optimisation of Llama 3 8B on 8 GPUs of 80 GB: sampling and updates share the devices.

    llmjax plan --config configs/post/llama3_8b_grpo.py --topology h100:8
    llmjax import --from FOLDER --to /mnt/runs/llama3-8b
    python launch/sky.py --name grpo --accelerators H100:8 --nodes 1 --bucket my-runs -- grpo --config configs/post/llama3_8b_grpo.py --config.train.init_from=/mnt/runs/llama3-8b --config.data.sources='["problems.jsonl"]' --workdir /mnt/runs/llama3-8b-grpo

A round has 16 prompts with 8 answers of up to 1,024 tokens each, scored by their last number, and gives two updates. One
process holds all devices. The weights are divided over tensor, because decoding would gather weights that are divided
over fsdp at every token: compare with --config.parallel.mesh=fsdp=8.

Hardware: by the plan, 8 H100. Not run at this size.
"""

from pathlib import Path

from ml_collections import ConfigDict

from llmjax import config

MODEL = Path(__file__).parents[1] / "models" / "llama.py"


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    assert not arg, "this config has no variants"
    c = config.post_run("llama3-8b-grpo", objective="policy")
    c.model = config.load(f"{MODEL}:llama3-8b").model.copy_and_resolve_references()
    c.model.remat = "full"
    c.objective.loss_chunks = 8
    c.train.inherit_model = False
    c.train.init_from = "runs/llama3-8b"
    c.parallel.mesh = "tensor=8"
    c.rollout.rewards = ("last_number",)
    c.rollout.samples, c.rollout.updates = 8, 2
    c.rollout.tokens, c.rollout.slots = 1024, 128
    c.optimizer.learning_rate = 1e-6
    c.schedule.name = "constant"
    c.train.duration = "500 steps"
    c.train.batch_size, c.train.micro_batches, c.train.sequence_length = 64, 8, 2048
    return c
