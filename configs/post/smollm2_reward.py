"""A reward model on a real chat model: LoRA and a new head on SmolLM2-135M learn which answers people prefer.

    llmjax reward --config configs/post/smollm2_reward.py --config.train.init_from=runs/smollm2 --config.data.sources='["pairs.jsonl"]' --workdir runs/smollm2-reward

It starts from the imported chat model (smollm2_sft.py says how to get it). A pair takes about 300 tokens, so the run reads some
1,300 pairs. Accuracy of held-out pairs, by margin and with its calibration, is measured before (a new head gives 0 to all
answers) and after. `python benchmarks/smollm2_post.py` runs it on Anthropic's harmless pairs. No measured quality yet.

Hardware: a laptop with 8 GB; at 100 GFLOP/s the 100 steps of 4,096 tokens take 35 minutes.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    assert not arg, "this config has no variants"
    c = config.post_run("smollm2-reward", objective="reward")
    c.model.adapter.kind = "lora"
    c.model.value_head = True
    c.objective.reward.centre = 0.01
    c.optimizer.learning_rate = 1e-4
    c.data.holdout_percent = 10.0
    c.train.duration = "100 steps"
    c.train.batch_size, c.train.micro_batches, c.train.sequence_length = 8, 4, 512
    c.train.eval_first, c.train.eval_every, c.train.eval_batches = True, "100%", 12
    return c
