"""Packing of whole examples."""

import numpy as np
import pytest

from llmjax.data.examples import Example
from llmjax.data.packing import best_fit, learnt_places, packed, packed_trees, size_of, text_of, tree_size


def example(*ids: int, learnt: int = 1) -> Example:
    """An example whose first `learnt` tokens are the prompt."""
    weights = np.ones(len(ids), np.float32)
    weights[:learnt] = 0
    return Example(np.array(ids, np.int32), weights)


@pytest.mark.parametrize("length", [7, 8, 31, 100])
def test_every_example_is_in_one_row_that_has_room_for_it(length):
    sizes = np.random.default_rng(length).integers(1, length + 1, 200).tolist()
    rows = best_fit(sizes, length=length)
    assert sorted(i for row in rows for i in row) == list(range(200))
    filled = [sum(sizes[i] for i in row) for row in rows]
    assert max(filled) <= length
    # Best fit, decreasing, needs at most 11/9 of the fewest rows, and one more.
    assert len(rows) <= 11 / 9 * -(-sum(sizes) // length) + 1 or min(sizes) > length // 2


def test_the_fullest_row_with_room_is_taken():
    assert best_fit([5, 4, 3, 2], length=7) == [[0, 3], [1, 2]]


def test_what_is_longer_than_a_row_is_refused_by_name():
    with pytest.raises(ValueError, match="above the length"):
        best_fit([3, 9], length=8)


def test_a_row_keeps_each_example_its_own_segment_positions_and_weights():
    row = packed([example(5, 6, 7), example(8, 9, 10, 11, learnt=2)], length=8)
    np.testing.assert_array_equal(row["tokens"], [5, 6, 8, 9, 10, 0, 0, 0])
    np.testing.assert_array_equal(row["targets"], [6, 7, 9, 10, 11, 0, 0, 0])
    np.testing.assert_array_equal(row["positions"], [0, 1, 0, 1, 2, 0, 0, 0])
    np.testing.assert_array_equal(row["segments"], [1, 1, 2, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(row["weights"], [1, 1, 0, 1, 1, 0, 0, 0])


def test_the_weight_of_a_row_is_its_tokens_less_one_a_document():
    examples = [example(*range(1, n + 1), learnt=0) for n in (12, 8, 9, 6, 5)]
    row = packed(examples, length=64)
    assert row["weights"].sum() == 40 - 5 == sum(map(size_of, examples))


def test_answers_to_one_prompt_are_branches_behind_all_of_it_but_its_last_token():
    pair = [example(5, 6, 7, 8, 9, learnt=3), example(5, 6, 7, 9, learnt=3)]
    other = [example(1, 2, 3, learnt=1)]
    groups = [[*map(text_of, texts)] for texts in (pair, other)]
    assert [tree_size(texts) for texts in groups] == [5, 2]
    row, places = packed_trees(groups, length=8)
    np.testing.assert_array_equal(row["tokens"], [5, 6, 7, 8, 7, 1, 2, 0])
    np.testing.assert_array_equal(row["targets"], [6, 7, 8, 9, 9, 2, 3, 0])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 2, 0, 1, 0])
    np.testing.assert_array_equal(row["segments"], [1, 1, 1, 1, 1, 2, 2, 0])
    np.testing.assert_array_equal(row["answers"], [0, 0, 1, 1, 2, 3, 3, 0])
    np.testing.assert_array_equal(row["until"], [5, 5, 4, 4, 5, 7, 7, 8])
    np.testing.assert_array_equal(row["weights"], [0, 0, 1, 1, 1, 1, 1, 0])
    assert places == [(2, 2, 2), (4, 2, 1), (5, 0, 2)]
    with pytest.raises(ValueError, match="do not fit"):
        packed_trees(groups, length=6)


def test_learnt_places_are_all_there_in_their_order():
    weights = np.array([0, 1, 0, 0, 0.5, 1], np.float32)
    assert learnt_places(weights, 3).tolist() == [1, 4, 5] and learnt_places(weights, 4).tolist() == [0, 1, 4, 5]
    with pytest.raises(ValueError, match="room for 2"):
        learnt_places(weights, 2)
