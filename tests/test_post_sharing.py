"""Answers that share rows, or their prompts: every number stays at its token, and an update is the same as with a row an answer.

Logits at learnt places alone are the same too.
"""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import first_params, mesh_of, tiny_config
from test_acceptance import store

from llmjax.data.examples import Example
from llmjax.data.packing import learnt_places, packed
from llmjax.errors import UserError
from llmjax.model import transformer
from llmjax.objectives import OBJECTIVES
from llmjax.objectives.policy import policy_loss
from llmjax.parallel import placement
from llmjax.post import batches, heldout, sharing
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


# ------------------------------------------------------------------ prompts that answers share, and learnt places


PAIRS = {"train__sequence_length": 48, "train__batch_size": 2, "model__layers": 1, "model__attention": "blocked"}


def settings(name, **changes):
    given = {
        "data__format": "conversations",
        "objective__name": name,
        "train__init_from": "a run",
        "rollout__tokens": 8,
    }
    return tiny_config(**(given | PAIRS | changes))


def pairs_of(count, *, seed=0):
    """Pairs of answers of several lengths to one prompt each, some of which begin alike."""
    draw, found = np.random.default_rng(seed), []
    for i in range(count):
        prompt, same = draw.integers(4, 200, 5 + 3 * (i % 3)), draw.integers(4, 200, i % 3)
        texts = [np.r_[prompt, same, draw.integers(4, 200, size)].astype(np.int32) for size in (4 + i % 3, 3)]
        found.append([Example(ids, (np.arange(len(ids)) >= len(prompt)).astype(np.float32)) for ids in texts])
    return found


def answers_of(*, seed=0):
    """A row an answer of two groups of three: with their numbers, and the largest row they make together."""
    draw, rows = np.random.default_rng(seed), []
    for prompt in (draw.integers(4, 200, 9), draw.integers(4, 200, 12)):
        for size in (8, 3, 5):
            ids = np.r_[prompt, draw.integers(4, 200, size + 1)].astype(np.int32)
            learnt = (np.arange(len(ids)) >= len(prompt)) & (np.arange(len(ids)) < len(ids) - 1)
            row = packed([Example(ids, learnt.astype(np.float32))], length=LENGTH)
            for name in ("sampler", "old", "reference", "advantages"):
                row[name] = np.where(row["weights"] > 0, draw.normal(size=LENGTH) - 2, 0).astype(np.float32)
            rows.append(row | {"exists": np.ones(1, np.float32)})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def measured(c, batch, *, mesh="data=1"):
    """Gradients, metrics and weight of an objective."""
    module, on = transformer.build(c.model), mesh_of(mesh)
    network, params = placement.on_mesh(module, on, c), first_params(module)

    def of(params, batch):
        sums = OBJECTIVES[c.objective.name](network, params, batch, jax.random.key(0), c.objective)
        return sums.objective, sums

    with placement.active(on, c):
        grads, sums = jax.jit(jax.grad(of, has_aux=True))(params, batch)
    return grads, {name: mean.total / mean.weight for name, mean in sums.metrics.items()} | {"weight": sums.weight}


def assert_same(found, wanted):
    """Sums of other orders, in float32."""
    for name, value in wanted[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=2e-6, atol=2e-6, err_msg=name)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(wanted[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=3e-6 * max(largest, 1)), wanted[0], found[0])


def rows_of_pairs(c, pairs):
    """The batch of all pairs, and the reference's log-probabilities of its answers."""
    module = transformer.build(c.model)
    made = batches.rows_of(store(pairs), c)
    own = heldout.reference_log_probs(c, module, first_params(module), made, mesh_of("data=1"))
    reference = own + np.linspace(-2, 2, len(own), dtype=np.float32)
    made = dataclasses.replace(made, reference=reference)
    return made, own, batches.stacked([batches.row(made, i, c) for i in range(c.train.batch_size)])


def test_pairs_that_share_their_prompts_have_the_loss_and_gradient_of_whole_texts():
    pairs = pairs_of(3)
    whole, own, batch = rows_of_pairs(c := settings("preference"), pairs)
    assert "until" not in batch and batch["places"].shape[1] == whole.learnt
    shared, own_too, batch_too = rows_of_pairs(settings("preference", data__share_prompts=True), pairs)
    assert shared.filled == whole.filled - sum(pair[0].prompt_tokens - 1 for pair in pairs)
    np.testing.assert_allclose(own_too, own, rtol=1e-5)
    wanted = measured(c, {name: values for name, values in batch.items() if name != "places"})
    assert_same(measured(c, batch), wanted)
    assert_same(measured(c, batch_too), wanted)


def test_groups_that_share_their_prompts_have_the_loss_and_gradient_of_a_row_an_answer():
    rows = answers_of()
    c = settings("policy", rollout__samples=3, train__batch_size=6, objective__policy__level="sequence",
                 objective__policy__aggregate="sequence", objective__policy__length=8, objective__policy__temperature=1.0)  # fmt: skip
    made = sharing.share_prompts(rows, samples=3, length=36, whole=False)
    assert made.rows["tokens"].shape == (2, 36) and made.rows["exists"].shape == (2, 3)
    for name in ("old", "advantages"):
        np.testing.assert_array_equal(made.apart(made.rows[name]), rows[name])
    wanted = measured(c, rows)
    for batch in (rows, made.rows):
        count = int((batch["weights"] > 0).sum(axis=1).max())
        places = np.stack([learnt_places(weights_L, count) for weights_L in batch["weights"]])
        assert_same(measured(c, batch | {"places": places}), wanted)


def test_a_supervised_loss_at_learnt_places_is_that_of_all_places():
    examples = [[one] for pair in pairs_of(3) for one in pair]
    c = settings("causal", objective__z_loss=1e-3)
    made = batches.rows_of(store(examples), c)
    batch = batches.stacked([batches.row(made, i, c) for i in range(c.train.batch_size)])
    wanted = measured(c, {name: values for name, values in batch.items() if name != "places"})
    assert 0 < made.learnt < 48
    assert_same(measured(c, batch), wanted)
    c.objective.loss_chunks = 2
    assert_same(measured(c, batch), wanted)


@pytest.mark.slow
def test_learnt_places_and_shared_prompts_are_the_same_on_every_mesh():
    c = settings("preference", train__batch_size=4, model__layers=2, data__share_prompts=True)
    _, _, shared = rows_of_pairs(c, pairs_of(6))
    c.data.share_prompts = False
    _, _, apart = rows_of_pairs(c, pairs_of(6))
    for batch, meshes in (
        (shared, ("data=2", "fsdp=2", "tensor=2")),
        (apart, ("data=2", "tensor=2", "context=2", "pipeline=2")),
    ):
        wanted = measured(c, batch)
        for mesh in meshes:
            assert_same(measured(c, batch, mesh=mesh), wanted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective__name": "causal"}, "has none"),
        ({"model__pattern": ("conv", "global")}, "conv layers"),
        ({"parallel__mesh": "context=2"}, "without the axis context"),
        (
            {"objective__name": "policy", "rollout__samples": 4, "train__batch_size": 6, "rollout__updates": 2},
            "a multiple of",
        ),
    ],
)
def test_prompts_that_cannot_be_shared_are_refused_by_name(changes, said):
    with pytest.raises(UserError, match=said):
        settings("preference", **({"data__share_prompts": True} | changes))
