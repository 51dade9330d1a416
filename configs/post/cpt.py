"""Continued pretraining: a model goes on learning text, of a domain or of greater length.

    llmjax cpt --config configs/post/cpt.py --config.train.init_from=RUN --config.data.sources='["domain=notes/","general=stdlib"]' --config.data.replay='["general"]' --workdir runs/cpt

The rate warms up again to its peak and decays again (Ibrahim et al. 2024); a tenth of the rows is general text, so that the model
keeps what it knows. The held-out text of both is measured before the first step and after the last one. The variant `long` trains
at 8,192 tokens with YaRN a model that was trained at 2,048 (Peng et al. 2023): `--config configs/post/cpt.py:long`.

Hardware: what the model needs; a model of a few million parameters trains on a laptop. No figure of a large model yet.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The defaults of cpt; `long`: those of context extension."""
    assert arg in ("", "long"), "the variants are '' and 'long'"
    c = config.base()
    c.name = "cpt"
    c.stages = ("prepare", "tokenizer", "train", "eval", "report")
    c.train.inherit_model = True
    c.train.eval_first = True
    c.train.eval_every = "10%"
    c.train.duration = "1 epochs"
    c.train.batch_size, c.train.sequence_length = 32, 1024
    c.optimizer.learning_rate = 3e-4  # about the peak of the first training
    c.schedule.warmup = "1%"
    c.schedule.final = 0.1
    if arg == "long":
        c.model.rotary_scaling, c.model.rotary_factor, c.model.rotary_original_length = "yarn", 4.0, 2048
        c.model.max_length = c.train.sequence_length = 8192
        c.train.batch_size, c.train.duration = 8, "400 steps"
        c.optimizer.learning_rate, c.schedule.name, c.schedule.warmup = 2e-5, "constant", "20 steps"
    return c
