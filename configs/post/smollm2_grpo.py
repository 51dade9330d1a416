"""Rewards that a program checks, on a real chat model: LoRA on SmolLM2-135M improves by its own answers (GRPO).

    llmjax grpo --config configs/post/smollm2_grpo.py --config.train.init_from=runs/smollm2 --config.data.sources='["prompts.jsonl"]' --workdir runs/smollm2-grpo

It starts from the imported chat model (smollm2_sft.py says how to get it). A prompt has IFEval's columns, and its reward is the share of
its constraints that the answer follows; or it has an `answer`, and the reward is 1 if the last number is that one. The prompt
has at most 128 tokens, and so has the answer. The rewards of greedy answers to held-out prompts are measured before and after.
`python benchmarks/smollm2_post.py` makes the prompts, holds three kinds of constraints out of them, and runs it. The rate is
a guess: no measured quality yet.

Hardware: a laptop with 8 GB; at 100 GFLOP/s the 30 steps take 50 minutes: in each 32 answers are written, read once and learnt.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    assert not arg, "this config has no variants"
    c = config.post_run("smollm2-grpo", objective="policy")
    c.model.adapter.kind = "lora"
    c.rollout.rewards = ("llmjax.post.instructions:ifeval", "last_number")
    c.rollout.samples, c.rollout.tokens, c.rollout.slots = 8, 128, 32
    c.optimizer.learning_rate = 5e-5
    c.schedule.name = "constant"
    c.data.holdout_percent = 10.0
    c.train.duration = "30 steps"
    c.train.batch_size, c.train.micro_batches, c.train.sequence_length = 32, 8, 256
    c.train.eval_first, c.train.eval_every, c.train.eval_batches = True, "100%", 2
    return c
