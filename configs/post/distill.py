"""Distillation: a model learns what its teacher would write next, from the teacher's distributions.

    llmjax distill --config configs/post/distill.py --config.train.init_from=RUN --config.objective.distill.teacher=TEACHER --config.data.sources='["chats.jsonl"]' --workdir runs/student

Rows as for sft. The teacher is a run or an import with the same tokenizer; its 64 likeliest ids a token are told apart. Forward
KL, or `objective.distill.divergence` reverse or js; `objective.distill.on_policy=1` learns from the student's own answers.

Hardware: what both models need; models of a few million parameters train on a laptop. No figure of a large model yet.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The defaults of distillation."""
    assert not arg, "this config has no variants"
    c = config.post_run("distill", objective="distill")
    c.optimizer.learning_rate = 2e-5
    c.train.duration = "3 epochs"
    c.train.batch_size, c.train.sequence_length = 32, 1024
    return c
