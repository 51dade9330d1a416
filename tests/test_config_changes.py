"""Every setting that a training depends on has its class, and a training can go on under every continuable one."""

import jax
import pytest
from helpers import mesh_of, tiny_config

from llmjax import config
from llmjax.config import changes
from llmjax.model import transformer
from llmjax.recipe.stages import stage_of
from llmjax.train.optimizer import make_optimizer
from llmjax.train.schedule import make_schedule
from llmjax.train.step import init_state


def of_the_training():
    """The settings of the stage `train` itself, without those of earlier stages."""
    groups = stage_of(config.base(), "train").keys
    return [k for k in config.flatten(config.base().to_dict()) if any(f"{k}.".startswith(f"{g}.") for g in groups)]


def test_every_setting_of_a_training_is_classified_and_every_row_is_a_setting():
    named = {key for keys in changes.CLASSES.values() for key in keys}
    groups = {key.rpartition(".")[0] for key in config.flatten(config.base().to_dict())}
    for key in of_the_training():
        sure = key in named or key.rpartition(".")[0] in named
        assert sure, f"{key} needs a row in llmjax/config/changes.py: can a training go on when it changes?"
    assert named <= {*config.flatten(config.base().to_dict()), *groups}
    assert sum(map(len, changes.CLASSES.values())) == len(named)


def test_a_setting_that_an_older_run_lacks_has_its_default():
    c = config.flatten(config.base().to_dict())
    older = {key: value for key, value in c.items() if key not in ("model.moe.jitter", "train.ema")}
    assert changes.changed(older, c) == changes.changed(c, older) == {}
    assert changes.changed(older, {**c, "train.ema": 0.5}) == {"train.ema": (0.0, 0.5)}
    assert changes.changed(c, {**c, "train.log_every": 1.0, "prepare.workers": 3}) == {}


BY_TYPE = {bool: True, int: 2, float: 0.5, tuple: ("10%", "20%")}
OTHER = {
    "model.dtype": "bfloat16", "model.dropout_shape": "linear", "model.moe.dispatch": "capacity", "schedule.by": "tokens",
    "schedule.name": "wsd", "schedule.decay": "3 steps", "schedule.warmup": "1 step", "train.duration": "12 steps",
    "train.rewind.factor": 2.0, "optimizer.rates": ("head=0.1",), "model.moe.balance_over": "row", "model.quantization": "none",  # quantization does not go with experts
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "lion", "sgd"])
def test_the_state_has_the_same_arrays_under_every_continuable_setting(optimizer):
    def arrays(**changed):
        c = tiny_config(optimizer__name=optimizer, model__moe__experts=4, **changed)
        schedule = make_schedule(c.schedule, total_steps=8)
        make = make_optimizer(c.optimizer, schedule, model=c.model)
        _, abstract = init_state(transformer.build(c.model), make, c, mesh_of("data=1"))
        state = {"params": abstract.params, "opt_state": abstract.opt_state}  # an average may begin on the way
        paths = jax.tree_util.tree_leaves_with_path(state)
        return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in paths]

    before, flat = arrays(), config.flatten(config.base().to_dict())
    keys = [k for k in changes.CLASSES[changes.CONTINUABLE] if optimizer == "adamw" or k.startswith("optimizer.")]
    others = {key: OTHER[key] if key in OTHER else BY_TYPE[type(flat[key])] for key in keys}
    assert arrays(**{key.replace(".", "__"): value for key, value in others.items()}) == before
