"""Kahneman-Tversky optimisation: a model learns from answers that are each good or bad, without pairs.

    llmjax kto --config configs/post/kto.py --config.train.init_from=RUN --config.data.sources='["judged.jsonl"]' --workdir runs/kto

Rows are prompt, completion and label (true or false); pairs and rankings are taken apart, the best answer is good. beta and rate as
DPO's. Where good and bad rows differ much in number, `objective.unpaired.good_weight` or `bad_weight` evens them out.

Hardware: what the model needs; a model of a few million parameters trains on a laptop. No figure of a large model yet.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The defaults of kto."""
    assert not arg, "this config has no variants"
    c = config.post_run("kto", objective="unpaired")
    c.optimizer.learning_rate = 1e-6
    c.train.duration = "1 epochs"
    c.train.batch_size, c.train.sequence_length = 64, 1024
    return c
