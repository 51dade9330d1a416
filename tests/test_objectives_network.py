"""Objectives through the real network: no prediction depends on what it must not see, and every objective is learnt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few, mesh_of, prepare_steps, tiny_config
from networks import make

from llmjax.data.batches import pack
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.model import transformer
from llmjax.objectives import OBJECTIVES, corruption
from llmjax.train.step import make_heldout_step

TOKENIZER = byte_tokenizer()
TWO_SIDED = {"model__direction": "bidirectional", "model__position": "learned"}
CASES = {
    "causal": {},
    "masked": TWO_SIDED,
    "translation": {**TWO_SIDED, "model__languages": 2},
    "unilm": {**TWO_SIDED, "model__types": 6, "objective__mask_rate": 0.4},
    "permutation": {"model__two_stream": True, "model__position": "xlnet", "objective__predict_share": 0.5},
    "permutation in parts": {
        "model__two_stream": True,
        "model__position": "xlnet",
        "objective__predict_share": 0.5,
        "objective__recurrence": 2,
    },
    "prefix": {},
    "infill": {"objective__infill_rate": 1.0},
    "span": {"objective__mask_rate": 0.3, "model__position": "t5", "model__encoder_layers": 2},
    "span without encoder": {"objective__mask_rate": 0.3},
    "multi_token": {"model__ahead": 3},
}


def setting(case, **changes):
    return tiny_config(objective__name=case.split()[0], model__vocab_size=384, **CASES[case], **changes)


def make_rows(c, seed, rows=2):
    """A batch of an objective, from rows of two documents of text that can be learnt."""
    change = corruption(c, TOKENIZER)
    length = c.train.sequence_length if change is None else change.tokens
    rng = np.random.default_rng((3, seed))
    made = []
    for row in range(rows):
        cut = int(rng.integers(length // 3, 2 * length // 3))
        first, second = (40 + (rng.integers(9) + np.arange(n)) % 9 for n in (cut - 2, length - cut))
        ids = np.concatenate([[1], first, [2, 1], second])[: length + 1]
        batch = {name: values[0] for name, values in pack([ids], length=length).items()}
        if c.model.languages:
            batch["languages"] = np.where(batch["segments"] > 0, (batch["segments"] + 1) % 2, 0).astype(np.int32)
        made.append(batch if change is None else change.transform(batch, np.random.default_rng((seed, row))))
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


@functools.cache
def network(case):
    c = setting(case)
    module, params = make(c.model)

    @jax.jit
    def predict(batch):
        return OBJECTIVES[c.objective.name].predict(module, params, batch, None, c.objective).logits

    return c, predict


def dependence(predict, batch, name):
    """(predictions, tokens) bool of the first row: whether changing a token of batch[name] changes a prediction."""
    row = {key: jnp.asarray(values[:1]) for key, values in batch.items()}
    plain = np.asarray(predict(row))[0]
    found = []
    for place in range(row[name].shape[1]):
        changed = {**row, name: row[name].at[0, place].set((row[name][0, place] + 7) % 256)}
        found.append(np.abs(np.asarray(predict(changed))[0] - plain).max(-1) > 1e-5)
    return np.stack(found, axis=1)


def allowed(row):
    """(L, L) bool by the definition: tokens of the same document whose order is not above."""
    orders = row.get("orders", np.arange(len(row["tokens"])))
    same = (row["segments"][:, None] == row["segments"][None]) & (row["segments"] > 0)[:, None]
    return same & (orders[None] <= orders[:, None])


@pytest.mark.parametrize("case", ["masked", "translation", "unilm", "prefix", "span without encoder"])
def test_predictions_depend_on_all_that_they_may_see_and_on_nothing_else(case):
    c, predict = network(case)
    for seed in range(4 if case == "unilm" else 1):
        batch = make_rows(c, seed)
        row = {name: values[0] for name, values in batch.items()}
        if case in ("masked", "translation"):
            row["orders"] = np.zeros_like(row["tokens"])
        real = row["segments"] > 0
        found = dependence(predict, batch, "tokens")
        np.testing.assert_array_equal(found[real], allowed(row)[real])


@pytest.mark.parametrize("case", ["permutation", "permutation in parts"])
def test_a_query_never_depends_on_its_own_token_or_on_later_ranks(case):
    c, predict = network(case)
    batch = make_rows(c, 2)
    row = {name: values[0] for name, values in batch.items()}
    found = dependence(predict, batch, "tokens")
    parts = c.objective.recurrence
    size, queries = len(row["tokens"]) // parts, len(row["targets"]) // parts
    asked = np.flatnonzero(row["weights"] > 0)
    assert len(asked) > 3
    for query in asked:
        part = query // queries
        here = slice(part * size, (part + 1) * size)
        expected = row["segments"] == row["query_segments"][query]
        expected[here] &= row["orders"][here] < row["query_orders"][query]
        expected[(part + 1) * size :] = False
        assert not found[query, row["query_places"][query] + part * size]
        np.testing.assert_array_equal(found[query], expected)


@pytest.mark.slow  # of a network: test_no_gradient_flows_into_the_part_before in test_network.py
def test_no_gradient_flows_into_the_memory():
    c, predict = network("permutation in parts")
    module, params = make(c.model)
    batch = make_rows(c, 0)
    # Only the first part has tokens above 128, so only through the memory could the second have a gradient for them.
    first = np.arange(c.train.sequence_length) < c.train.sequence_length // 2
    batch["tokens"] = batch["tokens"] + np.where(first, 100, 0)[None].astype(np.int32)
    queries = batch["targets"].shape[1] // 2

    def second_part(params):
        return OBJECTIVES["permutation"].predict(module, params, batch, None, c.objective).logits[:, queries:].sum()

    rows = np.asarray(jax.jit(jax.grad(second_part))(params)["embedding"])
    # The tied head gives all rows the same gradient; what more a row has is that of its token.
    unused = rows[300]
    np.testing.assert_allclose(rows[140:149], np.broadcast_to(unused, (9, len(unused))), rtol=1e-5, atol=1e-6)
    assert np.abs(rows[40:49] - unused).max() > 1e-3
    other = {**batch, "tokens": np.where(batch["tokens"] > 128, 150, batch["tokens"]).astype(np.int32)}
    assert np.abs(predict(other)[:, queries:] - predict(batch)[:, queries:]).max() > 1e-3, "the memory is read"


def test_a_decoder_sees_the_source_of_its_own_document_and_its_past():
    c, predict = network("span")
    batch = make_rows(c, 0)
    row = {name: values[0] for name, values in batch.items()}
    real = row["segments"] > 0
    found = dependence(predict, batch, "source_tokens")
    np.testing.assert_array_equal(found[real], (row["segments"][:, None] == row["source_segments"][None])[real])
    np.testing.assert_array_equal(dependence(predict, batch, "tokens")[real], allowed(row)[real])


# The others are slow: their programs are much like these, or like the causal ones of test_train.py.
@pytest.mark.parametrize(
    "case", few(["masked", "permutation in parts", "span", "multi_token", "unilm", "prefix", "span without encoder"])
)
def test_every_objective_is_learnt_and_measured(case):
    c = setting(
        case,
        train__duration="30 steps",
        schedule__name="constant",
        schedule__warmup="0 steps",
        train__sequence_length=32,
    )
    state, _, run = prepare_steps(c, mesh_of("data=1"))
    measure = jax.jit(make_heldout_step(transformer.build(c.model), OBJECTIVES[c.objective.name], c))
    heldout = make_rows(c, 999, rows=8)
    before = {name: float(value) for name, value in measure(state.params, heldout).items()}
    for k in range(30):
        state, values = run(state, make_rows(c, k, rows=8))
        assert np.isfinite(float(values["objective"]))
    after = {name: float(value) for name, value in measure(state.params, heldout).items()}
    assert before["tokens"] == after["tokens"] == heldout["weights"].sum()
    assert after["nats"] < 0.8 * before["nats"]


# test_acceptance.py cuts rows of policies into micro-batches and over devices.
@pytest.mark.parametrize("case", few(["permutation", "permutation in parts", "span"], 0, 2))
def test_rows_of_any_shape_are_spread_over_meshes_and_micro_batches(case):
    losses = []
    for mesh, parts in (("data=1", 1), ("fsdp=2 tensor=2", 2)):
        c = setting(case, train__micro_batches=parts)
        state, _, run = prepare_steps(c, mesh_of(mesh))
        values = []
        for k in range(3):
            state, metrics = run(state, make_rows(c, k, rows=8))
            values.append(float(metrics["loss"]))
        losses.append(values)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
