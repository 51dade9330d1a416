"""Supervised fine-tuning: a model learns to answer as conversations do.

    llmjax sft --config configs/post/sft.py --config.train.init_from=RUN --config.data.sources='["chats.jsonl"]' --workdir runs/sft

Every turn of the assistant is learnt, from the end of its prompt to its stop token. Full fine-tuning at 2e-5, three epochs, as
Alpaca; batches of 32 rows of 1,024 tokens, packed. For a small base model give a higher rate.
"""

from llmjax import config


def get_config(arg: str = "") -> config.ConfigDict:
    """The defaults of sft."""
    assert not arg, "this config has no variants"
    c = config.base()
    c.name = "sft"
    c.stages = ("rows", "train", "report")
    c.data.format = "conversations"
    c.train.inherit_model = True
    c.optimizer.name = "adamw"
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0
    c.schedule.name = "cosine"
    c.schedule.warmup = "3%"
    c.schedule.final = 0.1
    c.optimizer.learning_rate = 2e-5
    c.train.duration = "3 epochs"
    c.train.batch_size, c.train.sequence_length = 32, 1024
    c.train.eval_every = "10%"
    return c.lock()
