"""Perplexity and bits per byte: every target is scored once, with the context that was promised."""

import lzma
import math

import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.eval import stage
from llmjax.eval.stage import xz_bytes
from llmjax.infer import score as bpb
from llmjax.train.score import Score


@pytest.mark.parametrize(
    ("count", "length", "stride"), [(1, 8, 4), (8, 8, 4), (9, 8, 4), (100, 8, 3), (100, 8, 8), (31, 8, 1)]
)
def test_windows_score_every_target_once_with_at_least_the_promised_context(count, length, stride):
    scored = np.zeros(count, int)
    for start, stop, first in bpb.windows(count, length=length, stride=stride):
        assert 0 <= start <= first < stop <= count
        assert stop - start <= length
        if first:  # all windows after the first are full, and keep length - stride tokens of context
            assert stop - start == length
            assert first - start >= length - stride
        scored[first:stop] += 1
    assert (scored == 1).all()


def documents(rng: np.random.Generator) -> list[np.ndarray]:
    return [np.concatenate([[1], rng.integers(4, 20, n), [2]]).astype(np.int32) for n in (3, 40, 1, 17, 9, 0, 64)]


@pytest.mark.parametrize(("length", "stride"), [(16, 8), (16, 16), (128, 64)])
def test_packed_windows_hold_each_document_apart_and_score_all_of_it(length, stride):
    docs = documents(np.random.default_rng(0))
    seen = []
    for batch in bpb.pack_windows(docs, length=length, stride=stride, batch_size=3):
        assert all(x.shape == (3, length) for x in batch.values())
        for row in range(3):
            for segment in range(1, batch["segments"][row].max() + 1):
                here = batch["segments"][row] == segment
                positions = batch["positions"][row][here]
                np.testing.assert_array_equal(positions, np.arange(len(positions)))
                tokens, targets = batch["tokens"][row][here], batch["targets"][row][here]
                np.testing.assert_array_equal(tokens[1:], targets[:-1])  # one run of one document
        seen += batch["targets"][batch["weights"] > 0].tolist()
        assert (batch["weights"][batch["segments"] == 0] == 0).all()
    assert sorted(seen) == sorted(t for d in docs for t in d[1:].tolist())


def test_bits_per_byte_of_a_known_distribution_is_its_entropy():
    # Tokens of one byte, all 16 equally likely, and the end of a document certain: 4 bits per byte.
    docs = documents(np.random.default_rng(1))
    sizes = np.array([0] * 4 + [1] * 16)

    def nats_of(batch):
        return np.where(batch["targets"] == 2, 0.0, math.log(16)) * batch["weights"]

    score = bpb.score(nats_of, docs, length=16, stride=8, batch_size=2, piece_sizes=sizes)
    assert score.bytes == sum(len(d) - 2 for d in docs)
    assert score.tokens == sum(len(d) - 1 for d in docs)
    assert score.bits_per_byte == pytest.approx(4.0, abs=1e-6)
    assert score.perplexity == pytest.approx(math.exp(score.nats / score.tokens))


@pytest.mark.parametrize(("stride", "batch_size"), [(17, 2), (0, 2), (-1, 2), (8, 0)])
def test_windows_that_would_leave_tokens_out_are_refused(stride, batch_size):
    with pytest.raises(UserError, match=f"stride={stride} must be from 1 to the window's 16 tokens, and batch_size="):
        bpb.score(np.zeros, [], length=16, stride=stride, batch_size=batch_size, piece_sizes=np.zeros(1))


def test_documents_are_split_at_their_beginnings():
    docs = documents(np.random.default_rng(2))
    for a, b in zip(bpb.split_documents(np.concatenate(docs).astype(np.uint16)), docs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_xz_yardstick_is_the_size_of_a_stream_that_xz_reads_back():
    data = b"the same words and the same words again " * 500
    assert xz_bytes(data) < len(data) / 20
    packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    assert len(packed) == xz_bytes(data)
    assert lzma.decompress(packed) == data


def test_bits_per_character_divide_by_characters_and_bits_per_byte_by_bytes():
    numbers = stage._numbers(Score(nats=12 * math.log(2), tokens=3, bytes=6), len("é" * 3))
    assert numbers["bits_per_byte"] == pytest.approx(2.0) and numbers["bits_per_character"] == pytest.approx(4.0)
