"""Advantages by hand."""

import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.post.advantages import (
    Rewards,
    adapted_kl_weight,
    equal_groups,
    generalised_advantages,
    group_advantages,
    token_rewards,
    whiten,
)


def of(values: list[float], groups: list[int], *, baseline: str = "mean", scale: str = "none") -> np.ndarray:
    return group_advantages(Rewards(np.array(values), np.array(groups)), baseline=baseline, scale=scale).values


def test_baselines_of_a_group_of_four():
    np.testing.assert_allclose(of([1, 0, 0, 1], [7] * 4), [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(of([1, 0, 0, 1], [7] * 4, baseline="leave_one_out"), np.array([2, -2, -2, 2]) / 3)
    deviation = np.std([1, 0, 0, 1], ddof=1) + 1e-4
    np.testing.assert_allclose(of([1, 0, 0, 1], [7] * 4, scale="group"), np.array([0.5, -0.5, -0.5, 0.5]) / deviation)


def test_groups_are_told_by_ids_so_shuffled_rows_keep_their_advantages():
    values, groups = np.array([3.0, 1, 4, 1, 5, 9]), np.array([0, 0, 1, 1, 2, 2])
    order = np.array([4, 1, 3, 0, 5, 2])
    np.testing.assert_array_equal(of(values[order], groups[order]), of(values, groups)[order])


def test_a_text_without_a_score_is_in_no_baseline_and_a_reward_of_zero_is_a_score():
    np.testing.assert_allclose(of([0.0, np.nan, 1.0], [1, 1, 1]), [-0.5, 0.0, 0.5])
    np.testing.assert_allclose(of([100.0, np.nan, 1.0, 2.0], [1, 1, 2, 2]), [0.0, 0.0, -0.5, 0.5])


def test_equal_rewards_give_nothing_and_are_counted():
    rewards = Rewards(np.array([1.0, 1, 0, 1, np.nan, 3]), np.array([1, 1, 2, 2, 3, 3]))
    assert equal_groups(rewards) == {1: True, 2: False, 3: True}
    values = group_advantages(rewards, baseline="mean", scale="group").values
    assert not values[:2].any() and values[3] > 0 and not values[4:].any()


def test_groups_of_one_are_refused_because_nothing_would_be_learnt():
    with pytest.raises(UserError, match="rollout.samples to 2 or more"):
        of([1.0, 2.0], [1, 2])


def test_advantages_are_not_normalised_twice():
    once = group_advantages(Rewards(np.array([0.0, 1.0]), np.array([1, 1])), baseline="mean", scale="group")
    with pytest.raises(TypeError, match="once"):
        group_advantages(once, baseline="mean", scale="group")  # type: ignore[arg-type]


def test_whitening_is_over_the_mask_alone_and_may_keep_the_mean():
    values, mask = np.array([[1.0, 3.0, 100.0]]), np.array([[1, 1, 0]])
    np.testing.assert_allclose(whiten(values, mask), [[-1.0, 1.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(whiten(values, mask, keep_mean=True), [[1.0, 3.0, 0.0]], rtol=1e-6)
    white = of([0, 1, 0, 3], [1, 1, 2, 2], scale="batch")
    assert abs(white.mean()) < 1e-9 and white.var() == pytest.approx(1, rel=1e-6)


def test_generalised_advantages_by_hand_with_a_tools_tokens_stepped_over():
    rewards, values = np.array([[0.0, 0.0, 0.0, 1.0]]), np.array([[0.5, 0.4, 9.0, 0.2]])
    mask = np.array([[1, 1, 0, 1]])
    advantages, returns = generalised_advantages(rewards, values, mask, np.zeros(1), discount=0.9, trace=0.8)
    last = 1.0 - 0.2
    middle = 0.9 * 0.2 - 0.4 + 0.9 * 0.8 * last
    first = 0.9 * 0.4 - 0.5 + 0.9 * 0.8 * middle
    np.testing.assert_allclose(advantages, [[first, middle, 0.0, last]])
    np.testing.assert_allclose(returns, [[first + 0.5, middle + 0.4, 0.0, last + 0.2]])


def test_a_text_that_was_cut_goes_on_from_the_critics_value():
    rewards, values, mask = np.zeros((2, 2)), np.array([[0.1, 0.3]] * 2), np.ones((2, 2))
    advantages, _ = generalised_advantages(rewards, values, mask, np.array([0.0, 0.7]), discount=1.0, trace=1.0)
    np.testing.assert_allclose(advantages[:, 0], [-0.1, 0.6])


def test_the_score_lies_on_the_last_sampled_token_and_the_kl_on_each():
    mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    made = token_rewards(np.array([1.0, np.nan, 5.0]), np.full((3, 4), 2.0), mask, kl_weight=0.1)
    np.testing.assert_allclose(made, [[-0.2, 0.8, 0, 0], [-0.2, 0, -0.2, 0], [0, 0, 0, 0]])


def test_the_kl_weight_goes_up_when_the_policy_is_too_far_and_down_when_it_is_near():
    kwargs = {"target": 6.0, "horizon": 100, "texts": 50}
    assert adapted_kl_weight(0.1, 60.0, **kwargs) == pytest.approx(0.11)
    assert adapted_kl_weight(0.1, 6.0, **kwargs) == pytest.approx(0.1)
    assert adapted_kl_weight(0.1, 0.0, **kwargs) == pytest.approx(0.09)
