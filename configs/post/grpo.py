"""Group relative policy optimisation: a model improves by the rewards of its own answers.

    llmjax grpo --config configs/post/grpo.py --config.train.init_from=RUN --config.data.sources='["prompts.jsonl"]' --workdir runs/grpo

Rows are prompts with the columns that the rewards read: `--config.rollout.rewards='["exact_match"]'` compares with the column
answer. Advantages are the reward less the mean of 8 answers to the same prompt; every token counts the same (Dr. GRPO).
"""

from llmjax import config


def get_config(arg: str = "") -> config.ConfigDict:
    """The defaults of grpo."""
    assert not arg, "this config has no variants"
    c = config.base()
    c.name = "grpo"
    c.stages = ("rows", "train", "report")
    c.data.format = "conversations"
    c.train.inherit_model = True
    c.optimizer.name = "adamw"
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0
    c.schedule.name = "cosine"
    c.schedule.warmup = "3%"
    c.schedule.final = 0.1
    c.objective.name = "policy"
    c.rollout.samples = 8
    c.optimizer.learning_rate = 1e-6
    c.schedule.name = "constant"
    c.train.duration = "200 steps"
    c.train.batch_size, c.train.sequence_length = 64, 512
    c.train.eval_every = "10%"
    return c.lock()
