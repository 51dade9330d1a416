"""What is handed to the loop: sources of batches that keep a state, evaluations of any kind, a budget of time."""

import functools
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest
from helpers import assert_same_bits, few, first_params, make_batch, mesh_of, rows_of, tiny_config, train
from test_train import last_state

from llmjax import recipe
from llmjax.data.batches import heldout_batches
from llmjax.data.source import StatelessSource
from llmjax.errors import UserError
from llmjax.model import transformer
from llmjax.parallel import mesh as meshes
from llmjax.parallel import processes
from llmjax.train import budget, folders, pretrain
from llmjax.train.heldout import make_heldout
from llmjax.train.schedule import make_schedule

STEPS, ROUND = 10, 3
FIRST_BYTE = 4  # the id of byte 0


def own_rows(batch):
    """The part of a global batch that this process reads."""
    return {name: np.split(x, processes.count())[processes.index()] for name, x in batch.items()}


class Rounds:
    """Rounds of three batches, sampled with the parameters of the round's first step, as on-policy training samples."""

    stateless = False

    def __init__(self, c, *, killed_with=None):
        self._c, self._killed_with = c, killed_with  # at batch 6, once this checkpoint is complete
        self._left = np.empty((0,))
        self._rounds = 0

    def batch(self, k, params):
        if k == 6 and self._killed_with is not None:
            while not self._killed_with.is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        number, place = divmod(k, ROUND)
        if place == 0:
            seen = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(params)))
            digest = hashlib.blake2b(seen + bytes([number]), digest_size=8).digest()
            shape = (ROUND, self._c.train.batch_size, self._c.train.sequence_length + 1)
            sampled = np.random.default_rng(int.from_bytes(digest)).integers(4, 300, shape).astype(np.int32)
            self._left = np.split(sampled, processes.count(), axis=1)[processes.index()]
            self._rounds += 1
        rows, self._left = self._left[0], self._left[1:]
        return own_rows(make_batch(self._c, k)) | {"tokens": rows[:, :-1], "targets": rows[:, 1:]}

    def state(self):
        return {"left": self._left, "rounds": np.array(self._rounds)} if len(self._left) else {}

    def restore(self, state):
        if state:
            self._left, self._rounds = state["left"], int(state["rounds"])

    def metrics(self):
        return {"left_of_the_round": float(len(self._left))}


def rounds_config():
    return tiny_config(train__duration=f"{STEPS} steps", checkpoint__every="4 steps", train__eval_every="0 steps")


def train_rounds(workdir, **options):
    c = rounds_config()
    return train(c, workdir, make_source=lambda total: Rounds(c, **options))


@pytest.fixture(scope="module")
def whole_rounds(tmp_path_factory):
    """A run of rounds that nothing disturbed, on one device."""
    workdir = tmp_path_factory.mktemp("rounds") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", functools.partial(meshes.make_mesh, devices=jax.devices()[:1]))
        train_rounds(workdir)
    return workdir


def stopped(run):
    """Train until batch 6 ends the run by an error, in this process."""

    def stop(*_):
        raise KeyError("stop here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", stop)
        with pytest.raises(KeyError, match="stop here"):
            train_rounds(run, killed_with=run / "checkpoints" / "4")


def killed(run):
    """Train in a process that batch 6 kills."""
    script = (
        "import sys, functools, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import jax; from llmjax.parallel import mesh; from llmjax.train import hardware\n"
        "hardware._measured_cpu = lambda: 1e11\n"
        "mesh.make_mesh = functools.partial(mesh.make_mesh, devices=jax.devices()[:1])\n"
        "import test_source; run = pathlib.Path(sys.argv[2])\n"
        "test_source.train_rounds(run, killed_with=run / 'checkpoints' / '4')\n"
    )
    command = [sys.executable, "-c", script, Path(__file__).parent, run]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize("end", few([stopped, killed]), ids=lambda end: end.__name__)  # test_train.py kills runs
def test_a_source_with_a_state_that_ends_inside_a_round_goes_on_to_the_same_bits(
    end, tmp_path, whole_rounds, one_device
):
    end(tmp_path / "run")
    assert folders.steps_in(tmp_path / "run" / "checkpoints") == [4]
    assert (tmp_path / "run" / "checkpoints" / "4" / "source").is_dir(), "step 4 lies inside a round"
    train_rounds(tmp_path / "run")
    assert_same_bits(last_state(tmp_path / "run"), last_state(whole_rounds))
    rows = [[{k: row[k] for k in ("loss", "left_of_the_round")} for row in rows_of(workdir)]
            for workdir in (whole_rounds, tmp_path / "run")]  # fmt: skip
    assert rows[0] == rows[1]
    assert [row["left_of_the_round"] for row in rows[0]] == [2, 1, 0] * 3 + [2]


def test_what_a_source_with_a_state_cannot_do_is_refused(tmp_path, whole_rounds, one_device):
    c = rounds_config()
    c.train.rewind.factor = 1.5
    with pytest.raises(UserError, match=r"train\.rewind\.factor skips batches"):
        train(c, tmp_path / "rewinding", make_source=lambda total: Rounds(c))
    c = tiny_config(train__duration="1 minute")
    with pytest.raises(UserError, match="the time of a step cannot be measured"):
        train(c, tmp_path / "timed", make_source=lambda total: Rounds(c))
    shutil.copytree(whole_rounds, tmp_path / "run")
    with pytest.raises(UserError, match="keeps left, rounds of a source of batches that is not this run's"):
        train(rounds_config(), tmp_path / "run")


# ---------------------------------------------------------------- evaluations


def test_the_note_of_an_evaluation_says_whatever_it_returned(tmp_path, one_device, capsys):
    found = iter(
        [
            {"reward": 0.25, "arc/acc {x}": 0.5},
            {"heldout_loss": 2.0, "heldout_accuracy": 0.125, "heldout_loss/a": 1},
            {"arc/acc {x}": 0.5},
        ]
    )
    c = tiny_config(train__duration="6 steps", train__eval_every="2 steps", checkpoint__every="0 steps")
    train(c, tmp_path, evaluate=lambda params: next(found))
    notes = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d+: loss", line)]
    assert [note.partition(": ")[0] for note in notes] == ["step 2", "step 4", "step 6"]
    for note, end in zip(
        notes, (", reward 0.25", ", held-out loss 2.0000, 12.50% right", ", arc/acc x 0.5"), strict=True
    ):
        assert note.endswith(end)
    assert rows_of(tmp_path)[1]["arc/acc {x}"] == 0.5


# ---------------------------------------------------------------- a budget of time


def timed_config(**changes):
    return tiny_config(train__duration="1 minute", schedule__warmup="25%", train__eval_every="50%",
                       checkpoint__every="50%", **changes)  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """As if a step took 7.5 seconds; the list has how often it was measured."""
    times, real = [], budget.seconds_per_step

    def seconds_per_step(run, state, *, seconds):
        assert seconds == pytest.approx(3.0)
        assert real(run, state, seconds=0.0) > 0
        times.append(seconds)
        return 7.5

    monkeypatch.setattr(budget, "seconds_per_step", seconds_per_step)
    return times


def test_a_budget_of_time_becomes_steps_once_and_a_resumed_run_is_the_same_run(tmp_path, one_device, measured, capsys):
    c, totals = timed_config(model__dropout=0.1), []

    def make_source(total, stop=1000):
        totals.append(total)

        def batch(k):
            if k == stop:
                raise KeyError("stop here")
            return make_batch(c, k)

        return helpers.StatelessSource(batch, read_ahead=0)

    results = train(c, tmp_path / "whole", make_source=make_source)
    assert results["steps"] == 8
    assert results["duration"] == "1 minute"
    assert "train.duration='1 minute': a step takes 7.5 s, so 8 steps" in capsys.readouterr().out
    assert totals == [0, 8], "measured before the number of steps is known, trained with it"
    rate = make_schedule(c.schedule, total_steps=8)
    rates = [row["learning_rate"] for row in rows_of(tmp_path / "whole")]
    assert rates == pytest.approx([c.optimizer.learning_rate * float(rate(k)) for k in range(8)], rel=1e-6)
    with pytest.raises(KeyError, match="stop here"):
        train(c, tmp_path / "run", make_source=functools.partial(make_source, stop=6))
    assert len(measured) == 2
    assert folders.read_meta(tmp_path / "run" / "checkpoints" / "4")["budget"] == {
        "duration": "1 minute", "steps": 8, "seconds_per_step": 7.5}  # fmt: skip
    (tmp_path / "run" / "train" / "budget.json").unlink()  # a checkpoint says it too
    train(c, tmp_path / "run", make_source=make_source)
    assert len(measured) == 2, "never measured again"
    assert_same_bits(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))


@pytest.mark.slow
def test_a_budget_trains_as_so_many_steps_do_and_a_longer_one_goes_on_at_the_pace_that_was_measured(
    tmp_path, one_device, measured
):
    c = timed_config(model__dropout=0.1)
    assert train(c, tmp_path / "run")["steps"] == 8
    plain = tiny_config(model__dropout=0.1, train__duration="8 steps", schedule__warmup="25%")
    train(plain, tmp_path / "plain")
    for a, b in zip(rows_of(tmp_path / "run"), rows_of(tmp_path / "plain"), strict=True):
        assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-6)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    c.train.duration = "90 s"
    assert train(c, tmp_path / "run")["steps"] == 12
    assert len(measured) == 1
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 13))


def test_a_time_where_only_a_number_of_steps_will_do_is_refused():
    from llmjax.scaling import compiler

    for changes, message in (
        ({"schedule__warmup": "1 minute"}, r"'1 minute': only train\.duration may be a time"),
        ({"train__duration": "0 s"}, "must be above 0"),
        (
            {"train__duration": "5 minutes", "train__batch_ramp": "10%", "train__batch_start": 2},
            "measured with one step",
        ),
        ({"train__duration": "5 fortnights"}, "is not understood"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_config(**changes)
    with pytest.raises(UserError, match=r"a plan measures no step.*give train\.duration in tokens or steps"):
        compiler.stages(tiny_config(train__duration="2 days"))


# ---------------------------------------------------------------- mixtures by percent, evaluation in micro-batches


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """A run with two sources of text, prepared."""
    folder = tmp_path_factory.mktemp("two")
    for name in "ab":
        (folder / name).mkdir()
        for i in range(12):
            (folder / name / f"{i}.txt").write_text(f"{10 * name} {i}\n" * 40)
    c = two_config(folder)
    recipe.run(c.lock(), folder / "run", ("prepare", "tokenizer"))
    return folder


def two_config(folder, **changes):
    sources = (f"a={folder / 'a'}", f"b={folder / 'b'}")
    c = tiny_config(train__duration="20 steps", schedule__name="constant", schedule__warmup="0 steps",
                    train__eval_every="0 steps", train__batch_size=16, checkpoint__every="100%", **changes)  # fmt: skip
    c.data.sources = sources
    return c


@pytest.mark.parametrize(
    ("mixture", "shares"),
    [
        pytest.param(("0%: a=1", "80%: b=1"), {15: 0.0, 16: 1.0, 19: 1.0}, marks=pytest.mark.slow),
        pytest.param(("0%: a=1", "40%: b=1"), {7: 0.0, 8: 1.0}, marks=pytest.mark.slow),
        (("0%: a=1", "60%: b=1", "90%: a=1"), {11: 0.0, 12: 1.0, 17: 1.0, 18: 0.0}),
        pytest.param(("0%: a=1", "8 steps: b=1"), {7: 0.0, 8: 1.0}, marks=pytest.mark.slow),
    ],
)
def test_stages_of_a_mixture_begin_at_their_share_of_the_run(
    mixture, shares, two_sources, tmp_path, monkeypatch, one_device
):
    workdir = shutil.copytree(two_sources / "run", tmp_path / "run")
    found, real = {}, StatelessSource.batch

    def batch(self, k, params=None):
        made = real(self, k, params)
        found[k] = np.mean((made["tokens"] == FIRST_BYTE + ord("b")).any(axis=1))  # share of the rows
        return made

    monkeypatch.setattr(StatelessSource, "batch", batch)
    pretrain.run(two_config(two_sources, data__mixture=mixture).lock(), workdir)
    assert {k: found[k] for k in shares} == shares
    assert len(found) == 20


def test_held_out_text_is_measured_in_micro_batches_compiled_before_it_is_due(two_sources, caplog):
    found, mesh = [], mesh_of("data=1")
    for parts in (1, 4):
        c = two_config(two_sources, train__micro_batches=parts, train__eval_batches=2)
        heldout = heldout_batches(c, two_sources / "run" / "tokenizer" / "tokens", count=2)
        rows = {len(batch["tokens"]) for batches in heldout.values() for batch in batches}
        assert rows == {16 // parts}
        module = transformer.build(c.model)
        params = first_params(module)
        evaluate = make_heldout(c, module, heldout, np.ones(c.model.vocab_size), mesh, params)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
            found.append(evaluate(params))
        assert not any("XLA compilation of jit(step)" in record.getMessage() for record in caplog.records)
    assert found[0].keys() == {f"heldout_{kind}{end}" for kind in ("loss", "accuracy", "bits_per_byte")
                               for end in ("", "/a", "/b")}  # fmt: skip
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_held_out_scores_with_weights_that_are_shares_are_weighted_means(two_sources):
    c, mesh = two_config(two_sources), mesh_of("data=1")
    module = transformer.build(c.model)
    params = first_params(module)
    heldout = heldout_batches(c, two_sources / "run" / "tokenizer" / "tokens", count=1)
    small = {
        name: [batch | {"weights": batch["weights"] / 4096} for batch in batches] for name, batches in heldout.items()
    }
    whole, shares = (
        make_heldout(c, module, h, np.ones(c.model.vocab_size), mesh, params)(params) for h in (heldout, small)
    )
    assert shares == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_a_plan_knows_what_the_measurement_of_held_out_text_needs():
    from llmjax.scaling import compiler

    mesh, needed = mesh_of("data=1"), {}
    for parts in (1, 8):
        c = tiny_config(train__batch_size=64, train__micro_batches=parts, train__sequence_length=64)
        sizes = compiler.stages(c)
        made = compiler.compile_stage(c, mesh, sizes, sizes.stages[0])
        needed[parts] = compiler.evaluation_bytes(c, mesh, made)
        assert needed[parts] > compiler.shard_bytes(made.abstract)
    logits = 4 * 64 * 64 * 320
    assert needed[8] < needed[1] - logits / 2
