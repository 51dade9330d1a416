"""Losses of answers that are each good or bad, and the mismatched answers by which their KL is estimated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from llmjax import config
from llmjax.data.conversations import Row, RowError
from llmjax.data.examples import Example
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.errors import UserError
from llmjax.objectives import unpaired
from llmjax.post import batches, rows
from llmjax.post.rows import Group


def settings(**changes: float) -> ConfigDict:
    return ConfigDict({"beta": 0.1, "reward_shift": 0.0, **changes})


def test_P6_the_kl_is_the_mean_over_all_mismatched_answers_never_below_0_and_has_no_gradient():
    weights = jnp.array([1.0, 1, 1, 1, 0])
    assert float(unpaired.kl_of(jnp.array([2.0, 8, 4, 6, 99]), weights)) == 5.0
    assert float(unpaired.kl_of(jnp.array([2.0, -8, 4, -6, 99]), weights)) == 0.0
    np.testing.assert_array_equal(jax.grad(unpaired.kl_of)(jnp.array([2.0, 8, 4, 6, 99]), weights), np.zeros(5))


def test_kto_is_a_half_at_the_kl_and_moves_good_and_bad_answers_apart():
    good, bad = unpaired.kto(jnp.array([3.0]), jnp.array(3.0), settings())
    assert float(good[0]) == float(bad[0]) == 0.5
    good, bad = unpaired.kto(jnp.array([7.0]), jnp.array(2.0), settings())
    assert float(good[0]) == pytest.approx(1 - 1 / (1 + np.exp(-0.5))) and float(bad[0]) == pytest.approx(1 - good[0])
    for name, loss in unpaired.LOSSES.items():
        slopes = jax.jacobian(lambda x, loss=loss: jnp.stack(loss(x, jnp.array(1.0), settings())))(jnp.array([0.3]))
        assert slopes[0, 0, 0] < 0 < slopes[1, 0, 0], name


def test_bco_is_a_classifier_shifted_and_apo_zero_has_its_zero_at_the_reference():
    good, bad = unpaired.bco(jnp.array([5.0]), jnp.array(9.0), settings(reward_shift=0.2))
    assert float(good[0]) == pytest.approx(np.log1p(np.exp(-0.3))) and float(bad[0]) == pytest.approx(
        np.log1p(np.exp(0.3))
    )
    np.testing.assert_array_equal(
        unpaired.apo_zero(jnp.array([2.0]), jnp.array(9.0), settings()),
        unpaired.kto(jnp.array([2.0]), jnp.array(0.0), settings()),
    )


def single(number: int) -> Group:
    """A prompt of two tokens and an answer of three, all with the number."""
    weights = np.array([0, 0, 1, 1, 1], np.float32)
    return Group([Example(np.full(5, number, np.int32), weights)], [0.0], 0.0, {}, float(number % 2))


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_P6_no_answer_is_matched_with_its_own_prompt_and_each_is_with_one_other(count):
    made = rows._with_mismatches([single(i) for i in range(count)])
    partners = []
    for i, group in enumerate(made):
        own, mismatched = group.examples
        assert own.ids.tolist() == [i] * 5 and group.label == i % 2
        assert mismatched.ids[:2].tolist() == [i] * 2 and len(set(mismatched.ids[2:].tolist())) == 1
        assert mismatched.ids[2] != i and mismatched.weights.tolist() == [0, 0, 1, 1, 1]
        partners.append(int(mismatched.ids[2]))
    assert sorted(partners) == list(range(count))
    assert rows._with_mismatches([single(0)]) == []


def test_a_row_has_the_label_of_each_answer_before_its_mismatched_one(tmp_path):
    c = config.load("configs/post/kto.py", overrides=["train.sequence_length=40"])
    rows.save(tmp_path / "rows", "train", rows._with_mismatches([single(i) for i in range(4)]))
    made = batches.Rows(rows.load(tmp_path, "train"), [[1, 2], [3]], 40, 4, np.arange(8, dtype=np.float32))
    batch = batches.row(made, 0, c)
    assert batch["good"].tolist() == [1, 0] and batch["pair_weights"].tolist() == [1, 1]
    assert batch["reference"].tolist() == [2, 3, 4, 5]
    answers = [batch["targets"][(batch["segments"] == s) & (batch["weights"] > 0)].tolist() for s in (1, 2, 3, 4)]
    assert answers == [[1] * 3, [3] * 3, [2] * 3, [0] * 3]
    last = batches.row(made, 1, c)
    assert last["good"].tolist() == [1, 0] and last["pair_weights"].tolist() == [1, 0]


def test_pairs_are_taken_apart_and_an_answer_without_a_label_is_left_out():
    c, tokenizer = config.load("configs/post/kto.py"), byte_tokenizer()
    made = rows.groups_of(tokenizer, Row("ask", ("yes", "no"), (0.0, 1.0)), c)
    assert [group.label for group in made] == [1.0, 0.0]
    [bad] = rows.groups_of(tokenizer, Row("ask", ("no",), good=False), c)
    assert bad.label == 0.0
    with pytest.raises(RowError, match="give label, true or false"):
        rows.groups_of(tokenizer, Row("ask", ("yes",)), c)


@pytest.mark.parametrize("change", ["train.batch_size=1", "train.micro_batches=2"])
def test_P6_a_batch_that_has_no_mean_over_all_answers_is_refused(change):
    with pytest.raises(UserError, match="KL over the whole batch"):
        config.load("configs/post/kto.py", overrides=[change])
