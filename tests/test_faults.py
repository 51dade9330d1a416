"""Machines die, losses spike, numbers overflow: what is lost is bounded, and what went wrong is named."""

import functools
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest
import test_source
from helpers import first_params, make_batch, mesh_of, rows_of, run_command, tiny_config
from test_processes import assert_same_losses, launch
from test_train import assert_same_run, last_state, train, trained_steps, wait_for

from llmjax import cli
from llmjax.data.batches import TrainBatches
from llmjax.errors import UserError
from llmjax.model import transformer
from llmjax.objectives import OBJECTIVES
from llmjax.parallel import mesh as meshes
from llmjax.train import folders, hunt, metrics
from llmjax.train.rewind import Skip, Spike, Spikes, batch_number, go_back, skips_of
from llmjax.train.step import batch_shardings

ROOT = Path(__file__).parent.parent
STEPS = 300
LONG = (
    f"--config.train.duration={STEPS} steps",
    "--config.checkpoint.every=20 steps",
    "--config.train.eval_every=0 steps",
    "--config.optimizer.learning_rate=1e-4",  # so that differences of rounding do not grow much in so many steps
)


# ---------------------------------------------------------------- lost and stopped processes


def start(workdir, *settings, count=2, restarts=0):
    command = [
        sys.executable,
        ROOT / "launch" / "local.py",
        "-n",
        count,
        "--devices-per-process",
        1,
        "--restarts",
        restarts,
    ]
    command += ["--", "train", "--workdir", workdir, *settings]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pid_of(workdir, index):
    return int((workdir / "processes" / f"{index}.pid").read_text())


@pytest.fixture(scope="module")
def undisturbed(prepared_run, tmp_path_factory):
    """Two processes to the end."""
    workdir = shutil.copytree(prepared_run, tmp_path_factory.mktemp("undisturbed") / "run")
    status, output = launch(2, workdir, *LONG)
    assert status == 0, output
    return workdir


@pytest.mark.slow
def test_sigterm_to_any_process_saves_in_all_at_one_step_and_fewer_processes_go_on(undisturbed, tiny_run):
    process = start(tiny_run, *LONG, "--config.checkpoint.every=0 steps")
    wait_for(lambda: trained_steps(tiny_run) >= 5, process)
    os.kill(pid_of(tiny_run, 1), signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    output += (tiny_run / "processes" / "1.log").read_text()
    assert len(re.findall("^llmjax: stopped by", output, re.MULTILINE)) == 1
    (saved,) = folders.steps_in(tiny_run / "checkpoints")
    assert 5 <= saved == trained_steps(tiny_run) < STEPS
    status, output = run_command("train", "--workdir", tiny_run, *LONG)
    assert status == 0, output
    assert f"resuming from step {saved}" in output
    assert_same_losses(tiny_run, undisturbed)


@pytest.mark.slow
def test_after_a_lost_process_the_job_starts_again_and_ends_in_the_same_bits(undisturbed, tiny_run):
    process = start(tiny_run, *LONG, restarts=2)
    for index in (1, 0):
        saved = len(folders.steps_in(tiny_run / "checkpoints")) and max(folders.steps_in(tiny_run / "checkpoints"))
        wait_for(lambda saved=saved: max(folders.steps_in(tiny_run / "checkpoints"), default=0) > saved + 20, process)
        os.kill(pid_of(tiny_run, index), signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("was ended by SIGKILL") == 2
    assert_same_run(tiny_run, undisturbed)


@pytest.mark.slow
def test_without_a_launcher_a_lost_process_ends_the_others_in_bounded_time_with_a_message(tiny_run):
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"), "LLMJAX_PROCESSES": "2",
           "LLMJAX_COORDINATOR": "127.0.0.1:29517", "LLMJAX_LOCAL_PROCESSES": "2"}  # fmt: skip
    command = [sys.executable, "-m", "llmjax", "train", "--workdir", tiny_run, *LONG]
    command += ["--config.train.duration=100000 steps", "--config.parallel.heartbeat_seconds=5"]
    both = [
        subprocess.Popen(
            [*map(str, command)], env={**env, "LLMJAX_PROCESS": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(2)
    ]  # fmt: skip
    wait_for(lambda: trained_steps(tiny_run) >= 5, both[0])
    both[1].kill()
    began = time.monotonic()
    output, _ = both[0].communicate(timeout=120)
    both[1].communicate()
    assert both[0].returncode != 0
    assert time.monotonic() - began < 60
    assert "another process was lost" in output or "another task died" in output, output


def test_goodput_is_the_share_of_time_since_the_first_start(tmp_path):
    first = metrics.first_start(tmp_path, train_seconds=0.0)
    assert abs(first - time.time()) < 10
    assert metrics.first_start(tmp_path, train_seconds=50.0) == first  # also of a later process
    (tmp_path / "older").mkdir()
    older = metrics.first_start(tmp_path / "older", train_seconds=3600.0)  # a run from before this was kept
    assert older == pytest.approx(time.time() - 3600, abs=10)


# ---------------------------------------------------------------- spikes of the loss


def rewinding(**changes):
    settings = {"factor": 1.5, "window": 4, "patience": 2, "steps": 2, "skip": 3, "limit": 2, **changes}
    return {f"train__rewind__{key}": value for key, value in settings.items()}


def test_a_spike_is_seen_when_it_lasts_and_single_high_losses_are_not():
    spikes = Spikes(tiny_config(**rewinding()).train.rewind)
    found = [spikes.see(step, loss) for step, loss in enumerate([2, 9, 2, 2, 2, 9, 2, 2, 2.5, 4, math.nan, 4, 2], 1)]
    assert found == [None] * 10 + [10, 10, None]
    off = Spikes(tiny_config().train.rewind)
    assert [off.see(step, loss) for step, loss in enumerate([1.0] * 200 + [99.0] * 200)] == [None] * 400


def test_the_checkpoint_to_go_back_to_is_old_enough_where_one_is():
    spikes = Spikes(tiny_config(**rewinding(steps=10)).train.rewind)
    assert spikes.choose([10, 20, 30, 40], since=35) == 20
    assert spikes.choose([30, 40], since=35) == 30
    assert spikes.choose([28, 30, 40], since=35) == 28
    assert spikes.choose([40], since=35) is None


def test_batches_are_skipped_from_where_training_went_back_to(tmp_path):
    assert [batch_number(step, [Skip(4, 10), Skip(6, 100)]) for step in (0, 3, 4, 5, 6)] == [0, 3, 14, 15, 116]
    c = tiny_config(**rewinding()).train.rewind
    for step in (2, 4, 6, 8):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    for times in (1, 2):
        go_back(tmp_path, c, Spike(8, seen=9, back_to=4, skips=skips_of(tmp_path, {})))
        assert skips_of(tmp_path, {}) == [Skip(4, 8)] * times  # batches 4 to 8 led there; 3 more
        assert folders.steps_in(tmp_path / "checkpoints") == [4, 2]
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    (tmp_path / "checkpoints" / "6").mkdir()
    with pytest.raises(UserError, match=r"high again after going back 2 times, up to step 20.*train\.rewind\.limit"):
        go_back(tmp_path, c, Spike(8, seen=20, back_to=4, skips=skips_of(tmp_path, {})))
    assert folders.steps_in(tmp_path / "checkpoints") == [6, 4, 2], "what is refused changes nothing"


def spiking(c, bad):
    """Batches of which some teach what is wrong: the loss rises and stays high for a while."""

    def batch(k):
        made = make_batch(c, k)
        if k in bad:
            made["targets"] = (made["targets"] * 7 + k) % 300
        return made

    return batch


@pytest.mark.usefixtures("one_device")
def test_a_spike_goes_back_skips_its_batches_and_the_run_ends_as_if_they_had_not_been(tmp_path, capsys):
    settings = {"train__duration": "30 steps", "checkpoint__every": "4 steps", "checkpoint__keep": 5}
    c = tiny_config(**settings, **rewinding(factor=1.3, window=8))
    bad = range(18, 23)
    results, _ = train(c, tmp_path / "run", batch=spiking(c, bad))
    output = capsys.readouterr().out
    assert "WARNING: the loss is high since step 19: going back to step 16 and skipping" in output
    assert results["steps"] == 30
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row.get("rewinds", 0) for row in rows] == [0] * 16 + [1] * 14
    assert rows[-1]["loss"] < rows[15]["loss"]
    ((step, skipped),) = folders.read_meta(tmp_path / "run" / "checkpoints" / "30")["spikes"]["skips"]
    assert step == 16
    assert skipped == 20 - 16 + 3  # seen up to step 20

    def without(k):  # the same batches, never having met the bad ones
        return make_batch(c, k if k < 16 else k + skipped)

    train(tiny_config(**settings | {"checkpoint__every": "0 steps"}), tmp_path / "expected", batch=without)
    _, mine = last_state(tmp_path / "run")
    _, theirs = last_state(tmp_path / "expected")
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_after_too_many_spikes_the_command_goes_on_as_it_advises(tiny_run, monkeypatch, capsys):
    real = TrainBatches.batch

    def batch(self, k):
        made = real(self, k)
        return made | {"targets": (made["targets"] * 7 + k) % 300} if k in (*range(18, 23), *range(30, 36)) else made

    monkeypatch.setattr(TrainBatches, "batch", batch)
    settings = {
        "train.duration": "30 steps",
        "checkpoint.every": "4 steps",
        "checkpoint.keep": 9,
        "train.eval_every": 0,
    }
    settings |= {key.replace("__", "."): value for key, value in rewinding(factor=1.3, window=8, limit=1).items()}
    command = ["train", "--workdir", str(tiny_run), *(f"--config.{key}={value}" for key, value in settings.items())]
    assert cli.main(command) == 2
    assert "raise train.rewind.limit, and run again: it goes on from the last checkpoint" in capsys.readouterr().err
    assert cli.main([*command, "--config.train.rewind.limit=2"]) == 0
    assert "although train.rewind.limit changed from 1 to 2" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(tiny_run)] == list(range(1, 31))


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
@pytest.mark.parametrize("killed", [19, 22])
def test_killed_before_or_after_going_back_it_ends_in_the_same_bits(tmp_path, killed):
    c = tiny_config(
        train__duration="30 steps", checkpoint__every="4 steps", checkpoint__keep=5, **rewinding(factor=1.3, window=8)
    )
    bad = range(18, 23)
    train(c, tmp_path / "whole", batch=spiking(c, bad))
    delivered = 0

    def until_killed(k):
        nonlocal delivered
        if delivered == killed:
            raise KeyError("killed")
        delivered += 1
        return spiking(c, bad)(k)

    with pytest.raises(KeyError, match="killed"):
        train(c, tmp_path / "run", batch=until_killed)
    train(c, tmp_path / "run", batch=spiking(c, bad))
    _, mine = last_state(tmp_path / "run")
    _, theirs = last_state(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_rewinding_during_a_batch_ramp_is_refused():
    with pytest.raises(ValueError, match=r"train\.batch_ramp.*other sizes"):
        tiny_config(train__batch_ramp="4 steps", train__batch_start=2, **rewinding())
    with pytest.raises(ValueError, match=r"train\.rewind\.factor=0\.5 must be above 1"):
        tiny_config(**rewinding(factor=0.5))


# ---------------------------------------------------------------- what is not finite


@functools.cache
def hunting(**settings):
    """Parameters, and the compiled program that looks at a step."""
    c = tiny_config(**settings)
    module, mesh = transformer.build(c.model), mesh_of("data=2")
    params = first_params(module)
    return c, mesh, params, hunt.make_examine(module, OBJECTIVES[c.objective.name], c, mesh)


def examined(change=lambda params: params, *, spoil=lambda batch: None, **settings):
    """What the hunt says of the micro-batches of a first step whose parameters were changed, or whose batch was."""
    c, mesh, params, examine = hunting(**settings)
    batch = make_batch(c, 0)
    spoil(batch)
    on_mesh = jax.device_put(batch, batch_shardings(mesh))
    params = jax.device_put(change(params), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    parts = c.train.micro_batches
    return [hunt.explain(examine(params, on_mesh, jax.random.key(1), part, parts), c.model) for part in range(parts)]


def scaled(path, factor, *, layer=None):
    """Multiply one parameter, of one layer where it is stacked."""

    def change(params):
        *parents, last = path.split("/")
        params = jax.tree.map(lambda x: x, params)
        node = functools.reduce(lambda tree, key: tree[key], parents, params)
        node[last] = node[last] * factor if layer is None else node[last].at[layer].multiply(factor)
        return params

    return change


def both(*changes):
    return lambda params: functools.reduce(lambda tree, change: change(tree), changes, params)


def huge(stack, mixer, *, layer):
    """Make the sums in a mixer's output projection overflow, though what it is given and its kernel are finite."""
    before = "value" if mixer == "attention" else "input"
    return both(
        scaled(f"{stack}/{mixer}/{before}/kernel", 1e8, layer=layer),
        scaled(f"{stack}/{mixer}/out/kernel", 1e38, layer=layer),
    )


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ({}, scaled("layers/mlp/up/kernel", math.inf, layer=1), "the parameters, before the step: layer 1, mlp/up/kernel"),
        ({}, scaled("embedding", math.nan), "the parameters, before the step: embedding"),
        pytest.param({"model__embedding_scale": 1e38}, scaled("embedding", 1e4), "in the forward pass, embedding", marks=pytest.mark.slow),
        ({}, scaled("layers/attention/query/kernel", 1e39, layer=0), "layer 0, attention/query/kernel"),  # inf at once
        ({}, huge("layers", "attention", layer=1), "in the forward pass, layer 1, attention/out"),
        ({}, both(scaled("layers/mlp/up/kernel", 1e30, layer=0), scaled("layers/mlp/gate/kernel", 1e30, layer=0)),
         "in the forward pass, layer 0, mlp/down"),
        pytest.param({"model__tie_embeddings": False, "model__logit_scale": 1e10}, scaled("head/kernel", 1e36), "in the forward pass, the head or the loss", marks=pytest.mark.slow),
        ({"model__activation": "relu", "objective__z_loss": 1e4},
         both(scaled("layers/mlp/up/kernel", 1e-36, layer=1), scaled("layers/mlp/down/kernel", 1e38, layer=1)),
         "in the backward pass, the gradient of layer 1, mlp/up/kernel"),
        pytest.param({"model__norm_place": "post"}, huge("layers", "attention", layer=0), "layer 0, attention/out", marks=pytest.mark.slow),
        pytest.param({"model__pattern": ("global", "local"), "model__window": 4, "model__layers": 4},
                     huge("layers/1", "attention", layer=1), "in the forward pass, layer 3, attention/out", marks=pytest.mark.slow),
        pytest.param({"model__remat": "full"}, huge("layers", "attention", layer=1), "layer 1, attention/out", marks=pytest.mark.slow),
        pytest.param({"model__pattern": ("rglru",)}, huge("layers", "rglru", layer=1), "layer 1, rglru/out", marks=pytest.mark.slow),
        pytest.param({"model__moe__experts": 4},
                     both(scaled("layers/moe/up/kernel", 1e30, layer=1), scaled("layers/moe/gate/kernel", 1e30, layer=1)),
                     "in the forward pass, layer 1, moe", marks=pytest.mark.slow),
        ({}, lambda p: p, ""),
    ],
)  # fmt: skip
def test_the_first_layer_and_operation_that_is_not_finite_is_named(settings, change, said):
    (found,) = examined(change, **settings)
    assert said in found
    assert bool(found) == bool(said)


def test_a_bad_batch_and_its_micro_batch_are_named():
    def spoil(batch):
        batch["weights"][1, 0] = np.nan  # rows 1, 3, ... are the second part's

    assert examined(spoil=spoil, train__micro_batches=2) == ["", "the batch itself: 1 numbers of weights"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_that_hunts_names_what_was_bad_and_otherwise_ends_in_the_same_bits(tmp_path, capsys):
    c = tiny_config(train__hunt_nan=True, train__max_bad_steps=2)

    def poisoned(k):
        batch = make_batch(c, k)
        if k == 2:
            batch["weights"][0, 0] = np.nan
        return batch

    train(c, tmp_path / "hunted", batch=poisoned)
    assert (
        "WARNING: step 3 was not finite. The first that is not is the batch itself: 1 numbers of weights"
        in capsys.readouterr().out
    )
    train(tiny_config(), tmp_path / "plain", batch=poisoned)
    _, mine = last_state(tmp_path / "hunted")
    _, theirs = last_state(tmp_path / "plain")
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_what_is_finite_when_it_is_run_again_points_at_the_hardware():
    assert "look at the hardware" in hunt.warn(["", ""], step=7)
    assert "raise optimizer.epsilon" in hunt.warn(["", ""], step=7, gradients_finite=True)
    assert hunt.warn(["", "layer 3"], step=7) == "WARNING: step 7 was not finite. The first that is not is layer 3"


# ---------------------------------------------------------------- what is handed to the loop, over two processes

SCRIPT = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from llmjax.parallel import processes
processes.start(heartbeat_seconds=100, start_seconds=100)
import test_faults
getattr(test_faults, sys.argv[2])(pathlib.Path(sys.argv[3]))
processes.end(0)
"""


def two_processes(function, workdir):
    """Run a function of this module in both of two processes with one device each: their statuses and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"), "LLMJAX_PROCESSES": "2",
           "LLMJAX_COORDINATOR": f"127.0.0.1:{port}", "LLMJAX_LOCAL_PROCESSES": "2"}  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), function.__name__, str(workdir)]
    both = [
        subprocess.Popen(
            command, env=env | {"LLMJAX_PROCESS": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(2)
    ]
    output = "".join(process.communicate(timeout=300)[0] for process in both)
    return [process.returncode for process in both], output


def train_rounds(workdir):
    test_source.train_rounds(workdir)


def train_rounds_until_killed(workdir):
    test_source.train_rounds(workdir, killed_with=workdir / "checkpoints" / "4")


def train_spiking(workdir):
    c = tiny_config(
        train__duration="30 steps", checkpoint__every="4 steps", checkpoint__keep=5, train__eval_every="0 steps",
        **rewinding(factor=1.3, window=8),
    )  # fmt: skip
    batch = spiking(c, range(18, 23))
    helpers.train(c, workdir, batch=lambda k: test_source.own_rows(batch(k)))


@pytest.mark.slow
def test_two_processes_resume_inside_a_round_of_their_own_batches(tmp_path):
    statuses, output = two_processes(train_rounds, tmp_path / "whole")
    assert statuses == [0, 0], output
    statuses, output = two_processes(train_rounds_until_killed, tmp_path / "run")
    assert all(statuses), output
    assert folders.steps_in(tmp_path / "run" / "checkpoints") == [4]
    statuses, output = two_processes(train_rounds, tmp_path / "run")
    assert statuses == [0, 0], output
    numbers = [[(row["loss"], row["param_norm"]) for row in rows_of(tmp_path / name)] for name in ("whole", "run")]
    assert len(numbers[0]) == test_source.STEPS
    assert numbers[0] == numbers[1]
    with pytest.raises(UserError, match="keeps the batches of 2 processes, and there are 1: go on with 2"):
        train_rounds(tmp_path / "run")


@pytest.mark.slow
def test_two_processes_go_back_from_a_spike_as_one_does(tmp_path, monkeypatch):
    statuses, output = two_processes(train_spiking, tmp_path / "two")
    assert statuses == [0, 0], output
    assert output.count("going back to step 16") == 1
    monkeypatch.setattr(meshes, "make_mesh", functools.partial(meshes.make_mesh, devices=jax.devices()[:2]))
    train_spiking(tmp_path / "one")
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    assert [row.get("rewinds", 0) for row in rows_of(tmp_path / "two")] == [0] * 16 + [1] * 14
