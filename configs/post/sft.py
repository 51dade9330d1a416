"""Supervised fine-tuning: a model learns to answer as conversations do.

    llmjax sft --config configs/post/sft.py --config.train.init_from=RUN --config.data.sources='["chats.jsonl"]' --workdir runs/sft

Every turn of the assistant is learnt, from the end of its prompt to its stop token. Full fine-tuning at 2e-5, three epochs, as
Alpaca; batches of 32 rows of 1,024 tokens, packed. For a small base model give a higher rate.

Hardware: what the model needs; a model of a few million parameters trains on a laptop. No figure of a large model yet.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The defaults of sft."""
    assert not arg, "this config has no variants"
    c = config.post_run("sft")
    c.optimizer.learning_rate = 2e-5
    c.train.duration = "3 epochs"
    c.train.batch_size, c.train.sequence_length = 32, 1024
    return c
