"""Direct preference optimisation: a model learns from pairs of answers, held to the model that it starts from.

    llmjax dpo --config configs/post/dpo.py --config.train.init_from=RUN --config.data.sources='["pairs.jsonl"]' --workdir runs/dpo

beta 0.1 and a rate of 1e-6, as the paper; other losses by `--config.objective.preference.loss=NAME` (simpo, ipo, "orpo=1 sft=1",
...). The reference's log-probabilities are computed once and kept in WORKDIR/rows.

Hardware: what the model needs; a model of a few million parameters trains on a laptop. No figure of a large model yet.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The defaults of dpo."""
    assert not arg, "this config has no variants"
    c = config.post_run("dpo", objective="preference")
    c.optimizer.learning_rate = 1e-6
    c.train.duration = "1 epochs"
    c.train.batch_size, c.train.sequence_length = 64, 1024
    return c
