"""Answers that share rows: every number stays at its token, and an update is the same as with a row an answer."""

import jax
import numpy as np
import pytest
from helpers import first_params, tiny_config

from llmjax.data.examples import Example
from llmjax.data.packing import packed
from llmjax.model import transformer
from llmjax.objectives.policy import policy_loss
from llmjax.post import sharing
from llmjax.train.step import State, _make_gradients

LENGTH, PARTS = 24, 4


def rows_of(sizes, *, seed=0):
    """A row an answer, with random numbers at its learnt tokens."""
    draw, rows = np.random.default_rng(seed), []
    for size in sizes:
        ids = draw.integers(4, 200, size + 1).astype(np.int32)
        learnt = (np.arange(size + 1) > size // 2).astype(np.float32)
        row = packed([Example(ids, learnt)], length=LENGTH)
        for name in ("sampler", "old", "reference", "advantages"):
            row[name] = np.where(row["weights"] > 0, draw.normal(size=LENGTH) - 2, 0).astype(np.float32)
        rows.append(row | {"exists": np.ones(1, np.float32)})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_every_number_stays_at_its_token_and_comes_back():
    rows = rows_of([5, 11, 24, 3, 7, 9, 2, 4])
    shared = sharing.share(rows, most=3, micro_batch=2)
    used = shared.rows["exists"].any(axis=1)
    assert used.tolist() == [True] * 4 and shared.rows["exists"].sum() == 8
    assert shared.rows["exists"].shape[1] == 3  # 24 | 11, 9, 4 | 7, 5, 3 | 2, where a fourth would be one too many
    for name in rows.keys() - {"exists", "segments"}:
        np.testing.assert_array_equal(shared.apart(shared.rows[name]), np.where(rows["segments"] > 0, rows[name], 0))
    for row, segments in enumerate(shared.rows["segments"]):
        numbers = segments[segments > 0]
        assert (np.diff(numbers) >= 0).all() and set(numbers) == set(
            range(1, int(shared.rows["exists"][row].sum()) + 1)
        )
    batch = sharing.batch_of(shared, micro_batches=PARTS)
    full = [batch["exists"][part::PARTS].any() for part in range(PARTS)]
    assert full == [True, True, False, False]
    for part in range(2):  # the trainer's forward pass has the same rows in its micro-batches
        np.testing.assert_array_equal(batch["tokens"][part::PARTS], shared.rows["tokens"][2 * part : 2 * part + 2])


def test_answers_that_fill_their_rows_stay_alone():
    rows = rows_of([24, 23, 24, 24])
    batch = sharing.batch_of(sharing.share(rows, most=4, micro_batch=2), micro_batches=2)
    assert batch["exists"].tolist() == [[1, 0, 0, 0]] * 4
    assert sorted(map(tuple, batch["tokens"])) == sorted(map(tuple, rows["tokens"]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sequence", "constant", "token", "sequence_sum"])
def test_loss_ratio_and_gradient_are_those_of_a_row_an_answer_and_empty_micro_batches_cost_nothing(how):
    c = tiny_config(
        data__format="conversations", objective__name="policy", train__init_from="a run", train__batch_size=8, rollout__tokens=8,
        train__micro_batches=PARTS, train__sequence_length=LENGTH, rollout__pack=3, objective__policy__aggregate=how,
        objective__policy__length=8, objective__policy__level="sequence", objective__policy__kl_weight=0.1, model__layers=1,
        rollout__samples=2,
    )  # fmt: skip
    module, computed = transformer.build(c.model), []
    zero = np.zeros((), np.int32)
    state = State(zero, first_params(module), {}, (), None, zero, zero)

    def objective(*arguments):
        jax.debug.callback(lambda: computed.append(1))
        return policy_loss(*arguments)

    def update(batch, settings):
        gradients = _make_gradients(module, objective, settings, parts=PARTS)
        grads, sums, _ = jax.jit(gradients)(state, batch, jax.random.key(0))
        jax.effects_barrier()
        parts, computed[:] = len(computed), []
        return (
            jax.tree.map(lambda g: g / sums.weight, grads),
            {n: m.total / m.weight for n, m in sums.metrics.items()},
            parts,
        )

    rows = rows_of([5, 11, 24, 3, 7, 9, 2, 4])
    alone = c.copy_and_resolve_references()
    with alone.unlocked():
        alone.rollout.pack = 1
    grads, metrics, parts = update(rows, alone)
    shared = sharing.batch_of(sharing.share(rows, most=3, micro_batch=2), micro_batches=PARTS)
    grads_too, metrics_too, parts_too = update(shared, c)
    assert (parts, parts_too) == (4, 2)
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_too[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-6 * max(largest, 1)), grads, grads_too)
