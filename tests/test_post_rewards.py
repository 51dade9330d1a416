"""Rewards: one result for each answer, from functions and from models."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.post import rewards


def of(answer: str, row: Mapping[str, Any]) -> float | None:
    return None if answer == "?" else float(answer)


@rewards.batched
def counted(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(len(answers))] * len(answers)


def counted_in_words(answer: str, row: Mapping[str, Any]) -> str:
    return "one"


@rewards.batched
def one_too_few(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [0.0] * (len(answers) - 1)


def scored(
    names: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]] | None = None
) -> rewards.Scored:
    return rewards.score(rewards.parse(names), answers, rows or [{}] * len(answers))


def test_G9_a_reward_of_zero_is_a_score_none_is_not_and_every_answer_has_one_result():
    made = scored(["test_post_rewards:of"], ["0.0", "?", "1.0"])
    np.testing.assert_array_equal(made.total, [0.0, np.nan, 1.0])
    rows = [{"answer": "7"}, {"answer": "seven"}, {"answer": "1,000"}]  # the second has no number to compare with
    made = scored(["last_number"], ["it is 7", "7", "no number"], rows)
    np.testing.assert_array_equal(made.total, [1.0, np.nan, 0.0])
    assert rewards.means(made) == {"": 0.5, "last_number": 0.5}


def test_several_rewards_are_added_by_weight_and_kept_apart():
    names = ["test_post_rewards:of=2", "test_post_rewards:counted=0.5"]
    made = scored(names, ["1.0", "?", "3.0"])
    np.testing.assert_array_equal(made.total, [3.5, 1.5, 7.5])  # where one has no number, the other counts
    assert rewards.means(made) == {"": pytest.approx(12.5 / 3), "of": 2.0, "counted": 3.0}


def test_a_reward_that_gives_too_few_results_or_no_number_ends_the_run():
    with pytest.raises(UserError, match="one_too_few gave 1 numbers for 2 answers"):
        scored(["test_post_rewards:one_too_few"], ["1", "2"])
    with pytest.raises(UserError, match="gave inf: return a finite number"):
        scored(["test_post_rewards:of"], ["inf"])
    with pytest.raises(UserError, match="counted_in_words gave 'one': return a finite number"):
        scored(["test_post_rewards:counted_in_words"], ["1"])
    with pytest.raises(ValueError, match="could not convert"):
        scored(["test_post_rewards:of"], ["text"])


def test_rewards_that_are_not_there_are_refused_by_what_is_wrong(tmp_path):
    for name, message in {
        "exact": "'exact' is no reward",
        "test_post_rewards:no": "is no reward",
        "exact_match=much": "is no reward",
        "exact_match=nan": "its weight is nan",
        f"model:{tmp_path}": "holds no trained model: train one with llmjax reward",
    }.items():
        with pytest.raises(UserError, match=message):
            rewards.parse([name])
    with pytest.raises(UserError, match="twice"):
        rewards.parse(["exact_match", "exact_match=2", "exact_match=3"])
    meta = tmp_path / "run" / "checkpoints" / "1" / "meta"
    meta.mkdir(parents=True)
    (meta / "metadata").write_text(json.dumps({"config": {"model": {"value_head": False}}}))
    with pytest.raises(UserError, match=re.escape("is a model without a value head")):
        rewards.parse([f"model:{tmp_path / 'run'}=0.5"])
