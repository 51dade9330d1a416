"""Log-likelihoods of continuations: rows that share contexts give what every request alone gives, in every architecture."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import few, mesh_of, tiny_config
from networks import make, settings

from llmjax import config
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.eval import likelihood, trees
from llmjax.eval.likelihood import ScoringRequest, score_requests
from llmjax.infer.language_model import LanguageModel
from llmjax.train.step import make_eval_step


def model_of(c, *, mesh="data=1", seed=0) -> LanguageModel:
    """A random model of these `config.model` settings."""
    whole = tiny_config()
    with whole.unlocked():
        whole.model.update(c)
    module, params = make(whole.model, seed)
    mesh = mesh_of(mesh)
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    whole = config.ConfigDict(whole).lock()
    return LanguageModel(whole, module, params, byte_tokenizer(), 0, mesh, jax.jit(make_eval_step(module, whole)))


def score_groups(model: LanguageModel, groups, **more) -> list[list[likelihood.Likelihood]]:
    """The likelihood of each continuation of each context: groups of (context ids, [continuation ids, ...])."""
    found = iter(score_requests(model, [ScoringRequest(c, way) for c, ways in groups for way in ways], **more))
    return [[next(found) for _ in ways] for _, ways in groups]


def by_forward(model: LanguageModel, asked, limit: int) -> list[tuple[float, bool]]:
    """Every request alone in a row by the plain forward pass, as lm-evaluation-harness defines it."""
    pairs = [([*context, *way], len(way)) for context, ways in asked for way in ways]
    tokens, segments = np.zeros((2, len(pairs), limit), np.int32)
    for row, (ids, _) in enumerate(pairs):
        given = ids[-(limit + 1) :][:-1]
        tokens[row, : len(given)], segments[row, : len(given)] = given, 1
    logits_BLV = jax.jit(model.module.apply)({"params": model.params}, tokens, segments_BL=segments)
    logps_BLV = np.asarray(jax.nn.log_softmax(logits_BLV))
    found = []
    for row, (ids, count) in enumerate(pairs):
        end = int(segments[row].sum())
        logps, answer = logps_BLV[row, end - count : end], np.array(ids[-count:])
        found.append((logps[np.arange(count), answer].sum(), bool((logps.argmax(-1) == answer).all())))
    return found


def questions(vocabulary: int, *, seed: int = 0) -> list[tuple[list[int], list[list[int]]]]:
    """Contexts with a common beginning, some of them twice, and choices of one to six ids, some the same or a beginning of another."""
    rng = np.random.default_rng(seed)
    shots = rng.integers(0, vocabulary, 17).tolist()
    found = []
    for size in (1, 3, 6, 6, 9):
        context = shots + rng.integers(0, vocabulary, size).tolist()
        choices = [rng.integers(0, vocabulary, n).tolist() for n in (1, 1, 2, 6)]
        found.append((context, [*choices, choices[3], choices[3][:3]]))
    return [*found, ([5], [[1], [1, 2, 3]]), (rng.integers(0, vocabulary, 40).tolist(), [[7, 8]])]


ARCHITECTURES = {
    "rotary": {"position": "rotary", "kv_heads": 2},
    "learned": {"position": "learned", "tie_embeddings": False},
    "alibi": {"position": "alibi"},
    "t5": {"position": "t5"},
    "local": {"pattern": ("local", "global"), "window": 5},
    "recurrent": {"pattern": ("rglru", "global")},
    "experts": {"moe": {"experts": 4}},
    "capacity": {"moe": {"experts": 4, "dispatch": "capacity"}},
    "capped": {"logit_soft_cap": 5.0, "attention_soft_cap": 5.0},
}


OFTEN = ("local", "recurrent", "capacity")


@pytest.mark.parametrize("name", few(sorted(ARCHITECTURES, key=lambda name: name not in OFTEN), len(OFTEN)))
def test_every_architecture_scores_a_choice_as_the_plain_forward_pass_does(name):
    c = settings(**ARCHITECTURES[name])
    model, limit = model_of(c), c.max_length
    asked = questions(c.vocab_size)
    found = score_groups(model, asked, batch_tokens=128)
    scores = [score for group in found for score in group]
    for score, (total, greedy) in zip(scores, by_forward(model, asked, limit), strict=True):
        assert score.sum == pytest.approx(total, abs=2e-4)
        assert score.greedy == greedy


def test_a_shared_row_holds_a_context_once_and_an_unshared_one_has_one_request():
    c = settings()
    inputs = [[*context, *way][:-1] for context, ways in questions(32) for way in ways]
    free = trees.build_rows(inputs, cost=lambda before, new: new, longest=2048)
    assert len(free) == 3  # nothing is gained by joining rows without a common beginning
    assert sum(len(r.tokens) for r in free) < 0.5 * sum(map(len, inputs))
    alone = trees.build_rows(inputs, cost=lambda before, new: new, longest=2048, branches=False)
    for row in (*free, *alone):
        for number, path in row.paths:
            np.testing.assert_array_equal(row.tokens[path], inputs[number])
            np.testing.assert_array_equal(row.positions[path], np.arange(len(path)))
            for depth, place in enumerate(path):  # it sees those before it on its path and nothing else
                seen = [p for p in range(place + 1) if place < row.until[p]]
                assert seen == path[: depth + 1].tolist()
    for row in alone:
        np.testing.assert_array_equal(row.positions, np.arange(len(row.tokens)))
        assert (row.until == len(row.tokens)).all()
    assert sorted(n for row in alone for n, _ in row.paths) == list(range(len(inputs)))
    assert likelihood.shares_contexts(c) and not likelihood.shares_contexts(settings(pattern=("lstm",)))


def test_rows_get_no_longer_than_they_may_and_long_ones_are_not_joined_when_attention_costs_more():
    inputs = [[1] * 10 + [i] * 20 for i in range(2, 12)]
    for row in trees.build_rows(inputs, cost=lambda before, new: new, longest=64):
        assert len(row.tokens) <= 64
    assert len(trees.build_rows(inputs, cost=lambda before, new: new * (1 + before), longest=10**6)) == len(inputs)


def test_lengths_are_few_when_programs_are_dear_and_fit_when_they_are_free():
    sizes = [60, 64, 100, 500, 1000]
    assert trees.choose_lengths(sizes, cost=lambda _, n: n, shape_cost=0) == [64, 128, 512, 1024]
    assert trees.choose_lengths(sizes, cost=lambda _, n: n, shape_cost=1e9) == [1024]
    assert trees.choose_lengths([60] * 100 + [100] + [1000] * 3, cost=lambda _, n: n, shape_cost=1000) == [64, 1024]


def test_the_devices_of_a_mesh_give_the_likelihoods_of_one():
    c = settings(vocab_size=64)
    asked = questions(c.vocab_size)
    one = score_groups(model_of(c), asked, batch_tokens=256)
    for mesh in ("data=4", "fsdp=2 tensor=2"):
        found = score_groups(model_of(c, mesh=mesh), asked, batch_tokens=256)
        for a, b in zip(one, found, strict=True):
            assert [x.greedy for x in a] == [x.greedy for x in b]
            np.testing.assert_allclose([x.sum for x in a], [x.sum for x in b], atol=1e-4)


def test_the_order_of_requests_does_not_matter():
    c = settings()
    model = model_of(c)
    asked = [ScoringRequest(context, way) for context, ways in questions(c.vocab_size) for way in ways]
    order = np.random.default_rng(1).permutation(len(asked))
    straight = score_requests(model, asked)
    for i, score in zip(order, score_requests(model, [asked[i] for i in order]), strict=True):
        assert score.sum == pytest.approx(straight[i].sum, abs=1e-5) and score.greedy == straight[i].greedy


def test_what_cannot_be_scored_is_said():
    c = settings(position="learned")
    model = model_of(c)
    with pytest.raises(ValueError, match="no context or no continuation"):
        score_requests(model, [ScoringRequest([1], [])])
    with pytest.raises(ValueError, match="the continuation of request 0 has 33 tokens"):
        score_requests(model, [ScoringRequest([1], [1] * 33)])
    with pytest.raises(ValueError, match="ids that are not from 0 to 31"):
        score_requests(model, [ScoringRequest([1], [32])])
    with pytest.raises(ValueError, match="32 learned positions"):
        score_requests(model, [ScoringRequest([1], [2])], max_length=64)
    other = config.ConfigDict(model.config.to_dict())
    other.objective.name = "masked"
    with pytest.raises(ValueError, match="left to right"):
        score_requests(dataclasses.replace(model, config=other), [ScoringRequest([1], [2])])
    assert score_requests(model, []) == []
