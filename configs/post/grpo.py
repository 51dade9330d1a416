"""Group relative policy optimisation: a model improves by the rewards of its own answers.

    llmjax grpo --config configs/post/grpo.py --config.train.init_from=RUN --config.data.sources='["prompts.jsonl"]' --workdir runs/grpo

Rows are prompts with the columns that the rewards read: `--config.rollout.rewards='["exact_match"]'` compares with the column
answer. Advantages are the reward less the mean of 8 answers to the same prompt; every token counts the same (Dr. GRPO).

Hardware: what the model needs; a model of a few million parameters trains on a laptop. No figure of a large model yet.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The defaults of grpo."""
    assert not arg, "this config has no variants"
    c = config.post_run("grpo", objective="policy")
    c.rollout.samples = 8
    c.optimizer.learning_rate = 1e-6
    c.schedule.name = "constant"
    c.train.duration = "200 steps"
    c.train.batch_size, c.train.sequence_length = 64, 512
    return c
