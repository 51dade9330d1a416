"""Task fine-tuning: a model learns the class of a text, or of two, or a number of it.

    llmjax task --config configs/post/classify.py --config.train.init_from=RUN --config.data.sources='["rows.jsonl"]' --workdir runs/topics

Rows are text (and text_b) with label, the name of a class; `--config.objective.classify.target=number`: a number. A new head
reads an encoder's first token or a decoder's last one, and the whole model is trained at 2e-5, three epochs, as BERT's.

Hardware: what the model needs; a model of a few million parameters trains on a laptop. No figure of a large model yet.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The defaults of task fine-tuning."""
    assert not arg, "this config has no variants"
    c = config.post_run("classify", objective="classify")
    c.optimizer.learning_rate = 2e-5
    c.schedule.name = "linear"
    c.schedule.warmup = "10%"
    c.train.duration = "3 epochs"
    c.train.batch_size, c.train.sequence_length = 32, 512
    c.data.holdout_percent = 10.0
    return c
