"""A reward model from pairs or rankings: one number for an answer.

    llmjax reward --config configs/post/reward.py --config.train.init_from=RUN --config.data.sources='["pairs.jsonl"]' --workdir runs/reward

Rows are preferences (chosen, rejected) or rankings (completions with ranks). One epoch, scores kept near 0; held-out
accuracy is the share of pairs that are ordered as people ordered them.
"""

from llmjax import config


def get_config(arg: str = "") -> config.ConfigDict:
    """The defaults of reward."""
    assert not arg, "this config has no variants"
    c = config.base()
    c.name = "reward"
    c.stages = ("rows", "train", "report")
    c.data.format = "conversations"
    c.train.inherit_model = True
    c.optimizer.name = "adamw"
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0
    c.schedule.name = "cosine"
    c.schedule.warmup = "3%"
    c.schedule.final = 0.1
    c.objective.name = "reward"
    c.objective.reward.centre = 0.01
    c.model.value_head = True
    c.optimizer.learning_rate = 1e-4
    c.train.duration = "1 epochs"
    c.train.batch_size, c.train.sequence_length = 32, 1024
    c.train.eval_every = "10%"
    return c.lock()
