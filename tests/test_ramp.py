"""Batches grow over a ramp in stages; rows, tokens, durations, rates and a resume come out as if counted one by one."""

import json
import logging
import random

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, make_batch, tiny_config

from llmjax import config
from llmjax.data import tokens
from llmjax.data.batches import TrainBatches
from llmjax.data.ramp import batch_sizes, micro_batches, sizes
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.train import executable, folders
from llmjax.train.schedule import make_schedule


def settings(**changes):
    c = config.base().train
    c.update({"sequence_length": 10, "batch_size": 32, "duration": "100 steps", **changes})
    return c


# ---------------------------------------------------------------- stages


def test_without_a_ramp_there_is_one_stage():
    (stage,) = batch_sizes(settings(micro_batches=4)).stages
    assert (stage.first_step, stage.first_row, stage.rows, stage.micro_batches) == (0, 0, 32, 4)


def test_a_ramp_in_steps_doubles_where_the_line_reaches_the_next_size():
    # The line rises by 28 sequences in 28 steps: 8 after 4, 16 after 12, 32 after 28.
    found = batch_sizes(settings(batch_ramp="28 steps", batch_start=4)).stages
    assert [(s.first_step, s.rows, s.first_row) for s in found] == [(0, 4, 0), (4, 8, 16), (12, 16, 80), (28, 32, 336)]


def test_a_ramp_in_tokens_counts_what_was_read():
    # 4 at 0, 8 after 40 sequences (10 steps), 16 after 120 (10 more), 32 after 280 (10 more).
    found = batch_sizes(settings(batch_ramp="2800 tokens", batch_start=4)).stages
    assert [(s.first_step, s.rows, s.first_row) for s in found] == [
        (0, 4, 0),
        (10, 8, 40),
        (20, 16, 120),
        (30, 32, 280),
    ]
    in_epochs = settings(batch_ramp="2 epochs", batch_start=4)
    assert batch_sizes(in_epochs, tokens_per_epoch=1400).stages == found
    with pytest.raises(ValueError, match=r"train.batch_ramp='2 epochs': epochs are not known here"):
        batch_sizes(in_epochs)


def test_a_percentage_is_of_the_training_in_the_unit_of_its_duration():
    by_tokens = settings(batch_ramp="25%", batch_start=4, duration="11200 tokens")
    assert batch_sizes(by_tokens).stages == batch_sizes(settings(batch_ramp="2800 tokens", batch_start=4)).stages
    by_steps = settings(batch_ramp="28%", batch_start=4, duration="100 steps")
    assert batch_sizes(by_steps).stages == batch_sizes(settings(batch_ramp="28 steps", batch_start=4)).stages


def test_the_last_size_need_not_be_a_doubling_and_a_short_ramp_skips_stages():
    assert sizes(settings(batch_ramp="9 steps", batch_start=5)) == [5, 10, 20, 32]
    found = batch_sizes(settings(batch_ramp="2 steps", batch_start=1)).stages
    assert [(s.first_step, s.rows) for s in found] == [(0, 8), (1, 16), (2, 32)]


def test_a_batch_is_cut_into_as_few_micro_batches_as_fit():
    c = settings(batch_size=48, micro_batches=4)  # 12 rows at a time
    assert {size: micro_batches(c, size) for size in (3, 6, 12, 24, 48, 13, 30)} == {
        3: 1,
        6: 1,
        12: 1,
        24: 2,
        48: 4,
        13: 13,
        30: 3,
    }


def test_whatever_the_ramp_sizes_stay_under_the_line_reach_the_end_and_add_up():
    rng = random.Random(0)
    for _ in range(200):
        size = rng.randint(2, 500)
        start = rng.randint(1, size - 1)
        unit, amount = rng.choice([("steps", rng.randint(1, 300)), ("tokens", rng.randint(1, 10**6))])
        c = settings(
            batch_size=size, batch_start=start, batch_ramp=f"{amount} {unit}", sequence_length=rng.randint(1, 9)
        )
        plan = batch_sizes(c)
        assert len(plan.stages) <= 2 + (size // start).bit_length()
        rows = 0
        for step in range(plan.stages[-1].first_step + 5):
            now = plan.at(step)
            assert plan.first_row(step) == rows
            assert plan.tokens(step) == rows * c.sequence_length
            assert now.rows % now.micro_batches == 0
            done = step if unit == "steps" else rows * c.sequence_length
            line = start + (size - start) * min(done / amount, 1)
            assert (
                now.rows <= line + (0.5 * (size - start) / amount if unit == "steps" else 0) + 1e-6
            )  # steps are whole
            assert now.rows == size or now.rows > line / 2 - (size if unit == "steps" else 0) / amount
            rows += now.rows
        assert plan.at(10**9).rows == size


def test_durations_are_steps_at_which_so_much_was_read():
    plan = batch_sizes(settings(batch_ramp="2800 tokens", batch_start=4), tokens_per_epoch=4000)
    for step in range(60):
        assert plan.steps(f"{plan.tokens(step)} tokens") == step
    assert plan.steps("1 epoch") == plan.steps("4000 tokens") == 30 + round((400 - 280) / 32)
    assert plan.steps("7 steps") == plan.steps("7%", total_steps=100) == 7
    assert plan.period("640 tokens") == 2
    flat = batch_sizes(settings(), tokens_per_epoch=4000)
    for value in ("500 tokens", "1 epoch", "3 steps", "10%"):
        expected = config.duration(value, tokens_per_step=320, tokens_per_epoch=4000, total_steps=200)
        assert flat.steps(value, total_steps=200) == flat.period(value, total_steps=200) == expected
    with pytest.raises(ValueError, match="epochs are not known here"):
        batch_sizes(settings()).steps("1 epoch")


# ---------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token shards of one source."""
    path = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, rng.integers(5, 90)))) for _ in range(300)]
    splits = {
        "train": {
            "text": tokens.write_stream(texts, byte_tokenizer(), folder=path / "train" / "text", record_tokens=64)
        },
        "heldout": {},
    }
    index = {"dtype": "uint16", "record_tokens": 64, "vocab_size": 260, "tokenizer": "", "splits": splits}
    (path / "index.json").write_text(json.dumps(index))
    return path


def data_config(**train):
    return tiny_config(train__batch_size=8, train__sequence_length=16, **{f"train__{k}": v for k, v in train.items()})


def rows_of(batches, count):
    return np.concatenate([batches.batch(k)["tokens"] for k in range(count)])


def test_a_ramp_reads_the_same_rows_in_the_same_order(folder):
    plain = TrainBatches(data_config(), folder, total_steps=20)
    ramp = TrainBatches(data_config(batch_ramp="12 steps", batch_start=2), folder, total_steps=20)
    counts = [len(ramp.batch(k)["tokens"]) for k in range(20)]
    assert sorted(set(counts)) == [2, 4, 8]
    assert counts == sorted(counts)
    here = rows_of(ramp, 20)
    np.testing.assert_array_equal(here, rows_of(plain, 20)[: len(here)])
    np.testing.assert_array_equal(
        ramp.batch(7)["tokens"],
        TrainBatches(data_config(batch_ramp="12 steps", batch_start=2), folder, total_steps=20).batch(7)["tokens"],
    )


def test_the_hosts_parts_make_the_batch_at_every_size(folder):
    c = data_config(batch_ramp="6 steps", batch_start=2)
    whole = TrainBatches(c, folder, total_steps=9)
    parts = [TrainBatches(c, folder, total_steps=9, host=host, hosts=2) for host in range(2)]
    for k in range(9):
        np.testing.assert_array_equal(np.concatenate([p.batch(k)["tokens"] for p in parts]), whole.batch(k)["tokens"])
    with pytest.raises(
        ValueError, match=r"a batch of the ramp from train.batch_start=2 is not a multiple of the 4 hosts"
    ):
        TrainBatches(c, folder, total_steps=9, hosts=4)


# ---------------------------------------------------------------- rates


def test_rates_by_tokens_follow_the_tokens_and_rates_by_steps_the_steps():
    plan = batch_sizes(settings(batch_ramp="2800 tokens", batch_start=4))
    c = config.base().schedule
    c.update({"name": "linear", "warmup": "400 tokens", "final": 0.0})  # the first stage, 10 steps
    by_steps = make_schedule(c, total_steps=101, sizes=plan)
    for step, value in {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}.items():
        assert float(by_steps(jnp.int32(step))) == pytest.approx(value, abs=1e-6), step
    c.by = "tokens"
    by_tokens = make_schedule(c, total_steps=101, sizes=plan)
    last = plan.tokens(100)
    for step in range(101):
        seen = plan.tokens(step)
        value = plan.tokens(step + 1) / 400 if seen < 400 else 1 - (seen - 400) / (last - 400)
        assert float(by_tokens(jnp.int32(step))) == pytest.approx(value, abs=1e-5), step


@pytest.mark.parametrize("name", ["constant", "step", "exponential", "cosine", "linear", "inverse_sqrt", "wsd"])
def test_without_a_ramp_rates_by_tokens_are_those_by_steps(name):
    made = []
    for by in ("steps", "tokens"):
        c = config.base().schedule
        c.name, c.by = name, by
        made.append(make_schedule(c, total_steps=200, sizes=batch_sizes(settings())))
    for step in (0, 1, 3, 4, 50, 119, 120, 170, 199):
        assert float(made[0](jnp.int32(step))) == pytest.approx(float(made[1](jnp.int32(step))), abs=1e-6), step


# ---------------------------------------------------------------- the loop

RAMP = {"train__batch_size": 8, "train__batch_start": 2, "train__batch_ramp": "6 steps", "train__micro_batches": 2}
SIZES = [2, 2, 4, 4, 4, 4, 8, 8]  # 2 and 4 in one piece, 8 in two: the line reaches 4 after 2 steps, 8 after 6


def ramping(c, *, stop=10**9):
    """Batch k of a text whose batches grow."""
    plan = batch_sizes(c.train)
    rows = {name: np.concatenate([make_batch(c, k)[name] for k in range(8)]) for name in make_batch(c, 0)}

    def batch(k):
        if k == stop:
            raise KeyError("stop here")
        return {name: x[plan.first_row(k) : plan.first_row(k + 1)] for name, x in rows.items()}

    return batch


def train(c, workdir, **options):
    results = helpers.train(c, workdir, batch=ramping(c, **options))
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        folder = folders.newest(workdir)
        state = [checkpointer.restore((folder / name).absolute()) for name in ("params", "rest")]
    return results, state, [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_counts_rows_and_tokens_and_goes_on_inside_the_ramp_bit_for_bit(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(executable, "_compiled", {})
    monkeypatch.setattr(helpers, "PROGRAMS", {})
    c = tiny_config(**RAMP, checkpoint__every="3 steps", model__dropout=0.1, schedule__by="tokens")
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        results, state, rows = train(c, tmp_path / "whole")
    assert sum("Finished XLA compilation of jit(step)" in r.getMessage() for r in caplog.records) == 3
    assert [row["batch_size"] for row in rows] == SIZES
    assert [row["tokens"] for row in rows] == (16 * np.cumsum(SIZES)).tolist()
    assert results["tokens"] == 16 * sum(SIZES)
    assert rows[-1]["flops"] / rows[-1]["tokens"] == pytest.approx(rows[0]["flops"] / rows[0]["tokens"])
    with pytest.raises(KeyError, match="stop here"):
        train(c, tmp_path / "halves", stop=5)
    assert folders.steps_in(tmp_path / "halves" / "checkpoints") == [3]
    _, resumed, again = train(c, tmp_path / "halves")
    assert_same_bits(resumed, state)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


@pytest.mark.usefixtures("one_device")
def test_a_duration_in_tokens_ends_the_run_when_they_are_read(tmp_path):
    changes = {
        "train__batch_size": 4,
        "train__batch_start": 2,
        "train__batch_ramp": "96 tokens",
    }  # 6 sequences, 3 steps
    c = tiny_config(**changes, train__duration=f"{16 * 14} tokens")
    results, _, rows = train(c, tmp_path)
    assert results["tokens"] == rows[-1]["tokens"] == 16 * 14
    assert [row["batch_size"] for row in rows] == [2, 2, 2, 4, 4]


def test_a_stage_that_the_mesh_does_not_divide_is_an_error_before_training(tmp_path):
    with pytest.raises(
        ValueError, match=r"= 2 / 1 = 2 sequences of the stage of the batch ramp from step 0 cannot.*train.batch_start"
    ):
        train(tiny_config(**RAMP, parallel__mesh="data=8"), tmp_path)
    with pytest.raises(ValueError, match=r"= 8 / 2 = 4 sequences cannot be spread over 8 devices"):
        train(tiny_config(train__micro_batches=2, parallel__mesh="data=8"), tmp_path)


def test_a_ramp_that_does_not_rise_is_refused():
    with pytest.raises(ValueError, match=r"grows batches from train.batch_start=8 to train.batch_size=8"):
        tiny_config(train__batch_ramp="5 steps", train__batch_start=8)
