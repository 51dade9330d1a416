"""Training goes on where it was stopped, bit for bit; survives bad batches, bad disks and signals; and learns."""

import functools
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_same_bits,
    few,
    first_params,
    losses_of,
    make_batch,
    mesh_of,
    prepare_steps,
    rows_of,
    run_command,
    start_command,
    stopping_at,
    tiny_config,
)

from llmjax import config
from llmjax.errors import UserError
from llmjax.model import transformer
from llmjax.parallel import mesh as meshes
from llmjax.parallel import placement
from llmjax.train import checkpoint, executable, folders, metrics
from llmjax.train.journal import Journal
from llmjax.train.optimizer import make_optimizer, matrices
from llmjax.train.schedule import make_schedule

GOLDEN = Path(__file__).parent / "golden"
OPTIMIZERS = ("adamw", "muon", "adafactor", "lion", "sgd")


def steady(**changes):
    """A config whose step is the same program whatever the duration."""
    return tiny_config(schedule__name="constant", schedule__warmup="2 steps", **changes)


def train(c, workdir, **options):
    """The loop on the tiny problem: the final numbers and the last checkpoint's state."""
    return helpers.train(c, workdir, **options), last_state(workdir)


def last_state(workdir):
    """Every array of the newest checkpoint, with its path inside it as the name."""
    import orbax.checkpoint as ocp

    folder, here = folders.newest(workdir), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        state = {}
        for path in sorted(folder.iterdir()):
            if (path / "manifest.ocdbt").exists():  # onto one device, wherever the arrays were when they were saved
                tree = checkpointer.metadata(path.absolute()).item_metadata.tree
                like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
                state[path.name] = checkpointer.restore(path.absolute(), like)
        return int(folder.name), state


def assert_same_run(workdir, expected):
    """Both runs ended in the same state bit for bit, and each step is in metrics.jsonl once with the same numbers."""
    step, state = last_state(workdir)
    step_expected, state_expected = last_state(expected)
    assert step == step_expected
    assert_same_bits(state, state_expected)
    mine, theirs = rows_of(workdir), rows_of(expected)
    assert [row["step"] for row in mine] == list(range(1, step + 1))
    clocks = {"tokens_per_second", "tokens_per_second_per_device", "mfu", "train_seconds", "goodput"}
    clocks |= {"host_step_seconds_max", "slowest_host"}
    for a, b in zip(mine, theirs, strict=True):
        assert {k: v for k, v in a.items() if k not in clocks} == {k: v for k, v in b.items() if k not in clocks}


# ---------------------------------------------------------------- stopping and going on


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on one device with checkpoints at steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", functools.partial(meshes.make_mesh, devices=jax.devices()[:1]))
        train(steady(), workdir)
    return workdir


@pytest.fixture
def trained_copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.usefixtures("one_device")
def test_n_steps_are_k_steps_and_the_rest_after_a_resume(tmp_path):
    c = tiny_config(train__ema=0.9, model__dropout=0.1)
    train(c, tmp_path / "whole")
    with pytest.raises(KeyError, match="stop here"):
        train(c, tmp_path / "halves", batch=stopping_at(c, 6))
    assert folders.steps_in(tmp_path / "halves" / "checkpoints") == [4]
    train(c, tmp_path / "halves")
    assert_same_run(tmp_path / "halves", tmp_path / "whole")


@pytest.mark.usefixtures("one_device")
def test_a_run_killed_between_its_last_checkpoint_and_its_results_still_has_numbers_and_rows(trained, trained_copy):
    lines = (trained_copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (trained_copy / "metrics.jsonl").write_text("".join(lines[:-1]))  # the checkpoint is written first
    again, _ = train(steady(), trained_copy)
    assert again["loss"] == pytest.approx(np.mean([row["loss"] for row in rows_of(trained)]), rel=1e-6)
    assert [row["step"] for row in rows_of(trained_copy)] == list(range(1, 9))


@pytest.mark.slow  # test_older_runs.py extends a run of an older version
@pytest.mark.usefixtures("one_device")
def test_a_run_extended_by_half_after_its_end_is_the_run_that_was_longer_from_the_start(trained_copy, tmp_path):
    longer = steady(train__duration="12 steps")
    train(longer, tmp_path / "whole")
    results, _ = train(longer, trained_copy)
    assert results["steps"] == 12
    assert_same_bits(last_state(trained_copy), last_state(tmp_path / "whole"))
    rows = rows_of(trained_copy)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[8]["changed"] == "train.duration changed from '8 steps' to '12 steps'"
    assert sum("changed" in row for row in rows) == 1
    meta = folders.read_meta(folders.newest(trained_copy))
    assert meta["changes"] == [{"step": 8, "settings": {"train.duration": ["8 steps", "12 steps"]}}]
    with pytest.raises(UserError, match=r"has taken 12 steps, and train\.duration='8 steps' is 8"):
        train(steady(), trained_copy)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "also",
    few(
        [
            {"optimizer__learning_rate": 0.5},
            {"train__micro_batches": 2, "objective__loss_chunks": 2, "model__dtype": "bfloat16"},
        ]
    ),
    ids=str,
)
def test_a_run_goes_on_with_what_may_change_and_a_moving_average_switched_on_and_off(also, trained_copy):
    _, before = last_state(trained_copy)
    train(steady(train__duration="9 steps", train__ema=0.5, **also), trained_copy)
    _, after = last_state(trained_copy)
    halfway = jax.tree.map(lambda a, b: (a + b) / 2, before["params"], after["params"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after["ema"], halfway)
    train(steady(train__duration="10 steps"), trained_copy)
    assert "ema" not in last_state(trained_copy)[1]
    assert [row["step"] for row in rows_of(trained_copy)] == list(range(1, 11))


@pytest.mark.usefixtures("one_device")
def test_a_run_whose_files_cannot_be_closed_finishes_the_checkpoint_that_is_being_saved(tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    finished, close = [], checkpoint.Manager.close
    monkeypatch.setattr(Journal, "close", full)
    monkeypatch.setattr(checkpoint.Manager, "close", lambda self: finished.append(close(self)))
    with pytest.raises(OSError, match="No space left"):
        train(steady(), tmp_path, batch=stopping_at(steady(), 5))
    assert finished and folders.steps_in(tmp_path / "checkpoints") == [4]


STEPS = 200  # a second of training


@pytest.fixture(scope="module")
def uninterrupted(prepared_run, tmp_path_factory):
    """The command, run to its end once: what interrupted runs are compared with."""
    workdir = shutil.copytree(prepared_run, tmp_path_factory.mktemp("whole") / "run")
    status, output = run_command(*train_arguments(workdir))
    assert status == 0, output
    return workdir


def train_arguments(workdir, **changes):
    settings = {
        "train.duration": f"{STEPS} steps",
        "checkpoint.every": "50 steps",
        "train.eval_every": "50 steps",
        **changes,
    }
    return ["train", "--workdir", workdir, *(f"--config.{key}={value}" for key, value in settings.items())]


def wait_for(condition, process, seconds=120.0):
    """Wait until the condition holds; it must, before the process ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def trained_steps(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saved_steps(workdir):
    return folders.steps_in(workdir / "checkpoints")


def saving(workdir, *, since):
    """Whether a checkpoint begun after the wall clock's `since` is unfinished."""
    try:
        return any(path.stat().st_ctime > since for path in (workdir / "checkpoints").glob("*tmp*"))
    except FileNotFoundError:  # finished between the two looks
        return False


@pytest.mark.parametrize(
    "moments", [("a later save",), pytest.param(("the first save", "training"), marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_and_resumed_it_ends_bit_identical(moments, uninterrupted, tiny_run):
    rng = random.Random(0)
    for moment in moments:
        since = time.time()
        process = start_command(*train_arguments(tiny_run))
        if moment == "a later save":  # there is a checkpoint to go on from
            wait_for(lambda: saved_steps(tiny_run), process)
            since = time.time()
        if "save" in moment:  # a temporary folder is there that no earlier kill left
            wait_for(lambda since=since: saving(tiny_run, since=since), process)
        else:
            target = trained_steps(tiny_run) + rng.randint(1, 40)
            wait_for(lambda target=target: saved_steps(tiny_run) and trained_steps(tiny_run) >= target, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    status, output = run_command(*train_arguments(tiny_run))
    assert status == 0, output
    assert "resuming from step" in output
    assert "WARNING" not in output  # no checkpoint was unreadable
    assert_same_run(tiny_run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_sigterm_and_sigint_save_exit_0_and_the_same_command_goes_on(number, request, tiny_run):
    long = {"checkpoint.every": "0 steps"}
    process = start_command(*train_arguments(tiny_run, **long))
    wait_for(lambda: trained_steps(tiny_run) >= 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"stopped by {number.name}" in output
    saved = folders.steps_in(tiny_run / "checkpoints")[0]
    assert saved == trained_steps(tiny_run), "the last step that was taken is the one that was saved"
    assert 0 < saved < STEPS
    if number == signal.SIGTERM:  # the next test goes on, without another command
        return
    status, output = run_command(*train_arguments(tiny_run, **long))
    assert status == 0, output
    assert f"resuming from step {saved}" in output
    assert_same_run(tiny_run, request.getfixturevalue("uninterrupted"))


@pytest.mark.usefixtures("one_device")
def test_a_signal_during_an_evaluation_loses_no_step_and_the_run_goes_on_in_the_same_bits(trained, tmp_path):
    from llmjax.errors import Stopped

    c = steady(checkpoint__every="0 steps")

    def evaluate(params):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"heldout_loss": 1.0}

    with pytest.raises(Stopped, match="SIGTERM"):
        train(c, tmp_path, evaluate=evaluate)
    saved = folders.steps_in(tmp_path / "checkpoints")[0]
    assert saved >= 4
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, saved + 1))
    assert rows_of(tmp_path)[3]["heldout_loss"] == 1.0
    train(c, tmp_path)
    assert_same_bits(last_state(tmp_path), last_state(trained))


# ---------------------------------------------------------------- checkpoints


def truncate_largest(folder):
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.usefixtures("one_device")
def test_a_checkpoint_cut_in_half_is_put_aside_loudly_and_the_one_before_it_is_used(trained, trained_copy, capsys):
    truncate_largest(trained_copy / "checkpoints" / "8" / "params")  # the other items: test_checkpoint_files.py
    train(steady(), trained_copy)
    output = capsys.readouterr().out
    assert f"WARNING: the checkpoint {trained_copy}/checkpoints/8 cannot be read" in output
    assert "resuming from step 4 of 8" in output
    assert (trained_copy / "checkpoints" / "8.damaged").is_dir()
    assert_same_run(trained_copy, trained)


@pytest.mark.usefixtures("one_device")
def test_when_all_checkpoints_are_damaged_nothing_is_thrown_away_and_the_error_says_what_to_do(trained_copy):
    folder = trained_copy / "checkpoints"
    truncate_largest(folder / "8")
    shutil.rmtree(folder / "4" / "params")
    rows = (trained_copy / "metrics.jsonl").read_text()
    for _ in range(2):  # and the second start is no silent restart from step 0
        with pytest.raises(folders.CheckpointError, match=r"none of the checkpoints .* \(steps 8, 4\).*delete"):
            train(steady(), trained_copy)
    assert folders.steps_in(folder) == [8, 4]
    assert (trained_copy / "metrics.jsonl").read_text() == rows


@pytest.mark.usefixtures("one_device")
def test_a_config_that_does_not_fit_the_checkpoint_is_an_error_and_leaves_it_alone(trained_copy):
    message = r"layers/mlp/down/kernel is float32 \(2, 64, 32\) in the checkpoint and float32 \(2, 128, 32\)"
    with pytest.raises(folders.CheckpointMismatch, match=message):  # types and names: test_checkpoint_files.py
        train(steady(model__mlp_width=128), trained_copy)
    assert folders.steps_in(trained_copy / "checkpoints") == [8, 4]


@pytest.mark.slow
def test_a_full_disk_ends_in_a_clear_message_and_the_run_goes_on_when_there_is_space(
    prepared_run, uninterrupted, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        workdir = shutil.copytree(prepared_run, disk / "run")
        process = start_command(*train_arguments(workdir))
        wait_for(lambda: folders.steps_in(workdir / "checkpoints"), process)
        process.kill()
        process.communicate()
        last = folders.steps_in(workdir / "checkpoints")[0]
        space = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(b"0" * max(space - 150_000, 0))  # less than the next checkpoint needs
        status, output = run_command(*train_arguments(workdir))
        assert status == 1, output
        assert "No space left on device" in output
        assert "Free some space" in output
        assert "Traceback" not in output, output
        assert folders.steps_in(workdir / "checkpoints")[0] >= last
        (disk / "filler").unlink()
        status, output = run_command(*train_arguments(workdir))
        assert status == 0, output
        assert "resuming from step" in output
        assert_same_run(workdir, uninterrupted)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# ---------------------------------------------------------------- bad batches


def poisoned(c, *steps):
    """Batches of which some (k = 0 for the first step) hold a NaN."""

    def batch(k):
        made = make_batch(c, k)
        if k in steps:
            made["weights"][0, 0] = np.nan
        return made

    return batch


# The golden losses learn, a bad batch and a checkpoint have tests of their own.
@pytest.mark.parametrize("name", few(["muon", "adafactor", "adamw", "lion", "sgd"], 0, 2))
def test_every_optimizer_learns_skips_a_nan_batch_and_comes_back_from_a_checkpoint(name, tmp_path):
    rate = {"sgd": 0.3, "lion": 3e-3, "adafactor": 0.1}.get(name, 1e-2)  # adafactor's is relative
    c = tiny_config(optimizer__name=name, optimizer__learning_rate=rate, train__duration="30 steps", train__ema=0.9)
    state, abstract, run = prepare_steps(c, mesh_of("fsdp=2"))
    losses = []
    for k in range(30):
        state, values = run(state, make_batch(c, k))
        losses.append(float(values["loss"]))
    assert np.mean(losses[-3:]) < losses[0] - 1.0, losses

    bad = make_batch(c, 30)
    bad["weights"][0, 0] = np.nan
    after, values = run(state, bad)
    assert int(values["skipped"]) == int(after.skipped) == 1
    assert int(after.step) == 31  # batch k belongs to step k
    assert_same_bits((after.params, after.ema), (state.params, state.ema))
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(after.opt_state), jax.tree.leaves(state.opt_state), strict=True
    ):
        if jnp.issubdtype(new.dtype, jnp.integer):
            assert int(new) == int(old) + 1, "the schedule keeps its place"
        else:
            np.testing.assert_array_equal(new, old, err_msg=placement.path_name(path))
    good, values = run(after, make_batch(c, 31))
    assert math.isfinite(float(values["loss"]))
    assert int(good.bad_in_a_row) == 0

    with checkpoint.manager(tmp_path, keep=1) as checkpoints:
        checkpoint.save(checkpoints, good, step=32, meta={"step": 32})
        checkpoints.wait_until_finished()
    restored = checkpoint.restore(tmp_path, abstract)
    assert restored is not None
    assert_same_bits(restored[0], good)
    assert jax.tree.structure(restored[0]) == jax.tree.structure(good)


@pytest.mark.usefixtures("one_device")
def test_a_nan_batch_is_skipped_counted_and_leaves_valid_json(tmp_path):
    c = steady()
    results, _ = train(c, tmp_path, batch=poisoned(c, 2, 7))
    rows = rows_of(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 2]
    assert [row["loss"] is None for row in rows] == [k in (2, 7) for k in range(8)]
    assert rows[2]["param_norm"] == rows[1]["param_norm"]
    assert results["skipped"] == 2
    json.dumps(results, allow_nan=False)


@pytest.mark.usefixtures("one_device")
def test_too_many_bad_steps_in_a_row_end_the_run_with_what_to_do(tmp_path):
    c = steady(train__max_bad_steps=3, checkpoint__every="1 steps", checkpoint__keep=2)
    said = r"3 steps in a row, up to step 7.*Lower optimizer\.learning_rate.*from the checkpoint of step 4, from before"
    with pytest.raises(UserError, match=said):
        train(c, tmp_path, batch=poisoned(c, 1, 4, 5, 6))
    assert folders.steps_in(tmp_path / "checkpoints") == [4, 3], "nothing is saved while steps are bad"
    _, state = last_state(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    train(c, tmp_path)  # with sound batches the same command goes on
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 9))


# ---------------------------------------------------------------- what an update is


def test_clipping_scales_the_gradient_to_the_norm_and_reports_the_norm_before():
    plain = {"optimizer__name": "sgd", "optimizer__beta1": 0.0, "optimizer__weight_decay": 0.0,
             "schedule__name": "constant", "schedule__warmup": "0 steps", "optimizer__learning_rate": 1.0}  # fmt: skip
    state, _, run = prepare_steps(tiny_config(optimizer__clip_norm=0.01, **plain), mesh_of("data=1"))
    after, values = run(state, make_batch(tiny_config(), 0))
    moved = jax.tree.map(lambda a, b: a - b, jax.device_get(after.params), jax.device_get(state.params))
    length = math.sqrt(sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(moved)))
    assert float(values["grad_norm"]) > 0.1
    assert length == pytest.approx(0.01, rel=1e-3)
    assert float(values["update_norm"]) == pytest.approx(length, rel=1e-3)


def test_ema_is_the_moving_average_of_the_parameters():
    c = tiny_config(train__ema=0.75)
    state, _, run = prepare_steps(c, mesh_of("data=1"))
    expected = jax.device_get(state.params)
    for k in range(3):
        state, _ = run(state, make_batch(c, k))
        expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, expected, jax.device_get(state.params))
    jax.tree.map(lambda e, x: np.testing.assert_allclose(x, e, rtol=1e-5, atol=1e-7), expected, state.ema)


@pytest.fixture(scope="module")
def params_with_biases():
    """Parameters of every kind, none of which is zero."""
    c = tiny_config(model__bias=("qkv", "out", "mlp", "norm", "head"), model__norm="layer")
    params = first_params(transformer.build(c.model))
    return jax.tree.map(lambda x: x + 1.0, params)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("adamw", "muon", "adafactor") else pytest.mark.slow) for n in OPTIMIZERS]
)
def test_weight_decay_touches_matrices_only_and_is_the_rate_times_the_weight(name, params_with_biases):
    c = tiny_config(optimizer__name=name, optimizer__weight_decay=0.5,
                    optimizer__learning_rate=0.1, optimizer__muon_learning_rate=0.2)  # fmt: skip
    params = params_with_biases
    optimizer = make_optimizer(c.optimizer, lambda step: jnp.float32(1.0))
    gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(gradient, jax.jit(optimizer.init)(params), params)
    decayed = matrices(params)
    for (path, update), weight, is_decayed in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), jax.tree.leaves(decayed), strict=True
    ):
        path_text = placement.path_name(path)
        assert is_decayed == path_text.endswith(("kernel", "embedding")), path_text
        by_muon = name == "muon" and path_text.startswith("layers/") and is_decayed
        rate = 0.2 if by_muon else 0.1
        np.testing.assert_allclose(update, -rate * 0.5 * weight * is_decayed, rtol=1e-5, atol=1e-7, err_msg=path_text)


def newton_schulz(matrix):
    """Muon's orthogonalisation of one matrix as published (Jordan et al. 2024), in numpy: the oracle."""
    transposed = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if transposed else matrix
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if transposed else x


def test_muon_orthogonalises_the_matrix_of_each_layer_and_role(params_with_biases):
    c = tiny_config(optimizer__name="muon", optimizer__weight_decay=0.0, optimizer__muon_learning_rate=1.0)
    params, rng = params_with_biases, np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = make_optimizer(c.optimizer, lambda step: jnp.float32(1.0))
    updates, _ = jax.jit(optimizer.update)(gradient, jax.jit(optimizer.init)(params), params)
    matrix_shapes = {
        ("attention", "query"): (32, 32), ("attention", "key"): (32, 32), ("attention", "out"): (32, 32),
        ("mlp", "up"): (32, 64), ("mlp", "down"): (64, 32),
    }  # fmt: skip
    for (part, role), shape in matrix_shapes.items():
        given = np.asarray(gradient["layers"][part][role]["kernel"], np.float64)
        update = np.asarray(updates["layers"][part][role]["kernel"], np.float64)
        for layer in range(2):
            expected = newton_schulz(given[layer].reshape(shape))
            found = -update[layer].reshape(shape)
            scale = np.sum(found * expected) / np.sum(expected**2)  # optax scales by the matrix's shape
            np.testing.assert_allclose(found, scale * expected, atol=2e-3 * scale, err_msg=f"{part}/{role} {layer}")
            assert scale == pytest.approx(math.sqrt(max(1, shape[1] / shape[0])), rel=1e-3), (part, role)


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ({"name": "constant", "warmup": "4 steps"}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 100: 1.0}),
        ({"name": "constant", "warmup": "0 steps"}, {0: 1.0, 100: 1.0}),
        ({"name": "cosine", "warmup": "0 steps", "final": 0.1}, {0: 1.0, 50: 0.55, 25: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 100: 0.1}),
        ({"name": "cosine", "warmup": "10%", "final": 0.0}, {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}),
        ({"name": "linear", "warmup": "0 steps", "final": 0.2}, {0: 1.0, 50: 0.6, 100: 0.2}),
        ({"name": "exponential", "warmup": "0 steps", "final": 0.01}, {0: 1.0, 50: 0.1, 100: 0.01}),
        ({"name": "wsd", "warmup": "2 steps", "decay": "20 steps", "final": 0.0}, {0: 0.5, 2: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        ({"name": "step", "warmup": "0 steps", "drop_at": ("50 steps", "80 steps"), "drop_factor": 0.1},
         {0: 1.0, 49: 1.0, 50: 0.1, 79: 0.1, 80: 0.01, 100: 0.01}),
    ],
)  # fmt: skip
def test_schedules_go_through_points_computed_by_hand(settings, points):
    c = config.base().schedule
    c.update(settings)
    schedule = make_schedule(c, total_steps=101, tokens_per_step=1)
    for step, value in points.items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(value, abs=2e-6), step


# ---------------------------------------------------------------- the loop's own promises


@pytest.mark.usefixtures("one_device")
def test_a_run_compiles_its_step_once_and_writes_the_promised_row_for_every_step(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(executable, "_compiled", {})  # what other tests compiled in this process
    monkeypatch.setattr(helpers, "PROGRAMS", {})
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        train(tiny_config(), tmp_path, evaluate=lambda params: {"heldout_loss": 1.0, "heldout_bits_per_byte": 2.0})
    compiled = [
        record.getMessage()
        for record in caplog.records
        if "Finished XLA compilation of jit(step)" in record.getMessage()
    ]
    assert len(compiled) == 1, compiled
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    promised = {
        "step", "loss", "learning_rate", "grad_norm", "param_norm", "update_norm", "tokens", "flops",
        "tokens_per_second", "tokens_per_second_per_device", "mfu", "train_seconds", "skipped",
    }  # fmt: skip
    assert all(row.keys() >= promised for row in rows)
    assert ["heldout_loss" in row for row in rows] == [k in (4, 8) for k in range(1, 9)]
    assert [row["tokens"] for row in rows] == [128 * k for k in range(1, 9)]
    assert all(a["train_seconds"] < b["train_seconds"] for a, b in itertools.pairwise(rows))


def test_the_command_evaluates_when_due_and_reports_every_source(uninterrupted):
    rows = [row for row in rows_of(uninterrupted) if "heldout_loss" in row]
    assert [row["step"] for row in rows] == [50, 100, 150, 200]
    sources = [key for key in rows[0] if key.startswith("heldout_bits_per_byte/")]
    assert len(sources) == 1
    assert rows[0][sources[0]] == rows[0]["heldout_bits_per_byte"]  # one source is the whole
    assert rows[-1]["heldout_loss"] < rows[0]["heldout_loss"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_losses_of_20_steps_are_the_golden_ones(name):
    losses, _ = losses_of(tiny_config(optimizer__name=name), mesh_of("data=1"), steps=20)
    path = GOLDEN / f"losses-{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([round(loss, 5) for loss in losses.tolist()]) + "\n")
    expected = json.loads(path.read_text())
    np.testing.assert_allclose(
        losses, expected, rtol=0, atol=2e-5,
        err_msg="training changed. If it was meant to, run UPDATE_GOLDEN=1 pytest tests/test_train.py and say why in the commit",
    )  # fmt: skip


def test_a_torn_last_row_and_rows_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert metrics.keep_rows(path, up_to=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert not metrics.keep_rows(path, up_to=3)
