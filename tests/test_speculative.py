"""Speculative decoding changes how fast a text comes, never which texts come how often."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from networks import answers, make, settings
from scipy import stats

from llmjax.data.tokenizer import byte_tokenizer
from llmjax.infer.engine import Engine
from llmjax.infer.request import Request

TOKENIZER = byte_tokenizer()
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2},
    "gpt2": {"position": "learned", "max_length": 48, "norm": "layer", "tie_embeddings": False},
    "griffin": {"pattern": ("rglru", "local", "global"), "layers": 3, "window": 5},  # which cannot forget
}
PROMPTS = [(5, 6, 7, 5, 6, 7, 5, 6), (9,), tuple(range(4, 31))]


@functools.cache
def model(name: str) -> tuple[Any, Any]:
    return make(settings(vocab_size=32, **ARCHITECTURES[name]))


@functools.cache
def draft() -> tuple[Any, Any]:
    return make(settings(vocab_size=32, layers=1), seed=1)


def near(name: str) -> tuple[Any, Any]:
    """A draft that mostly agrees with the model: the model itself, slightly changed."""
    module, params = model(name)
    return module, jax.tree.map(lambda x: x * 1.02, params)


QUICK = (("llama", "a good model"),)


def _marks(name: str, drafts: str) -> list[pytest.MarkDecorator]:
    """gpt2 keeps its keys as llama does."""
    return [] if (name, drafts) in QUICK else [pytest.mark.exhaustive if name == "gpt2" else pytest.mark.slow]


COMMON: dict[str, Any] = {"slots": 2, "length": 48, "chunks": (16,), "steps": 3}


@pytest.mark.parametrize(
    ("name", "drafts"),
    [
        pytest.param(name, drafts, marks=_marks(name, drafts))
        for name in ARCHITECTURES
        for drafts in ("lookup", "a model", "a good model")
        if (name, drafts) != ("griffin", "a good model")  # a draft must be able to forget
    ],
)
def test_greedy_texts_are_the_same_tokens(name, drafts):
    given = {"lookup": None, "a model": draft, "a good model": functools.partial(near, name)}[drafts]
    plain = Engine(*model(name), TOKENIZER, **COMMON)
    fast = Engine(*model(name), TOKENIZER, ahead=3, draft=given and given(), **COMMON)
    requests = [Request(ids, 16, temperature=0.0, repetition_penalty=r) for ids in PROMPTS for r in (1.0, 1.3)]
    expected, found = answers(plain, requests), answers(fast, requests)
    for one, other in zip(expected, found, strict=True):
        assert one.tokens == other.tokens
        assert one.finish == other.finish
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-4)


def test_good_drafts_take_fewer_steps():
    count, steps = 24, 0  # without drafts three tokens a step
    engine = Engine(*model("llama"), TOKENIZER, ahead=3, draft=model("llama"), **COMMON)
    engine.submit(Request(PROMPTS[0], count, temperature=0.0))
    while engine.busy:
        engine.step()
        steps += 1
    assert steps <= count // (3 * 4) + 2


@pytest.mark.parametrize(
    ("drafts", "top_p"),
    [
        ("lookup", 0.8),
        pytest.param("a model", 1.0, marks=pytest.mark.slow),
        pytest.param("lookup", 1.0, marks=pytest.mark.slow),
        pytest.param("a model", 0.8, marks=pytest.mark.slow),
    ],
)
def test_sampled_texts_come_as_often_as_the_model_says(drafts, top_p):
    """The first two tokens of 2,048 texts against the exact distribution, by chi-square."""
    module, params = model("llama")
    count, ids = 2048, PROMPTS[0]
    given = draft() if drafts == "a model" else None
    engine = Engine(module, params, TOKENIZER, slots=128, length=32, chunks=(16,), ahead=2, draft=given)
    found = answers(engine, [Request(ids, 2, top_p=top_p, seed=7, number=i) for i in range(count)])

    apply = jax.jit(module.apply)  # operation by operation each would be compiled alone

    def distribution(tokens_BL: np.ndarray) -> np.ndarray:
        logits_BV = np.array(apply({"params": params}, tokens_BL)[:, -1], np.float64)
        logits_BV[:, [0, 1, 3]] = -np.inf
        p = np.exp(logits_BV - logits_BV.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        order = np.argsort(-p, -1)
        sorted_BV = np.take_along_axis(p, order, -1)
        cut = np.cumsum(sorted_BV, -1) - sorted_BV >= top_p
        np.put_along_axis(p, order, np.where(cut, 0, sorted_BV), -1)
        return p / p.sum(-1, keepdims=True)

    first = distribution(np.array([ids]))[0]
    second = distribution(np.array([[*ids, token] for token in range(32)]))
    pairs = first[:, None] * second
    pairs[TOKENIZER.eos_id] = 0  # there the text ends
    tokens = [one.tokens for one in found]
    for counts, expected in (
        (np.bincount([t[0] for t in tokens], minlength=32), first * count),
        (np.bincount([t[1] for t in tokens if len(t) > 1], minlength=32), pairs.sum(0) * count),
    ):
        assert not counts[expected == 0].any()
        rare = expected < 5
        observed = np.append(counts[~rare], counts[rare].sum())
        wanted = np.append(expected[~rare], expected[rare].sum() + 1e-9)
        assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


def test_a_text_does_not_depend_on_what_else_is_written():
    engine = Engine(*model("llama"), TOKENIZER, ahead=3, draft=near("llama"), **COMMON)
    requests = [Request(ids, 12, temperature=1.2, seed=i) for i, ids in enumerate(PROMPTS)]
    together = [one.tokens for one in answers(engine, requests)]
    assert together == [answers(engine, [request])[0].tokens for request in requests]


def test_drafts_that_cannot_work_are_refused():
    for given, message in (
        (model("griffin"), "attend to everything"),
        (make(settings(vocab_size=40, layers=1)), "has 40 ids and the model 32"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(*model("llama"), TOKENIZER, length=32, ahead=2, draft=given)
