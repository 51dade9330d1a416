"""Proximal policy optimisation: a policy and its critic improve by rewards, held to the model that they start from.

    llmjax ppo --config configs/post/ppo.py --config.train.init_from=RUN --config.data.sources='["prompts.jsonl"]' --workdir runs/ppo

The critic is a value head on the policy (a reward model as --config.train.init_from gives it its start). Generalised
advantages, the KL to the reference in the reward, clipped values; four updates a round of answers.
"""

from llmjax import config


def get_config(arg: str = "") -> config.ConfigDict:
    """The defaults of ppo."""
    assert not arg, "this config has no variants"
    c = config.base()
    c.name = "ppo"
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
    c.train.eval_every = "10%"
    return c.lock()
