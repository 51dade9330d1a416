"""Batch k is a function of the config and k; an epoch shows every token once; documents stay apart."""

import dataclasses
import json

import numpy as np
import pytest

from llmjax.config import base, duration
from llmjax.data import tokens
from llmjax.data.batches import Corruption, TrainBatches, heldout_batches, pack, tokens_per_epoch
from llmjax.data.mixture import BLOCK, PERIOD, Mixture, capped, parse_mixture, tempered
from llmjax.data.source import StatelessSource
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.infer.score import split_documents

LENGTH, BATCH = 16, 8


def make_config(**train):
    c = base()
    c.train.sequence_length, c.train.batch_size = LENGTH, BATCH
    for key, value in train.items():
        c.train[key] = value
    return c


def write_tokens(folder, streams, record_tokens=50):
    """Token shards of {split: {source: texts}}."""
    splits = {
        split: {
            name: tokens.write_stream(
                texts, byte_tokenizer(), folder=folder / split / name, record_tokens=record_tokens
            )
            for name, texts in sources.items()
        }
        for split, sources in streams.items()
    }
    index = {"dtype": "uint16", "record_tokens": record_tokens, "vocab_size": 260, "tokenizer": "", "splits": splits}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def documents(seed, count=40):
    rng = np.random.default_rng(seed)
    return ["".join(map(chr, rng.integers(97, 123, size=rng.integers(3, 90)))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    streams = {
        "train": {"code": documents(1), "notes": documents(2, 15)},
        "heldout": {"code": documents(3), "notes": ["tiny"]},
    }
    return write_tokens(tmp_path_factory.mktemp("tokens"), streams)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
        assert a[key].dtype == b[key].dtype


def test_batch_k_is_the_same_in_any_order_and_any_instance(folder):
    first = TrainBatches(make_config(), folder, total_steps=50)
    second = TrainBatches(make_config(), folder, total_steps=50)
    forward = [first.batch(k) for k in range(40)]
    for k in reversed(range(40)):
        assert_equal(second.batch(k), forward[k])


def test_another_seed_is_another_order(folder):
    c = make_config()
    c.seed = 1
    assert (
        TrainBatches(c, folder, total_steps=50).batch(0)["tokens"]
        != TrainBatches(make_config(), folder, total_steps=50).batch(0)["tokens"]
    ).any()


def test_resume_is_an_integer(folder):
    batches = TrainBatches(make_config(), folder, total_steps=50)
    ahead = StatelessSource(batches.batch)
    for k in (*range(7, 30), *range(3, 9), 40):  # read ahead, and from another place after going back or skipping
        assert_equal(ahead.batch(k), batches.batch(k))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_batch_k_does_not_depend_on_the_number_of_hosts(folder, hosts):
    whole = TrainBatches(make_config(), folder, total_steps=50)
    parts = [TrainBatches(make_config(), folder, total_steps=50, host=host, hosts=hosts) for host in range(hosts)]
    for k in (0, 5, 31):
        joined = [part.batch(k) for part in parts]
        assert_equal({key: np.concatenate([part[key] for part in joined]) for key in joined[0]}, whole.batch(k))
    held = heldout_batches(make_config(), folder, count=2)
    held_parts = [heldout_batches(make_config(), folder, count=2, host=host, hosts=hosts) for host in range(hosts)]
    for source in held:
        for number, batch in enumerate(held[source]):
            assert_equal({k: np.concatenate([part[source][number][k] for part in held_parts]) for k in batch}, batch)


def test_hosts_that_do_not_divide_the_batch_are_an_error(folder):
    with pytest.raises(ValueError, match=r"train.batch_size=8 is not a multiple of the 3 hosts"):
        TrainBatches(make_config(), folder, total_steps=50, hosts=3)


@pytest.mark.parametrize("length", [5, 16, 49, 50, 51, 130])
def test_an_epoch_shows_every_token_once_up_to_the_cut_ends(tmp_path, length):
    write_tokens(tmp_path, {"train": {"code": documents(1)}, "heldout": {}})
    stream = tokens.read_stream(tmp_path, "train", "code")
    c = make_config(sequence_length=length, batch_size=1)
    batches, epoch = TrainBatches(c, tmp_path, total_steps=9), tokens_per_epoch(c, tokens.load_index(tmp_path))
    rows = epoch // length
    assert len(stream) - epoch < 2 * length + 1
    orders = []
    for epoch in range(2):
        found = [batches.batch(k) for k in range(epoch * rows, (epoch + 1) * rows)]
        windows = [np.append(b["tokens"][0], b["targets"][0, -1]) for b in found]
        starts = [
            next(s for s in range(len(stream) - length) if (stream[s : s + length + 1] == w).all()) for w in windows
        ]
        orders.append(starts)
        assert len({s % length for s in starts}) == 1
        assert sorted(starts) == list(range(min(starts), min(starts) + rows * length, length))
    assert orders[0] != orders[1]
    if rows > 20:
        assert orders[0] != sorted(orders[0])
        assert np.argsort(orders[0]).tolist() != np.argsort(orders[1]).tolist()


def test_positions_and_segments_restart_at_bos_and_no_document_is_predicted_from_another():
    row = np.array([7, 8, 2, 1, 9, 2, 1, 5, 6])
    batch = pack([row, row[:4], row[3:3]], length=8)
    assert batch["tokens"].tolist()[0] == [7, 8, 2, 1, 9, 2, 1, 5]
    assert batch["targets"].tolist()[0] == [8, 2, 1, 9, 2, 1, 5, 6]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 0, 0, 0, 0, 0], [0] * 8]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 2, 3, 3], [1, 1, 1, 2, 0, 0, 0, 0], [0] * 8]
    assert batch["weights"].tolist() == [[1, 1, 0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert {key: array.dtype for key, array in batch.items()} == {
        "tokens": np.int32, "targets": np.int32, "positions": np.int32, "segments": np.int32, "weights": np.float32,
    }  # fmt: skip


def test_a_row_that_begins_with_bos_has_its_first_segment_number_one():
    batch = pack([np.array([1, 5, 2, 1, 6])], length=4)
    assert batch["segments"].tolist() == [[1, 1, 1, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0]]


@pytest.mark.parametrize("size", [1, LENGTH - 2, LENGTH - 1, LENGTH, 2 * LENGTH])
def test_a_corpus_about_as_small_as_one_row_still_works(tmp_path, size):
    write_tokens(tmp_path, {"train": {"code": ["x" * size]}, "heldout": {}})
    batches = TrainBatches(make_config(), tmp_path, total_steps=5)
    for k in range(5):
        batch = batches.batch(k)
        assert batch["tokens"].shape == (BATCH, LENGTH)
        assert (batch["weights"].sum(axis=1) == min(size + 1, LENGTH)).all()


def test_a_corpus_without_text_is_a_clear_error(tmp_path):
    write_tokens(tmp_path, {"train": {"code": []}, "heldout": {}})
    with pytest.raises(ValueError, match="no text to train on"):
        TrainBatches(make_config(), tmp_path, total_steps=5)


def test_a_shard_cut_short_is_named_before_training_starts(tmp_path):
    write_tokens(tmp_path, {"train": {"code": documents(1)}, "heldout": {}})
    file = tmp_path / "train" / "code" / "00000.array_record"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00000.array_record is truncated or damaged"):
        TrainBatches(make_config(), tmp_path, total_steps=5)


def test_without_a_mixture_all_sources_end_their_epochs_together(folder):
    batches = TrainBatches(make_config(batch_size=1), folder, total_steps=50)
    counts = np.array([rows.count for rows in batches._rows])
    sources, _ = batches._mixture.locate(np.arange(counts.sum()))
    assert abs(np.bincount(sources) - counts).max() <= 2


def test_mixture_counts_are_exact_in_every_block_and_stage():
    stages = parse_mixture(
        ["0%: a=3 b=1", "50%: b=1", "80%: a=1 b=1 c=2"],
        sources=["a", "b", "c"],
        steps=lambda text: duration(text, tokens_per_step=80, total_steps=1000),
    )
    mixture = Mixture([(step * 10, weights) for step, weights in stages], sources=["a", "b", "c"], seed=5)
    sources, indices = mixture.locate(np.arange(30_000))
    for start, stop, weights in [(0, 5000, [3, 1, 0]), (5000, 8000, [0, 1, 0]), (8000, 30_000, [1, 1, 2])]:
        share = np.array(weights) / sum(weights)
        for first in range(start, stop - BLOCK, BLOCK):
            assert np.bincount(sources[first : first + BLOCK], minlength=3).tolist() == (share * BLOCK).tolist()
    for source in range(3):  # nothing is skipped and nothing is shown twice, across stages too
        assert indices[sources == source].tolist() == list(range((sources == source).sum()))


def test_mixture_weights_that_do_not_divide_a_block_are_exact_over_a_period():
    stages = [(0, {"a": 0.7, "b": 0.299_99, "c": 0.000_01})]
    mixture = Mixture(stages, sources=["a", "b", "c"], seed=0)
    counts = np.zeros(3, np.int64)
    for block in range(PERIOD):
        found = np.bincount(mixture.locate(np.arange(block * BLOCK, (block + 1) * BLOCK))[0], minlength=3)
        assert (abs(found - np.array([0.7, 0.299_99, 0.000_01]) * BLOCK) < 1).all()
        counts += found
    assert abs(counts - np.array([0.7, 0.299_99, 0.000_01]) * BLOCK * PERIOD).max() <= 1
    far = 10**15
    np.testing.assert_array_equal(
        mixture.locate(np.arange(far, far + 99))[0], mixture.locate(np.arange(far, far + 99))[0]
    )


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (["0%: code=1 nots=1"], "no source 'nots' .* the sources are code, notes"),
        (["0%: code=-1"], "negative"),
        (["10%: code=1"], "first stage must start at 0"),
        (["0%: code=1", "50%: notes=1", "20%: code=1"], "starts at step 20, not after"),
        (["0%: code=0"], "no source has a positive weight"),
        (["0%: code"], "write SOURCE=WEIGHT"),
        (["code=1"], "write START: SOURCE=WEIGHT"),
        (["soon: code=1"], "duration 'soon' is not understood"),
        (["0%: code=1 code=2"], "twice"),
        (["0%:"], "no source has a positive weight"),
    ],
)
def test_a_mixture_that_cannot_be_read_says_why(folder, mixture, message):
    c = make_config()
    c.data.mixture = tuple(mixture)
    with pytest.raises(ValueError, match=message):
        TrainBatches(c, folder, total_steps=100)


def test_a_mixture_changes_the_sources_at_its_step(folder):
    c = make_config()
    c.data.mixture = ("0%: code=1", "3 steps: notes=1")
    batches = TrainBatches(c, folder, total_steps=10)
    for k in range(6):
        name = "code" if k < 3 else "notes"
        stream = tokens.read_stream(folder, "train", name)
        windows = {bytes(w) for w in np.lib.stride_tricks.sliding_window_view(stream.astype(np.int32), LENGTH)}
        assert all(bytes(row) in windows for row in batches.batch(k)["tokens"])


def test_heldout_batches_are_fixed_spread_and_per_source(folder):
    c = make_config()
    held = heldout_batches(c, folder, count=3)
    c.seed = 9
    again = heldout_batches(c, folder, count=3)
    assert list(held) == ["code", "notes"]
    for source in held:
        for a, b in zip(held[source], again[source], strict=True):
            assert_equal(a, b)
            assert a["tokens"].shape == (BATCH, LENGTH)
    assert [len(held[source]) for source in held] == [3, 1]
    pieces = byte_tokenizer().piece_bytes
    batch = held["notes"][0]
    assert b"".join(pieces[i] for i in batch["targets"][batch["weights"] > 0]) == b"tiny"


def test_heldout_batches_of_a_whole_stream_score_every_byte_once(folder):
    held = heldout_batches(make_config(), folder, count=10**6)
    text_bytes = tokens.load_index(folder).splits["heldout"]["code"]["text_bytes"]
    pieces = byte_tokenizer().piece_bytes
    scored = sum(len(pieces[i]) for batch in held["code"] for i in batch["targets"][batch["weights"] > 0])
    assert scored == text_bytes


def test_one_id_for_both_ends_of_documents_stands_once_between_them_and_is_predicted(tmp_path):
    one = dataclasses.replace(byte_tokenizer(), bos_id=2)  # as GPT-2's <|endoftext|>
    entry = tokens.write_stream(["ab", "c"], one, folder=tmp_path / "train" / "x", record_tokens=50)
    index = {"dtype": "uint16", "record_tokens": 50, "vocab_size": 260, "tokenizer": "", "start_id": 2, "end_id": 2}
    (tmp_path / "index.json").write_text(json.dumps({**index, "splits": {"train": {"x": entry}, "heldout": {}}}))
    stream = tokens.read_stream(tmp_path, "train", "x")
    a, b, c = (4 + ord(letter) for letter in "abc")
    assert stream.tolist() == [2, a, b, 2, c]
    assert [d.tolist() for d in split_documents(stream, start_id=2, end_id=2)] == [[2, a, b, 2], [2, c]]
    batch = TrainBatches(make_config(sequence_length=4), tmp_path, total_steps=5).batch(0)
    assert batch["targets"][0].tolist() == [a, b, 2, c]
    assert batch["weights"][0].tolist() == [1, 1, 1, 1]
    assert batch["segments"][0].tolist() == [1, 1, 1, 2]


def test_padding_is_told_by_the_length_of_a_row_and_not_by_an_id():
    batch = pack([np.array([1, 0, 5, 0]), np.array([1, 7])], length=4)
    assert batch["segments"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("hosts", [1, 2])
def test_what_an_objective_does_to_a_row_depends_on_the_seed_the_batch_and_the_row_alone(folder, hosts):
    def change(row, rng):
        return {**row, "drawn": rng.integers(0, 1 << 60, 3)}

    def made(c, k, parts=1):
        parts = [
            TrainBatches(c, folder, total_steps=50, corruption=Corruption(LENGTH, change), host=host, hosts=parts)
            for host in range(parts)
        ]
        return np.concatenate([part.batch(k)["drawn"] for part in parts])

    c, other = make_config(), make_config()
    other.seed = 1
    np.testing.assert_array_equal(made(c, 3, hosts), made(c, 3))
    every = np.concatenate([made(c, 3), made(c, 4), made(other, 3)])
    assert len({tuple(row) for row in every.tolist()}) == len(every), "no two rows have the same random numbers"


def test_rows_of_more_text_than_the_sequence_length_still_show_every_token_once(tmp_path):
    write_tokens(tmp_path, {"train": {"code": documents(1)}, "heldout": {}})
    longer = Corruption(LENGTH + 5, lambda row, rng: row)
    c = make_config(batch_size=1)
    batches = TrainBatches(c, tmp_path, total_steps=9, corruption=longer)
    rows = tokens_per_epoch(c, tokens.load_index(tmp_path), corruption=longer) // LENGTH
    found = [batches.batch(k)["tokens"][0] for k in range(rows)]
    stream = tokens.read_stream(tmp_path, "train", "code")
    shown = sorted(bytes(row.astype(np.uint16)) for row in found)
    shifts = [
        sorted(bytes(stream[s + i * 21 : s + (i + 1) * 21]) for i in range(rows))
        for s in range(len(stream) - rows * 21)
    ]
    assert shown in shifts


def test_a_source_is_seen_no_more_often_than_max_epochs_and_the_others_give_the_rest():
    sizes = {"a": 100, "b": 1000, "c": 10_000}
    stages = capped([(0, {"a": 1, "b": 1, "c": 2})], examples=4096, sizes=sizes, max_epochs=2.0)
    counts = Mixture(stages, sources=list(sizes), seed=0).counts(4096)  # whole blocks
    assert counts["a"] == pytest.approx(200, abs=2)
    assert counts["c"] / counts["b"] == pytest.approx(2.0, rel=0.01) and sum(counts.values()) == 4096
    # What the first stage used up is not there for the second.
    stages = capped([(0, {"a": 1}), (150, {"a": 1, "b": 1})], examples=150 + BLOCK, sizes=sizes, max_epochs=2.0)
    counts = Mixture(stages, sources=list(sizes), seed=0).counts(
        150 + BLOCK
    )  # a whole block: of a part of one a source may have a few more
    assert counts["a"] == pytest.approx(200, abs=2) and counts["c"] == 0
    with pytest.raises(ValueError, match="200 examples left under it, and 300 are wanted"):
        capped([(0, {"a": 1})], examples=300, sizes=sizes, max_epochs=2.0)


def test_the_temperature_lifts_small_sources():
    sizes = {"large": 900, "small": 100}
    assert tempered(sizes, 1.0) == {"large": 900.0, "small": 100.0}
    assert tempered(sizes, 0.5) == {"large": 30.0, "small": 10.0}
    assert tempered(sizes, 0.0) == {"large": 1.0, "small": 1.0}


def test_counts_agree_with_where_every_example_is():
    mixture = Mixture([(0, {"a": 3, "b": 1}), (700, {"b": 1, "c": 5})], sources=["a", "b", "c"], seed=1)
    for examples in (0, 1, 256, 699, 700, 701, 1500):
        sources, _ = mixture.locate(np.arange(examples))
        assert list(mixture.counts(examples).values()) == np.bincount(sources, minlength=3).tolist()
