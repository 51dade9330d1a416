"""A reward model from pairs or rankings: one number for an answer.

    llmjax reward --config configs/post/reward.py --config.train.init_from=RUN --config.data.sources='["pairs.jsonl"]' --workdir runs/reward

Rows are preferences (chosen, rejected) or rankings (completions with ranks). One epoch, scores kept near 0; held-out
accuracy is the share of pairs that are ordered as people ordered them.

Hardware: what the model needs; a model of a few million parameters trains on a laptop. No figure of a large model yet.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The defaults of reward."""
    assert not arg, "this config has no variants"
    c = config.post_run("reward", objective="reward")
    c.objective.reward.centre = 0.01
    c.model.value_head = True
    c.optimizer.learning_rate = 1e-4
    c.train.duration = "1 epochs"
    c.train.batch_size, c.train.sequence_length = 32, 1024
    return c
