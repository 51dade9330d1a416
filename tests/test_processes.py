"""Several processes find each other, train as one, write one of everything, and go on as more or fewer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import mesh_of, rows_of, run_command

from llmjax import storage
from llmjax.parallel import processes
from llmjax.train import folders
from llmjax.train.sync import Flags, Sync, _reduce

ROOT = Path(__file__).parent.parent
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
EXPLICIT = {"LLMJAX_COORDINATOR": "host:1", "LLMJAX_PROCESSES": "4", "LLMJAX_PROCESS": "2"}


# ---------------------------------------------------------------- finding the others


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (EXPLICIT, processes.Cluster("explicit", 4, 2, "host:1")),
        ({**EXPLICIT, "LLMJAX_LOCAL_PROCESSES": "4"}, processes.Cluster("explicit", 4, 2, "host:1", 4)),
        ({**EXPLICIT, "LLMJAX_PROCESSES": "1", "LLMJAX_PROCESS": "0"}, None),
        (
            {**EXPLICIT, **SLURM},
            processes.Cluster("explicit", 4, 2, "host:1"),
        ),  # what is said goes before what is found
        (SLURM, processes.Cluster("slurm", 16, 3)),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, processes.Cluster("slurm", 16, 3, local=8)),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # the batch script, outside of srun
        ({"LLMJAX_CLUSTER": "tpu"}, processes.Cluster("tpu")),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, processes.Cluster("tpu")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, processes.Cluster("tpu")),
        (
            {"LLMJAX_COORDINATOR": "a-0:1", "LLMJAX_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"},
            processes.Cluster("explicit", 4, 3, "a-0:1"),
        ),
    ],
)
def test_the_job_is_found_from_the_environment(env, expected):
    assert processes.detect(env) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"LLMJAX_PROCESSES": "4", "LLMJAX_PROCESS": "0"}, "LLMJAX_COORDINATOR is not set"),
        ({"LLMJAX_COORDINATOR": "a:1", "LLMJAX_PROCESSES": "4"}, "LLMJAX_PROCESS is not set"),
        ({**EXPLICIT, "LLMJAX_PROCESS": "4"}, "LLMJAX_PROCESS=4 must be from 0 to LLMJAX_PROCESSES - 1 = 3"),
        ({**EXPLICIT, "LLMJAX_PROCESSES": "four"}, "must be whole numbers"),
        ({"LLMJAX_CLUSTER": "gpu"}, "LLMJAX_CLUSTER='gpu' is not known: set it to tpu"),
    ],
)
def test_an_environment_that_cannot_be_is_refused_with_what_to_set(env, message):
    with pytest.raises(ValueError, match=message):
        processes.detect(env)


def test_alone_nothing_happens():
    assert processes.start(heartbeat_seconds=10, start_seconds=10) is None


@pytest.mark.parametrize(
    ("visible", "local", "found"),
    [
        ("0,1,2,3", 4, [2]),  # all of the job's GPUs on this node: the process's own one
        ("3", 4, [0]),  # its own alone, whatever its number
        ("0,1,2,3,4,5,6,7", 4, [4, 5]),  # two for each process
        ("", 4, None),
        ("0,1,2", 4, None),  # JAX's own rule, which then says what is missing
    ],
)
def test_a_process_of_slurm_takes_its_share_of_the_gpus_that_it_sees(visible, local, found):
    assert processes.own_gpus({"CUDA_VISIBLE_DEVICES": visible, "SLURM_LOCALID": "2"}, local=local) == found
    assert (processes.count(), processes.index(), processes.is_first(), processes.cpu_share()) == (1, 0, True, 0)
    assert processes.broadcast_from_first(lambda: {1: 2}) == {1: 2}
    assert processes.failures(None) == []
    assert processes.failures("no") == ["no"]
    processes.end(1)


def test_processes_on_one_machine_share_its_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for local, expected in ((1, cores), (cores, 1), (10 * cores, 1)):
        monkeypatch.setattr(processes, "_job", processes.Cluster("explicit", 20 * cores, 0, "a:1", local))
        assert processes.cpu_share() == expected


# ---------------------------------------------------------------- synchronising


def test_the_flags_of_one_process_hold_at_once():
    sync = Sync(mesh_of("data=4 fsdp=2"))
    flags = Flags(stop=True, seconds=0.5)
    assert sync.exchange(flags) == sync.wait(flags) == flags


def test_a_flag_of_one_process_holds_for_all_and_the_slowest_is_named(monkeypatch):
    table = np.array([[0, 0, 0.1], [1, 0, 0.3], [0, 0, 0.2], [0, 1, 0.1]], np.float32)
    np.testing.assert_allclose(jax.jit(_reduce)(table), [1, 1, 0.3, 1])
    # The protocol of several processes on the devices of one: every answer is a step late, and none is lost.
    sync = Sync(mesh_of("data=4"))
    monkeypatch.setattr(sync, "_alone", False)
    assert sync.exchange(Flags(stop=True)) == Flags()
    assert sync.exchange(Flags(save=True, seconds=1.5)).stop
    assert sync.exchange(Flags()) == Flags(save=True, seconds=1.5)
    assert sync.wait(Flags(stop=True)).stop


# ---------------------------------------------------------------- real processes


def launch(count, workdir, *settings, restarts=0, verb="train"):
    """Several processes over Gloo, each with one device: status and output."""
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
    command += ["--", verb, "--workdir", workdir, *settings]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout + done.stderr


LOSSES = ("loss", "heldout_loss")


def assert_same_losses(workdir, expected):
    mine, theirs = rows_of(workdir), rows_of(expected)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() & set(LOSSES) == b.keys() & set(LOSSES)
        for key in a.keys() & set(LOSSES):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), (key, a["step"])


@pytest.fixture(scope="module")
def one_process(prepared_run, tmp_path_factory):
    """The run of one process with two devices, to its end."""
    workdir = shutil.copytree(prepared_run, tmp_path_factory.mktemp("one") / "run")
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    status, output = run_command("train", "--workdir", workdir, XLA_FLAGS=flags)
    assert status == 0, output
    return workdir


def test_two_processes_train_as_one_does_with_two_devices_and_write_one_of_everything(one_process, tiny_run):
    status, output = launch(2, tiny_run)
    assert status == 0, output
    assert_same_losses(tiny_run, one_process)
    assert output.count("== train took") == 1
    log = (tiny_run / "processes" / "1.log").read_text()
    assert "Traceback" not in log + output
    assert folders.steps_in(tiny_run / "checkpoints") == [8, 4]
    params = tiny_run / "checkpoints" / "8" / "params"
    told = json.loads((params / "files.json").read_text())  # of the files of both, by the first
    sizes = {name: {"bytes": size} for name, size in storage.sizes(params).items() if name != "files.json"}
    assert told == sizes
    assert {name.partition("/")[0] for name in told} >= {"ocdbt.process_0", "ocdbt.process_1"}
    assert json.loads((tiny_run / "stages.json").read_text())["train"]["done"]
    results = json.loads((tiny_run / "train" / "results.json").read_text())
    assert results["loss"] == pytest.approx(
        json.loads((one_process / "train" / "results.json").read_text())["loss"], rel=1e-5
    )
    for row in rows_of(tiny_run):
        assert row["slowest_host"] in (0, 1)
        assert row["host_step_seconds_max"] >= 0
        assert 0 < row["goodput"] <= 1


@pytest.mark.slow  # test_launch.py holds what the launcher does, test_mesh.py what is refused
def test_a_mesh_that_the_devices_do_not_fill_is_refused_by_all_and_not_tried_again(tiny_run):
    status, output = launch(2, tiny_run, "--config.parallel.mesh=data=3", restarts=3)
    assert status == 2, output
    assert "parallel.mesh='data=3' asks for 3 devices and there are 2" in output
    assert "starting again" not in output


@pytest.mark.slow
def test_the_whole_recipe_runs_on_two_processes_and_a_model_divided_over_them_goes_on_in_one(
    tiny_sources, tmp_path, one_process
):
    from helpers import tiny_config

    from llmjax import config

    path = tmp_path / "config.json"
    path.write_text(config.to_json(tiny_config(tiny_sources)))
    settings = ("--config", path)
    status, output = launch(2, tmp_path / "run", *settings, "--config.parallel.mesh=tensor=2", verb="run")
    assert status == 0, output
    assert_same_losses(tmp_path / "run", one_process)
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["bits_per_byte"] > 0
    longer = ("--config.train.duration=12 steps",)
    shutil.copytree(one_process, tmp_path / "other")
    for workdir in (tmp_path / "run", tmp_path / "other"):
        stages = json.loads((workdir / "stages.json").read_text())
        del stages["train"]  # so that a longer training goes on instead of anew
        (workdir / "stages.json").write_text(json.dumps(stages))
        status, output = run_command("train", "--workdir", workdir, *longer, "--config.parallel.mesh=data=-1")
        assert status == 0, output
        assert "resuming from step 8 of 12" in output
    assert_same_losses(tmp_path / "run", tmp_path / "other")


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_put_aside_by_all(one_process, tiny_run):
    status, output = launch(2, tiny_run, "--config.parallel.mesh=fsdp=2")
    assert status == 0, output
    stages = json.loads((tiny_run / "stages.json").read_text())
    stages["train"]["done"] = False
    (tiny_run / "stages.json").write_text(json.dumps(stages))
    largest = max(
        (tiny_run / "checkpoints" / "8" / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    os.truncate(largest, largest.stat().st_size // 2)
    status, output = launch(2, tiny_run, "--config.parallel.mesh=fsdp=2")
    assert status == 0, output
    assert f"WARNING: the checkpoint {tiny_run}/checkpoints/8 cannot be read" in output
    assert "resuming from step 4 of 8" in output
    assert (tiny_run / "checkpoints" / "8.damaged").is_dir()
    assert_same_losses(tiny_run, one_process)


@pytest.mark.slow
def test_two_processes_distill_as_one_does_with_two_devices_and_do_not_write_texts(one_process, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "".join(
            json.dumps({"prompt": f"{a} + {b} =", "completion": f" {a + b}"}) + "\n" for a in range(6) for b in range(6)
        )
    )
    given = (
        "--config", ROOT / "configs" / "post" / "distill.py", f"--config.train.init_from={one_process}",
        f"--config.objective.distill.teacher={one_process / 'checkpoints' / '4'}", f"--config.data.sources=['{chats}']",
        "--config.objective.distill.top=8", "--config.train.batch_size=8", "--config.train.micro_batches=2",
        "--config.train.sequence_length=16", "--config.train.duration=4 steps", "--config.train.eval_every=2 steps",
        "--config.data.holdout_percent=30", "--config.data.pack=False", "--config.optimizer.learning_rate=1e-2",
    )  # fmt: skip
    status, output = launch(2, tmp_path / "refused", *given, "--config.eval.texts=('bleu',)", verb="distill")
    assert status == 2 and "the texts of eval.texts are written by one process" in output
    assert not (tmp_path / "refused" / "rows").exists()
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    status, output = run_command("distill", "--workdir", tmp_path / "one", *given, XLA_FLAGS=flags)
    assert status == 0, output
    status, output = launch(2, tmp_path / "two", *given, verb="distill")
    assert status == 0, output
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    assert all(row["divergence"] > 1e-4 for row in rows_of(tmp_path / "one"))
