"""Beam search finds what a search of all texts finds where it keeps enough candidates, and what a plain beam search does."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from helpers import few
from networks import make, settings

from llmjax.data.hf_tokenizer import no_tokenizer
from llmjax.errors import UserError
from llmjax.infer.beam import BeamSearch
from llmjax.infer.generate import generate
from llmjax.infer.request import Request

V, END, NEW = 7, 2, 4
LETTERS = (3, 4, 5)  # besides END all that may be written: 6 only pads the embedding


class Letters:
    def encode_batch(self, texts, **_):
        return [["abc".index(letter) + 3 for letter in text] for text in texts]

    def decode(self, ids):
        return "".join("abc"[i - 3] for i in ids if i in LETTERS)


TOKENIZER = dataclasses.replace(
    no_tokenizer(V - 1), piece_bytes=(b"", b"", b"", b"a", b"b", b"c"), pad_id=0, bos_id=1, eos_id=END, unsampled_ids=(0, 1),
    backend=Letters(),
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "decoder": {"pattern": ("local", "global"), "window": 3},
    "encoder-decoder": {"encoder_layers": 1, "pattern": ("global",)},
    "recurrent": {"pattern": ("lstm",)},
}
PROMPTS = ((1,), (1, 4, 3, 5, 5, 3), (1, 5, 4))


@functools.cache
def model(name: str) -> tuple[Any, Any]:
    return make(settings(vocab_size=V, **MODELS[name]))


@functools.cache
def plain(name: str) -> Any:
    module, params = model(name)
    return jax.jit(
        lambda tokens_BL, source: jax.nn.log_softmax(module.apply({"params": params}, tokens_BL, source=source))
    )


def source_of(name: str) -> tuple[int, ...]:
    return (4, 5, 3, 3, 5) if name == "encoder-decoder" else ()


@functools.cache
def nats_after(name: str, ids: tuple[int, ...]) -> np.ndarray:
    """Of each next token, by the whole text through the network."""
    tokens_BL = np.zeros((1, 16), np.int32)
    tokens_BL[0, : len(ids)] = ids
    given = {"tokens": np.array([source_of(name)]), "segments": np.ones((1, 5), np.int32)} if source_of(name) else None
    return np.asarray(plain(name)(tokens_BL, given), np.float64)[0, len(ids) - 1]


@functools.cache
def nats_of(name: str, prompt: tuple[int, ...], text: tuple[int, ...]) -> float:
    return sum(nats_after(name, (*prompt, *text[:i]))[token] for i, token in enumerate(text))


def all_texts() -> list[tuple[int, ...]]:
    ended = [(*text, END) for n in range(NEW) for text in itertools.product(LETTERS, repeat=n)]
    return ended + list(itertools.product(LETTERS, repeat=NEW))


def by_hand(name: str, prompt: tuple[int, ...], beams: int) -> list[tuple[int, ...]]:
    """The candidates of a beam search in plain Python."""
    kept: list[tuple[int, ...]] = [()]
    for _ in range(NEW):
        grown = [
            one for text in kept for one in ([text] if text[-1:] == (END,) else [(*text, i) for i in (END, *LETTERS)])
        ]
        kept = sorted(grown, key=lambda text: -nats_of(name, prompt, text))[:beams]
    return kept


def search(name: str, prompts: Any = PROMPTS, **more: Any) -> list[Any]:
    if source_of(name):
        more["source"] = source_of(name)
    return generate(*model(name), TOKENIZER, prompts, max_new_tokens=NEW, **more)


@pytest.mark.parametrize("name", few(["decoder", "encoder-decoder", "recurrent"]))
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_enough_candidates_find_the_best_of_all_texts(name, penalty):
    beams = len(LETTERS) ** NEW
    for prompt, found in zip(PROMPTS, search(name, beams=beams, length_penalty=penalty), strict=True):
        best = max(all_texts(), key=lambda text: nats_of(name, prompt, text) / len(text) ** penalty)
        assert found.tokens == best
        assert sum(found.log_probabilities) == pytest.approx(nats_of(name, prompt, best), abs=2e-5)
        for i, nats in enumerate(found.log_probabilities):
            assert nats == pytest.approx(nats_after(name, (*prompt, *best[:i]))[best[i]], abs=2e-5)
        assert found.finish == ("eos" if best[-1] == END else "length")
        assert found.text == "".join("abc"[i - 3] for i in best if i != END)


def test_few_candidates_find_what_a_plain_beam_search_does():
    for prompt, found in zip(PROMPTS, search("decoder", beams=2), strict=True):
        kept = by_hand("decoder", prompt, 2)
        assert found.tokens == max(kept, key=lambda text: nats_of("decoder", prompt, text) / len(text))


def test_requests_are_answered_one_after_the_other_and_wrong_ones_are_refused():
    module, params = model("decoder")
    made = BeamSearch(module, params, TOKENIZER, beams=2, length=16)
    numbers = [made.submit(Request(prompt, NEW, stop_ids=(3,))) for prompt in PROMPTS]
    events = [event for _ in PROMPTS for event in made.step()]
    assert [event.number for event in events] == numbers and not made.busy
    assert all(event.finish == ("stop" if event.tokens[-1] == 3 else event.finish) for event in events)
    for given, message in (
        ({"stop": "a"}, "beam search knows no stop: leave it out"),
        ({"regex": "a+"}, "beam search knows no regex"),
        ({"max_new_tokens": 16}, "more than the 16"),
        ({"ids": (9,)}, "ids from 0 to 6"),
    ):
        with pytest.raises(UserError, match=message):
            made.submit(Request.parse({"ids": PROMPTS[1], "max_new_tokens": NEW, **given}))
    for given in ({"beams": 0}, {"beams": 2, "best_of": 2}, {"beams": 2, "engine": {"ahead": 2}}):
        with pytest.raises(UserError, match="beams="):
            search("decoder", **given)
