"""Direct preference optimisation: a model learns from pairs of answers, held to the model that it starts from.

    llmjax dpo --config configs/post/dpo.py --config.train.init_from=RUN --config.data.sources='["pairs.jsonl"]' --workdir runs/dpo

beta 0.1 and a rate of 1e-6, as the paper; other losses by `--config.objective.preference.loss=NAME` (simpo, ipo, "orpo=1 sft=1",
...). The reference's log-probabilities are computed once and kept in WORKDIR/rows.
"""

from llmjax import config


def get_config(arg: str = "") -> config.ConfigDict:
    """The defaults of dpo."""
    assert not arg, "this config has no variants"
    c = config.base()
    c.name = "dpo"
    c.stages = ("rows", "train", "report")
    c.data.format = "conversations"
    c.train.inherit_model = True
    c.optimizer.name = "adamw"
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0
    c.schedule.name = "cosine"
    c.schedule.warmup = "3%"
    c.schedule.final = 0.1
    c.objective.name = "preference"
    c.optimizer.learning_rate = 1e-6
    c.train.duration = "1 epochs"
    c.train.batch_size, c.train.sequence_length = 64, 1024
    c.train.eval_every = "10%"
    return c.lock()
