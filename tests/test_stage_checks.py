"""What a later stage would refuse is refused before the first one begins, and nothing is made."""

import json
import re

import pytest
from helpers import tiny_config

from llmjax import config, recipe
from llmjax.errors import UserError

ALL = ("prepare", "tokenizer", "train", "eval", "generate", "report")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prepare.steps", ("exat",), "there is no step 'exat'; did you mean exact?"),
        ("data.sources", "nowhere.txt", "nowhere.txt"),
        ("tokenizer.path", "nowhere.model", "nowhere.model"),
        ("train.duration", "0", "train.duration='0' is less than one step of 128 tokens"),
        ("train.duration", "50 tokens", "is less than one step"),
        ("parallel.mesh", "rows=2", "'rows=2' is not understood"),
        ("parallel.mesh", "data=3 tensor=-1", "8 sequences cannot be spread over 3 devices"),
        ("train.init_from", "nowhere", "there is no run or checkpoint nowhere"),
        ("train.executable", "nowhere.bin", "train.executable='nowhere.bin' is not there"),
        ("eval.tasks", ("arc_challenge",), "arc_challenge"),
        ("eval.tasks", ("humaneval",), "--allow-code-execution"),
        ("generate.prompts", (), "generate.prompts is empty"),
    ],
)
def test_a_recipe_is_refused_as_a_whole(key, value, message, tiny_sources, tmp_path):
    c = tiny_config(tiny_sources)
    config.set_key(c, key, value)
    with pytest.raises(UserError, match=re.escape(message)):
        recipe.run(c.lock(), tmp_path / "run", ALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__batch_size": 6}, "6 sequences cannot be spread over 8 devices"),
        ({"parallel__mesh": "data=3"}, "asks for 3 devices"),
        ({"model__vocab_size": 100}, "model.vocab_size=100"),
        ({"data__mixture": ("0%: nobody=1",)}, "there is no source 'nobody'"),
    ],
)
def test_what_only_devices_and_tokens_can_tell_is_told_before_the_stage_is_noted(
    changes, message, tiny_run, tiny_sources
):
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    c = tiny_config(tiny_sources, **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        recipe.run(c.lock(), tiny_run, ("train",))
    assert {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()} == before
    assert "train" not in json.loads((tiny_run / "stages.json").read_text())
