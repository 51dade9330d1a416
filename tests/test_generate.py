"""Generation gives what the plain forward pass gives, row by row, and its text is cut and shown where it should be."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_params, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.data.tokenizer import byte_tokenizer
from llmjax.errors import UserError
from llmjax.infer.generate import generate
from llmjax.infer.sample import sample
from llmjax.infer.sample import settings as sampling_of
from llmjax.infer.text import Text
from llmjax.model import transformer

TOKENIZER = byte_tokenizer()
PROMPTS = ["def f(x):\n", "", "a prompt that is rather longer than the others"]
ROTARY = {"model__kv_heads": 2}
LEARNED = {
    "model__position": "learned",
    "model__norm": "layer",
    "model__activation": "gelu",
    "model__bias": ("qkv", "out", "mlp", "norm"),
    "model__tie_embeddings": False,
    "model__max_length": 64,
}


@functools.cache
def model(**changes: Any) -> tuple[transformer.Transformer, Any]:
    c = tiny_config(model__init_std=0.2, **changes)
    module = transformer.build(c.model)
    return module, first_params(module)


def tokens_of(prompts: list[str], **kwargs: Any) -> list[tuple[int, ...]]:
    return [one.tokens for one in generate(*model(**ROTARY), TOKENIZER, prompts, **kwargs)]


# ---------------------------------------------------------------------- the model


@pytest.mark.slow
@pytest.mark.parametrize("changes", [LEARNED, ROTARY], ids=["learned", "rotary"])
def test_cached_batched_decoding_equals_the_plain_forward_pass(changes):
    """Tokens are those of a loop without a cache, one row alone; log-probabilities are those that training computes."""
    module, params = model(**changes)
    given = {"temperature": [0.0, 0.9, 1.3], "top_k": [0, 20, 0], "top_p": [1.0, 0.9, 0.95], "min_p": [0.0, 0.0, 0.01]}
    allowed_V = jnp.array([4 <= i < TOKENIZER.vocab_size or i == TOKENIZER.eos_id for i in range(module.c.vocab_size)])

    @jax.jit
    def plain(tokens_BL, length, key, row_sampling):
        logits_BV = module.apply({"params": params}, tokens_BL)[:, length - 1]
        token_B, _ = sample(jnp.where(allowed_V[None], logits_BV, -jnp.inf), key[None], row_sampling)
        return token_B[0], jax.nn.log_softmax(logits_BV)[0]

    completions = generate(module, params, TOKENIZER, PROMPTS, max_new_tokens=17, seed=3, **given)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]
        row_key = jax.random.fold_in(jax.random.key(3), row)
        row_sampling = sampling_of(1, **{k: v[row] for k, v in given.items()})
        for token, log_probability in zip(completion.tokens, completion.log_probabilities, strict=True):
            tokens_BL = np.array([ids + [0] * (64 - len(ids))], np.int32)
            key = jax.random.fold_in(row_key, len(ids) - 1)
            wanted, log_probability_V = plain(tokens_BL, np.int32(len(ids)), key, row_sampling)
            assert token == wanted, (prompt, len(ids))
            np.testing.assert_allclose(log_probability, log_probability_V[token], atol=2e-5)
            ids.append(token)
        assert len(completion.tokens) == 17 or completion.finish == "eos"


@pytest.mark.slow  # the engine's requests come and go in test_engine.py
def test_a_rows_text_does_not_depend_on_its_neighbours():
    kwargs = {"max_new_tokens": 24, "temperature": 1.0, "slots": 4}
    alone = tokens_of(["one prompt"], seed=5, **kwargs | {"slots": 1})[0]
    assert tokens_of(["one prompt", "another", "and a third, which is longer"], seed=5, **kwargs)[0] == alone
    assert tokens_of(["something else", "one prompt"], seed=[9, 5], **kwargs)[1] == alone
    assert tokens_of(["one prompt"], seed=6, **kwargs)[0] != alone


def test_special_tokens_and_padding_of_the_vocabulary_are_never_sampled():
    rows = tokens_of(["x"] * 8, max_new_tokens=64, temperature=100.0, slots=4)
    drawn = {token for row in rows for token in row}
    assert len(drawn) > 150  # of 257: the distribution is nearly flat
    assert all(token == TOKENIZER.eos_id or 4 <= token < TOKENIZER.vocab_size for token in drawn)


def test_rows_end_at_eos_each_at_its_own_time():
    kwargs = {"max_new_tokens": 40, "temperature": 1.0, "seed": [1, 2, 3]}
    endless = dataclasses.replace(TOKENIZER, eos_id=TOKENIZER.unk_id)  # which is never sampled
    free = [one.tokens for one in generate(*model(**ROTARY), endless, PROMPTS, **kwargs)]
    end = free[0][6]  # let a token that occurs stand for the end of a document
    tokenizer = dataclasses.replace(TOKENIZER, eos_id=end)
    completions = generate(*model(**ROTARY), tokenizer, PROMPTS, **kwargs)
    assert completions[0].finish == "eos"
    whole = TOKENIZER.decode(completions[0].tokens[:-1])
    assert completions[0].text.rstrip("\ufffd") == whole.rstrip("\ufffd")  # these bytes may end within a character
    for completion, tokens in zip(completions, free, strict=True):
        cut = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert completion.tokens == tokens[:cut]


def test_a_stop_string_ends_a_text_wherever_tokens_break_and_the_stream_adds_up_to_it():
    kwargs = {"max_new_tokens": 40, "temperature": 0.8, "seed": 4}
    free = generate(*model(**ROTARY), TOKENIZER, PROMPTS, **kwargs)
    stop = free[0].text[5:8]
    pieces: list[list[str]] = [[] for _ in PROMPTS]
    completions = generate(
        *model(**ROTARY), TOKENIZER, PROMPTS, stop=stop, on_text=lambda row, piece: pieces[row].append(piece), **kwargs
    )
    assert completions[0].finish == "stop"
    for completion, whole, shown in zip(completions, free, pieces, strict=True):
        assert completion.text == whole.text.partition(stop)[0]
        assert "".join(shown) == completion.text
        assert (completion.finish == "stop") == (stop in whole.text)


def test_texts_beyond_the_learned_positions_are_refused():
    module, params = model(**LEARNED)
    with pytest.raises(ValueError, match=r"prompt 1 has 55 tokens .* max_new_tokens=10 .* 64 learned positions"):
        generate(module, params, TOKENIZER, ["x", "x" * 54], max_new_tokens=10)


@pytest.mark.slow
def test_texts_up_to_the_last_learned_position_are_written():
    assert len(generate(*model(**LEARNED), TOKENIZER, ["x" * 53], max_new_tokens=10, temperature=0)[0].tokens) <= 10


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        ("def", {}, r"write \[prompt\]"),
        (["\ud800"], {}, "lone surrogate"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens=0"),
        (["a"], {"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        (["a"], {"temperature": float("nan")}, "temperature=nan"),
        (["a"], {"top_p": 0.0}, "top_p=0.0 must be above 0"),
        (["a"], {"min_p": 1.5}, "min_p=1.5"),
        (["a", "b"], {"top_k": [1, 2, 3]}, "top_k has 3 values for 2 prompts"),
        (["a", "b"], {"seed": [1]}, "seed has 1 values for 2 prompts"),
        (["a"], {"stop": ["x", ""]}, "stop string is empty"),
        (["a"], {"stop": None}, "stop=None must be a text"),
        (["a"], {"temperature": "0.5"}, "temperature='0.5' must be a number"),
        (["a"], {"max_new_tokens": 2.0}, "max_new_tokens=2.0 must be a whole number"),
        (["a"], {"top_k": True}, "top_k=True must be a whole number"),
        (["a"], {"logit_bias": {70: float("inf")}}, "logit_bias {70: inf}"),
        (["a"], {"logit_bias": dict.fromkeys(range(320), -float("inf"))}, "forbids every token"),
        (["a"], {"heat": 1}, "no setting 'heat'"),
        (["a"], {"number": 1}, "no setting 'number'"),
        (["a"], {"slots": -1}, "slots=-1"),
        (None, {}, r"write \[prompt\]"),
        ([5], {}, "prompt 0 must be a text"),
        ([["a"]], {}, "prompt 0 has 'a', which is no id"),
        ([[999]], {}, "prompt 0 must have ids from 0 to 319"),
    ],
)
def test_mistakes_are_named(prompts, kwargs, message):
    with pytest.raises(UserError, match=message):
        generate(*model(**ROTARY), TOKENIZER, prompts, **kwargs)


def test_no_prompts_give_no_texts():
    assert generate(*model(**ROTARY), TOKENIZER, []) == []


# ---------------------------------------------------------------------- texts


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab\u00e9\u4e2d\U0001f600", max_size=30),
    st.lists(st.integers(1, 4), min_size=1),
    st.lists(st.text(alphabet="ab\u00e9\u4e2d", min_size=1, max_size=4), max_size=2, unique=True),
)
def test_the_stream_is_the_text_cut_at_the_first_stop_string_and_characters_come_whole(whole, sizes, stops):
    data, pieces = whole.encode(), [b"<eos>"]
    while data:
        size = sizes[len(pieces) % len(sizes)]
        pieces, data = [*pieces, data[:size]], data[size:]
    text = Text(piece_bytes=pieces, eos_ids=(0,), stops=stops)
    shown = []
    for token in range(1, len(pieces)):
        text.add(token, 0.0)
        shown.append(text.take())
    text.end("length")
    shown.append(text.take())
    assert "".join(shown) == text.text
    assert "\ufffd" not in text.text
    if any(stop in whole for stop in stops):
        assert text.finish == "stop"
        assert whole.startswith(text.text)
        assert not any(stop in text.text for stop in stops)
        assert any(whole.startswith(stop, len(text.text)) for stop in stops)
    else:
        assert (text.text, text.finish) == (whole, "length")


def test_a_character_cut_by_the_length_limit_is_left_out():
    text = Text(piece_bytes=[b"", b"ok \xf0\x9f", b"\xff"], eos_ids=(0,), stops=())
    text.add(1, 0.0)
    text.end("length")
    assert (text.text, text.take()) == ("ok ", "ok ")


def test_bytes_that_are_no_text_become_replacement_characters():
    text = Text(piece_bytes=[b"", b"a\xff", b"b"], eos_ids=(0,), stops=())
    for token in (1, 2, 0):
        text.add(token, 0.0)
    assert (text.text, text.finish) == ("a\ufffdb", "eos")
