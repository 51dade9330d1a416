"""Proximal policy optimisation: a policy and its critic improve by rewards, held to the model that they start from.

    llmjax ppo --config configs/post/ppo.py --config.train.init_from=RUN --config.data.sources='["prompts.jsonl"]' --workdir runs/ppo

The critic is a value head on the policy (a reward model as --config.train.init_from gives it its start). Generalised
advantages, the KL to the reference in the reward, clipped values; four updates a round of answers.

Hardware: what the model needs; a model of a few million parameters trains on a laptop. No figure of a large model yet.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The defaults of ppo."""
    assert not arg, "this config has no variants"
    c = config.post_run("ppo", objective="policy")
    c.model.value_head = True
    c.rollout.advantage = "gae"
    c.rollout.samples = 1
    c.rollout.updates = 4
    c.rollout.kl_weight = 0.05
    c.objective.policy.aggregate = "token"
    c.optimizer.learning_rate = 3e-6
    c.schedule.name = "constant"
    c.train.duration = "400 steps"
    c.train.batch_size, c.train.sequence_length = 64, 512
    return c
