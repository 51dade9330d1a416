"""LoRA on Llama 2 70B: 207 million trained numbers beside a frozen model in bfloat16, on 8 GPUs of 80 GB.

    llmjax plan --config configs/post/llama2_70b_lora.py --topology h100:8
    llmjax plan --config configs/post/llama2_70b_lora.py:nf4 --topology h100:1
    llmjax import --from FOLDER --to /shared/runs/llama2-70b
    python launch/slurm.py --nodes 1 --gpus 8 --time 24:00:00 -- sft --config configs/post/llama2_70b_lora.py --config.train.init_from=/shared/runs/llama2-70b --config.data.sources='["chats.jsonl"]' --workdir /shared/runs/llama2-70b-lora

Rank 16 in all linear maps of the layers. The frozen model has no gradient and no optimizer state, and is divided over all
devices. `:nf4` keeps its kernels in 4.5 bits, and one GPU of 80 GB trains it on rows of 2,048 tokens (Dettmers et al.
2023, QLoRA).

Hardware: by the plan, 8 H100, or one with `:nf4`. Not run at this size.
"""

from pathlib import Path

from ml_collections import ConfigDict

from llmjax import config

MODEL = Path(__file__).parents[1] / "models" / "llama.py"


def get_config(arg: str = "") -> ConfigDict:
    """The variants: none, for 8 GPUs, and "nf4", for one."""
    assert arg in ("", "nf4"), f"{arg!r} is no variant: give none, or nf4"
    c = config.post_run("llama2-70b-lora")
    c.model = config.load(f"{MODEL}:llama2-70b").model.copy_and_resolve_references()
    c.model.param_dtype = "bfloat16"
    c.model.remat = "full"
    c.model.adapter.kind = "lora"
    c.objective.loss_chunks = 8
    c.train.inherit_model = False
    c.train.init_from = "runs/llama2-70b"
    c.parallel.mesh = "fsdp=-1"
    c.optimizer.learning_rate = 2e-4
    c.train.duration = "500 steps"
    c.train.batch_size, c.train.micro_batches, c.train.sequence_length = 32, 4, 4096
    if arg == "nf4":
        c.model.adapter.base_format = "nf4"
        c.train.micro_batches, c.train.sequence_length = 32, 2048
    return c
